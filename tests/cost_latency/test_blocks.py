"""Quantisation blocks: refused are exactly those widths that tear one, on a rank or between submodels."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from layout_shapes import DENSE, NANO

from elastic_megatron.checkpoint.quantised_layers import block_weights
from elastic_megatron.checkpoint.quantised_plan import planned_by
from elastic_megatron.cost.block_rules import whole_blocks
from elastic_megatron.cost.remedy import problems_of, remedies
from elastic_megatron.cost.setting import Setting
from elastic_megatron.errors import UserError
from elastic_megatron.recipe.deploy import Quantize
from elastic_megatron.recipe.training import Parallel
from elastic_megatron.space import ElasticSpace

BLOCK = 16


def setting(shape=NANO, space=None, wanted=None, **layout) -> Setting:  # type: ignore[no-untyped-def]
    weights = block_weights(planned_by(wanted or Quantize(format="nvfp4"), shape), shape)
    return Setting.of(shape, space, Parallel(**layout), blocks=BLOCK, quantised=weights)


def torn(given: Setting) -> bool:
    """The slow truth: walk the columns that every submodel keeps of every weight, rank by rank."""
    space = given.space or ElasticSpace(given.shape, ())
    fields = {**given.shape.to_dict()}
    ranks = {"moe_ffn_hidden_size": given.parallel.expert_tensor or given.parallel.tensor}
    for tensor in given.quantised:
        axes = [f for s in tensor.dims[1] for f in s.factors if isinstance(f, str)]
        parts = 1 if axes == ["hidden_size"] else ranks.get(axes[0], given.parallel.tensor)
        total = tensor.shape(fields)[1]
        for axis in axes:
            for width in space.choices_of(axis) if axis in space.axes else (fields[axis],):
                kept = set(tensor.gather(1, fields, {axis: space.kept(axis, width)}) or range(total))
                for start in range(0, total, total // parts):
                    mine = [c for c in range(start, start + total // parts) if c in kept]
                    blocks = [mine[i : i + BLOCK] for i in range(0, len(mine), BLOCK)]
                    if any(
                        len(b) < BLOCK or b[-1] - b[0] != BLOCK - 1 or (b[0] - start) % BLOCK for b in blocks
                    ):
                        return True
    return False


@given(
    st.integers(1, 12), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.lists(st.integers(1, 12), max_size=2),
    st.sampled_from([8, 16, 24]),
)  # fmt: skip
def test_refused_are_exactly_the_widths_that_tear_a_block(
    full: int, lanes: int, tensor: int, smaller: list[int], grain: int
) -> None:
    shape = replace(
        DENSE, hybrid_layer_pattern="--", ffn_hidden_size=full * grain, hidden_size=64, vocab_size=1024
    )
    choices = [n * grain for n in smaller if n <= full]
    try:
        space = ElasticSpace.build(shape, {"ffn_hidden_size": choices}, {"ffn_hidden_size": lanes})
    except UserError:
        return
    tried = setting(shape, space, tensor=tensor)
    if lanes % tensor == 0:
        assert bool(list(whole_blocks(tried))) == torn(tried)


@given(st.integers(1, 8), st.sampled_from([8, 16, 48, 80]), st.sampled_from([1, 2, 4]), st.integers(1, 8))
def test_mamba_columns_are_heads_times_channels(
    per_group: int, head_dim: int, tensor: int, fewer: int
) -> None:
    shape = replace(DENSE, hybrid_layer_pattern="MM", mamba_num_heads=4 * per_group, mamba_head_dim=head_dim)
    space = ElasticSpace.build(shape, {"mamba_num_heads": [4 * min(fewer, per_group)]})
    tried = setting(shape, space, tensor=tensor)
    assert bool(list(whole_blocks(tried))) == torn(tried)


def test_elastic_head_sizes_are_whole_blocks_themselves() -> None:
    shape = replace(DENSE, hybrid_layer_pattern="MM", mamba_head_dim=32)
    space = ElasticSpace.build(shape, {"mamba_head_dim": [24, 32]})
    (problem,) = whole_blocks(setting(shape, space))
    assert "mamba_head_dim=24 leaves 24" in problem.text
    assert not list(whole_blocks(setting(shape, ElasticSpace.build(shape, {"mamba_head_dim": [16, 32]}))))


def test_nano_is_whole_at_the_layouts_that_are_known_to_work() -> None:
    """1856 / 4 = 464 is 29 blocks, 1856 / 8 = 232 is not whole."""
    for ranks, fits in ((1, True), (2, True), (4, True), (8, False)):
        assert (list(whole_blocks(setting(expert_tensor=ranks))) == []) is fits
    assert list(whole_blocks(replace(setting(expert_tensor=8), blocks=1))) == []


def test_unquantised_layers_have_no_blocks() -> None:
    """Attention, and Mamba layers in front of it, stay in BF16."""
    shape = replace(DENSE, hybrid_layer_pattern="M*M*", hidden_size=250, kv_channels=17, mamba_head_dim=17)
    assert list(whole_blocks(setting(shape))) == []
    assert list(whole_blocks(setting(replace(shape, hybrid_layer_pattern="*M")))) != []
    for wanted in ({"keep_feeding_mamba": False}, {"preset": "default"}):
        assert list(whole_blocks(setting(shape, wanted=Quantize(format="nvfp4", **wanted)))) != []


def test_only_weights_in_the_format_have_blocks() -> None:
    """A rank's 232 columns of an expert tear a block, unless every expert is left alone."""
    fc2 = "backbone.layers.*.mixer.experts.*.down_proj"
    for keep, fits in (((), False), ((fc2,), True), (("backbone.layers.1.*",), False)):
        tried = setting(wanted=Quantize(format="nvfp4", keep=keep), expert_tensor=8)
        assert (list(whole_blocks(tried)) == []) is fits
    assert block_weights(planned_by(Quantize(format="fp8"), NANO), NANO) == ()


