"""Train-time blocks: each one function that returns an expression of branches. No framework.

A new block is one function here and its name in :data:`BLOCKS`; its fold comes from the laws of
:mod:`refold.algebra`, its layer from each framework's way to build an expression.
"""

from __future__ import annotations

from refold.blocks.acnet import acnet
from refold.blocks.config import from_config, to_config
from refold.blocks.diverse_branch import diverse_branch
from refold.blocks.expression import (
    NORM,
    AveragePool,
    BatchNorm,
    Chain,
    Conv,
    Expression,
    Identity,
    Leaf,
    Scale,
    Sum,
    average_pool,
    centered,
    channels_out,
    convolution,
    interpret,
    parameters,
)
from refold.blocks.fold import equivalent, fold
from refold.blocks.mobileone import mobileone
from refold.blocks.repvgg import repvgg

# All blocks; each takes (channels_in, filters, kernel_size, stride, dilation, groups, *, norm, axes) and more.
BLOCKS = (repvgg, acnet, diverse_branch, mobileone)

__all__ = [
    "BLOCKS",
    "NORM",
    "AveragePool",
    "BatchNorm",
    "Chain",
    "Conv",
    "Expression",
    "Identity",
    "Leaf",
    "Scale",
    "Sum",
    "acnet",
    "average_pool",
    "centered",
    "channels_out",
    "convolution",
    "diverse_branch",
    "equivalent",
    "fold",
    "from_config",
    "interpret",
    "mobileone",
    "parameters",
    "repvgg",
    "to_config",
]
