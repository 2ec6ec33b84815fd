"""Numbers and names as a person says them; the page, the plots and the terminal all speak this way."""

import math
import re
from typing import Any, TypeGuard

AXIS_TITLES = {
    "hidden_size": "hidden size",
    "ffn_hidden_size": "FFN width",
    "moe_ffn_hidden_size": "expert width",
    "moe_shared_expert_intermediate_size": "shared expert width",
    "num_moe_experts": "experts",
    "mamba_num_heads": "Mamba heads",
    "mamba_head_dim": "Mamba head size",
    "mamba_state_dim": "Mamba state size",
    "num_attention_heads": "attention heads",
    "num_layers": "layers",
}
LAYER_NAMES = {"M": "Mamba", "E": "MoE", "*": "attention", "-": "FFN"}
_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def finite(value: Any) -> TypeGuard[float]:
    """True for a number that can be drawn; None, NaN and infinities cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def axis_title(axis: str) -> str:
    """Plain words for a Megatron config field name; unknown names only lose their underscores."""
    return AXIS_TITLES.get(axis, axis.replace("_", " "))


def count(value: float, digits: int = 3) -> str:
    """``1830000`` → ``1.83 M``; below a thousand, the number itself."""
    for unit, suffix in _SUFFIXES:
        if abs(value) >= unit:
            return f"{significant(value / unit, digits)} {suffix}"
    return significant(value, digits)


def significant(value: float, digits: int = 3) -> str:
    """``digits`` significant digits, never in exponent form between 1e-4 and 1e15."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or (float(value).is_integer() and abs(value) < 10**digits):
        return f"{value:.0f}"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}g}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(decimals, 0)}f}"


def trimmed(shown: str) -> str:
    """Without the zeros that end a decimal fraction: ``1.50 M`` → ``1.5 M``; for axis ticks."""
    return re.sub(r"(\.\d*?)0+(?!\d)", r"\1", shown).replace(". ", " ").removesuffix(".")


def size(n_bytes: float) -> str:
    """Decimal bytes: ``3660000`` → ``3.66 MB``."""
    for unit, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= unit:
            return f"{significant(n_bytes / unit)} {suffix}"
    return f"{n_bytes:.0f} B"


def loss(value: float) -> str:
    """A loss in nats: three decimals."""
    return f"{value:.3f}"


def percent(ratio: float, digits: int = 0) -> str:
    """A ratio as a percentage: ``0.416`` → ``42 %``."""
    return f"{100 * ratio:.{digits}f} %"


def change(ratio: float, digits: int = 2) -> str:
    """A relative change with its sign: ``0.0362`` → ``+3.62 %``."""
    return f"{100 * ratio:+.{digits}f} %".replace("-", "−")


def duration(seconds: float) -> str:
    """``75`` → ``1 min 15 s``; hours drop the seconds, and below ten seconds one decimal stays."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def width(chosen: int | list[int]) -> str:
    """One width, or ``smallest–largest`` where layers differ."""
    if isinstance(chosen, list):
        low, high = min(chosen), max(chosen)
        return str(low) if low == high else f"{low}–{high}"
    return str(chosen)


def mean_width(chosen: int | list[int]) -> float:
    """The width of an axis, the mean where layers differ."""
    return sum(chosen) / len(chosen) if isinstance(chosen, list) else float(chosen)
