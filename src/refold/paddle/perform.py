"""Doing recorded steps again, on other tensors and in another precision."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import paddle

from refold.paddle import patches
from refold.paddle.recurrent import is_packed, repack
from refold.paddle.tensors import computed_weights
from refold.paddle.trace import Origin, Step, dtype_name
from refold.recording.sizes import Size
from refold.recording.symbols import Constant, Symbol, leaves, mapped

Tensor = paddle.Tensor

# How far a constant that is computed again in float64 may be from what it was, relative to its largest number.
_SINGLE_ROUNDINGS = 1e-5

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_post_hooks",
    "_forward_pre_hooks_with_kwargs_flag",
    "_forward_post_hooks_with_kwargs_flag",
    "_forward_post_hooks_always_called",
)


def perform(
    step: Step,
    tensor: Callable[[Symbol], Any],
    *,
    constant: Callable[[Any], Any] = lambda tensor: tensor,
    size: Callable[[Size], int] = int,
    layer: Any = None,
) -> list[Any]:
    """The tensors that a step gives. ``tensor`` says what a symbol is now, ``constant`` what stands for a
    constant tensor, ``size`` what a size is; ``layer`` takes the place of the step's own."""

    def leaf(entry: Any) -> Any:
        if isinstance(entry, Symbol):
            return tensor(entry)
        if isinstance(entry, Constant):
            return constant(entry.tensor)
        return size(entry) if isinstance(entry, Size) else entry

    args, kwargs = mapped(leaf, (step.args, step.kwargs))
    operation = patches.resolved(step.function) if step.function else (layer or step.layer).forward
    with paddle.no_grad():
        result = operation(*args, **kwargs)
    return [entry for entry in leaves(result) if isinstance(entry, Tensor)]


def in_double(tensor: Any) -> Any:
    """A tensor of real numbers in float64, which holds every narrower type exactly; any other as it is."""
    return tensor.detach().astype("float64") if "float" in dtype_name(tensor) else tensor


def recomputed(tensor: Any, origins: Mapping[int, Origin]) -> Any:
    """A constant in float64, computed again from what is stored as the forward computed it, if that gives the same
    up to rounding."""
    origin = origins.get(id(tensor))
    if origin is None or dtype_name(tensor) != "float32":
        return in_double(tensor)

    def leaf(entry: Any) -> Any:
        if isinstance(entry, Tensor):
            return recomputed(entry, origins)
        return float(np.float32(entry)) if isinstance(entry, float) else entry  # as Paddle computes with it

    args, kwargs = mapped(leaf, (origin.args, origin.kwargs))
    known = in_double(tensor)
    try:
        with paddle.no_grad():
            made = [entry for entry in leaves(origin.function(*args, **kwargs)) if isinstance(entry, Tensor)]
        found = made[origin.place].astype("float64")
    except Exception:  # an operator without a float64 kernel, in whatever words of Paddle
        return known
    gap, size = (
        (float(abs(part).max()) for part in (found - known, known)) if found.shape == known.shape else (1, 0)
    )
    return found if gap <= _SINGLE_ROUNDINGS * size else known


def twin(layer: Any, computed: dict[str, Any], memo: dict[int, Any] | None = None) -> Any:
    """A copy of a layer without its own hooks, which were recorded as steps. Weights that a hook had computed,
    given in ``computed``, are plain parameters in the place of those from which they were computed."""
    memo = {} if memo is None else memo
    memo.update({id(getattr(layer, name)): OrderedDict() for name in _HOOKS if hasattr(layer, name)})
    memo.update({id(getattr(layer, name)): value.detach() for name, value in computed.items()})
    made = copy.deepcopy(layer, memo)
    for name, value in computed.items():
        sources = computed_weights(layer)[name]
        for own in (name, *sources):
            made._parameters.pop(own, None)
            made._buffers.pop(own, None)
            vars(made).pop(own, None)
        frozen = all(getattr(layer, own).stop_gradient for own in sources)
        # Through float64, which holds every type: of bfloat16 numpy has but the bits.
        made.add_parameter(name, parameter(value.astype("float64").numpy(), dtype_name(value), not frozen))
    if computed and is_packed(made):
        repack(made)
    return made


def parameter(array: Any, dtype: str, trainable: bool = True) -> Any:
    """A parameter that holds ``array``, rounded once to ``dtype``."""
    start = paddle.nn.initializer.Constant(0.0)
    made = paddle.create_parameter(list(np.shape(array)), dtype=dtype, default_initializer=start)
    made.set_value(rounded(array, dtype))
    made.stop_gradient = not trainable
    return made


def rounded(array: Any, dtype: str) -> Any:
    """``array`` as a tensor of type ``dtype``, each number rounded once."""
    if dtype == "bfloat16":
        return paddle.to_tensor(np.asarray(array, dtype=np.float64)).astype("bfloat16")
    return paddle.to_tensor(np.asarray(array).astype(dtype))
