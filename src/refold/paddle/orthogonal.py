"""Orthogonal weights for Paddle's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import paddle

from refold.paddle.attach import ComputedWeight, Start, as_numbers, attach
from refold.paddle.namespace import PADDLE
from refold.weights import Orthogonal, Rows


@final
class OrthogonalWeight(ComputedWeight):
    """A constant matrix with orthonormal rows that the stored weight, a free matrix, turns.

    ``weight_base`` ``(units, fan_in)`` is a buffer, ``weight_gain`` ``(1, 1)`` a parameter, both in float32 or
    wider.
    """

    def __init__(self, name: str, rows: Rows, method: Orthogonal, gain: bool, dtype: str) -> None:
        super().__init__(name, rows)
        self.method = method
        self.gain = gain
        self.dtype = dtype

    def starts(self, matrix: Any) -> Mapping[str, Start]:
        """The multiple of an orthogonal matrix that is nearest, and a direction that starts at it."""
        parts = self.method.attach(as_numbers(matrix))
        # Rounded as the direction is stored: where nothing has turned, nothing is to turn.
        base = paddle.to_tensor(parts.base).astype(self.dtype).astype(str(matrix.dtype).removeprefix("paddle."))
        starts = {"v": Start(base), "base": Start(base, trains=False)}
        return {**starts, "gain": Start(parts.gain)} if self.gain else starts

    def compose(self, layer: Any, matrix: Any) -> Any:
        """The base, turned."""
        return self.method.compose(PADDLE, matrix, self.part(layer, "base"), self.part(layer, "gain"))


def orthogonal_weights(
    layer: Any,
    name: str = "weight",
    map: str = "cayley",
    *,
    gain: bool = False,
    axis: int | Sequence[int] | None = None,
) -> Any:
    """Train the weight ``name`` of ``layer`` as a matrix with orthonormal rows; returns the layer.

    The weight is a matrix with one row per output unit (as in :func:`weight_normalization`). Its rows are
    orthonormal, or its columns where there are more units than inputs: a constant, ``weight_base``, turned by a
    rotation that the stored weight ``weight_v``, a free matrix, parameterizes. Formula and sources:
    :class:`refold.weights.Orthogonal`. The weight stays orthogonal to rounding however long it trains, and nothing
    is ever written into the stored one.

    Attaching keeps a weight whose singular values are all equal (with ``gain=False``: all 1), such as
    ``nn.initializer.Orthogonal`` gives, and replaces any other by the nearest. :func:`refold.fold` ships the value.

    Args:
        layer: a layer of Paddle, in place.
        name: of the parameter.
        map: ``"cayley"``, or ``"exponential"``, which takes longer.
        gain: whether to learn one number that multiplies the weight, and that starts as its mean singular value.
        axis: as for :func:`weight_normalization`.

    Of a convolution the matrix is ``(filters, channels * taps)``: the convolution as a map of images is not
    orthogonal then.

    Raises:
        ValueError: as for :func:`weight_normalization`, or there is no such map.
    """
    method = Orthogonal(map)
    dtype = str(getattr(layer._parameters.get(name), "dtype", "float32")).removeprefix("paddle.")
    attach(layer, name, axis, lambda name, rows: OrthogonalWeight(name, rows, method, gain, dtype))
    return layer
