"""Which axes of a stored Paddle weight number the output units: declared here once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paddle import nn

from refold.paddle.recurrent import RECURRENT
from refold.weights import Rows

# The axis of the output units, by kind of layer and by the names of its weights: of a recurrent layer a unit is one
# gate of one unit. Names that end in a layer's number, and a direction, are told by their start.
_UNIT_AXIS: dict[type, tuple[tuple[str, ...], int]] = {
    nn.Linear: (("weight",), 1),
    nn.Bilinear: (("weight",), 0),
    nn.Conv1D: (("weight",), 0),
    nn.Conv2D: (("weight",), 0),
    nn.Conv3D: (("weight",), 0),
    nn.Embedding: (("weight",), 0),
    nn.RNNCellBase: (("weight_ih", "weight_hh"), 0),
    RECURRENT: (("weight_ih_l", "weight_hh_l"), 0),
}
TRANSPOSED = (nn.Conv1DTranspose, nn.Conv2DTranspose, nn.Conv3DTranspose)


def rows_of(layer: Any, name: str, shape: tuple[int, ...], axis: int | Sequence[int] | None) -> Rows:
    """The weight ``name`` of ``layer``, viewed as ``rows.shape``, as a matrix with one row per output unit.

    Raises:
        ValueError: nothing tells its output units, or there is no such ``axis``.
    """
    if axis is not None:
        return Rows(shape, (axis,) if isinstance(axis, int) else tuple(axis))
    if isinstance(layer, TRANSPOSED) and name == "weight":
        # (in, out/groups, *taps): an output unit is one of a group, and sums over that group's inputs.
        groups = layer._groups
        return Rows((groups, shape[0] // groups, *shape[1:]), (0, 2))
    for kind, (names, unit_axis) in _UNIT_AXIS.items():
        if isinstance(layer, kind) and any(name == n or (n.endswith("_l") and name.startswith(n)) for n in names):
            return Rows(shape, (unit_axis,))
    raise ValueError(
        f"nothing tells which axes of '{name}' number the output units of the layer {type(layer).__name__}: "
        "pass axis"
    )
