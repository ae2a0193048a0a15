"""Examples and arguments, as far as they are the same for every framework."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any


def is_shape(example: Any) -> bool:
    """Whether an example is a shape and not a nest of inputs."""
    return (
        isinstance(example, tuple | list)
        and len(example) > 0
        and all(size is None or (isinstance(size, int) and not isinstance(size, bool)) for size in example)
    )


def argument_names(model: Any, specs: Sequence[Any]) -> tuple[str, ...]:
    """The names of the forward's arguments that ``specs`` are for."""
    try:
        found = [
            parameter.name
            for parameter in inspect.signature(model.forward).parameters.values()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        found = []
    return tuple((*found, *(f"input{index}" for index in range(len(found), len(specs))))[: len(specs)])


def input_names(names: Sequence[str], specs: Sequence[Any]) -> Any:
    """The nest of the inputs' names."""

    def named(spec: Any, name: str) -> Any:
        if isinstance(spec, dict):
            return {key: named(value, f"{name}.{key}") for key, value in spec.items()}
        if isinstance(spec, list | tuple):
            return [named(entry, f"{name}{index}") for index, entry in enumerate(spec)]
        return name

    return tuple(named(spec, name) for name, spec in zip(names, specs, strict=True))
