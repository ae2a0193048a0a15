"""Which of Paddle's functions are listened to while a model is recorded, and by what names.

Paddle's Python functions end in operators of ``paddle._C_ops``; arithmetic on tensors is implemented in the
Tensor class. Both are replaced, wherever a module or class holds them under whatever name, for as long as
a recording lasts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import paddle
from paddle import _C_ops, _legacy_C_ops

Tensor = paddle.Tensor

# Where public functions live, the preferred name first.
NAMESPACES = ("paddle", "paddle.nn.functional", "paddle.linalg", "paddle.vision.ops", "paddle._C_ops")

# Arithmetic in the Tensor class, and the operator of paddle._C_ops that does the same.
ARITHMETIC = {
    "__add__": "add",
    "__radd__": "add",
    "__sub__": "subtract",
    "__rsub__": "rsub",
    "__mul__": "multiply",
    "__rmul__": "multiply",
    "__div__": "divide",
    "__truediv__": "divide",
    "__rdiv__": "rdiv",
    "__rtruediv__": "rdiv",
    "__matmul__": "matmul",
    "__pow__": "pow",
    "__rpow__": "rpow",
    "__mod__": "remainder",
    "__floordiv__": "floor_divide",
    "__neg__": "neg",
    "__eq__": "equal",
    "__ne__": "not_equal",
    "__lt__": "less_than",
    "__le__": "less_equal",
    "__gt__": "greater_than",
    "__ge__": "greater_equal",
    "__getitem__": "getitem",
    "clone": "clone",
    "detach": "detach",
    "contiguous": "contiguous",
    "astype": "astype",
}

# What gives another object for the same tensor.
ALIASING = ("_use_gpudnn",)

# What would tell Python code the numbers in a tensor.
LOOKING = ("numpy", "item", "tolist", "__bool__", "__nonzero__", "__float__", "__int__", "__index__", "__array__")

# Writing into a piece of a tensor: ``x[i] = y``.
SET_ITEM = "paddle.Tensor.__setitem__"

# What else would write into a tensor without a result of its own.
WRITING = ("set_value", "copy_", "_setitem_dygraph", "share_data_with", "get_tensor")

# Public functions that are about tensors, not of them.
UNHEARD = frozenset({"is_tensor", "rank", "to_tensor", "save", "load", "grad", "set_printoptions", "is_empty"})


@cache
def functions() -> dict[int, tuple[str, Callable[..., Any]]]:
    """By identity, the name and the function of everything that is listened to."""
    found: dict[int, tuple[str, Callable[..., Any]]] = {}
    for namespace in NAMESPACES:
        module = sys.modules[namespace]
        names = getattr(module, "__all__", None) or dir(module)
        for name in names:
            function = getattr(module, name, None)
            if name.startswith("__") or name in UNHEARD:
                continue
            if isinstance(function, FunctionType | BuiltinFunctionType):
                found.setdefault(id(function), (f"{namespace}.{name}", function))
    for name in dir(_legacy_C_ops):
        function = getattr(_legacy_C_ops, name)
        if isinstance(function, BuiltinFunctionType) and not name.startswith("__"):
            # Paddle's older layers call their activations so; programs do not have these operators.
            public = f"{NAMESPACES[1]}.{name}" if name in paddle.nn.functional.__all__ else None
            found.setdefault(id(function), (public or f"paddle._legacy_C_ops.{name}", function))
    for name in paddle.tensor.tensor_method_func:
        function = getattr(Tensor, name, None)
        if isinstance(function, FunctionType) and name not in LOOKING + WRITING and not name.startswith("__"):
            found.setdefault(id(function), (f"paddle.Tensor.{name}", function))
    return found


def out_of_place(name: str) -> str | None:
    """The function that does the same as ``name`` and writes into no tensor; None if there is none."""
    if not name.endswith("_") or name.endswith("__"):
        return name
    owner, _, short = name.rpartition(".")
    return _places().get(f"{owner}.{short[:-1]}") or _places().get(f"paddle.{short[:-1]}")


@cache
def _places() -> dict[str, str]:
    return {name: name for name, _ in functions().values()}


def operator_name(function: Callable[..., Any]) -> str | None:
    """The name in ``paddle._C_ops`` of one of its operators; None for any other function."""
    return _operators().get(id(function))


@cache
def _operators() -> dict[int, str]:
    named = ((name, getattr(_C_ops, name)) for name in dir(_C_ops) if not name.startswith("__"))
    return {id(function): name for name, function in named if isinstance(function, BuiltinFunctionType)}


def positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of an operator with its operands by position, however they were given and in whatever order."""
    named = {_OPERANDS.get(name, name): value for name, value in kwargs.items()}
    for place, name in enumerate(("x", "y")):
        if len(args) == place and name in named:
            args = (*args, named.pop(name))
    return args, named


# Names that Paddle takes for operands beside its own.
_OPERANDS = {"input": "x", "other": "y"}


def _with_item(tensor: Any, index: Any, value: Any) -> Any:
    """A copy of ``tensor`` in which ``value`` stands at ``index``."""
    made = tensor.clone()
    made[index] = value
    return made


def resolved(name: str) -> Callable[..., Any]:
    """The function of a name that :func:`functions` gave, or of ``paddle.Tensor``'s arithmetic; for
    :data:`SET_ITEM` the one that gives what it writes."""
    if name == SET_ITEM:
        return _with_item
    owner, _, attribute = name.rpartition(".")
    holder: Any = Tensor if owner == "paddle.Tensor" else sys.modules[owner]
    function: Callable[..., Any] = getattr(holder, attribute)
    return function


@contextmanager
def replaced(replacements: dict[int, Any], on_tensor: dict[str, Any]) -> Iterator[None]:
    """Put ``replacements`` in the place of functions (by identity), in all modules and in the Tensor class,
    and ``on_tensor`` in the place of attributes of the Tensor class."""
    undo: list[tuple[Any, str, Any]] = []
    try:
        for holder in [*_modules(), Tensor]:
            # Few modules hold any, and most of the time of a recording goes here.
            if replacements.keys().isdisjoint(map(id, list(vars(holder).values()))):
                continue
            for name, value in list(vars(holder).items()):
                other = replacements.get(id(value))
                if other is not None:
                    undo.append((holder, name, value))
                    setattr(holder, name, other)
        for name, other in on_tensor.items():
            if name in vars(Tensor):
                undo.append((Tensor, name, vars(Tensor)[name]))
                setattr(Tensor, name, other)
        yield
    finally:
        for holder, name, value in reversed(undo):
            setattr(holder, name, value)


def _modules() -> list[ModuleType]:
    # A module need not be one: some packages put other objects into sys.modules.
    own = __name__
    return [m for name, m in list(sys.modules.items()) if type(m) is ModuleType and name != own]
