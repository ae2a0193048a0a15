"""The demo's network in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from refold.demo import Digits, Report
from refold.torch import RepVGGBlock, files, weight_normalization

ENDING = ".pt2"


def words() -> str:
    """The framework in words."""
    return "PyTorch"


def arranged(pixels: Any) -> Any:
    """Images ``(count, 8, 8)`` with their one channel in front."""
    return pixels[:, None]


def network() -> Any:
    """RepVGG blocks with learnable branch scales, and a weight-normalized head with a layer norm."""
    torch.manual_seed(0)
    network = nn.Sequential()
    before = 1
    for index, (filters, stride) in enumerate([(16, 1), (16, 1), (32, 2), (32, 1), (32, 1)]):
        network.add_module(f"block{index + 1}", RepVGGBlock(before, filters, stride=stride, alpha=True))
        before = filters
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flat", nn.Flatten())
    network.add_module("hidden", weight_normalization(nn.Linear(before, 64)))
    network.add_module("act", nn.ReLU())
    network.add_module("layer_norm", nn.LayerNorm(64))
    network.add_module("digit", nn.Linear(64, 10))
    return network


def size(model: Any) -> int:
    """The number of its parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def train(model: Any, train: Digits, test: Digits, epochs: int, report: Report) -> None:
    """Train with Adam in batches of 64."""
    images, digits = torch.from_numpy(train[0]), torch.from_numpy(train[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(images) // 64))
    shuffled = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        model.train()
        losses = []
        order: Any = torch.randperm(len(images), generator=shuffled)
        for batch in order.split(64):
            loss: Any = nn.functional.cross_entropy(model(images[batch]), digits[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        model.eval()
        accuracy = float((scores(model, test[0]).argmax(axis=1) == test[1]).mean())
        report(epoch + 1, sum(losses) / len(losses), accuracy)


def scores(model: Any, images: Any) -> Any:
    """The scores ``(count, 10)`` of the digits."""
    with torch.no_grad():
        return model(torch.from_numpy(images)).numpy()


def scales(model: Any) -> dict[str, float]:
    """The learnable branch scales, by block."""
    blocks = {name: block for name, block in model.named_children() if isinstance(block, RepVGGBlock)}
    return {name: float(block.alpha.detach()) for name, block in blocks.items() if block.alpha is not None}


def save(model: Any, path: Path) -> None:
    """Write a model, in the place of an earlier one."""
    files.save(model, path, overwrite=True, example=(None, 1, 8, 8))
