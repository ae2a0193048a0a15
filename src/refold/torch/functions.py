"""Torch's functions by what they do while a model is followed: which look at numbers, which write in place, and
which function says the same without writing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]

# What depends on the numbers in a tensor and is no tensor: whoever asks may then go another way.
LOOKING = frozenset(
    [
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__complex__",
        "__contains__",
        "__array__",
        "item",
        "tolist",
        "numpy",
        "is_nonzero",
        "equal",
        "allclose",
    ]
)

# Another handle on the same numbers, as far as inference is concerned.
ALIASING = frozenset(["detach", "data", "requires_grad_", "__deepcopy__"])

_IN_PLACE = {
    "__iadd__": "add",
    "__isub__": "sub",
    "__imul__": "mul",
    "__idiv__": "div",
    "__itruediv__": "div",
    "__ipow__": "pow",
}


def set_item(tensor: Any, index: Any, value: Any) -> Any:
    """``tensor`` with ``value`` written at ``index``, as a new tensor."""
    made = tensor.clone()
    made[index] = value
    return made


def short_name(function: Function) -> str:
    """The name of a function as people know it: ``"conv2d"``, also for ``aten.conv2d.default``."""
    return str(getattr(function, "__name__", type(function).__name__)).partition(".")[0].strip("_")


def method_name(function: Function) -> str | None:
    """The name under which a function is a method of tensors; None if it is none."""
    name = getattr(function, "__name__", "")
    names = (name, f"__{name}__", f"__r{name}__")  # an operator may be called as what it wraps
    return next((found for found in names if getattr(torch.Tensor, found, None) is function), None)


def is_method(function: Function) -> bool:
    """Whether a function is a method of tensors."""
    return method_name(function) is not None


def is_getter(function: Function) -> bool:
    """Whether a function reads an attribute of tensors."""
    return getattr(function, "__name__", "") == "__get__"


def out_of_place(function: Function) -> Function | None:
    """The function that gives what an in-place one writes; None if there is none."""
    name = getattr(function, "__name__", "")
    if name == "__setitem__":
        return set_item
    if isinstance(function, torch._ops.OpOverload):
        return _overload_out_of_place(function)
    pure = _IN_PLACE.get(name) or (name[:-1] if name.endswith("_") and not name.endswith("__") else None)
    if pure is None:
        return function if _inplace_parameter(function) is not None else None
    owner: Any = torch.Tensor if is_method(function) else torch.nn.functional
    found = getattr(owner, pure, None) or getattr(torch, pure, None)
    return found if callable(found) else None


def _overload_out_of_place(function: Any) -> Function | None:
    """``aten.relu.default`` for ``aten.relu_.default``."""
    name, _, overload = function.__name__.partition(".")
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if function.namespace == "aten" else None
    found: Function | None = getattr(packet, overload, None) if name.endswith("_") else None
    return found


def without_inplace(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments with ``inplace`` taken back, for functions that have it."""
    place = _inplace_parameter(function)
    if place is None:
        return args, kwargs
    if place < len(args):
        return (*args[:place], False, *args[place + 1 :]), kwargs
    return args, {name: value for name, value in kwargs.items() if name != "inplace"}


def _inplace_parameter(function: Function) -> int | None:
    if getattr(function, "__module__", None) != "torch.nn.functional":
        return None
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None
