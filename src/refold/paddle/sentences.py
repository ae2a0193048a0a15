"""What Paddle raises, as part of a sentence."""

from __future__ import annotations

import re
from textwrap import shorten

# How Paddle says that an operator does not exist for a type.
_NO_KERNEL = re.compile(r"kernel with key \((\w+), .*, (\w+)\) of kernel `(\w+)` is not registered")


def first_line(error: Exception) -> str:
    """The first line of an error that says something, for a sentence."""
    text = str(error)
    missing = _NO_KERNEL.search(text)
    if missing:
        place, dtype, operator = missing.groups()
        return f"Paddle has no {operator} in {dtype} on this {place}; fold the model in float32"
    lines = [line.strip() for line in text.splitlines()]
    telling = [line for line in lines if line and not line.startswith(("---", "C++", "Error Message", "["))]
    return shorten(telling[0] if telling else type(error).__name__, 240, placeholder=" ...").rstrip(".:")
