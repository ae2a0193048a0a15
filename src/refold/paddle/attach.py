"""Weights of Paddle layers that are computed from others at each call.

Paddle has no parametrizations; a hook in front of the layer's forward makes the weight and gives it to the
layer, as Paddle's own ``weight_norm`` does. What is stored is a parameter under ``weight_v`` and parts under names
such as ``weight_g``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import paddle
from paddle import nn

from refold.paddle.namespace import PADDLE
from refold.paddle.places import beside
from refold.paddle.recurrent import RECURRENT, is_packed, packed_as
from refold.paddle.units import rows_of
from refold.weights import Rows, dtype_name, widen, working_dtype


@final
@dataclass(frozen=True)
class Start:
    """What a part is at first: an array, and whether it is a parameter or a buffer."""

    value: Any
    trains: bool = True


class ComputedWeight:
    """A hook in front of a layer's forward: it computes the weight ``name`` from what is stored.

    ``rows`` is how the weight, viewed as ``rows.shape``, is a matrix with one row per output unit. It makes a new
    tensor at each call and writes to no parameter. What somebody wrote into the tensor that it made
    (``layer.weight.set_value(...)``, an initializer) is stored at the next call, so that it is not lost: behind
    attaching and behind any call in eval mode; between two steps of training only what counts as a change of
    version in Paddle, because looking at the numbers takes time.
    """

    def __init__(self, name: str, rows: Rows) -> None:
        self.name = name
        self.rows = rows
        self.cell = ""  # of a recurrent layer: where the weight is used by steps, and among its packed weights
        self.slot = -1
        self.made: Any = None
        self.version = 0
        self.numbers: Any = None  # of what was made, where they are looked at

    def __getstate__(self) -> dict[str, Any]:
        # A copy knows nothing of what was made before it.
        return {**vars(self), "made": None, "numbers": None}

    # ---- what a subclass says --------------------------------------------------------------------

    def starts(self, matrix: Any) -> Mapping[str, Start]:
        """The parts, by the end of their names, that keep a matrix ``(units, fan_in)`` in float32 or wider, or as
        near as can be; ``v`` among them only if something else is stored than the matrix."""
        raise NotImplementedError

    def compose(self, layer: Any, matrix: Any) -> Any:
        """The effective matrix ``(units, fan_in)`` for the stored one."""
        raise NotImplementedError

    def advance(self, layer: Any) -> None:
        """Called before a call in training, for parts that such a call moves on."""

    # ---- computing -------------------------------------------------------------------------------

    def part(self, layer: Any, end: str) -> Any:
        """The part whose name ends like this, or None."""
        return getattr(layer, f"{self.name}_{end}", None)

    def column(self, layer: Any, end: str) -> Any:
        """The same as a matrix with one column, or None."""
        found = self.part(layer, end)
        return None if found is None else paddle.reshape(found, [-1, 1])

    def stored(self, layer: Any) -> Any:
        """The stored matrix ``(units, fan_in)``, in float32 or wider."""
        # Through a copy, or the gradient would be a transposed view, and paddle.DataParallel leaves such gradients
        # out of its sum (Paddle 3.3) without a word.
        return self.as_matrix(paddle.assign(self.part(layer, "v")))

    def as_matrix(self, weight: Any) -> Any:
        """A weight as a matrix ``(units, fan_in)``, in float32 or wider."""
        return self.rows.to_matrix(PADDLE, widen(PADDLE, paddle.reshape(weight, list(self.rows.shape))))

    def as_weight(self, matrix: Any, like: Any) -> Any:
        """The inverse, in the shape and type of ``like``."""
        weight = paddle.reshape(self.rows.from_matrix(PADDLE, matrix), like.shape)
        return paddle.cast(weight, dtype_name(like))

    def compute(self, layer: Any) -> Any:
        """The weight, in the shape and type in which it is stored."""
        return self.as_weight(self.compose(layer, self.stored(layer)), self.part(layer, "v"))

    def __call__(self, layer: Any, inputs: Any) -> None:
        """Before a forward: give the layer its weight."""
        if not paddle.in_dynamic_mode():
            # While Paddle translates the forward: what it sees there is worth nothing afterwards.
            self.give(layer, self.compute(layer))
            return
        if vars(layer).get(self.name) is self.made and self._is_written():
            self.store(layer, self.made.detach())
        if layer.training and not self.part(layer, "v").stop_gradient:
            with paddle.no_grad():
                self.advance(layer)
        self.renew(layer, watched=not layer.training)

    def renew(self, layer: Any, *, watched: bool = True) -> None:
        """Give the layer its weight; ``watched``: remember the numbers, to notice what is written into them."""
        self.made = self.compute(layer)
        self.version = self.made.inplace_version
        self.numbers = as_numbers(self.made).copy() if watched else None
        self.give(layer, self.made)

    def _is_written(self) -> bool:
        if self.made is None or self.made.inplace_version != self.version:
            return self.made is not None
        if self.numbers is None:
            return False
        return not np.array_equal(as_numbers(self.made), self.numbers, equal_nan=True)

    def after(self, layer: Any, inputs: Any, outputs: Any) -> None:
        """Behind a forward that Paddle translated: give the layer its tensor back."""
        if not paddle.in_dynamic_mode() and self.made is not None:
            self.give(layer, self.made)

    def give(self, layer: Any, weight: Any) -> None:
        """Put a weight where the layer's forward reads it."""
        object.__setattr__(layer, self.name, weight)
        if self.slot >= 0:
            layer._all_weights[self.slot] = weight
        if self.cell:
            path, _, own = self.cell.rpartition(".")
            for attribute in path.split("."):
                layer = getattr(layer, attribute)
            object.__setattr__(layer, own, weight)

    def store(self, layer: Any, weight: Any) -> None:
        """Make the layer store ``weight``, or the nearest that there is."""
        with paddle.no_grad():
            stored = self.part(layer, "v")
            starts = self.starts(self.as_matrix(weight))
            first = starts["v"].value if "v" in starts else self.as_matrix(weight)
            stored.set_value(self.as_weight(first, stored))
            for end, start in starts.items():
                if end != "v":
                    self.part(layer, end).set_value(start.value)


