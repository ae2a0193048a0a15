"""A Keras model with train-time blocks in the places of its convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import layers
from keras.src import backend

from refold.algebra import AffineConv, Refusal, Window
from refold.algebra import convolution as affine
from refold.algebra.affine import Array
from refold.blocks import NORM
from refold.blocks.unfold import Choose, Moments, Unfolded, Watch
from refold.errors import InputError
from refold.frontend import Rich
from refold.keras.axes import CONV, DEPTHWISE
from refold.keras.blocks import ExpressionBlock
from refold.keras.lower import clone_layer
from refold.keras.trace import first_line

_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D, *_DEPTHWISE)


def unfold(model: Any, choose: Choose, example: Any) -> Rich:
    """A copy of ``model`` whose convolutions are blocks where ``choose`` says how; see
    :meth:`refold.frontend.Frontend.unfold`."""
    if not _is_graph(model):
        raise InputError(
            f"'{model.name}' is no Functional or Sequential model, and only those can be made anew with other "
            "layers: fold it first (refold.fold gives a Functional model), and unfold that"
        )
    if not model.built:
        raise InputError(f"the model '{model.name}' is not built: call it once on an input, then unfold it")
    unfolded: dict[str, Unfolded] = {}
    kept: list[tuple[str, str]] = []
    layers_of = dict(_layers(model, ""))
    for path, layer in layers_of.items():
        if isinstance(layer, _CONVOLUTIONS):
            found = _chosen(path, layer, choose)
            if isinstance(found, Unfolded):
                unfolded[path] = found
            else:
                kept.append((path, found.reason))
    expressions = {id(layers_of[path]): found for path, found in unfolded.items()}
    copies: dict[int, Any] = {}

    def copied(layer: Any) -> Any:
        found = expressions.get(id(layer))
        copy = clone_layer(layer) if found is None else _block(found, layer)
        if copy is None:
            raise InputError(f"the layer '{layer.name}' cannot be made anew from its configuration (get_config)")
        copies[id(layer)] = copy
        return copy

    rich = keras.models.clone_model(model, clone_function=copied, recursive=True)
    made = {path: (copies[id(layers_of[path])], found) for path, found in unfolded.items()}
    for layer in layers_of.values():
        if id(layer) in copies and id(layer) not in expressions:
            for variable, fresh in zip(layer.variables, copies[id(layer)].variables, strict=True):
                # Not the variable itself: JAX would share its buffer, and give it away when it compiles.
                fresh.assign(backend.convert_to_numpy(variable))
    for block, found in made.values():
        block.set_numbers(found.numbers)
    if made and _is_data(example):
        _observe(rich, made, example)
    return Rich(rich, tuple(made), tuple(kept))


def _is_graph(model: Any) -> bool:
    return isinstance(model, keras.Sequential | keras.src.models.functional.Functional)


def _layers(model: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """The layers of a model and of the models in it, with their paths."""
    for layer in model.layers:
        yield f"{prefix}{layer.name}", layer
        if _is_graph(layer):
            yield from _layers(layer, f"{prefix}{layer.name}/")


def _is_data(example: Any) -> bool:
    found = keras.tree.flatten(example)
    return bool(found) and all(hasattr(leaf, "shape") for leaf in found)


def _chosen(path: str, layer: Any, choose: Choose) -> Unfolded | Refusal:
    if type(layer) not in _CONVOLUTIONS:
        return Refusal(f"it is a {type(layer).__name__}, which may compute something else")
    if layer.padding == "same" and any(step > 1 for step in layer.strides):
        return Refusal(
            "its padding 'same' moves with the size of the input, which no block does: pad with a ZeroPadding layer"
        )
    return choose(path, _convolution(layer), NORM, partial(_stored, layer.variable_dtype))


def _convolution(layer: Any) -> AffineConv:
    depthwise = isinstance(layer, _DEPTHWISE)
    kernel = (DEPTHWISE if depthwise else CONV).to_core(backend.convert_to_numpy(layer.kernel))
    windows = []
    for taps, stride, dilation in zip(kernel.shape[2:], layer.strides, layer.dilation_rate, strict=True):
        reach = dilation * (taps - 1)
        before, after = {"same": (reach // 2, reach - reach // 2), "causal": (reach, 0)}.get(layer.padding, (0, 0))
        windows.append(Window(taps, stride, dilation if taps > 1 else 1, before, after))
    bias = None if layer.bias is None else np.asarray(backend.convert_to_numpy(layer.bias), dtype=np.float64)
    groups = layer.kernel.shape[-2] if depthwise else layer.groups
    return affine(kernel, bias, tuple(windows), groups)


def _block(unfolded: Unfolded, layer: Any) -> ExpressionBlock:
    return ExpressionBlock(
        unfolded.expression,
        activation=layer.activation,
        data_format=layer.data_format,
        kernel_regularizer=layer.depthwise_regularizer
        if isinstance(layer, _DEPTHWISE)
        else layer.kernel_regularizer,
        dtype=layer.dtype_policy,
        trainable=layer.trainable,
        name=layer.name,
    )


def _stored(dtype: str, array: Array) -> Array:
    """What is left of numbers in a type."""
    return np.asarray(backend.convert_to_numpy(backend.convert_to_tensor(array, dtype)), dtype=np.float64)


# ---- statistics of real data -------------------------------------------------------------------------


def _observe(model: Any, made: Mapping[str, tuple[ExpressionBlock, Unfolded]], example: Any) -> None:
    """Let the batch norms of the blocks start at the statistics of ``example``."""
    watch = Watch(made)
    norms = [(block.parts[path], moments) for block, path, moments in watch.norms()]
    try:
        with _watched(norms):
            model(keras.tree.map_structure(backend.convert_to_tensor, example), training=False)
    except Exception as error:  # whatever Keras raises on an example that is not one
        raise InputError(f"the model '{model.name}' does not run on the example: {first_line(error)}") from error
    watch.settle(lambda block: partial(_stored, block.variable_dtype))


@contextmanager
def _watched(norms: list[tuple[Any, Moments]]) -> Iterator[None]:
    """While it lasts, the layers in ``norms`` note what they are called on."""

    def watching(call: Callable[..., Any], axis: int, moments: Moments) -> Callable[..., Any]:
        def noting(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            moments.add(np.moveaxis(np.asarray(backend.convert_to_numpy(inputs), dtype=np.float64), axis, 0))
            return call(inputs, *args, **kwargs)

        return noting

    for norm, moments in norms:
        vars(norm)["call"] = watching(norm.call, norm.axis, moments)
    try:
        yield
    finally:
        for norm, _ in norms:
            del vars(norm)["call"]
