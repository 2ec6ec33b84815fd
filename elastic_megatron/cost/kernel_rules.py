"""What kernels demand of sizes on a GPU, where torch on a CPU takes any.

- causal-conv1d, which mamba-ssm's scan hands channels-last tensors, takes a rank's convolution channels by eights and 2
  to 4 taps (its ``csrc/causal_conv1d.cpp``). They are x, dealt to tensor x context ranks by heads, and B and C, dealt
  by groups as long as there are any (``MambaContextParallel``).
- Under context parallelism attention is FlashAttention's or cuDNN's, which take head sizes by eights up to 256;
  otherwise Transformer Engine falls back on one that keeps all scores (its ``get_attention_backend``).
- DeepEP sends tokens in pieces of 16 bytes, 8 bf16 numbers (its ``csrc/deep_ep.cpp``).

The strides of what the convolution reads need not be told: mamba-ssm copies where they are no multiples of 8. GEMMs in
bf16 take any width; the blocks of NVFP4 are in ``block_rules``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from math import gcd, lcm

from .layout_rules import Problem, lower, near, other_widths, widths_of
from .setting import Change, Setting

CHANNELS = 8
_TAPS = range(2, 5)
_LARGEST_HEAD = 256
_SERVED = 16  # input columns of an NVFP4 block
_CONVOLVED = ("mamba_num_heads", "mamba_head_dim", "mamba_state_dim")


def kernel_rules(setting: Setting) -> Iterator[Problem]:
    """What kernels refuse, for every width of the family; nothing where no GPU is meant."""
    if setting.gpus:
        yield from _convolution(setting)
        yield from _attention(setting)
        yield from _dispatched(setting)


def slow_attention(setting: Setting) -> Iterator[Problem]:
    """Heads that only the attention takes which keeps all scores."""
    if setting.gpus and setting.parallel.context == 1 and _odd_heads(setting):
        text = f"{_heads(setting)}; Transformer Engine's own attention, which is left, keeps all scores of a sequence"
        yield Problem(text, (), "choose a parent with such heads")


def _convolution(setting: Setting) -> Iterator[Problem]:
    shape, parallel = setting.shape, setting.parallel
    if "M" not in shape.hybrid_layer_pattern:
        return
    if shape.conv_kernel not in _TAPS:
        text = f"conv_kernel={shape.conv_kernel}: causal-conv1d takes 2 to 4 taps"
        yield Problem(text, (), "choose a parent with such a convolution")
    ranks, heads = parallel.tensor * parallel.context, widths_of(setting, "mamba_num_heads")
    if shape.mamba_num_groups % parallel.tensor or any(n % ranks for n in heads):
        return  # refused in any case
    for sizes in product(*(widths_of(setting, axis) for axis in _CONVOLVED)):
        widths = dict(zip(_CONVOLVED, sizes, strict=True))
        if channels(setting, widths) % CHANNELS == 0:
            continue
        said = " x ".join(f"{axis}={width}" for axis, width in list(widths.items())[:2])
        text = (
            f"causal-conv1d takes channels by {CHANNELS}: {said} with mamba_state_dim={sizes[2]} make "
            f"{channels(setting, widths)} on a rank"
        )
        legal = [
            f"{a} {' or '.join(map(str, found))}" for a in _CONVOLVED if (found := _legal(setting, widths, a))
        ]
        text += f", {' or '.join(legal)} would do" if legal else ""
        fewer = (*lower(setting, "context"), *lower(setting, "tensor"))
        otherwise = "train with such space.choices" if setting.frozen and legal else ""
        yield Problem(text, (*_moved(setting), *fewer), otherwise)
        return


def channels(setting: Setting, widths: Mapping[str, int]) -> int:
    """Convolution channels of a rank under these widths of ``mamba_num_heads``, ``mamba_head_dim`` and
    ``mamba_state_dim``."""
    ranks = setting.parallel.tensor * setting.parallel.context
    inner = widths["mamba_num_heads"] // ranks * widths["mamba_head_dim"]
    return inner + 2 * _groups(setting) * widths["mamba_state_dim"]


def _groups(setting: Setting) -> int:
    return max(1, setting.shape.mamba_num_groups // (setting.parallel.tensor * setting.parallel.context))


def _legal(setting: Setting, widths: Mapping[str, int], axis: str) -> list[int]:
    """The nearest widths of an elastic axis below and above one, the others being as they are."""
    if setting.space is None or axis not in setting.space.axes:
        return []
    step = setting.granule.get(axis, 1)
    if axis == "mamba_num_heads":
        step = lcm(step, setting.shape.mamba_num_groups, setting.parallel.tensor * setting.parallel.context)
    most = setting.shape.size(axis)
    fit = [n for n in range(step, most + 1, step) if channels(setting, {**widths, axis: n}) % CHANNELS == 0]
    below, above = [n for n in fit if n < widths[axis]], [n for n in fit if n > widths[axis]]
    return below[-1:] + above[:1]


def _moved(setting: Setting) -> list[Change]:
    """Choices of one axis by which each part of the channels, x or B and C, is a multiple."""
    ranks = setting.parallel.tensor * setting.parallel.context
    heads, dims = (gcd(*widths_of(setting, axis)) for axis in _CONVOLVED[:2])
    steps = {
        "mamba_num_heads": lcm(setting.shape.mamba_num_groups, ranks * CHANNELS // gcd(CHANNELS, dims)),
        "mamba_head_dim": CHANNELS // gcd(CHANNELS, heads // ranks),
        "mamba_state_dim": CHANNELS // gcd(CHANNELS, 2 * _groups(setting)),
    }
    return [change for axis, step in steps.items() for change in other_widths(setting, axis, step)]


def _odd_heads(setting: Setting) -> bool:
    size = setting.shape.kv_channels
    return "*" in setting.shape.hybrid_layer_pattern and (size % 8 != 0 or size > _LARGEST_HEAD)


def _heads(setting: Setting) -> str:
    return (
        f"kv_channels={setting.shape.kv_channels}: FlashAttention and cuDNN take heads of a multiple of 8, at most "
        f"{_LARGEST_HEAD}"
    )


def _attention(setting: Setting) -> Iterator[Problem]:
    if setting.parallel.context > 1 and _odd_heads(setting):
        text = f"{_heads(setting)}, and context parallelism needs one of them"
        yield Problem(text, ({"parallel.context": 1},))


def _dispatched(setting: Setting) -> Iterator[Problem]:
    if setting.parallel.dispatcher != "flex" or "E" not in setting.shape.hybrid_layer_pattern:
        return
    if bad := [w for w in widths_of(setting, "hidden_size") if w % 8]:
        text = f"DeepEP sends tokens by 8 numbers: hidden_size={bad[0]} is no multiple"
        other: Change = {"parallel.dispatcher": "alltoall"}
        yield Problem(text, (*other_widths(setting, "hidden_size", 8), other))


def served_experts(setting: Setting, tensor: int) -> Iterator[str]:
    """A line for each expert width that engines cannot serve in NVFP4 on so many tensor ranks, with the nearest that
    they can.

    Each rank has whole blocks of 16 input columns or the engine refuses the model (vllm-project/vllm#49949).
    """
    axis = "moe_ffn_hidden_size"
    for width in widths_of(setting, axis) if "E" in setting.shape.hybrid_layer_pattern else ():
        if width % (_SERVED * tensor) == 0:
            continue
        step = lcm(_SERVED * tensor, setting.granule.get(axis, 1))
        ranks = f" on {tensor} tensor ranks, {width / tensor:g} each" if tensor > 1 else ""
        nearest = " or ".join(str(n) for n in sorted(near(width, step)[:2]))
        yield (
            f"{axis}={width} cannot be served in NVFP4{ranks}: engines take multiples of {_SERVED} a rank; "
            f"{nearest} can"
        )
