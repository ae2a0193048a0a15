"""Weight normalization for Paddle's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import paddle
from paddle import nn

from refold.weights import Normalization, Rows, dtype_name, method, widen, working_dtype

# Which axes of a stored weight number the output units, by kind of layer.
UNIT_AXES: dict[type, tuple[int, ...]] = {
    nn.Linear: (1,),
    nn.Conv1D: (0,),
    nn.Conv2D: (0,),
    nn.Conv3D: (0,),
    nn.Conv1DTranspose: (1,),
    nn.Conv2DTranspose: (1,),
    nn.Conv3DTranspose: (1,),
    nn.Embedding: (0,),
}

_RECURRENT = (nn.RNN, nn.BiRNN, nn.SimpleRNN, nn.LSTM, nn.GRU, nn.RNNCellBase)


@final
class _Paddle:
    """Paddle's functions under the names and with the arguments that :mod:`refold.weights` uses."""

    abs = staticmethod(paddle.abs)
    clip = staticmethod(paddle.clip)
    floor = staticmethod(paddle.floor)
    log2 = staticmethod(paddle.log2)
    ones_like = staticmethod(paddle.ones_like)
    power = staticmethod(paddle.pow)
    reshape = staticmethod(paddle.reshape)
    sqrt = staticmethod(paddle.sqrt)
    transpose = staticmethod(paddle.transpose)
    where = staticmethod(paddle.where)
    zeros_like = staticmethod(paddle.zeros_like)

    def cast(self, x: Any, dtype: str) -> Any:
        """``x`` in another type."""
        return paddle.cast(x, dtype)

    def stop_gradient(self, x: Any) -> Any:
        """``x`` as a constant."""
        return x.detach()

    def max(self, x: Any, *, axis: int, keepdims: bool) -> Any:
        """The largest entry along an axis."""
        return paddle.max(x, axis=axis, keepdim=keepdims)

    def mean(self, x: Any, *, axis: int, keepdims: bool) -> Any:
        """The mean along an axis."""
        return paddle.mean(x, axis=axis, keepdim=keepdims)

    def sum(self, x: Any, *, axis: int, keepdims: bool) -> Any:
        """The sum along an axis."""
        return paddle.sum(x, axis=axis, keepdim=keepdims)


PADDLE: Any = _Paddle()


@final
class NormalizedWeight:
    """A hook in front of a layer's forward: the weight from its direction, gain and offset.

    It makes a new tensor at each call and writes to no parameter."""

    def __init__(self, name: str, rows: Rows, normalization: Normalization) -> None:
        self.name = name
        self.rows = rows
        self.normalization = normalization

    def compute(self, layer: Any) -> Any:
        """The weight, in the type in which its direction is stored."""
        # Through a copy, or the direction's gradient would be a transposed view, and paddle.DataParallel leaves
        # such gradients out of its sum (Paddle 3.3) without a word.
        direction = paddle.assign(getattr(layer, f"{self.name}_v"))
        matrix = self.rows.to_matrix(PADDLE, widen(PADDLE, direction))
        gain, offset = (getattr(layer, f"{self.name}_{part}", None) for part in ("g", "offset"))
        columns = [None if part is None else paddle.reshape(part, [-1, 1]) for part in (gain, offset)]
        weight = self.rows.from_matrix(PADDLE, self.normalization.compose(PADDLE, matrix, *columns))
        return paddle.cast(weight, dtype_name(direction))

    def __call__(self, layer: Any, inputs: Any) -> None:
        """Before a forward: give the layer its weight."""
        object.__setattr__(layer, self.name, self.compute(layer))


