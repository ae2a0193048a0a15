"""ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks
(Ding et al. 2019, arXiv:1908.03930, section 3)."""

from __future__ import annotations

from functools import partial

from refold.blocks.expression import NORM, BatchNorm, Sizes, Sum, convolution, per_axis


def acnet(
    channels_in: int,
    filters: int,
    kernel_size: Sizes = 3,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    norm: BatchNorm = NORM,
    axes: int = 2,
) -> Sum:
    """A k x k, a k x 1 and a 1 x k convolution, each with its batch norm: the kernel, and along every
    spatial axis a kernel that has its taps on that axis only."""
    conv = partial(convolution, filters, stride=stride, dilation=dilation, groups=groups, axes=axes)
    size = per_axis(kernel_size, axes)
    strips = (tuple(size[at] if at == axis else 1 for at in range(axes)) for axis in range(axes))
    return Sum(*(conv(taps) | norm for taps in (size, *strips)))
