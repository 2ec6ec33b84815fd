"""Everything that Megatron-Core needs to accept a CPU as its device.

Each adaptation is one idempotent function, and its docstring names the symptom it cures.  They patch
module globals of this process only; where CUDA is available :func:`adapt` refuses to run.
"""

import contextlib
import functools
import logging
import multiprocessing
import warnings
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import Any

import torch

from elastic_megatron.runtime.launch import begin_fork
from elastic_megatron.runtime.standins import Event, Stream, cpu_rng_tracker, sharded_gated_norm

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "full", "full_like", "ones", "ones_like"),
    *("rand", "randint", "randn", "tensor", "zeros", "zeros_like"),
)
_installed: list[str] = []

NOISE = (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "full scope is deprecated",
    "MimoModelConfig is experimental",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "torch.distributed is disabled, unavailable or uninitialized",
    "The argument order of load has been changed",
    "Please use DTensor instead",
    "invalid escape sequence",
)
NOISY_LOGGERS = (
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.dist_checkpointing.strategies.torch",
    "torch.utils.cpp_extension",
)


def adapt() -> tuple[str, ...]:
    """Install every adaptation once and return their names, in order.

    Raises ``RuntimeError`` where CUDA is available: there Megatron runs as it is.
    """
    if torch.cuda.is_available():
        raise RuntimeError("CPU adaptations on a machine with CUDA: call runtime.start(), which chooses")
    for adaptation in ADAPTATIONS:
        if adaptation.__name__ not in _installed:
            adaptation()
            _installed.append(adaptation.__name__)
            logger.debug("CPU adaptation: %s", adaptation.__name__)
    return tuple(_installed)


