"""What ONNX's convolutions and average pools are in the engine's words: operators that read windows.

Kernels are stored ``(out, in/groups, *taps)``, as the engine has them. See :mod:`refold.onnx.linear` for the rest.
"""

from __future__ import annotations

import numpy as np

from refold.algebra import affine, geometry
from refold.algebra.affine import AffineConv, Array, Deferred
from refold.algebra.geometry import Window
from refold.graph.graph import Affine, Op, Opaque
from refold.graph.passing import means
from refold.onnx.facts import Facts
from refold.onnx.step import Step

UNCOUNTED_PADDING = "it leaves padded positions out of the average, so at the border it is no convolution"
INCOMPLETE = "its last windows reach over the border (ceil_mode), so it is no convolution there"


def _kernel(facts: Facts) -> Array | Deferred:
    """The numbers of a kernel, read when they are needed: a file may hold more than memory does."""
    shape = facts.shapes[0]
    assert shape is not None
    return Deferred(shape, lambda: np.asarray(facts.array(), dtype=np.float64))


def convolution(step: Step) -> Op:
    """A convolution with a constant kernel."""
    kernel = step.input(1)
    if kernel is None or not kernel.is_constant or kernel.shapes[0] is None:
        return Opaque("its kernel is no constant")
    bias = step.constant(2)
    if bias is None and not step.is_left_out(2):
        return Opaque("its bias is no constant")
    windows = _windows(step, kernel.shapes[0][2:])
    if isinstance(windows, str):
        return Opaque(windows)
    groups = step.integer("group", 1)
    weights = _kernel(kernel)
    channels = step.shape_in()[1]
    if channels is not None and channels != weights.shape[1] * groups:
        return Opaque("its kernel does not fit the channels that it reads")
    offset = np.zeros(weights.shape[0]) if bias is None else np.asarray(bias, dtype=np.float64)
    return Affine(AffineConv(weights, offset, windows, groups), 1, bias is not None)


def transposed_convolution(step: Step) -> Op:
    """A transposed convolution with a constant kernel whose paddings are said."""
    kernel = step.input(1)
    if kernel is None or not kernel.is_constant or kernel.shapes[0] is None:
        return Opaque("its kernel is no constant")
    bias = step.constant(2)
    if bias is None and not step.is_left_out(2):
        return Opaque("its bias is no constant")
    if step.integers("output_shape") or step.word("auto_pad", "NOTSET") not in ("NOTSET", "", "VALID"):
        return Opaque("its paddings follow from the shape of its output")
    channels_in, per_group, *taps = kernel.shapes[0]
    axes, groups = len(step.shape_in()) - 2, step.integer("group", 1)
    ones, zeros = (1,) * axes, (0,) * axes
    strides, dilations = step.integers("strides") or ones, step.integers("dilations") or ones
    extra = step.integers("output_padding") or zeros
    pads = step.integers("pads") or zeros * 2
    if {len(taps), len(strides), len(dilations), len(extra), len(pads) // 2} != {axes}:
        return Opaque("its kernel does not fit the tensor that it reads")
    if channels_in % groups or step.shape_in()[1] not in (channels_in, None):
        return Opaque("its kernel does not fit the channels that it reads")
    crops = zip(pads[:axes], (pad - more for pad, more in zip(pads[axes:], extra, strict=True)), strict=True)
    windows = tuple(map(geometry.transposed, taps, strides, dilations, crops))
    shape = (per_group * groups, channels_in // groups, *taps)
    weights = Deferred(shape, lambda: affine.turned_around(kernel.array(), groups))
    offset = np.zeros(shape[0]) if bias is None else np.asarray(bias, dtype=np.float64)
    return Affine(AffineConv(weights, offset, windows, groups), 1, bias is not None)


def _windows(step: Step, taps: tuple[int, ...], dilated: bool = True) -> tuple[Window, ...] | str:
    """The windows of a convolution or pooling; or why there are none."""
    space = step.shape_in()[2:]
    ones = (1,) * len(space)
    strides = step.integers("strides") or ones
    dilations = (step.integers("dilations") or ones) if dilated else ones
    pads = step.integers("pads") or (0,) * (2 * len(space))
    word = step.word("auto_pad", "NOTSET")
    if {len(taps), len(strides), len(dilations), len(pads) // 2} != {len(space)}:
        return "its kernel does not fit the tensor that it reads"
    windows = []
    for axis, (t, s, d, size) in enumerate(zip(taps, strides, dilations, space, strict=True)):
        match word:
            case "NOTSET" | "":
                window = Window(t, s, d, pads[axis], pads[axis + len(space)])
            case "VALID":
                window = Window(t, s, d)
            case "SAME_UPPER":
                window = geometry.same(t, s, d, size)
            case "SAME_LOWER":
                upper = geometry.same(t, s, d, size)
                if upper.floating or (size is None and s > 1):
                    return "padding SAME_LOWER with a stride depends on the size of the input, which is not known"
                window = Window(t, s, d, upper.after, upper.before)
            case _:
                return f"its padding '{word}' is not known"
        windows.append(window)
    return tuple(windows)


def average_pool(step: Step) -> Op:
    """An average over windows, where it counts what it pads."""
    taps = step.integers("kernel_shape") or ()
    windows = _windows(step, taps)
    if isinstance(windows, str):
        return Opaque(windows)
    shape = step.shape_in()
    if shape[1] is None:
        return Opaque("the number of its channels is not known")
    counted = step.integer("count_include_pad", 0) == 1 and step.word("auto_pad", "NOTSET") == "NOTSET"
    if any(window.floating or ((window.before or window.after) and not counted) for window in windows):
        return Opaque(UNCOUNTED_PADDING, passages=tuple if counted else means(1))
    if step.integer("ceil_mode", 0):
        for window, size, out in zip(windows, shape[2:], step.shape[2:], strict=True):
            if window.stride > 1 and (size is None or window.output_size(size) != out):
                return Opaque(INCOMPLETE, passages=tuple if step.integer("count_include_pad", 0) else means(1))
    return Affine(affine.average_pool(shape[1], windows), 1, biased=False)


def global_average_pool(step: Step) -> Op:
    """An average over all positions, where their number is known."""
    channels, *space = step.shape_in()[1:]
    if channels is None or None in space or not space:
        return Opaque("", passages=means(1))
    windows = tuple(Window(int(size or 1)) for size in space)
    return Affine(affine.average_pool(channels, windows), 1, biased=False)
