"""Train-time blocks written out in torch, as people have them, and both of its exporters."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from typing import Any

import onnx
import torch
from exports import BorderedBatchNorm
from torch import nn

logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def conv_bn(i: int, o: int, k: int, stride: int = 1, padding: Any = None, groups: int = 1) -> nn.Sequential:
    padding = k // 2 if padding is None else padding
    return nn.Sequential(nn.Conv2d(i, o, k, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(o))


class RepVGG(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.dense, self.point = conv_bn(i, o, 3, stride), conv_bn(i, o, 1, stride)
        self.skip = nn.BatchNorm2d(i) if i == o and stride == 1 else None

    def forward(self, x: Any) -> Any:
        y = self.dense(x) + self.point(x)
        return y if self.skip is None else y + self.skip(x)


class MobileOne(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1, k: int = 4) -> None:
        super().__init__()
        self.branches = nn.ModuleList(conv_bn(i, o, 3, stride) for _ in range(k))
        self.scale = conv_bn(i, o, 1, stride)
        self.skip = nn.BatchNorm2d(i) if i == o and stride == 1 else None

    def forward(self, x: Any) -> Any:
        y = self.scale(x)
        for branch in self.branches:
            y = y + branch(x)
        return y if self.skip is None else y + self.skip(x)


class ACNet(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.square = conv_bn(i, o, 3, stride)
        self.wide = nn.Sequential(nn.Conv2d(i, o, (1, 3), stride, (0, 1), bias=False), nn.BatchNorm2d(o))
        self.tall = nn.Sequential(nn.Conv2d(i, o, (3, 1), stride, (1, 0), bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Any) -> Any:
        return self.square(x) + self.wide(x) + self.tall(x)


class Expansion(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(i, 2 * o, 1, bias=False),
            nn.Conv2d(2 * o, 2 * o, 3, stride, 1, bias=False),
            nn.Conv2d(2 * o, o, 1),
        )

    def forward(self, x: Any) -> Any:
        return self.layers(x)


class DiverseBranch(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.origin, self.point = conv_bn(i, o, 3, stride), conv_bn(i, o, 1, stride)
        self.average = nn.Sequential(
            nn.Conv2d(i, o, 1, bias=False), BorderedBatchNorm(o, 1), nn.AvgPool2d(3, stride), nn.BatchNorm2d(o)
        )
        self.chain = nn.Sequential(
            nn.Conv2d(i, i, 1, bias=False), BorderedBatchNorm(i, 1), conv_bn(i, o, 3, stride, 0)
        )

    def forward(self, x: Any) -> Any:
        return self.origin(x) + self.point(x) + self.average(x) + self.chain(x)


class Net(nn.Module):
    """Three blocks with activations between them, a pooling and a classifier."""

    def __init__(self, block: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.features = nn.Sequential(block(3, 8, 2), nn.ReLU(), block(8, 8), nn.ReLU(), block(8, 16, 2), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, x: Any) -> Any:
        return self.head(self.features(x).mean((2, 3)))


BLOCKS = {
    "RepVGG": RepVGG,
    "MobileOne": MobileOne,
    "ACNet": ACNet,
    "linear expansion": Expansion,
    "DBB": DiverseBranch,
}


def trained(block: Callable[..., nn.Module], seed: int = 0) -> nn.Module:
    """A net with statistics and scales as training leaves them: none is 0 or 1."""
    torch.manual_seed(seed)
    net = Net(block).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return net


def export(net: nn.Module, x: Any, exporter: str, free: bool = False) -> onnx.ModelProto:
    """The model that ``exporter`` ("script" or "dynamo") makes; ``free`` leaves the batch open."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            shapes = ({0: torch.export.Dim("N")},) if free else None
            program = torch.onnx.export(net, (x,), dynamo=True, verbose=False, dynamic_shapes=shapes)
            assert program is not None
            return program.model_proto
        buffer = io.BytesIO()
        axes = {"x": {0: "N"}} if free else None
        torch.onnx.export(net, (x,), buffer, dynamo=False, input_names=["x"], dynamic_axes=axes)
        return onnx.load_from_string(buffer.getvalue())
