"""Doing a recorded step again: on other tensors, at other sizes, or in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from refold.recording.sizes import Size
from refold.recording.symbols import Constant, Symbol, leaves, mapped
from refold.torch.trace import Step

Tensor = torch.Tensor

_WIDE = {"float": "double", "half": "double", "bfloat16": "double", "cfloat": "cdouble", "chalf": "cdouble"}
_TO_DOUBLE = {getattr(Tensor, name): getattr(Tensor, wide) for name, wide in _WIDE.items()}


def perform(
    step: Step,
    tensor: Callable[[Symbol], Any],
    *,
    constant: Callable[[Constant], Any] = lambda constant: constant.tensor,
    size: Callable[[Size], int] = int,
    module: Any = None,
    double: bool = False,
) -> list[Any]:
    """The tensors that a step gives. ``tensor`` says what a symbol is now, ``constant`` what stands for a
    constant, ``size`` what a size is; ``module`` takes the place of the step's own. With ``double``, what the
    step would convert to another real or complex type it converts to that of 64 bits."""

    def leaf(entry: Any) -> Any:
        if isinstance(entry, Symbol):
            return tensor(entry)
        if isinstance(entry, Constant):
            return constant(entry)
        if isinstance(entry, torch.dtype) and double:
            return _doubled(entry)
        return size(entry) if isinstance(entry, Size) else entry

    args, kwargs = mapped(leaf, (step.args, step.kwargs))
    function: Any = module or step.module if step.function is None else step.function
    if double:
        function = _TO_DOUBLE.get(function, function) if step.function is not None else function
    with torch.no_grad():
        result = function(*args, **kwargs)
    return [entry for entry in leaves(result) if isinstance(entry, Tensor)]


def doubled(tensor: Any) -> Any:
    """A tensor with 64 bits for each real number, and for each part of a complex one."""
    return tensor.to(_doubled(tensor.dtype))


def _doubled(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_floating_point:
        return torch.float64
    return torch.complex128 if dtype.is_complex else dtype


def in_double(constant: Constant, cache: dict[int, Any]) -> Any:
    """A constant in float64, computed in float64 from the parameters that it is a function of; ``cache`` keeps
    what was computed, by identity."""
    if id(constant) not in cache:
        if constant.origin is None:
            made = doubled(constant.tensor.detach())
        else:
            results = perform(
                constant.origin, _no_symbol, constant=lambda inner: in_double(inner, cache), double=True
            )
            made = doubled(results[constant.place])
        cache[id(constant)] = made
    return cache[id(constant)]


def sources(constant: Constant) -> list[Any]:
    """The tensors from which a constant is computed; its own if it is not computed."""
    found: dict[int, Any] = {}
    seen, waiting = {id(constant)}, [constant]
    while waiting:
        inner = waiting.pop()
        if inner.origin is None:
            found[id(inner.tensor)] = inner.tensor
            continue
        new = [argument for argument in reversed(inner.origin.constants) if id(argument) not in seen]
        seen.update(map(id, new))
        waiting += new
    return list(found.values())


def _no_symbol(symbol: Symbol) -> Any:
    raise AssertionError(f"a constant depends on {symbol.name}")
