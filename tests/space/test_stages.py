"""Pipeline parts are consecutive, nearly equal, and short where the embedding and the head are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_megatron.space import stage_layers

CUTS = st.integers(1, 80).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(CUTS)
def test_parts_are_the_layers_in_order(cut: tuple[int, int]) -> None:
    layers, parts = cut
    ranges = stage_layers(layers, parts)
    assert len(ranges) == parts
    assert [layer for part in ranges for layer in part] == list(range(layers))


@given(CUTS)
def test_sizes_differ_by_at_most_one_and_grow_towards_the_middle(cut: tuple[int, int]) -> None:
    layers, parts = cut
    sizes = [len(part) for part in stage_layers(layers, parts)]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == min(sizes), "the head's part is one of the shortest"
    if sizes.count(min(sizes)) > 1:
        assert sizes[0] == min(sizes), "the embedding's is the next"
    peak = sizes.index(max(sizes))
    assert sizes == sorted(sizes[:peak]) + sorted(sizes[peak:], reverse=True)


@pytest.mark.parametrize(("layers", "parts"), [(5, 6), (5, 0), (1, 2), (3, -1)])
def test_every_part_needs_a_layer(layers: int, parts: int) -> None:
    with pytest.raises(ValueError, match=f"{layers} layers cannot be cut into {parts} parts"):
        stage_layers(layers, parts)
