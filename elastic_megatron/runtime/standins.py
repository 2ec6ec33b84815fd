"""What stands in for CUDA's objects on a CPU: streams, events, named generators, Mamba's sharded norm."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class Stream:
    """The one stream of a CPU: everything is done when the call returns."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> "Event":
        return Event()

    def query(self) -> bool:
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


class Event:
    """An event that has always happened already."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def cpu_rng_tracker() -> Any:
    """A ``CudaRNGStatesTracker`` whose named states are those of torch's CPU generator."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    class CpuRNGStatesTracker(CudaRNGStatesTracker):
        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"rng state {name!r} or seed {seed} exists already")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            if name not in self.states_:
                raise KeyError(f"rng state {name!r} is not added")
            outer, outer_name = torch.get_rng_state(), self._current_state_name
            if outer_name != "default-rng":
                self.states_[outer_name] = outer
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer if outer_name == "default-rng" else self.states_[outer_name])
                self._current_state_name = outer_name

    return CpuRNGStatesTracker()


def sharded_gated_norm() -> type:
    """The torch gated norm with the sharded state of ``mamba_mixer.ExtendedRMSNorm``: rows over tensor ranks."""
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    from elastic_megatron.runtime.ssd import RMSNormGated

    class ExtendedRMSNorm(RMSNormGated):
        tp_group: Any  # set by MambaMixer

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
        ) -> dict[str, Any]:
            state = self.state_dict(prefix="", keep_vars=True)
            return make_sharded_tensors_for_checkpoint(
                state,
                prefix,
                {"weight": 0},
                sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=(metadata or {})["dp_cp_group"],
            )

    return ExtendedRMSNorm
