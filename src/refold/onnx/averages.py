"""Operators of ONNX that take means, or maxima, of numbers of one channel: maps per channel pass through them.

See :mod:`refold.onnx.linear` for the rest of the table, and :class:`refold.graph.graph.Passage` for what that
means.
"""

from __future__ import annotations

from collections.abc import Callable

from refold.graph.graph import Op, Opaque, Passage
from refold.graph.passing import means, reduction
from refold.onnx.step import Step

# Of what lies outside of the tensor, or of the shape of the output, these make something else.
_CROPPING = "tf_crop_and_resize"


def largest(step: Step) -> Op:
    """A maximum over windows; what it pads is smaller than everything."""
    named = [output for output in step.node.outputs if output.name]
    return Opaque("", passages=means(1, rising=True)) if len(named) == 1 else Opaque()


def reduced(*, rising: bool) -> Callable[[Step], Op]:
    """A mean (or a maximum) over some axes."""

    def entry(step: Step) -> Op:
        axes = step.integers("axes")
        if axes is None:
            given = step.constant(1) if len(step.inputs) > 1 else None
            axes = None if given is None else tuple(int(axis) for axis in given.reshape(-1))
        if not axes:
            return Opaque()  # over all axes, or over none, or not known
        keep = step.integer("keepdims", 1) == 1
        return Opaque("", passages=reduction(len(step.shape_in()), axes, keep=keep, rising=rising))

    return entry


def resized(step: Step) -> Op:
    """An interpolation, whose weights sum to one. Axes that keep their size are not touched."""
    words = ("coordinate_transformation_mode", "half_pixel"), ("keep_aspect_ratio_policy", "stretch")
    where, policy = (step.word(name, default) for name, default in words)
    if where == _CROPPING or policy != "stretch" or step.integer("antialias", 0):
        return Opaque()
    before, after = step.shape_in(), step.shape
    same = [
        axis
        for axis, (old, new) in enumerate(zip(before, after, strict=True))
        if axis and old is not None and old == new
    ]
    return Opaque("", passages=lambda: tuple(Passage(axis, axis) for axis in same))
