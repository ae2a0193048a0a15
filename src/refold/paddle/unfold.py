"""A Paddle Layer with train-time blocks in the places of its convolutions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import paddle

from refold.algebra import AffineConv, Refusal, Window
from refold.algebra import convolution as affine
from refold.algebra.affine import Array
from refold.blocks import BatchNorm
from refold.blocks.unfold import Choose, Moments, Unfolded, Watch
from refold.errors import InputError
from refold.frontend import Rich
from refold.paddle import examples
from refold.paddle.axes import layout
from refold.paddle.blocks import CONVOLUTIONS, EPSILON, MOMENTUM, ExpressionBlock, as_stored
from refold.paddle.perform import rounded
from refold.paddle.sentences import first_line
from refold.paddle.tensors import numbers
from refold.paddle.trace import dtype_name
from refold.recording.symbols import mapped

NORM = BatchNorm(as_stored(EPSILON), MOMENTUM)


def unfold(model: Any, choose: Choose, example: Any) -> Rich:
    """A copy of ``model`` whose convolutions are blocks where ``choose`` says how; see
    :meth:`refold.frontend.Frontend.unfold`."""
    rich = copy.deepcopy(model)
    made: dict[str, tuple[Any, Unfolded]] = {}
    kept: list[tuple[str, str]] = []
    blocks: dict[int, Any] = {}
    owners = _owners(rich)
    for path, holder, name, layer in _places(rich):
        if id(layer) not in blocks:
            reason = _unfit(layer, owners)
            unfolded = Refusal(reason) if reason else _chosen(path, layer, choose)
            if isinstance(unfolded, Refusal):
                kept.append((path, unfolded.reason))
                continue
            blocks[id(layer)] = _block(unfolded, layer)
            made[path] = (blocks[id(layer)], unfolded)
        if holder is None:
            rich = blocks[id(layer)]
        else:
            holder._sub_layers[name] = blocks[id(layer)]
    if made and examples.arrays_of(example) is not None:
        _observe(rich, made, example)
    return Rich(rich, tuple(made), tuple(kept))


def _places(model: Any) -> list[tuple[str, Any, str, Any]]:
    """The convolutions: path, the layer that holds it, its name there, itself; the model alone has no holder."""
    kinds = tuple(CONVOLUTIONS.values())
    if isinstance(model, kinds):
        return [("", None, "", model)]
    return [
        (f"{path}.{name}" if path else name, holder, name, layer)
        for path, holder in model.named_sublayers(include_self=True)
        for name, layer in holder._sub_layers.items()
        if isinstance(layer, kinds)
    ]


def _chosen(path: str, layer: Any, choose: Choose) -> Unfolded | Refusal:
    if layer._padding_algorithm == "SAME" and any(step > 1 for step in layer._stride):
        return Refusal("its padding 'same' moves with the size of the input, which no block does")
    return choose(path, _convolution(layer), NORM, partial(_stored, dtype_name(layer.weight)))


def _convolution(layer: Any) -> AffineConv:
    taps = layer.weight.shape[2:]
    reaches = [d * (t - 1) for t, d in zip(taps, layer._dilation, strict=True)]
    match layer._padding_algorithm:
        case "VALID":
            widths = [(0, 0)] * len(taps)
        case "SAME":
            widths = [(reach // 2, reach - reach // 2) for reach in reaches]
        case _ if len(layer._updated_padding) == len(taps):
            widths = [(width, width) for width in layer._updated_padding]
        case _:
            widths = list(zip(layer._updated_padding[::2], layer._updated_padding[1::2], strict=True))
    windows = tuple(
        Window(t, s, d if t > 1 else 1, before, after)
        for t, s, d, (before, after) in zip(taps, layer._stride, layer._dilation, widths, strict=True)
    )
    bias = None if layer.bias is None else numbers(layer.bias)
    return affine(numbers(layer.weight), bias, windows, layer._groups)


def _unfit(layer: Any, owners: Mapping[int, int]) -> str:
    """Why a convolution is not one that a block can stand in for; empty if it is one."""
    axes = len(layer.weight.shape) - 2
    if type(layer) is not CONVOLUTIONS[axes]:
        return f"it is a {type(layer).__name__}, which may compute something else"
    if layer._padding_mode != "zeros":
        return f"it pads with other numbers than zeros ({layer._padding_mode})"
    if layer._data_format != layout(axes, 1):
        return f"its layout is {layer._data_format}, and blocks work on {layout(axes, 1)}"
    if layer._forward_pre_hooks or layer._forward_post_hooks:
        return "it has hooks, which would be lost"
    if any(owners[id(parameter)] > 1 for parameter in layer.parameters()):
        return "its weight is that of another layer as well"
    return ""


def _owners(model: Any) -> dict[int, int]:
    """How many layers hold a parameter, by its identity."""
    counts: dict[int, int] = {}
    for layer in model.sublayers(include_self=True):
        for parameter in layer.parameters(include_sublayers=False):
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def _block(unfolded: Unfolded, layer: Any) -> Any:
    block = ExpressionBlock(unfolded.expression, layer._in_channels, axes=len(layer.weight.shape) - 2)
    if dtype_name(layer.weight) != dtype_name(block.parameters()[0]):
        block.to(dtype=dtype_name(layer.weight))
    block.set_numbers(unfolded.numbers)
    for parameter in block.parameters():
        parameter.stop_gradient = layer.weight.stop_gradient
    if layer.training:
        block.train()
    else:
        block.eval()
    return block


def _stored(dtype: str, array: Array) -> Array:
    """What is left of numbers in a type."""
    return numbers(rounded(np.asarray(array), dtype))


# ---- statistics of real data -------------------------------------------------------------------------


def _observe(model: Any, made: Mapping[str, tuple[Any, Unfolded]], example: Any) -> None:
    """Let the batch norms of the blocks start at the statistics of ``example``."""
    specs = examples.specs_of(model, example)
    arguments = mapped(lambda spec: paddle.to_tensor(spec.array).astype(spec.dtype), specs)
    watch = Watch(made)
    hooks = [
        block.part(path).register_forward_pre_hook(partial(_note, moments))
        for block, path, moments in watch.norms()
    ]
    training = [layer for layer in model.sublayers(include_self=True) if layer.training]
    try:
        model.eval()
        with paddle.no_grad():
            model(*arguments)
    except Exception as error:  # whatever the model raises on an example that is not one
        raise InputError(f"the model does not run on the example: {first_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
        for layer in training:
            layer.training = True
    watch.settle(lambda block: partial(_stored, dtype_name(block.parameters()[0])))


def _note(moments: Moments, layer: Any, inputs: tuple[Any, ...]) -> None:
    moments.add(numbers(inputs[0]).swapaxes(0, 1))