def test_attention_heads_are_blocks_of_their_channels() -> None:
    shape = replace(
        DENSE, hybrid_layer_pattern="**", num_attention_heads=8, num_query_groups=2, kv_channels=8
    )
    space = ElasticSpace.build(shape, {"num_attention_heads": [4, 8]})
    whole = Quantize(format="nvfp4", preset="default")
    assert list(whole_blocks(setting(shape, space, whole))) == []
    torn = ElasticSpace.build(shape, {"num_attention_heads": [6, 8]})
    (problem,) = whole_blocks(setting(shape, torn, whole))
    assert "num_attention_heads=6 leaves 24 in each of 2 parts" in problem.text
    assert list(whole_blocks(setting(shape, torn))) == []


def test_widths_of_a_trained_family_are_not_moved() -> None:
    space = ElasticSpace.build(NANO, {"moe_ffn_hidden_size": [1000]}, {"moe_ffn_hidden_size": 2})
    tried = replace(setting(space=space, expert_tensor=2), frozen=True)
    (problem,) = problems_of(tried)
    assert remedies(tried, problem) == [{"quantize.format": "fp8"}]
    assert problem.otherwise == "train with such space.choices.moe_ffn_hidden_size"


def test_a_torn_width_moves_to_the_nearest_whole_one() -> None:
    space = ElasticSpace.build(NANO, {"moe_ffn_hidden_size": [1000, 1850]}, {"moe_ffn_hidden_size": 2})
    tried = setting(space=space, expert_tensor=2)
    (problem,) = problems_of(tried)
    choices = {"space.choices.moe_ffn_hidden_size": [992, 1856]}
    assert remedies(tried, problem) == [choices, {"quantize.format": "fp8"}]


def test_a_moved_width_keeps_to_the_granule() -> None:
    """1800 is 75 x 24; 1824 is the nearest multiple of 16 and of 24."""
    space = ElasticSpace.build(NANO, {"hidden_size": [1800]}, granule={"hidden_size": 24})
    tried = replace(setting(space=space), granule={"hidden_size": 24})
    (problem,) = problems_of(tried)
    assert remedies(tried, problem)[0] == {"space.choices.hidden_size": [1824, 2688]}
