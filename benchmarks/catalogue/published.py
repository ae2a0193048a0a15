"""Folds that published code makes and that are wrong, rebuilt in our own words; one is run as it is.

Each says which fold it is of which project. The trained forms are small: what is wrong is the rule.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F

from catalogue.faults import Twice
from catalogue.nets import (
    Case,
    RepBlock,
    centered,
    conv_of,
    folded_block,
    identity_kernel,
    image,
    normed,
    parts,
    settings_of,
    total,
    trained,
)


def published() -> list[Case]:
    """All of them."""
    with torch.no_grad():
        return [
            _grouped_identity(2),
            _grouped_identity(4),
            _dense_residual(),
            _reflected(),
            _dilated(),
            _shared(),
            _hooked(),
            _exclusive_pooling(),
            _broadcast_identity(1),
            _broadcast_identity(2),
            _first_branch_only(),
            _slope(),
        ]


def _block(name: str, source: str, block: RepBlock, folded: nn.Module, example: torch.Tensor) -> Case:
    before = nn.Sequential(block, nn.ReLU()).eval()
    return Case(name, before, nn.Sequential(folded, nn.ReLU()).eval(), example, False, source)


def _grouped_identity(groups: int) -> Case:
    """The identity kernel is the diagonal of a matrix of shape (channels, channels/groups), which ends after the
    first group."""
    block = trained(RepBlock(8, 8, groups=groups), seed=10)
    diagonal = torch.zeros(8, 8 // groups, dtype=torch.float64).fill_diagonal_(1.0)[:, :, None, None]
    kernel, bias = normed(diagonal, block.skip)
    wrong = total([*parts(block)[:-1], (centered(kernel, 3), bias)])
    return _block(
        f"identity of {groups} groups on the first diagonal only",
        "YOLOv7, RepConv.fuse_repvgg_block",
        block,
        conv_of(wrong, **settings_of(block)),
        image(8),
    )


class Residual(nn.Module):
    """A convolution with a batch norm, and its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Any) -> Any:
        return x + self.norm(self.conv(x))


def _dense_residual() -> Case:
    """The identity is a kernel of ones, which is right where each channel reads itself only."""
    block = trained(Residual(6), seed=11)
    kernel, bias = normed(block.conv.weight, block.norm)
    wrong = kernel + centered(torch.ones(6, 6, 1, 1, dtype=torch.float64), 3)
    return Case(
        "identity of ones in a dense convolution",
        nn.Sequential(block, nn.ReLU()).eval(),
        nn.Sequential(conv_of((wrong, bias), padding=1), nn.ReLU()).eval(),
        image(6),
        False,
        "RepViT, Residual.fuse",
    )


def _reflected() -> Case:
    """The trained form reflects its input at the border, the deployed one pads zeros."""
    block = trained(RepBlock(6, 6), seed=12)
    block.convs[0].padding_mode = "reflect"
    block.convs[0]._reversed_padding_repeated_twice = [1, 1, 1, 1]
    return _block(
        "zeros for reflected padding", "RepVGG, RepVGGBlock(deploy=True)", block, folded_block(block), image(6)
    )


def _dilated() -> Case:
    """The deployed convolution is made without the dilation of the trained one."""
    block = trained(RepBlock(6, 6, dilation=2), seed=13)
    wrong = conv_of(total(parts(block)), padding=1)
    return _block("dilation forgotten", "RepVGG, RepVGGBlock(deploy=True)", block, wrong, image(6))


FUSE = "PyTorch, torch.fx.experimental.optimization.fuse"


def _shared() -> Case:
    """Run as it is: both batch norms are folded into the one convolution that is used twice."""
    model = trained(Twice(), seed=14)
    wrong = fuse(copy.deepcopy(model))
    return Case("one convolution, two batch norms", model, wrong, image(6), False, FUSE)


def _hooked() -> Case:
    """Run as it is: a forward hook changes what a convolution gives, and then what the folded one gives."""
    model = trained(nn.Sequential(nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5)), seed=15)
    model[0].register_forward_hook(lambda module, inputs, output: 1.5 * output)
    return Case("a convolution with a hook", model, fuse(copy.deepcopy(model)), image(4), False, FUSE)


class Pooled(nn.Module):
    """A convolution and an average pooling that does not count its padding."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm, self.after_pool = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x: Any) -> Any:
        return self.norm(self.conv(x)) + self.after_pool(self.pool(x))


def _exclusive_pooling() -> Case:
    """The pooling becomes a kernel of ninths, which counts the padding."""
    block = trained(Pooled(6), seed=16)
    ninths = identity_kernel(6, 1).expand(6, 6, 3, 3) / 9
    wrong = total([normed(block.conv.weight, block.norm), normed(ninths, block.after_pool)])
    return Case(
        "average pooling that does not count its padding",
        nn.Sequential(block, nn.ReLU()).eval(),
        nn.Sequential(conv_of(wrong, padding=1), nn.ReLU()).eval(),
        image(6),
        False,
        "PaddleSlim, DiverseBranchBlock",
    )


def _broadcast_identity(groups: int) -> Case:
    """The identity kernel has one input channel, and is added to all of them."""
    block = trained(RepBlock(6, 6, groups=groups), seed=17)
    scale, bias = normed(torch.ones(6, 1, 1, 1), block.skip)
    per_group = 6 // groups
    wrong = total([*parts(block)[:-1], (centered(scale, 3).expand(6, per_group, 3, 3), bias)])
    return _block(
        f"identity of one channel added to all{f' ({groups} groups)' if groups > 1 else ''}",
        "PaddleSlim, RepVGGBlock",
        block,
        conv_of(wrong, **settings_of(block)),
        image(6),
    )


def _first_branch_only() -> Case:
    """Of several branches only the first is read."""
    block = trained(RepBlock(6, 6, (3, 3, 1)), seed=18)
    wrong = total([parts(block)[0], parts(block)[-1]])
    return _block(
        "only the first branch read",
        "PaddleSlim, SlimRepBlock",
        block,
        conv_of(wrong, **settings_of(block)),
        image(6),
    )


class Leaky(nn.Module):
    """Two 1x1 convolutions, and between them an activation that becomes the identity while training goes on."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.first, self.second, self.slope = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 5, 1), slope

    def forward(self, x: Any) -> Any:
        return self.second(F.leaky_relu(self.first(x), self.slope))


def _slope() -> Case:
    """The two are merged while the slope is still 0.5."""
    block = trained(Leaky(0.5), seed=19)
    first, second = (conv.weight.double()[:, :, 0, 0] for conv in (block.first, block.second))
    bias = second @ block.first.bias.double() + block.second.bias.double()
    return Case(
        "an activation that is not yet the identity",
        nn.Sequential(block, nn.ReLU()).eval(),
        nn.Sequential(conv_of(((second @ first)[:, :, None, None], bias)), nn.ReLU()).eval(),
        image(4),
        False,
        "VanillaNet, Block.switch_to_deploy",
    )