def weight_normalization(
    layer: Any,
    name: str = "weight",
    normalizer: str = "unit",
    *,
    epsilon: float | None = None,
    gain: bool = True,
    offset: bool | None = None,
    axis: int | Sequence[int] | None = None,
) -> Any:
    """Train the weight ``name`` of ``layer`` as a direction and a gain per output unit; returns the layer.

    The weight is seen as a matrix with one row per output unit: a column of a Linear's weight, a filter of a
    convolution (transposed ones too), a row of an Embedding. Its parameter becomes the direction,
    ``weight_v``; the gain is a new parameter ``weight_g`` of shape ``(units,)`` and, where the normalizer takes
    the row's mean out, there is an offset ``weight_offset``. They start such that nothing changes that the
    layer computes. :func:`refold.fold` makes plain weights of them again.

    Args:
        layer: a layer of Paddle, in place.
        name: of the parameter.
        normalizer: ``"unit"``, weight normalization (arXiv:1602.07868); ``"layer"``, weight standardization
            (arXiv:1903.10520); ``"rms"``: see :mod:`refold.weights`.
        epsilon: added to the size of each row, not under the root; by default the normalizer's own.
        gain: whether each unit has a learnable gain. Without it the rows keep the size that the normalizer
            gives them, which changes what the layer computes.
        offset: whether each unit has a learnable offset; by default where it is needed to change nothing.
        axis: the axes of the weight that number the output units, for other layers than those above.

    The norms are computed in float32 or wider and rounded once to the weight's type. A weight that is frozen
    (``stop_gradient``) stays so, gain and offset included.

    Raises:
        ValueError: the layer is recurrent, has no such parameter, is normalized already, or nothing tells its
            output units.
    """
    called = f"the layer {type(layer).__name__}"
    if isinstance(layer, _RECURRENT):
        raise ValueError(
            f"{called} is recurrent: its forward packs its weights elsewhere, so normalizing '{name}' would do "
            "nothing; normalize the layers around it"
        )
    if any(getattr(hook, "name", None) == name for hook in layer._forward_pre_hooks.values()):
        raise ValueError(f"the parameter '{name}' of {called} is normalized already")
    weight = layer._parameters.get(name)
    if weight is None:
        known = ", ".join(key for key, value in layer._parameters.items() if value is not None) or "none"
        raise ValueError(f"{called} has no parameter '{name}' of its own (it has: {known})")
    wide = working_dtype(dtype_name(weight))
    rows = Rows(tuple(weight.shape), _unit_axes(layer, name, axis))
    normalization = method(normalizer, epsilon)
    with paddle.no_grad():
        parts = normalization.decompose(PADDLE, rows.to_matrix(PADDLE, widen(PADDLE, weight)))
    use_offset = normalization.centered and gain if offset is None else offset
    del layer._parameters[name]
    layer.add_parameter(f"{name}_v", weight)
    for part, used, start in (("g", gain, parts.gain), ("offset", use_offset, parts.offset)):
        if used:
            values = paddle.zeros([rows.units]) if start is None else paddle.reshape(start, [-1])
            made = paddle.create_parameter(
                [rows.units], dtype=wide, default_initializer=nn.initializer.Constant(0.0)
            )
            made.set_value(values.astype(wide))
            made.stop_gradient = weight.stop_gradient
            layer.add_parameter(f"{name}_{part}", made)
    hook = NormalizedWeight(name, rows, normalization)
    layer.register_forward_pre_hook(hook)
    hook(layer, ())
    return layer


def _unit_axes(layer: Any, name: str, axis: int | Sequence[int] | None) -> tuple[int, ...]:
    if axis is not None:
        return (axis,) if isinstance(axis, int) else tuple(axis)
    found = next((axes for kind, axes in UNIT_AXES.items() if isinstance(layer, kind)), None)
    if found is None or name != "weight":
        raise ValueError(
            f"nothing tells which axes of '{name}' number the output units of the layer {type(layer).__name__}: "
            "pass axis"
        )
    if found == (1,) and getattr(layer, "_groups", 1) > 1:
        raise ValueError(
            f"no axes of the weight of a {type(layer).__name__} with groups number its output units: pass axis"
        )
    return found
