"""RepVGG: Making VGG-style ConvNets Great Again (Ding et al. 2021, arXiv:2101.03697, section 3.2)."""

from __future__ import annotations

from functools import partial

from refold.blocks.expression import NORM, BatchNorm, Expression, Identity, Scale, Sizes, Sum, convolution, per_axis


def repvgg(
    channels_in: int,
    filters: int,
    kernel_size: Sizes = 3,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    alpha: bool = False,
    identity: bool = True,
    norm: BatchNorm = NORM,
    axes: int = 2,
) -> Sum:
    """A k x k convolution, a 1x1 convolution and the input, each with its batch norm.

    ``alpha`` puts a learnable factor on the 1x1 branch (it starts at 1). ``identity`` adds the input
    where the shapes allow: stride 1 and as many filters as channels.
    """
    conv = partial(convolution, filters, stride=stride, groups=groups, axes=axes)
    pointwise = conv(1) | norm
    branches: list[Expression] = [conv(kernel_size, dilation=dilation) | norm]
    branches.append(Scale() * pointwise if alpha else pointwise)
    if identity and filters == channels_in and per_axis(stride, axes) == (1,) * axes:
        branches.append(Identity() | norm)
    return Sum(*branches)
