"""JSON from files that somebody else may have written."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds. Raises ValueError for whatever cannot be read, depth included."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
