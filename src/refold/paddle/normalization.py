"""Weight normalization for Paddle's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, final

import paddle
from paddle import nn

from refold.paddle.attach import ComputedWeight, Start, attach, computed
from refold.paddle.namespace import PADDLE
from refold.paddle.rows import compose, decompose
from refold.weights import MagnitudePreserving, Normalization, Rows, fit_rows, method


@final
class NormalizedWeight(ComputedWeight):
    """A weight from its direction ``weight_v``, and from a gain and an offset per output unit, ``weight_g`` and
    ``weight_offset``, of shape ``(units,)`` in float32 or wider."""

    def __init__(self, name: str, rows: Rows, normalizer: Any, *, gain: bool, offset: bool) -> None:
        super().__init__(name, rows)
        self.method = normalizer if isinstance(normalizer, Normalization) else None
        self.normalizer = None if self.method else normalizer
        self.gain = gain
        self.offset = offset

    def starts(self, matrix: Any) -> Mapping[str, Start]:
        """The gain and the offset, where there are any."""
        if self.method is not None:
            parts = decompose(self.method, self.rows, matrix)
        else:
            parts = fit_rows(PADDLE, self._applied(matrix), matrix, offset=self.offset)
        offset = paddle.zeros_like(parts.gain) if parts.offset is None else parts.offset
        chosen = {"g": (self.gain, parts.gain), "offset": (self.offset, offset)}
        return {end: Start(paddle.reshape(value, [-1])) for end, (used, value) in chosen.items() if used}

    def compute(self, layer: Any) -> Any:
        """The method's formula."""
        if self.method is None:
            return super().compute(layer)
        stored, gain, offset = (self.part(layer, end) for end in ("v", "g", "offset"))
        return compose(self.method, self.rows, stored, gain, offset)

    def compose(self, layer: Any, matrix: Any) -> Any:
        """The matrix through a layer that normalizes."""
        gain, offset = self.column(layer, "g"), self.column(layer, "offset")
        normalized = self._applied(matrix)
        normalized = normalized if gain is None else normalized * gain
        return normalized if offset is None else normalized + offset

    def force(self, layer: Any) -> None:
        """Store the rows that EDM2 forces, if that is the method."""
        if isinstance(self.method, MagnitudePreserving):
            with paddle.no_grad():
                stored = self.part(layer, "v")
                stored.set_value(self.as_weight(self.method.force(PADDLE, self.stored(layer)), stored))

    def _applied(self, matrix: Any) -> Any:
        assert self.normalizer is not None
        return self.normalizer(matrix)


def weight_normalization(
    layer: Any,
    name: str = "weight",
    normalizer: str | Normalization | Any = "unit",
    *,
    epsilon: float | None = None,
    gain: bool = True,
    offset: bool | None = None,
    axis: int | Sequence[int] | None = None,
) -> Any:
    """Train the weight ``name`` of ``layer`` as a direction and a gain per output unit; returns the layer.

    The weight is seen as a matrix with one row per output unit: a column of a Linear's weight, a filter of a
    convolution (of transposed and grouped ones too), a row of an Embedding, a gate of one unit of a recurrent cell
    or layer (``name="weight_hh_l0"`` of the layer: ``nn.LSTM`` does not call its cells); the projections of
    ``nn.MultiHeadAttention`` are Linear layers. Its parameter becomes the direction, ``weight_v``; the gain is a
    new parameter ``weight_g`` of shape ``(units,)`` and, where the normalizer takes the row's mean out, there is an
    offset ``weight_offset``. They start such that nothing changes that the layer computes. :func:`refold.fold`
    makes plain weights of them again.

    Args:
        layer: a layer of Paddle, in place.
        name: of the parameter.
        normalizer: ``"unit"``, weight normalization (arXiv:1602.07868); ``"layer"``, weight standardization
            (arXiv:1903.10520); or another name, or an object, of :mod:`refold.weights`; or a layer that is applied
            to the matrix, such as ``nn.LayerNorm(fan_in)``, which becomes a part of ``layer``.
        epsilon: added to the size of each row, not under the root; by default the normalizer's own.
        gain: whether each unit has a learnable gain. Without it the rows keep the size that the normalizer
            gives them, which changes what the layer computes.
        offset: whether each unit has a learnable offset; by default where it is needed to change nothing.
        axis: the axes of the weight that number the output units, for other layers than those above, or in their
            place; ``()`` for one norm over the whole weight.

    The norms are computed in float32 or wider and rounded once to the weight's type. A weight that is frozen
    (``stop_gradient``) stays so, gain and offset included. Attach before the optimizer is made: it has to see the
    new parameters.

    Raises:
        ValueError: the layer has no such parameter, it is normalized already, or nothing tells its output units.
    """
    chosen = method(normalizer, epsilon) if isinstance(normalizer, str) else normalizer
    centered = not isinstance(chosen, Normalization) or chosen.centered
    use_offset = centered and gain if offset is None else offset

    def make(name: str, rows: Rows) -> NormalizedWeight:
        if not isinstance(chosen, Normalization):
            _check_normalizer(chosen, epsilon, rows)
        return NormalizedWeight(name, rows, chosen, gain=gain, offset=use_offset)

    attach(layer, name, axis, make)
    if isinstance(chosen, nn.Layer):
        layer.add_sublayer(f"{name}_normalizer", chosen)
    return layer


def force_magnitudes(model: Any) -> None:
    """Set the stored rows of every weight that is normalized by ``"magnitude"`` to length sqrt(fan-in).

    To be called after each step of the optimizer, as EDM2 (arXiv 2312.02696) does before each: a forward never
    writes here. What the model computes stays the same, but for what epsilon is beside the old length.
    """
    for _, layer, hook in computed(model):
        if isinstance(hook, NormalizedWeight):
            hook.force(layer)


def _check_normalizer(normalizer: Any, epsilon: float | None, rows: Rows) -> None:
    called = f"the normalizer {type(normalizer).__name__}"
    if not isinstance(normalizer, nn.Layer):
        raise ValueError(f"{called} is neither the name of a method, nor a method of refold.weights, nor a layer")
    if epsilon is not None:
        raise ValueError(f"epsilon is for named normalizers: {called} has its own")
    if hasattr(normalizer, "_mean"):
        raise ValueError(f"{called} normalizes over the output units, not over the weights of each")
    shape = getattr(normalizer, "_normalized_shape", None)
    if shape is not None and prod(shape) != rows.fan_in:
        raise ValueError(f"{called} is for rows of {prod(shape)} weights; an output unit has {rows.fan_in}")
