"""Starting and stopping: groups, seeds, and no collisions."""

from typing import Any

import pytest
import torch

from elastic_megatron import runtime
from elastic_megatron.errors import UserError
from elastic_megatron.runtime import device

Outcomes = dict[str, dict[str, Any]]


def test_starting_twice_keeps_the_groups_and_seeds_again(outcomes: Outcomes) -> None:
    value = outcomes["start_twice"]["value"]
    assert value["same"] and value["equal"] and value["sum"] == 1
    assert value["drawn"] == value["redrawn"]


def test_other_sizes_make_other_groups(outcomes: Outcomes) -> None:
    tensor, pipeline, expert, context = outcomes["other_sizes"]["value"]
    assert tensor == [2, 1, 1, 1, 1]
    assert pipeline == [1, 2, 1, 1, 1]
    assert expert == [1, 1, 2, 1, 2]
    assert context == [1, 1, 1, 2, 1]


def test_every_group_waits_as_long_as_it_is_told(outcomes: Outcomes) -> None:
    assert outcomes["patience"]["value"] == [7, 7]


def test_batches_travel_to_a_gpu_while_the_host_goes_on() -> None:
    """From pinned memory, or a copy that need not block would block all the same; on a CPU nothing is copied."""
    found: list[Any] = []

    class Batch:
        def pin_memory(self) -> "Batch":
            found.append("pinned")
            return self

        def to(self, device: torch.device, **how: Any) -> "Batch":
            found.append((device.type, how))
            return self

    runtime.sent({"tokens": Batch()}, torch.device("cuda"))  # type: ignore[dict-item]
    assert found == ["pinned", ("cuda", {"non_blocking": True})]
    tokens = torch.ones(3)
    assert runtime.sent({"tokens": tokens}, torch.device("cpu"))["tokens"] is tokens


def test_two_runs_started_together_do_not_meet(outcomes: Outcomes) -> None:
    assert outcomes["two_runs_at_once"]["value"] == [1.0, 1.0]


def test_denormals_are_flushed_in_every_thread(outcomes: Outcomes) -> None:
    assert outcomes["denormals_left"]["value"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(tensor=2), "tensor 2 x pipeline 1 x context 1 = 2 does not divide the 1 started"),
        (dict(expert=4), "expert_tensor 1 x expert 4 x pipeline 1 = 4 does not divide the 1 started"),
        (dict(sequence=True), "sequence = true needs tensor > 1"),
        (dict(virtual_pipeline=2), "virtual_pipeline needs pipeline > 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match=message):
        runtime.start(**arguments)


def test_a_world_without_rendezvous_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="RANK, MASTER_ADDR, MASTER_PORT not set; launch with torchrun"):
        device._need_rendezvous()
