"""JSON objects in files, and what to say where there are none. No torch: a login node may ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError


def read_object(file: Path, missing: str, damaged: str = "copy it again") -> dict[str, Any]:
    """The object in a file.

    Args:
        missing, damaged: the remedies, for the message.

    Raises ``UserError`` where the file is missing or holds anything else.
    """
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {missing}") from None
    except OSError as e:
        raise UserError(f"{file} cannot be read ({e.strerror}); {missing}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{file} is no valid JSON ({e}); {damaged}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file} holds a {type(data).__name__}, not an object; {damaged}")
    return data