def attach(
    layer: Any, name: str, axis: int | Sequence[int] | None, make: Callable[[str, Rows], ComputedWeight]
) -> ComputedWeight:
    """Have the weight ``name`` of ``layer`` computed by what ``make`` gives for its name and rows.

    ``weight_v`` is the parameter that the weight was. A weight that several layers share stays shared if each is
    treated in the same way.

    Raises:
        ValueError: there is no such weight, it is computed already, or nothing tells its output units.
    """
    called = f"the layer {type(layer).__name__}"
    if any(getattr(hook, "name", None) == name for hook in layer._forward_pre_hooks.values()):
        raise ValueError(f"the parameter '{name}' of {called} is normalized already")
    weight = layer._parameters.get(name)
    if weight is None:
        raise ValueError(f"{called} has no parameter '{name}' of its own ({_instead(layer)})")
    if getattr(layer, "_sparse", False):
        raise ValueError(f"{called} makes sparse gradients, which a weight that is computed cannot take")
    hook = make(name, rows_of(layer, name, tuple(weight.shape), axis))
    _find_recurrent(hook, layer, weight)
    with paddle.no_grad(), beside([weight]):
        matrix = hook.as_matrix(weight)
        parts = _shared_parts(hook, weight, called) or _made_parts(hook, hook.starts(matrix), weight)
        if "v" in parts:
            weight.set_value(hook.as_weight(parts.pop("v"), weight))
    del layer._parameters[name]
    layer.add_parameter(f"{name}_v", weight)
    for end, part in parts.items():
        add = (
            layer.add_parameter if isinstance(part, paddle.base.framework.EagerParamBase) else layer.register_buffer
        )
        add(f"{name}_{end}", part)
    weight.refold_parts = repr(vars(hook)), parts
    layer.register_forward_pre_hook(hook)
    layer.register_forward_post_hook(hook.after)
    hook.renew(layer)
    return hook


def _instead(layer: Any) -> str:
    own = [key for key, value in layer._parameters.items() if value is not None]
    inner = [key for key, value in layer._sub_layers.items() if isinstance(value, nn.Linear)]
    if not own and inner:
        return f"its parameters are those of its layers: {', '.join(inner)}"
    return f"it has: {', '.join(own) or 'none'}"


def _made_parts(hook: ComputedWeight, starts: Mapping[str, Start], weight: Any) -> dict[str, Any]:
    wide = working_dtype(dtype_name(weight))
    parts: dict[str, Any] = {}
    for end, start in starts.items():
        known = isinstance(start.value, paddle.Tensor)
        value = (start.value if known else paddle.to_tensor(start.value)).astype(wide)
        if end == "v" or not start.trains:
            parts[end] = value
            continue
        made = paddle.create_parameter(value.shape, wide, default_initializer=nn.initializer.Constant(0.0))
        made.set_value(value)
        made.stop_gradient = weight.stop_gradient
        parts[end] = made
    return parts


def _shared_parts(hook: ComputedWeight, weight: Any, called: str) -> dict[str, Any] | None:
    """The parts that another layer has for this very parameter, if it does."""
    how, parts = getattr(weight, "refold_parts", (None, None))
    if how is not None and how != repr(vars(hook)):
        raise ValueError(f"the weight of {called} is shared with a layer where it is computed in another way")
    return None if parts is None else dict(parts)


def _find_recurrent(hook: ComputedWeight, layer: Any, weight: Any) -> None:
    """Where else a recurrent layer keeps a weight: in the list that its kernel takes, and in a cell."""
    if isinstance(layer, nn.RNNCellBase) and (packed := packed_as(weight)) is not None:
        kind, name = packed
        raise ValueError(
            f"the layer {type(layer).__name__} is a cell of a recurrent layer ({kind}) that does not call its "
            f"cells: normalize the weight '{name}' of that layer"
        )
    if not isinstance(layer, RECURRENT):
        return
    if not is_packed(layer):
        raise ValueError(
            f"the layer {type(layer).__name__} runs step by step (it has a projection, or a bias is left out): "
            "normalize the weights of its cells"
        )
    hook.slot = next(place for place, other in enumerate(layer._all_weights) if other is weight)
    for path, cell in layer.named_sublayers():
        for own, other in list(cell._parameters.items()):
            if other is weight:
                hook.cell = f"{path}.{own}"
                del cell._parameters[own]


def computed(model: Any) -> list[tuple[str, Any, ComputedWeight]]:
    """The computed weights of a model: the path of the layer, the layer, and the hook."""
    return [
        (path, layer, hook)
        for path, layer in model.named_sublayers(include_self=True)
        for hook in layer._forward_pre_hooks.values()
        if isinstance(hook, ComputedWeight)
    ]


def as_numbers(tensor: Any) -> Any:
    """The numbers of a tensor as an array, in float32 or wider."""
    return np.asarray(widen(PADDLE, tensor.detach()).numpy())
