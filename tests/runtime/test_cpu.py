"""The CPU adaptations: together they suffice, and each one is still needed."""

import importlib.util
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_megatron.runtime import cpu

NO_DRIVER = "NVIDIA driver|re-initialize CUDA"  # the second where the process is a fork

SYMPTOMS = {
    cpu.eager_instead_of_compiled: "inductor was asked to compile",
    cpu.current_device_is_cpu: NO_DRIVER,
    cpu.cuda_literals_mean_cpu: NO_DRIVER,
    cpu.streams_are_synchronous: "CUDA driver version|" + NO_DRIVER,
    cpu.rng_tracker_on_cpu: NO_DRIVER,
    cpu.mamba_kernels_in_torch: "MambaSSM is not installed",
    cpu.final_norm_in_torch: "Transformer Engine is not installed",
    cpu.split_sizes_as_numpy: "all_to_all_single",
    cpu.latent_projections_in_torch: "TransformerEngine is required for MoE latent projections",
    cpu.adam_with_group_step: "AssertionError",
}
SHOWN_OTHERWISE = (cpu.quiet_upstream, cpu.checkpoint_queue_by_fork)

Outcomes = dict[str, dict[str, Any]]


def test_every_adaptation_is_either_left_out_below_or_shown_otherwise() -> None:
    assert set(SYMPTOMS) | set(SHOWN_OTHERWISE) == set(cpu.ADAPTATIONS)


@pytest.mark.parametrize("adaptation", SYMPTOMS, ids=lambda a: a.__name__)
def test_leaving_one_out_shows_its_symptom(outcomes: Outcomes, adaptation: Any) -> None:
    outcome = outcomes[f"without_{adaptation.__name__}"]
    assert re.search(SYMPTOMS[adaptation], outcome.get("error", f"no error: {outcome}"))


def test_a_model_trains_saves_and_resumes_bit_for_bit(outcomes: Outcomes) -> None:
    value = outcomes["everything"]["value"]
    losses = value["losses"] + value["went_on"]
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert value["resumed"] == value["went_on"]


def test_upstream_noise_is_quiet_and_every_listed_message_exists(outcomes: Outcomes) -> None:
    seen = outcomes["without_quiet_upstream"]["value"]["seen"]
    only_when_compiled = "invalid escape sequence"
    for message in set(cpu.NOISE) - {only_when_compiled}:
        assert any(re.match(message, s) for s in seen), message
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0], "inference/contexts/kv_block_allocator.py")
    with pytest.warns(SyntaxWarning, match=only_when_compiled):
        compile(source.read_text(), str(source), "exec")
    assert set(cpu.NOISY_LOGGERS) <= set(seen)


def test_a_save_spawns_no_second_interpreter(outcomes: Outcomes) -> None:
    assert outcomes["everything"]["value"]["spawned"] is False
    assert outcomes["without_checkpoint_queue_by_fork"]["value"] is True


def test_recomputation_draws_the_same_dropout(outcomes: Outcomes) -> None:
    assert outcomes["recomputation_draws_the_same_dropout"]["value"] < 1e-6


def test_forked_generators_go_on_where_they_stopped_and_leave_the_outer_one_alone(outcomes: Outcomes) -> None:
    draws = outcomes["forked_generators"]["value"]
    assert draws["plain"] == draws["nested"]
    assert draws["plain"][:2] == draws["unforked"]
    assert len(set(draws["plain"])) == 5


def test_adapt_refuses_a_machine_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA"):
        cpu.adapt()


def test_adapting_twice_changes_nothing_more(outcomes: Outcomes) -> None:
    assert outcomes["adapt_twice"]["value"] == [a.__name__ for a in cpu.ADAPTATIONS]


def test_literals_mean_cpu_also_inside_backward(outcomes: Outcomes) -> None:
    assert outcomes["literals"]["value"] == ["cpu"] * 6 + ["torch.cuda.FloatTensor"]
