"""The demo's network in PaddlePaddle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from refold.demo import Digits, Report
from refold.paddle import RepVGGBlock, files, weight_normalization

ENDING = ".json"


class Network(nn.Layer):
    """RepVGG blocks with learnable branch scales, and a weight-normalized head with a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        plan = [(1, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1)]
        self.blocks = nn.LayerList([RepVGGBlock(a, b, stride=stride, alpha=True) for a, b, stride in plan])
        self.pool = nn.AdaptiveAvgPool2D(1)
        self.hidden = weight_normalization(nn.Linear(32, 64))
        self.norm = nn.LayerNorm(64)
        self.digit = nn.Linear(64, 10)

    def forward(self, image: Any) -> Any:
        """The scores of the digits."""
        x = image
        for block in self.blocks:
            x = block(x)
        x = self.pool(x).flatten(1)
        return self.digit(self.norm(nn.functional.relu(self.hidden(x))))


def words() -> str:
    """The framework in words."""
    return f"PaddlePaddle {paddle.__version__}"


def arranged(pixels: Any) -> Any:
    """Images ``(count, 8, 8)`` with their one channel first."""
    return pixels[:, None]


def network() -> Any:
    """The network, with the same weights in every run."""
    paddle.seed(0)
    return Network()


def size(model: Any) -> int:
    """The number of its parameters."""
    return sum(int(np.prod(tensor.shape)) for tensor in model.state_dict().values())


def train(model: Any, train: Digits, test: Digits, epochs: int, report: Report) -> None:
    """Train with Adam in batches of 64; afterwards the model is in eval mode."""
    images, labels = (paddle.to_tensor(array) for array in train)
    batches = -(-len(train[0]) // 64)
    rate = paddle.optimizer.lr.CosineAnnealingDecay(3e-3, epochs * batches)
    optimizer = paddle.optimizer.Adam(rate, parameters=model.parameters())
    rng = np.random.default_rng(0)
    for epoch in range(epochs):
        model.train()
        order, total = rng.permutation(len(train[0])), 0.0
        for batch in np.array_split(order, batches):
            picked = paddle.to_tensor(batch)
            loss = nn.functional.cross_entropy(model(images[picked]), labels[picked])
            loss.backward()
            optimizer.step()
            optimizer.clear_grad()
            rate.step()
            total += float(loss) * len(batch)
        model.eval()
        report(epoch + 1, total / len(order), float(np.mean(scores(model, test[0]).argmax(axis=1) == test[1])))


def scores(model: Any, images: Any) -> Any:
    """The scores ``(count, 10)`` of the digits."""
    with paddle.no_grad():
        return model(paddle.to_tensor(images)).numpy()


def scales(model: Any) -> dict[str, float]:
    """The learnable branch scales, by block."""
    return {f"block{place + 1}": float(block.alpha) for place, block in enumerate(model.blocks)}


def save(model: Any, path: Path) -> None:
    """Write a model as an inference program, in the place of an earlier one."""
    files.save(model, path, overwrite=True, example=(None, 1, 8, 8))