def quiet_upstream() -> None:
    """Warnings on which a CPU user cannot act: missing Apex and Transformer Engine, deprecations between Megatron and
    torch.  Each one is listed in ``NOISE``; errors and everything else still show."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def eager_instead_of_compiled() -> None:
    """``megatron/core/jit.py`` compiles small functions: minutes of C++ for milliseconds of work."""
    torch.compiler.set_stance("force_eager")


def current_device_is_cpu() -> None:
    """``Found no NVIDIA driver``: ``torch.cuda.current_device()`` as ``device=`` in ``ssm/mamba_mixer.py``,
    ``tensor_parallel/mappings.py``, the MoE router, p2p and the gradient buffers."""
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]


def cuda_literals_mean_cpu() -> None:
    """``Found no NVIDIA driver``: ``device="cuda"`` and ``.cuda()`` in ``pipeline_parallel/schedules.py``,
    ``optimizer/clip_grads.py`` and ``dist_checkpointing/exchange_utils.py``, and parameter types compared with
    ``"torch.cuda.FloatTensor"`` in ``optimizer/``.

    The few functions concerned are wrapped, instead of a ``TorchFunctionMode`` over all of torch: other
    operations pay nothing, and the wrappers hold inside ``torch.autograd.backward``, where torch switches modes off.
    """
    for name in _FACTORIES:
        setattr(torch, name, _with_cpu_device(getattr(torch, name)))
    to, kind = torch.Tensor.to, torch.Tensor.type

    def tensor_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return to(self, *args, **kwargs)

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return kind(self, *args, **kwargs)
        return kind(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to = tensor_to  # type: ignore[method-assign,assignment]
    torch.Tensor.type = tensor_type  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def rng_tracker_on_cpu() -> None:
    """``cuda rng state model-parallel-rng is not added``: ``tensor_parallel/random.py`` forks CUDA generators.

    ``model_parallel_cuda_manual_seed`` keeps a tracker that is already there.  Activation recomputation saves
    "the CUDA state" next to the CPU one; here both are the CPU state.
    """
    from megatron.core.tensor_parallel import random as module

    module._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    module._CUDA_RNG_STATE_TRACKER = cpu_rng_tracker()
    module._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def streams_are_synchronous() -> None:
    """``CUDA driver version is insufficient``: streams and events in ``transformer/moe/token_dispatcher.py``,
    ``distributed/param_and_grad_buffer.py``, p2p communication, timers and ``filesystem_async.py``."""
    stream = Stream()
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = cuda.default_stream = lambda *_, **__: stream
    cuda.stream = lambda *_, **__: contextlib.nullcontext()
    cuda.synchronize = cuda.set_stream = lambda *_, **__: None
    cuda.is_current_stream_capturing = lambda: False


def mamba_kernels_in_torch() -> None:
    """``MambaSSM is not installed``: ``ssm/mamba_mixer.py`` imports Triton kernels and otherwise derives its
    gated norm from a mock object.  ``MambaMixer`` itself runs unmodified on :mod:`.ssd`, and without Megatron's own
    Triton kernels (``0 active drivers``) a decoding step takes the torch path that it has."""
    from megatron.core.ssm import mamba_mixer as module

    from elastic_megatron.runtime import ssd

    module.causal_conv1d_update = module.selective_state_update = None
    if module.HAVE_MAMBA_SSM:
        return
    module.ExtendedRMSNorm = sharded_gated_norm()
    module.mamba_chunk_scan_combined = ssd.mamba_chunk_scan_combined
    module.mamba_split_conv1d_scan_combined = ssd.mamba_split_conv1d_scan_combined
    module.HAVE_MAMBA_SSM = True


def final_norm_in_torch() -> None:
    """``Transformer Engine is not installed``: ``models/hybrid/hybrid_block.py`` builds ``TENorm`` for any spec."""
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.models.hybrid import hybrid_block as module

    from elastic_megatron.runtime.leaves import TorchRMSNorm

    if not HAVE_TE:
        module.TENorm = TorchRMSNorm


def split_sizes_as_numpy() -> None:
    """``all_to_all_single(): incompatible function arguments``: ``moe_utils.maybe_move_tensor_to_cpu`` makes numpy of
    split sizes only if they were on a GPU, and ``tensor_parallel/mappings.py`` then passes tensors."""
    from megatron.core.transformer.moe import token_dispatcher as module

    def convert(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    module.maybe_move_tensor_to_cpu = convert


def latent_projections_in_torch() -> None:
    """``TransformerEngine is required for MoE latent projections``: ``transformer/moe/moe_layer.py``."""
    from megatron.core.transformer.moe import moe_layer as module

    from elastic_megatron.runtime.leaves import DuplicatedLinear

    if not module.HAVE_TE:
        module.TELinear, module.HAVE_TE = DuplicatedLinear, True


def adam_with_group_step() -> None:
    """``assert len(steps) == 1`` when a distributed optimizer state is loaded: see :class:`.adam.GroupStepAdam`."""
    import megatron.core.optimizer as package
    from megatron.core.optimizer import distrib_optimizer as module

    from elastic_megatron.runtime.adam import GroupStepAdam

    if not module.HAVE_APEX_OR_TE:
        package.Adam = GroupStepAdam
        package.USING_PYTORCH_OPTIMIZER = False
        module.HAVE_APEX_OR_TE = module.USING_APEX_OPTIMIZER = True


def checkpoint_queue_by_fork() -> None:
    """``dist_checkpointing/strategies/filesystem_async.py`` starts the server of its result queue with ``spawn``: the
    first save imports torch and the main script again, 5 to 25 s.  A fork does not, and may be taken without CUDA."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async as module

    def queue(mp_mode: str = "fork") -> Any:
        if module._results_queue is None:
            manager = SyncManager(ctx=multiprocessing.get_context("fork"))
            manager.start(initializer=begin_fork)
            module._results_queue = manager.Queue()
        return module._results_queue

    module.get_write_results_queue = queue


ADAPTATIONS: tuple[Callable[[], None], ...] = (
    quiet_upstream,
    eager_instead_of_compiled,
    current_device_is_cpu,
    cuda_literals_mean_cpu,
    streams_are_synchronous,
    rng_tracker_on_cpu,
    mamba_kernels_in_torch,
    final_norm_in_torch,
    split_sizes_as_numpy,
    latent_projections_in_torch,
    adam_with_group_step,
    checkpoint_queue_by_fork,
)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _with_cpu_device(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return wrapper
