"""ONNX files of networks as they are trained: seven blocks, an activation behind each, a pooling and a classifier.

``python benchmarks/exports.py FOLDER`` writes them there; needs torch. Widths, strides and blocks are those that
the tools for ONNX files are compared on (``onnx_files.py``), which runs where no torch is.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from catalogue.nets import trained
from torch import nn
from torch.nn import functional as F

from refold.blocks import BatchNorm, Expression, Identity, Sum, convolution
from refold.torch import ACBlock, DiverseBranchBlock, ExpressionBlock, MobileOneBlock, RepVGGBlock

SIZE = 224
WIDTHS = ((32, 2), (64, 2), (64, 1), (128, 2), (128, 1), (128, 1), (128, 1))
# For proofs, which take some seconds for each of the nets above.
SMALL_SIZE = 32
SMALL_WIDTHS = ((8, 2), (8, 1), (16, 2), (16, 1))
NORM = BatchNorm()

Block = Callable[[int, int, int], nn.Module]  # of the channels in and out, and the stride


class BorderedBatchNorm(nn.Module):
    """A batch norm whose border is padded with its own bias, as the code of the DBB paper writes it."""

    def __init__(self, channels: int, pad: int) -> None:
        super().__init__()
        self.bn, self.pad = nn.BatchNorm2d(channels), pad

    def forward(self, x: Any) -> Any:
        bn, p = self.bn, self.pad
        y = bn(x)
        border = bn.bias.detach() - bn.running_mean * bn.weight.detach() / torch.sqrt(bn.running_var + bn.eps)
        y = F.pad(y, [p] * 4)
        border = border.view(1, -1, 1, 1)
        y[:, :, 0:p, :] = border
        y[:, :, -p:, :] = border
        y[:, :, :, 0:p] = border
        y[:, :, :, -p:] = border
        return y


class PaperDiverseBranch(nn.Module):
    """The Diverse Branch Block with the border that the paper's code writes in place."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        i, o = channels_in, channels_out
        self.origin = nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o))
        self.point = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
        pool = nn.AvgPool2d(3, stride)
        self.average = nn.Sequential(
            nn.Conv2d(i, o, 1, bias=False), BorderedBatchNorm(o, 1), pool, nn.BatchNorm2d(o)
        )
        last = nn.Conv2d(i, o, 3, stride, bias=False)
        self.chain = nn.Sequential(nn.Conv2d(i, i, 1, bias=False), BorderedBatchNorm(i, 1), last, nn.BatchNorm2d(o))

    def forward(self, x: Any) -> Any:
        return self.origin(x) + self.point(x) + self.average(x) + self.chain(x)


def expansion(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    """1x1 to twice the channels, 3x3, 1x1, without activations between (SESR, ECBSR)."""
    wide = 2 * channels_out
    chain = convolution(wide, 1) | convolution(wide, 3, stride) | convolution(channels_out, 1, bias=True)
    return ExpressionBlock(chain, channels_in)


def dilated(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    """Depthwise branches of several sizes and dilations, which make one 7x7, and a 1x1 behind their sum
    (UniRepLKNet). The first block, which has no channels of its own, is a plain convolution."""
    if channels_in == 3:
        return ExpressionBlock(convolution(channels_out, 3, stride, bias=True), channels_in)
    branches: list[Expression] = [
        convolution(channels_in, taps, stride, dilation, groups=channels_in) | NORM
        for taps, dilation in ((7, 1), (5, 1), (3, 2), (3, 3))
    ]
    if stride == 1:
        branches.append(Identity())
    mix = ExpressionBlock(convolution(channels_out, 1) | NORM, channels_in)
    return nn.Sequential(ExpressionBlock(Sum(*branches), channels_in, nn.ReLU()), mix)


def of(block: Any) -> Block:
    """A block of ours without its activation."""
    return lambda i, o, stride: block(i, o, stride=stride, act=None)


# By name; the second says which of torch's exporters writes it.
NETWORKS: Mapping[str, tuple[Block, str]] = {
    "RepVGG": (of(RepVGGBlock), "dynamo"),
    "MobileOne, k=4": (of(MobileOneBlock), "dynamo"),
    "ACNet": (of(ACBlock), "dynamo"),
    "DBB": (of(DiverseBranchBlock), "dynamo"),
    "DBB, border in place": (PaperDiverseBranch, "dynamo"),
    "DBB, border in place, TorchScript": (PaperDiverseBranch, "script"),
    "linear expansion": (expansion, "dynamo"),
    "dilated branches": (dilated, "dynamo"),
}


class Net(nn.Module):
    """Blocks, each with an activation, the mean over space, and a classifier."""

    def __init__(self, block: Block, widths: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, stride in widths:
            layers += [block(channels, width, stride), nn.ReLU()]
            channels = width
        self.features, self.head = nn.Sequential(*layers), nn.Linear(channels, 10)

    def forward(self, x: Any) -> Any:
        return self.head(self.features(x).mean((2, 3)))


def export(name: str, path: Path, widths: Sequence[tuple[int, int]] = WIDTHS, size: int = SIZE) -> None:
    block, exporter = NETWORKS[name]
    torch.manual_seed(0)
    net = trained(Net(block, widths), seed=0)
    x = torch.randn(1, 3, size, size)
    names = {"input_names": ["x"], "output_names": ["y"]}
    if exporter == "dynamo":
        program = torch.onnx.export(net, (x,), dynamo=True, verbose=False, **names)
        assert program is not None
        path.write_bytes(program.model_proto.SerializeToString())
    else:
        torch.onnx.export(net, (x,), path, dynamo=False, **names)


def main() -> int:
    warnings.simplefilter("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    folder = Path(sys.argv[1])
    (folder / "small").mkdir(parents=True, exist_ok=True)
    for name in NETWORKS:
        export(name, folder / f"{name}.onnx")
        if NETWORKS[name][1] == "dynamo":
            export(name, folder / "small" / f"{name}.onnx", SMALL_WIDTHS, SMALL_SIZE)
        print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
