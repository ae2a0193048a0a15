"""MobileOne: An Improved One millisecond Mobile Backbone (Vasu et al. 2022, arXiv:2206.04040, section 3.3)."""

from __future__ import annotations

from functools import partial

from refold.blocks.expression import NORM, BatchNorm, Expression, Identity, Sizes, Sum, convolution, per_axis


def mobileone(
    channels_in: int,
    filters: int,
    kernel_size: Sizes = 3,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    branches: int = 4,
    norm: BatchNorm = NORM,
    axes: int = 2,
) -> Sum:
    """``branches`` equal k x k convolutions, a 1x1 convolution (where k > 1) and the input (where stride
    is 1 and there are as many filters as channels), each with its batch norm.

    With ``groups`` equal to the channels this is the paper's depthwise block; a second one with
    ``kernel_size`` 1 is its pointwise block. Raises ValueError if there is not at least one branch.
    """
    if branches < 1:
        raise ValueError(f"there is at least one branch, got {branches}")
    conv = partial(convolution, filters, stride=stride, groups=groups, axes=axes)
    terms: list[Expression] = [conv(kernel_size, dilation=dilation) | norm] * branches
    if per_axis(kernel_size, axes) != (1,) * axes:
        terms.append(conv(1) | norm)
    if filters == channels_in and per_axis(stride, axes) == (1,) * axes:
        terms.append(Identity() | norm)
    return Sum(*terms)
