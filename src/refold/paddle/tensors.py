"""The tensors of a layer: what it stores, and what it computes with."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from refold.algebra.affine import Array

Tensor = paddle.Tensor


def numbers(tensor: Any) -> Array:
    """The numbers of a tensor in float64, which holds every narrower type exactly."""
    return np.asarray(tensor.astype("float64").numpy())


def computed_weights(layer: Any) -> dict[str, tuple[str, ...]]:
    """The weights that a hook computes from parameters (``weight`` from ``weight_v`` and ``weight_g``), and the
    names of those."""
    tensors = [*layer._buffers, *(name for name, value in vars(layer).items() if isinstance(value, Tensor))]
    stored = [*layer._parameters, *layer._buffers]
    made = {name: tuple(own for own in stored if _is_part(own, name)) for name in tensors}
    hooked = bool(layer._forward_pre_hooks)
    return {name: sources for name, sources in made.items() if hooked and sources}


def _is_part(own: str, name: str) -> bool:
    """Whether ``own`` is a part of the weight ``name``, such as ``weight_v``, and not of the other direction's."""
    return own.startswith(f"{name}_") and not own.startswith(f"{name}_reverse")


def current_weights(layer: Any) -> dict[str, Any]:
    """The tensors that a layer computes with, by their names; not those of which a hook made others."""
    hidden = {name for sources in computed_weights(layer).values() for name in sources}
    found = {**layer._parameters, **layer._buffers}
    found.update({name: value for name, value in vars(layer).items() if isinstance(value, Tensor)})
    return {name: found[name] for name in sorted(found) if found[name] is not None and name not in hidden}


def stored(model: Any) -> list[Any]:
    """The parameters and buffers of a model, each once."""
    tensors = [*model.parameters(), *model.buffers()]
    return list({id(tensor): tensor for tensor in tensors if tensor._is_initialized()}.values())
