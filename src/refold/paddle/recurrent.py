"""Where Paddle's recurrent layers keep their weights: under their own names, in cells, and packed for a kernel."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from paddle import nn

# What nn.SimpleRNN, nn.LSTM and nn.GRU have in common; it has no public name.
RECURRENT: Any = nn.LSTM.__bases__[0]
OWN = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def is_packed(layer: Any) -> bool:
    """Whether a layer is one of Paddle's recurrent ones that hands all its weights to one kernel."""
    return bool(getattr(layer, "could_use_cudnn", False)) and hasattr(layer, "_all_weights")


def packed_as(weight: Any) -> tuple[str, str] | None:
    """The kind of recurrent layer that hands the weight of a cell to its kernel, and the weight's name there.

    None for other weights. No weight or cell of Paddle knows who has it, so it is Python that is asked.
    """
    for holder in gc.get_referrers(weight):
        if not isinstance(holder, list):
            continue
        for owner in gc.get_referrers(holder):
            attributes = owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})
            if attributes.get("_all_weights") is holder:
                names = [name for name, known in attributes["_parameters"].items() if known is weight]
                return str(attributes["mode"]), names[0]
    return None


def cells(layer: Any) -> Iterator[tuple[str, Any]]:
    """The cells of a recurrent layer, with the end of the names of their weights: ``"_l0"``, ``"_l0_reverse"``."""
    for number, inner in enumerate(layer):
        if hasattr(inner, "cell"):
            yield f"_l{number}", inner.cell
        else:
            yield f"_l{number}", inner.cell_fw
            yield f"_l{number}_reverse", inner.cell_bw


def repack(layer: Any) -> None:
    """Put the parameters of a recurrent layer into its cells and its packed list, and into Paddle's order."""
    order = []
    for end, cell in cells(layer):
        for own in OWN:
            parameter = layer._parameters.get(own + end)
            if parameter is not None:
                vars(cell).pop(own, None)
                cell._parameters.pop(own, None)  # so that it comes behind those before it
                cell._parameters[own] = parameter
                order.append(own + end)
    rest = [name for name in layer._parameters if name not in order]
    layer._parameters = OrderedDict((name, layer._parameters[name]) for name in (*order, *rest))
    if is_packed(layer):
        layer.flatten_parameters()
