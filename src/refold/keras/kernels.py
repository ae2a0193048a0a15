"""Which kernels a Keras layer has, and which of their axes number its output units."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import keras

layers = keras.layers


@final
@dataclass(frozen=True, slots=True)
class KernelSpec:
    """A kernel of a layer: the path of attributes to it (``kernel``, ``cell.kernel``), the axes that number the
    output units, and what its parts are called.

    The variables and the normalizer that belong to it are the attributes ``prefix + "gain"``,
    ``prefix + "offset"`` and so on of the wrapper.
    """

    path: str
    unit_axes: tuple[int, ...]
    prefix: str = ""


_DENSE = (KernelSpec("kernel", (-1,)),)
_TRANSPOSED = (KernelSpec("kernel", (-2,)),)
_DEPTHWISE = (KernelSpec("kernel", (-2, -1)),)
_SEPARABLE = (
    KernelSpec("depthwise_kernel", (-2, -1), "depthwise_"),
    KernelSpec("pointwise_kernel", (-1,), "pointwise_"),
)
_EMBEDDING = (KernelSpec("embeddings", (0,)),)
# A column of either kernel of a recurrent cell belongs to one gate of one unit.
_CELL = (
    KernelSpec("cell.kernel", (-1,)),
    KernelSpec("cell.recurrent_kernel", (-1,), "recurrent_"),
)

# Which axes of a stored kernel number the output units, by kind of layer.
KERNELS: dict[type, tuple[KernelSpec, ...]] = {
    layers.Dense: _DENSE,
    layers.Conv1D: _DENSE,
    layers.Conv2D: _DENSE,
    layers.Conv3D: _DENSE,
    layers.Conv1DTranspose: _TRANSPOSED,
    layers.Conv2DTranspose: _TRANSPOSED,
    layers.Conv3DTranspose: _TRANSPOSED,
    layers.DepthwiseConv1D: _DEPTHWISE,
    layers.DepthwiseConv2D: _DEPTHWISE,
    layers.SeparableConv1D: _SEPARABLE,
    layers.SeparableConv2D: _SEPARABLE,
    layers.Embedding: _EMBEDDING,
}

# Cells that are known to have a kernel for the input and one for the state.
_CELLS = (layers.SimpleRNNCell, layers.GRUCell, layers.LSTMCell)
_RECURRENT = (layers.SimpleRNN, layers.GRU, layers.LSTM, layers.RNN)
# What a cell alone would need (states in and out) is not what a wrapper passes on.
_REFUSED = (layers.RNN, *_CELLS, layers.StackedRNNCells)

ATTENTION = (layers.MultiHeadAttention, layers.GroupQueryAttention)


def called(layer: Any) -> str:
    """How messages call a layer: its name and its class."""
    return f"{layer.name!r} ({type(layer).__name__})"


def kernel_specs(layer: Any, axis: int | Sequence[int] | None) -> tuple[KernelSpec, ...]:
    """The kernels of a layer that is to be trained through other parameters.

    Raises:
        ValueError: it has none, or nothing tells which of their axes number the output units.
    """
    specs = (
        _recurrent_specs(layer)
        or _attention_specs(layer)
        or next((s for kind, s in KERNELS.items() if isinstance(layer, kind)), ())
    )
    if not specs and (isinstance(layer, _REFUSED) or hasattr(layer, "recurrent_kernel")):
        raise ValueError(
            f"the layer {called(layer)} is a recurrent cell, or a recurrent layer with cells of another kind than "
            "SimpleRNNCell, GRUCell and LSTMCell, whose kernels are not known."
        )
    if isinstance(layer, layers.EinsumDense):
        specs = (KernelSpec("kernel", _einsum_axes(layer.equation)),)
        if not specs[0].unit_axes and axis is None:
            raise ValueError(
                f"the output of the layer {called(layer)} has no axis of its kernel, "
                f"so {layer.equation!r} does not tell its output units."
            )
    if axis is not None:
        if len(specs) > 1:
            raise ValueError(f"the layer {called(layer)} has several kernels, for which one axis cannot be given.")
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        return (KernelSpec(specs[0].path if specs else "kernel", axes),)
    if specs:
        return specs
    if type(layer).__module__.startswith("keras.") or (layer.built and not hasattr(layer, "kernel")):
        raise ValueError(f"the layer {called(layer)} has no kernel of its own that could be normalized.")
    raise ValueError(
        f"nothing tells which axes of the kernel of the layer {called(layer)} number its output units: pass axis."
    )


def specs_of_class(kind: type, config: Mapping[str, Any]) -> tuple[KernelSpec, ...]:
    """The kernels of a layer that is only described, by class and configuration; none where these do not say."""
    if issubclass(kind, layers.EinsumDense):
        equation = config.get("equation")
        axes = _einsum_axes(equation) if isinstance(equation, str) and _EQUATION.fullmatch(equation) else ()
        return (KernelSpec("kernel", axes),) if axes else ()
    if kind in (layers.SimpleRNN, layers.GRU, layers.LSTM):
        return _CELL
    if kind is layers.RNN:
        return _CELL if _described(config.get("cell"))[0] in _CELLS else ()
    if kind is layers.Bidirectional:
        (forward, own), (backward, other) = map(_described, (config.get("layer"), config.get("backward_layer")))
        if forward not in _RECURRENT or backward not in (*_RECURRENT, None):
            return ()
        there = specs_of_class(forward, own)
        return _both_directions(there, there if backward is None else specs_of_class(backward, other))
    if kind in ATTENTION:
        shape = config.get("output_shape")
        outputs = len(shape) if isinstance(shape, list | tuple) else 1
        return _projections(bool(config.get("use_gate")), outputs)
    return next((specs for known, specs in KERNELS.items() if issubclass(kind, known)), ())


def _described(entry: Any) -> tuple[Any, Mapping[str, Any]]:
    """The kind of layer of Keras that is described inside of another one, or None, and its configuration."""
    if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
        return None, {}
    if not str(entry.get("module")).startswith("keras."):
        return None, {}
    return getattr(layers, str(entry.get("class_name")), None), entry["config"]


# Two operands, the second the kernel.
_EQUATION = re.compile(r"[A-Za-z. ]+,[A-Za-z ]+->[A-Za-z. ]+")


def _einsum_axes(equation: str) -> tuple[int, ...]:
    """The axes of an EinsumDense kernel that its output has too: they tell its output units apart."""
    operands, output = equation.replace(" ", "").replace("...", "").split("->")
    kernel = operands.split(",")[1]
    return tuple(axis for axis, label in enumerate(kernel) if label in output)


def _recurrent_specs(layer: Any) -> tuple[KernelSpec, ...]:
    """Both kernels of a recurrent layer's cell, in both directions; none for other layers."""
    if isinstance(layer, layers.Bidirectional):
        return _both_directions(_recurrent_specs(layer.forward_layer), _recurrent_specs(layer.backward_layer))
    if isinstance(layer, layers.RNN) and isinstance(layer.cell, _CELLS):
        return _CELL
    return ()


def _both_directions(forward: Sequence[KernelSpec], backward: Sequence[KernelSpec]) -> tuple[KernelSpec, ...]:
    return tuple(
        KernelSpec(f"{word}_layer.{spec.path}", spec.unit_axes, f"{word}_{spec.prefix}")
        for word, specs in (("forward", forward), ("backward", backward))
        for spec in specs
    )


def _attention_specs(layer: Any) -> tuple[KernelSpec, ...]:
    """The projections of an attention layer; none for other layers.

    They map the features to one number per head and entry, kernel ``(features, heads, size)``, and back, kernel
    ``(heads, size, *outputs)``.
    """
    if not isinstance(layer, ATTENTION):
        return ()
    gated = getattr(layer, "use_gate", False) or getattr(layer, "_use_gate", False)
    return _projections(gated, len(getattr(layer, "_output_shape", None) or (1,)))


def _projections(gated: bool, outputs: int) -> tuple[KernelSpec, ...]:
    words = ("query", "key", "value", *(("gate",) if gated else ()))
    into = [KernelSpec(f"_{word}_dense.kernel", (1, 2), f"{word}_") for word in words]
    return (*into, KernelSpec("_output_dense.kernel", tuple(range(2, 2 + outputs)), "output_"))
