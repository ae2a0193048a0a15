"""Diverse Branch Block: Building a Convolution as an Inception-like Unit
(Ding et al. 2021, arXiv:2103.13425, section 3.3)."""

from __future__ import annotations

from refold.blocks.expression import (
    NORM,
    BatchNorm,
    Expression,
    Sizes,
    Sum,
    average_pool,
    centered,
    convolution,
    per_axis,
)


def diverse_branch(
    channels_in: int,
    filters: int,
    kernel_size: Sizes = 3,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    hidden: int | None = None,
    average: bool = True,
    norm: BatchNorm = NORM,
    axes: int = 2,
) -> Sum:
    """Four branches, with a batch norm after every convolution and pool: k x k; 1x1; 1x1 to ``hidden``
    channels (by default as many as the input has) and then k x k; 1x1 and then an average pool.

    Zeros that are padded after a batch norm are not what that batch norm would have given, and then
    nothing folds at the border; the paper's code pads with the batch norm's shift instead. Here a 1x1
    convolution pads in the place of the k x k or the pool behind it: it sees zeros, so its batch norm
    gives its shift there, which is the same function, and exact. (While training, the statistics of that
    batch norm count the border.)

    Raises ValueError for a dilation with ``average``: a pool has none.
    """
    dilated = per_axis(dilation, axes) != (1,) * axes
    if average and dilated:
        raise ValueError("the averaging branch has no dilation: leave it out (average=False), or dilate by 1")
    spread = centered(kernel_size, dilation, axes)
    unpadded = ((0, 0),) * axes
    mixed = channels_in if hidden is None else hidden
    branches: list[Expression] = [
        convolution(filters, kernel_size, stride, dilation, groups=groups, axes=axes) | norm,
        convolution(filters, 1, stride, groups=groups, axes=axes) | norm,
        convolution(mixed, 1, padding=spread, groups=groups, axes=axes)
        | norm
        | convolution(filters, kernel_size, stride, dilation, unpadded, groups, axes=axes)
        | norm,
    ]
    if average:
        branches.append(
            convolution(filters, 1, padding=spread, groups=groups, axes=axes)
            | norm
            | average_pool(kernel_size, stride, unpadded, axes)
            | norm
        )
    return Sum(*branches)
