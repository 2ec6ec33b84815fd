"""What files state about models, held against what can be: kinds and sizes of numbers, names, orders.

JSON knows one kind of number and lets a switch pass for one; ``1e12`` layers would be counted for hours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError

MOST_LAYERS = 4096
MOST_EXPERTS = 1 << 17
"""Of all layers together: every one is a tensor or two."""

# far above any model that was built, and small enough to count and list
_MOST = {
    "hidden_size": 1 << 20,
    "vocab_size": 1 << 25,
    "ffn_hidden_size": 1 << 22,
    "moe_ffn_hidden_size": 1 << 22,
    "moe_shared_expert_intermediate_size": 1 << 22,
    "num_moe_experts": 1 << 16,
    "moe_router_topk": 1 << 16,
    "mamba_num_heads": 1 << 16,
    "mamba_head_dim": 1 << 16,
    "mamba_state_dim": 1 << 16,
    "mamba_num_groups": 1 << 16,
    "num_attention_heads": 1 << 16,
    "num_query_groups": 1 << 16,
    "kv_channels": 1 << 16,
    "conv_kernel": 1 << 10,
    "mamba_chunk_size": 1 << 20,
    "max_position_embeddings": 1 << 40,
}
_POSITIVE = ("moe_router_topk_scaling_factor", "layernorm_epsilon")
_SWITCHES = ("tie_embeddings",)


def check_sizes(sizes: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """Raise ``UserError`` unless every value is what a field of ``ParentShape`` of that name can be.

    Args:
        names: what the fields are called where they were read, if they are called something else.
    """
    for field, value in sizes.items():
        name = (names or {}).get(field, field)
        if field in _MOST:
            whole_number(value, name, 0, _MOST[field])
        elif field in _SWITCHES and not isinstance(value, bool):
            raise UserError(f"{name} is {shown(value)}; it must be true or false")
        elif field in _POSITIVE and not (_is_number(value) and 0 < value < 1e6):
            raise UserError(f"{name} is {shown(value)}; it must be a number above 0")


def check_pattern(pattern: Any, name: str) -> str:
    """The layers of a model, as text of possible length. Raises ``UserError``."""
    if not isinstance(pattern, str):
        raise UserError(f"{name} is {shown(pattern)}; it must be text, a symbol per layer")
    if len(pattern) > MOST_LAYERS:
        raise UserError(f"{name} has {len(pattern)} layers; {MOST_LAYERS} at most can be read")
    return pattern


def whole_number(value: Any, name: str, least: int, most: int) -> int:
    """The value, if it is a whole number (2.0 and true are none) in these bounds. Raises ``UserError``."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f"{name} is {shown(value)}; it must be a whole number from {least} to {most}")
    return value


def whole_numbers(values: Any, name: str, least: int, most: int) -> tuple[int, ...]:
    """The values of a list of such numbers. Raises ``UserError``."""
    return tuple(whole_number(value, name, least, most) for value in listed(values, name))


def listed(values: Any, name: str) -> Sequence[Any]:
    """A list that a file states. Raises ``UserError`` where it is none."""
    if not isinstance(values, list | tuple):
        raise UserError(f"{name} is {shown(values)}; it must be a list")
    return values


def section(values: Any, name: str) -> Mapping[str, Any]:
    """A mapping. Raises ``UserError``."""
    if not isinstance(values, Mapping):
        raise UserError(f"{name} is {shown(values)}; it must be an object of names and values")
    return values


# recipes are stricter; what is read here may have been named by anybody
_NAME = re.compile(r"[^\W_][^/\\]{0,99}")


def checked_name(name: Any, what: str) -> str:
    """A name that becomes part of a path. Raises ``UserError`` where it could lead elsewhere."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not name.isprintable():
        raise UserError(
            f"{shown(name)} is no name of a {what}: up to 100 characters without / and \\ are one, the first a letter "
            "or digit"
        )
    return name


def is_finite(value: Any) -> bool:
    """A number that is neither infinite nor NaN nor a switch."""
    return _is_number(value) and math.isfinite(value)


def shown(value: Any) -> str:
    """A value for a message, as JSON spells it more or less, cut where it is long."""
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    spelled = {None: "null", True: "true", False: "false"}
    text = spelled[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
