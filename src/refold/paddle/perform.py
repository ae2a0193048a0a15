"""Doing recorded steps again, on other tensors and in another precision."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle

from refold.paddle import patches
from refold.paddle.trace import Step, computed_weights, dtype_name
from refold.recording.sizes import Size
from refold.recording.symbols import Constant, Symbol, leaves, mapped

Tensor = paddle.Tensor

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
