"""The fact table says where every component lies: checked against a truth that labels every row."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_megatron.ops import gather_tensor
from elastic_megatron.space import BLOCKS, Segment, TensorLayout, ends

FIELDS = ("a", "b", "c")
LAYOUTS = [
    pytest.param(layout, id=f"{symbol} {layout.name}")
    for symbol, layouts in {**BLOCKS, "ends": ends(False)}.items()
    for layout in layouts
]


def labels(segments: tuple[Segment, ...], sizes: dict[str, int], parts: int) -> list[tuple]:
    """What each position of a dimension is: (part, segment, coordinates), in the order it is stored."""
    out = []
    for part in range(parts):
        for number, segment in enumerate(segments):
            extents = [f if isinstance(f, int) else sizes[f] for f in segment.factors]
            share = extents[0] // parts
            for first in range(part * share, (part + 1) * share):
                for rest in itertools.product(*map(range, extents[1:])):
                    out.append((part, number, (first, *rest)))
    return out


def slow_gather(
    segments: tuple[Segment, ...], sizes: dict[str, int], kept: dict[str, list[int]], parts: int
) -> list[int]:
    """Write down what every target position must hold, and look up where the source has it."""
    source = {label[1:]: position for position, label in enumerate(labels(segments, sizes, parts))}
    target_sizes = sizes | {f: len(k) for f, k in kept.items()}
    out = []
    for _, number, coordinates in labels(segments, target_sizes, parts):
        factors = segments[number].factors
        old = tuple(kept[f][i] if f in kept else i for f, i in zip(factors, coordinates, strict=True))
        out.append(source[number, old])
    return out


@st.composite
def dimensions(draw: Any) -> tuple[tuple[Segment, ...], dict[str, int], dict[str, list[int]], int]:
    """Segments whose first factors hold equal shares of every part, and components to take, permuted."""
    parts = draw(st.sampled_from([1, 1, 2, 3]))
    sizes = {
        "a": parts * draw(st.integers(1, 3)),
        "b": draw(st.integers(1, 3)),
        "c": parts * draw(st.integers(1, 2)),
    }
    segments = tuple(
        Segment(
            str(i),
            (draw(st.sampled_from(["a", "c"])), *draw(st.lists(st.sampled_from(["b", 2]), max_size=2))),
        )
        for i in range(draw(st.integers(1, 4)))
    )
    kept: dict[str, list[int]] = {}
    for field in draw(st.sets(st.sampled_from(FIELDS))):
        if field == "b":
            kept[field] = draw(st.permutations(range(sizes["b"])))[: draw(st.integers(1, sizes["b"]))]
            continue
        share = sizes[field] // parts
        left = draw(st.integers(1, share))
        kept[field] = [
            p * share + i for p in range(parts) for i in draw(st.permutations(range(share)))[:left]
        ]
    return segments, sizes, kept, parts


@given(dimensions())
def test_gather_takes_the_labelled_rows(case: Any) -> None:
    segments, sizes, kept, parts = case
    layout = TensorLayout("t", (segments,), None)
    found = layout.gather(0, sizes, kept, parts)
    if found is None:
        assert not {f for s in segments for f in s.factors} & set(kept)
    else:
        assert found == slow_gather(segments, sizes, kept, parts)


def test_the_interleaved_qkv_is_cut_by_its_groups() -> None:
    """[q q q k v] for each of two KV groups; the middle query of the first, the last of the second."""
    layout = next(t for t in BLOCKS["*"] if "linear_qkv" in t.name)
    sizes = {"num_attention_heads": 6, "num_query_groups": 2, "kv_channels": 2, "hidden_size": 1}
    assert layout.gather(0, sizes, {"num_attention_heads": [1, 5]}) == [
        2,
        3,
        6,
        7,
        8,
        9,
        14,
        15,
        16,
        17,
        18,
        19,
    ]


def test_in_proj_has_mamba_heads_in_three_of_its_five_segments() -> None:
    layout = next(t for t in BLOCKS["M"] if "in_proj" in t.name)
    sizes = {
        "mamba_num_heads": 2,
        "mamba_head_dim": 2,
        "mamba_num_groups": 1,
        "mamba_state_dim": 3,
        "hidden_size": 1,
    }
    assert layout.gather(0, sizes, {"mamba_num_heads": [1]}) == [2, 3, 6, 7, *range(8, 14), 15]
    assert layout.gather(0, sizes, {"mamba_state_dim": [2, 0]}) == [*range(8), 10, 8, 13, 11, 14, 15]
    assert layout.gather(1, sizes, {"mamba_num_heads": [1]}) is None


SIZES = {
    "hidden_size": 6,
    "vocab_size": 5,
    "ffn_hidden_size": 4,
    "moe_ffn_hidden_size": 5,
    "num_moe_experts": 4,
    "moe_shared_expert_intermediate_size": 3,
    "mamba_num_heads": 6,
    "mamba_head_dim": 3,
    "mamba_state_dim": 4,
    "mamba_num_groups": 2,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 3,
    "conv_kernel": 4,
}
GROUPS = {"mamba_num_heads": 2, "num_attention_heads": 2}
ELASTIC = sorted(
    set(SIZES) - {"vocab_size", "mamba_num_groups", "num_query_groups", "kv_channels", "conv_kernel"}
)


def inside_groups(field: str, rng: random.Random, left: int | None = None) -> list[int]:
    groups = GROUPS.get(field, 1)
    share = SIZES[field] // groups
    return [g * share + i for g in range(groups) for i in rng.sample(range(share), left or share)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_permutation_and_its_inverse_are_the_identity(layout: TensorLayout) -> None:
    rng = random.Random(0)
    tensor = torch.randn(layout.shape(SIZES))
    orders = {f: inside_groups(f, rng) for f in ELASTIC}
    inverse = {f: [order.index(i) for i in range(len(order))] for f, order in orders.items()}
    there = gather_tensor(tensor, layout, SIZES, orders)
    assert torch.equal(gather_tensor(there, layout, SIZES, inverse), tensor)
    assert torch.equal(there.flatten().sort().values, tensor.flatten().sort().values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_permuting_then_slicing_is_one_gather(layout: TensorLayout) -> None:
    rng = random.Random(1)
    tensor = torch.randn(layout.shape(SIZES))
    orders = {f: inside_groups(f, rng) for f in ELASTIC}
    kept = {f: inside_groups(f, rng, 1 if f in GROUPS else 2) for f in ELASTIC}
    twice = gather_tensor(gather_tensor(tensor, layout, SIZES, orders), layout, SIZES, kept)
    both = {f: [orders[f][i] for i in kept[f]] for f in ELASTIC}
    assert torch.equal(twice, gather_tensor(tensor, layout, SIZES, both))
    assert tuple(twice.shape) == layout.shape(SIZES | {f: len(k) for f, k in kept.items()})


def test_a_tensor_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        gather_tensor(torch.zeros(3, 3), BLOCKS["-"][1], SIZES, {})
