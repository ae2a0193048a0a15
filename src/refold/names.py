"""Names of parameters: which of others one is closest to."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """The first of ``names`` that shares most segments with ``name``, from the left."""
    segments = name.split(".")

    def shared(other: str) -> int:
        pairs = zip(segments, other.split("."), strict=False)
        return next((count for count, (one, two) in enumerate(pairs) if one != two), len(segments))

    return max(names, key=shared)
