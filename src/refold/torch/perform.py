"""Doing a recorded step again: on other tensors, at other sizes, or in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from refold.recording.sizes import Size
from refold.recording.symbols import Constant, Symbol, leaves, mapped
from refold.torch.trace import Step

Tensor = torch.Tensor

_TO_DOUBLE = {Tensor.float: Tensor.double, Tensor.half: Tensor.double, Tensor.bfloat16: Tensor.double}


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
    step would convert to another real type it converts to float64."""

    def leaf(entry: Any) -> Any:
        if isinstance(entry, Symbol):
            return tensor(entry)
        if isinstance(entry, Constant):
            return constant(entry)
        if isinstance(entry, torch.dtype) and double and entry.is_floating_point:
            return torch.float64
        return size(entry) if isinstance(entry, Size) else entry

    args, kwargs = mapped(leaf, (step.args, step.kwargs))
    function: Any = module or step.module if step.function is None else step.function
    if double:
        function = _TO_DOUBLE.get(function, function) if step.function is not None else function
    with torch.no_grad():
        result = function(*args, **kwargs)
    return [entry for entry in leaves(result) if isinstance(entry, Tensor)]


def in_double(constant: Constant, cache: dict[int, Any]) -> Any:
    """A constant in float64, computed in float64 from the parameters that it is a function of; ``cache`` keeps
    what was computed, by identity."""
    if id(constant) not in cache:
        if constant.origin is None:
            tensor = constant.tensor.detach()
            made = tensor.double() if tensor.is_floating_point() else tensor
        else:
            results = perform(
                constant.origin, _no_symbol, constant=lambda inner: in_double(inner, cache), double=True
            )
            made = results[constant.place]
            if made.is_floating_point() and made.dtype != torch.float64:
                made = made.double()
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
