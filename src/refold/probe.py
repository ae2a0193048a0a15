"""Reading the kernel of a black box from its impulse response."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import gcd, prod
from typing import Any

import numpy as np

from refold.algebra.affine import AffineConv, Array
from refold.algebra.evaluate import evaluate
from refold.algebra.geometry import Window
from refold.algebra.laws import refine_groups
from refold.algebra.refusal import Refusal

NOT_AFFINE = "the function is not affine: its answer to a sum of inputs is not the sum of its answers"


def probe(
    function: Callable[[Array], Any], shape: tuple[int, ...], *, tolerance: float = 1e-9
) -> AffineConv | Refusal:
    """The affine convolution that a black box computes, or why it computes none.

    ``function`` maps float64 arrays ``(batch, channels, *space)`` to arrays ``(batch, channels_out,
    *space_out)``; ``shape`` is ``(channels, *space)``, large enough to show all borders (each size at least
    the kernel's reach plus twice the stride). Every unit impulse is sent through it, the kernel, stride,
    dilation and padding are read from the answers, and the result is held against all of them and against
    random inputs, up to ``tolerance`` relative to the largest answer. Padding behind the last output's taps
    cannot be seen at one size and is taken as the smallest that gives the outputs there are.
    """
    channels, space = shape[0], shape[1:]
    size = prod(shape)
    impulses = np.eye(size).reshape(size, *shape)
    zero = _call(function, np.zeros((1, *shape)))
    response = _call(function, impulses) - zero
    bias = zero[0].reshape(zero.shape[1], -1)
    if not np.isfinite(response).all():
        return Refusal("the function gives numbers that are not finite")
    limit = tolerance * max(float(np.abs(response).max(initial=0.0)), float(np.abs(zero).max(initial=0.0)), 1e-30)
    rng = np.random.default_rng(0)
    data = rng.normal(size=(4, *shape))
    answers = _call(function, data)
    linear = np.tensordot(data.reshape(4, size), response, 1) + zero
    if np.abs(answers - linear).max(initial=0.0) > limit * size:
        return Refusal(NOT_AFFINE)
    if np.ptp(bias, axis=1).max(initial=0.0) > limit:
        return Refusal("what it adds is not the same at every position: its border is not zero padding")
    outputs = zero.shape[2:]
    # present[..., in, out]: whether some channel of an output position reads some of an input position
    answers_at = np.abs(response.reshape(channels, *space, zero.shape[1], *outputs)) > limit
    table = np.any(answers_at, axis=(0, 1 + len(space)))
    windows = []
    for axis in range(len(space)):
        rest = tuple(i for i in range(2 * len(space)) if i not in (axis, axis + len(space)))
        window = _window(np.any(table, axis=rest), space[axis], outputs[axis])
        if isinstance(window, Refusal):
            return window
        windows.append(window)
    found = _kernel(response, shape, zero.shape[1], outputs, tuple(windows), bias[:, 0])
    check = np.concatenate([impulses, data])
    if np.abs(evaluate(found, check) - np.concatenate([response + zero, answers])).max(initial=0.0) > limit * size:
        return Refusal("it is affine, but not the same at every position with zeros around: no convolution")
    return refine_groups(found)


def _call(function: Callable[[Array], Any], data: Array) -> Array:
    result = np.asarray(function(data), dtype=np.float64)
    if result.ndim != data.ndim or result.shape[0] != data.shape[0]:
        raise ValueError(f"the function made {result.shape} of {data.shape}: it must keep the axes and the batch")
    return result


def _window(reads: Any, size: int, outputs: int) -> Window | Refusal:
    """The window along one axis; ``reads[i, o]`` says whether output ``o`` reads position ``i``."""
    lists = [np.flatnonzero(reads[:, o]) for o in range(outputs)]
    if not any(len(places) for places in lists):
        return Window() if outputs == size else Refusal("an axis has no effect on the result")
    most = max(len(places) for places in lists)
    full = [o for o, places in enumerate(lists) if len(places) == most]
    first = [int(lists[o][0]) for o in full]
    steps = zip(zip(full, first, strict=True), zip(full[1:], first[1:], strict=True), strict=False)
    strides = {b - a for (i, a), (j, b) in steps if j == i + 1}
    if len(strides) > 1 or any(stride < 1 for stride in strides):
        return Refusal("it does not step evenly along an axis: no convolution")
    stride = strides.pop() if strides else max(size // max(outputs, 1), 1)
    offsets = sorted({int(place) - stride * o for o, places in enumerate(lists) for place in places})
    step = 0
    for offset in offsets[1:]:
        step = gcd(step, offset - offsets[0])
    step = step or 1
    taps = (offsets[-1] - offsets[0]) // step + 1
    before = -offsets[0]
    reach = step * (taps - 1)
    # The smallest padding behind that gives this many outputs.
    after = (outputs - 1) * stride + 1 + reach - before - size
    return Window(taps, stride, step, before, after if after > 0 or stride == 1 else min(0, after + stride - 1))


def _kernel(
    response: Array,
    shape: tuple[int, ...],
    channels_out: int,
    outputs: tuple[int, ...],
    windows: tuple[Window, ...],
    bias: Array,
) -> AffineConv:
    """Each weight from an output position that reads that tap inside the input."""
    channels, space = shape[0], shape[1:]
    answers = response.reshape(channels, *space, channels_out, *outputs)
    kernel = np.zeros((channels_out, channels, *(window.taps for window in windows)))
    for tap in np.ndindex(*kernel.shape[2:]):
        places = []
        for t, window, size, count in zip(tap, windows, space, outputs, strict=True):
            offset = window.dilation * t - window.before
            reads = [(window.stride * o + offset, o) for o in range(count)]
            inside = [(place, o) for place, o in reads if 0 <= place < size]
            places.append(inside[len(inside) // 2 :][:1])
        for chosen in product(*places):
            into, out = tuple(i for i, _ in chosen), tuple(o for _, o in chosen)
            kernel[(slice(None), slice(None), *tap)] = answers[(slice(None), *into, slice(None), *out)].T
    return AffineConv(kernel, bias, windows)
