"""What stands in a recorded step for the tensors that it read, and nests of such things."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(eq=False)
class Symbol:
    """A tensor that depends on the inputs. ``shape`` is that of the recording, ``dtype`` such as
    ``"float32"``; ``dense`` says that its elements lie in memory in the order of its axes, as far as that is
    looked at."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    dense: bool = True


@final
@dataclass(eq=False)
class Constant:
    """A tensor that does not depend on the inputs: a parameter, a buffer, or computed from such. ``origin`` is
    the recorded operator that computed it, as its ``place``-th result, where that was recorded."""

    tensor: Any
    origin: Any = None
    place: int = 0


def mapped(function: Callable[[Any], Any], nest: Any) -> Any:
    """``nest`` (lists, tuples, dicts, slices) with ``function`` applied to every leaf."""
    if isinstance(nest, list):
        return [mapped(function, entry) for entry in nest]
    if isinstance(nest, tuple):
        entries = [mapped(function, entry) for entry in nest]
        return type(nest)(*entries) if hasattr(nest, "_fields") else tuple(entries)
    if isinstance(nest, dict):
        return {key: mapped(function, value) for key, value in nest.items()}
    if isinstance(nest, slice):
        return slice(*(mapped(function, part) for part in (nest.start, nest.stop, nest.step)))
    return function(nest)


def leaves(nest: Any) -> Iterator[Any]:
    """The leaves of a nest, in order."""
    found: list[Any] = []
    _collect(nest, found)
    return iter(found)


def _collect(nest: Any, found: list[Any]) -> None:
    """Append the leaves of a nest to ``found``."""
    if isinstance(nest, list | tuple):
        for entry in nest:
            _collect(entry, found)
    elif isinstance(nest, dict):
        for entry in nest.values():
            _collect(entry, found)
    elif isinstance(nest, slice):
        found += (nest.start, nest.stop, nest.step)
    else:
        found.append(nest)


def symbols(nest: Any) -> list[Symbol]:
    """The symbols in a nest, in order."""
    return [leaf for leaf in leaves(nest) if isinstance(leaf, Symbol)]
