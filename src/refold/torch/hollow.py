"""Calls of which only the shape of the result is asked for.

Of two recordings the larger one need not compute what takes long: how a model goes its way must not depend on
numbers, and what was written down is checked on those of the smaller one. Here convolutions, products of matrices
and what works on each number for itself give zeros of the right shape. Everything else is computed, so that views
stay views, what is written in place stays written, and sizes that do not fit raise an error.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, final

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from refold.recording.symbols import leaves, mapped

Tensor = torch.Tensor

# Torch says itself, without numbers, what shape these give.
_SHAPED = frozenset(
    [
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
        F.linear,
        F.avg_pool2d,
        F.max_pool2d,
        torch.matmul,
        torch.bmm,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.bmm,
    ]
)

# Arithmetic of two tensors whose shapes are broadcast, or of a tensor and a number.
_PAIRED = frozenset(
    function
    for name in ("add", "sub", "mul")
    for function in (
        getattr(torch, name),
        getattr(Tensor, name),
        getattr(Tensor, f"__{name}__"),
        getattr(Tensor, f"__r{name}__"),
    )
)

# These give the shape that they are given, whatever it is, and may be told to write in place.
_ALIKE = frozenset(
    [
        F.elu,
        F.gelu,
        F.hardsigmoid,
        F.hardswish,
        F.hardtanh,
        F.leaky_relu,
        F.mish,
        F.relu,
        F.relu6,
        F.silu,
        F.softmax,
        torch.relu,
        torch.sigmoid,
        torch.softmax,
        torch.tanh,
        Tensor.relu,
        Tensor.sigmoid,
        Tensor.softmax,
        Tensor.tanh,
    ]
)


def call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``function`` gives, but for the numbers in it."""
    if _FITTING.get(function, _never)(args, kwargs) and _are_plain((args, kwargs)):
        if function in _SHAPED:
            shape, dtype = _shape_of(function, args, kwargs)
        elif function in _PAIRED:
            shape, dtype = _together([entry for entry in args if isinstance(entry, Tensor)])
        else:
            shape, dtype = args[0].shape, args[0].dtype
            if kwargs.get("inplace") or any(entry is True for entry in args[1:]):
                torch.autograd.graph.increment_version(args[0])
                return args[0]
        return _zeros(shape, dtype, next(leaf.device for leaf in args if isinstance(leaf, Tensor)))
    return function(*args, **kwargs)


@final
class Hollow(TorchFunctionMode):
    """Everything that is called meanwhile gives what :func:`call` does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


def _are_plain(nest: Any) -> bool:
    """Whether all tensors are of one type and lie in memory as most do, so that what is made of them does."""
    tensors = [leaf for leaf in leaves(nest) if isinstance(leaf, Tensor)]
    return len({tensor.dtype for tensor in tensors}) == 1 and all(
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and tensor.is_floating_point()
        and not torch.is_autocast_enabled(tensor.device.type)
        for tensor in tensors
    )


def _shape_of(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[int, ...], Any]:
    """The shape and the type of what a function gives. Raises what the function raises."""

    def empty(leaf: Any) -> Any:
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") if isinstance(leaf, Tensor) else leaf

    inner_args, inner_kwargs = mapped(empty, (args, kwargs))
    result = function(*inner_args, **inner_kwargs)
    return tuple(result.shape), result.dtype


def _together(tensors: list[Any]) -> tuple[tuple[int, ...], Any]:
    """The shape and the type of arithmetic with tensors. Raises ValueError."""
    return np.broadcast_shapes(*(tuple(tensor.shape) for tensor in tensors)), tensors[0].dtype


def _zeros(shape: tuple[int, ...], dtype: Any, device: Any) -> Any:
    """Zeros; on the CPU memory is given out when it is first written to, which mostly is never."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)


# ---- which calls it may be ---------------------------------------------------------------------------

Fits = Callable[[tuple[Any, ...], dict[str, Any]], bool]


def _never(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return False


def _is_on_a_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """The first argument in its place; no other type is asked for, nor a place for the result."""
    asked = any(isinstance(leaf, torch.dtype) for leaf in leaves((args, kwargs)))
    return bool(args) and isinstance(args[0], Tensor) and not asked and "out" not in kwargs


def _is_pair(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    tensors = [entry for entry in args if isinstance(entry, Tensor)]
    numbers = [entry for entry in args if type(entry) in (int, float)]
    return len(args) == 2 == len(tensors) + len(numbers) and not kwargs and all(t.ndim for t in tensors)


def _is_settled_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A batch norm that works with stored statistics, of as many channels as there are."""
    training = args[5] if len(args) > 5 else kwargs.get("training", False)
    mean = args[1] if len(args) > 1 else kwargs.get("running_mean")
    return (
        _is_on_a_tensor(args, kwargs)
        and not training
        and isinstance(mean, Tensor)
        and args[0].shape[1:2] == mean.shape
    )


_FITTING: dict[Any, Fits] = {
    **dict.fromkeys((*_SHAPED, *_ALIKE), _is_on_a_tensor),
    **dict.fromkeys(_PAIRED, _is_pair),
    F.batch_norm: _is_settled_norm,
}
