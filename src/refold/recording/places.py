"""Where in a new model something is put."""

from __future__ import annotations

from collections.abc import Collection


def free(wanted: str, taken: Collection[str]) -> str:
    """A dotted path like ``wanted`` at which, and below and above which, nothing is ``taken`` yet."""
    path, count = wanted.replace("#", "_").replace(":", "_"), 1
    base = path
    while any(path == p or path.startswith(f"{p}.") or p.startswith(f"{path}.") for p in taken):
        count += 1
        path = f"{base}_{count}"
    return path
