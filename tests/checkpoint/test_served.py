"""Evaluation of a quantised model is of what will be served: checkpoint, elastic directory and slices compute the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hf_models import same
from parity import distance, megatron_logits
from precision import keep_fp64
from quantised_checkpoints import Trained, train, whole_state
from quantised_dirs import SHAPE, bits, family
from safetensors.torch import save_file
from torch import Tensor, nn

from elastic_megatron import runtime
from elastic_megatron.blocks import build_elastic_model, build_model, running
from elastic_megatron.checkpoint.amax import FILE, amax_of, read_amax, write_amax
from elastic_megatron.checkpoint.served import check_blocks
from elastic_megatron.checkpoint.shards import by_name
from elastic_megatron.checkpoint.source import Source, open_source, open_stored
from elastic_megatron.conversion import Request, to_hf
from elastic_megatron.errors import UserError
from elastic_megatron.ops import SubmodelMix
from elastic_megatron.quantization import inputs
from elastic_megatron.quantization.formats import FORMATS, FP8, NVFP4, Format
from elastic_megatron.quantization.inputs import rounding
from elastic_megatron.quantization.packing import fake_quantise, rounded, scale_of

FAMILY = family()
SUBMODELS = ("whole", "middle", "smallest")
formats = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
TOKENS = torch.randint(0, SHAPE.vocab_size, (2, 21), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Served:
    trained: Trained
    root: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    """An fp32 checkpoint of each format, its elastic directory, and slices."""
    found = {}
    for form in FORMATS.values():
        root = tmp_path_factory.mktemp(form.name)
        trained = train(root / "run", form, dtype=torch.float32)
        slices = [Request(root / name, name) for name in SUBMODELS]
        to_hf(open_stored(root / "run"), [Request(root / "elastic", elastic=True), *slices])
        found[form.name] = Served(trained, root)
    return found


def filled(source: Source, dtype: torch.dtype, *, elastic: bool) -> nn.Module:
    assert FAMILY.space is not None
    model = (
        build_elastic_model(FAMILY.space, dtype=dtype)
        if elastic
        else build_model(source.manifest.shape, dtype=dtype)
    )
    source.fill([model])
    return model.eval()


def logits(path: Path, name: str, dtype: torch.dtype, *, rounds: bool = True) -> Tensor:
    """Of a submodel of a checkpoint or elastic directory by masks, and of a directory of its own without."""
    assert FAMILY.space is not None
    source = open_source(path)
    elastic = source.manifest.space is not None
    model = filled(source, dtype, elastic=elastic)
    with source.served([model]) if rounds else rounding(FP8, []):
        if not elastic:
            return megatron_logits(model, TOKENS)
        with running(model, SubmodelMix.one_hot(FAMILY.space, FAMILY.submodels[name], dtype=dtype)):
            return megatron_logits(model, TOKENS)


@formats
@pytest.mark.parametrize("name", SUBMODELS)
def test_masked_is_sliced_with_rounded_inputs(
    served: dict[str, Served], monkeypatch: pytest.MonkeyPatch, form: Format, name: str
) -> None:
    """In fp64, where nothing but rounding to the format makes a difference."""
    runtime.start(seed=1)
    keep_fp64(monkeypatch)
    root = served[form.name].root
    sliced = logits(root / name, name, torch.float64)
    for path in (root / "run", root / "elastic"):
        assert distance(logits(path, name, torch.float64), sliced) < 1e-12
    assert distance(logits(root / name, name, torch.float64, rounds=False), sliced) > 1e-3


@formats
@pytest.mark.parametrize("name", SUBMODELS)
def test_the_same_logits_from_all_files_within_fp32_rounding(
    served: dict[str, Served], form: Format, name: str
) -> None:
    """Checkpoint and directory do the same arithmetic. A slice sums in another order, which rounding to the format
    may turn into another code, so here its inputs are left alone."""
    runtime.start(seed=1)
    root = served[form.name].root
    both = [logits(root / p, name, torch.float32) for p in ("run", "elastic")]
    assert torch.equal(*both)
    masked, sliced = (logits(root / p, name, torch.float32, rounds=False) for p in ("run", name))
    assert distance(sliced, masked.double()) < 2e-6


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_filled_with_what_training_multiplied_with(
    tmp_path: Path, form: Format, dtype: torch.dtype
) -> None:
    """Rounded in the dtype of training, also into a model of another one; the parent of a run gets these numbers."""
    trained = train(tmp_path / "run", form, dtype=dtype, preset="default")
    to_hf(open_stored(tmp_path / "run"), [Request(tmp_path / "hf", elastic=True)])
    wanted = {
        name: fake_quantise(form, tensor, trained.amax[name].weight) if name in trained.amax else tensor
        for name, tensor in trained.state.items()
    }
    for path in (tmp_path / "run", tmp_path / "hf"):
        source = open_source(path)
        assert source.manifest.quantised is None
        own = whole_state(filled(source, dtype, elastic=True))
        assert bits(own) == bits({name: wanted[name] for name in own})
        wide = whole_state(filled(source, torch.float32, elastic=True))
        assert same(wide, {name: wanted[name].float() for name in wide})


@formats
def test_input_scales_of_checkpoint_and_directory_are_the_same(tmp_path: Path, form: Format) -> None:
    trained = train(tmp_path / "run", form, preset="default")
    to_hf(open_stored(tmp_path / "run"), [Request(tmp_path / "hf", elastic=True)])
    wanted = {name: scale_of(form, amax.input) for name, amax in trained.amax.items()}
    for path in (tmp_path / "run", tmp_path / "hf"):
        found = open_source(path).inputs
        assert found is not None and found.form is form and bits(found.scales) == bits(wanted)
    to_hf(trained.unquantised(), [Request(tmp_path / "plain")])
    assert open_source(tmp_path / "plain").inputs is None


class Seen(nn.Module):
    """Keeps what it is called with."""

    def forward(self, x: Tensor, bias: int) -> int:
        self.x = x
        return bias


@formats
def test_inputs_are_rounded_after_all_other_hooks_and_only_inside(form: Format) -> None:
    module, scale, x = Seen(), scale_of(form, torch.tensor(3.0)), torch.randn(5, 2, 32)
    module.register_forward_pre_hook(lambda _, args: (args[0] * 0.37, *args[1:]))
    with rounding(form, [(module, scale)]):
        assert module(x, 7) == 7
    assert torch.equal(module.x, rounded(form, x * 0.37, scale)) and not torch.equal(module.x, x * 0.37)
    assert torch.equal(module.x, fake_quantise(form, x * 0.37, torch.tensor(3.0)))
    with pytest.raises(ZeroDivisionError), rounding(form, [(module, scale)]):
        raise ZeroDivisionError
    module(x, 7)
    assert torch.equal(module.x, x * 0.37)
    with rounding(form, [(module, scale)]):
        module(x[:0], 7)  # an expert without a token
    assert module.x.shape == (0, 2, 32)


def test_a_linear_that_normalises_its_input_is_a_mistake() -> None:
    module = Seen()
    module.layer_norm_weight = torch.ones(3)
    with (
        pytest.raises(AssertionError, match="Seen normalises its input"),
        rounding(FP8, [(module, torch.ones(()))]),
    ):
        pass


def test_only_the_linears_that_are_quantised_round(
    served: dict[str, Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.start(seed=1)
    seen: list[nn.Module] = []
    monkeypatch.setattr(inputs, "rounded", lambda form, x, scale: x)
    source = open_source(served["nvfp4"].root / "run")
    model = filled(source, torch.float32, elastic=True)
    with source.served([model]):
        seen = [
            m
            for m in model.modules()
            if any(isinstance(h, inputs._Rounds) for h in m._forward_pre_hooks.values())
        ]
    names = {name for name, module in model.named_modules() if module in seen}
    assert names == {name.removesuffix(".weight") for name in served["nvfp4"].trained.amax}
    assert not any(
        "self_attention" in n or "router" in n or n == "decoder.layers.2.mixer.in_proj" for n in names
    )


@pytest.mark.parametrize(("ranks", "refused"), [(1, False), (3, False), (2, True)])
def test_ranks_may_not_share_the_columns_of_a_block(
    served: dict[str, Served], ranks: int, refused: bool
) -> None:
    """48 columns are three blocks; FP8 has none."""
    runtime.start(seed=1)
    model = filled(open_source(served["fp8"].root / "run"), torch.float32, elastic=True)
    whole = by_name([model], SHAPE)["decoder.layers.1.mlp.shared_experts.linear_fc2.weight"][0]
    shard = replace(whole, tensor=whole.tensor[:, : 48 // ranks], group=SimpleNamespace(size=lambda: ranks))
    check_blocks(FP8, shard)
    message = r"linear_fc2.weight has 24 columns on each of 2 tensor-parallel ranks, and NVFP4 columns share a scale"
    with pytest.raises(UserError, match=message) if refused else nullcontext():
        check_blocks(NVFP4, shard)


def _without(folder: Path) -> None:
    found = read_amax(folder)
    del found["decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"]
    write_amax(folder, found)


def _triples(folder: Path) -> None:
    save_file({"decoder.layers.0.mixer.in_proj.weight": torch.ones(3)}, folder / FILE)


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (
        lambda f: (f / FILE).unlink(),
        r"elastic.json says that the model is quantised, but .*amax.safetensors cannot be read \(No such",
    ),
    "cut short": (
        lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-3]),
        r"amax.safetensors is truncated",
    ),
    "no pairs": (
        _triples,
        r"amax.safetensors: 'decoder.layers.0.mixer.in_proj.weight' is no pair of fp32 numbers",
    ),
    "one less": (
        _without,
        r"name different weights \('decoder.layers.1.*experts.3.linear_fc1.weight' is in one, 1 in all",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_magnitudes_are_one_line(served: dict[str, Served], tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "iter_0000003"
    shutil.copytree(served["fp8"].trained.folder, folder)
    (folder / "integrity.json").unlink()
    assert amax_of(folder, served["fp8"].trained.manifest).keys() == served["fp8"].trained.amax.keys()
    change, message = DAMAGED[damage]
    change(folder)
    for read in (open_source, open_stored):
        with pytest.raises(UserError, match=message) as error:
            read(folder)
        assert "\n" not in str(error.value)
