"""Which axes of a stored torch weight number the output units: declared here once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from refold.weights import Rows

# Modules whose weights have one row per output unit, by the names of the weights: of a recurrent layer a row is one
# gate of one unit, of attention an entry of one head. Names that end in a layer's number are told by their start.
_ROWS_FIRST: dict[type, tuple[str, ...]] = {
    nn.Linear: ("weight",),
    nn.Bilinear: ("weight",),
    nn.Conv1d: ("weight",),
    nn.Conv2d: ("weight",),
    nn.Conv3d: ("weight",),
    nn.Embedding: ("weight",),
    nn.EmbeddingBag: ("weight",),
    nn.RNNCellBase: ("weight_ih", "weight_hh"),
    nn.RNNBase: ("weight_ih_l", "weight_hh_l", "weight_hr_l"),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def rows_of(module: Any, name: str, shape: tuple[int, ...], axis: int | Sequence[int] | None) -> Rows:
    """The weight ``name`` of ``module`` as a matrix with one row per output unit.

    Raises:
        ValueError: nothing tells its output units, or there is no such ``axis``.
    """
    if axis is not None:
        return Rows(shape, (axis,) if isinstance(axis, int) else tuple(axis))
    if isinstance(module, TRANSPOSED) and name == "weight":
        # (in, out/groups, *taps): an output unit is one of a group, and sums over that group's inputs.
        groups = module.groups
        return Rows((groups, shape[0] // groups, *shape[1:]), (0, 2))
    for kind, names in _ROWS_FIRST.items():
        if isinstance(module, kind) and any(name == n or (n.endswith("_l") and name.startswith(n)) for n in names):
            return Rows(shape, (0,))
    raise ValueError(
        f"nothing tells which axes of '{name}' number the output units of the module {type(module).__name__}: "
        "pass axis"
    )
