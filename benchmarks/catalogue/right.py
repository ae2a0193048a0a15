"""Right folds: no check may call one of them wrong."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from catalogue.nets import Case, RepBlock, conv_of, folded_stack, image, normed, stack, total, trained
from catalogue.published import Pooled


def right() -> list[Case]:
    """A few of each kind: deep ones, wide gains, large and small numbers, every geometry."""
    found = []
    for depth, spread in ((1, 0.5), (4, 0.5), (16, 0.5), (16, 0.95), (32, 0.5)):
        blocks = [RepBlock(3, 16), *(RepBlock(16, 16) for _ in range(depth - 1))]
        found.append(_stack(f"{depth} blocks, gains {1 - spread:.2g} to {1 + spread:.2g}", blocks, spread=spread))
    found += [
        _stack("two groups", [RepBlock(4, 8, groups=2), RepBlock(8, 8, groups=2)]),
        _stack("depthwise", [RepBlock(8, 8, groups=8), RepBlock(8, 16, (1,)), RepBlock(16, 16, groups=16)]),
        _stack("stride 2", [RepBlock(3, 8, stride=2), RepBlock(8, 8), RepBlock(8, 16, stride=2)]),
        _stack("dilation 2", [RepBlock(3, 8, dilation=2), RepBlock(8, 8, dilation=2)]),
        _stack("five branches", [RepBlock(3, 8, (3, 3, 3, 3, 1)), RepBlock(8, 8, (3, 3, 3, 3, 1))]),
        _stack("5x5, 3x3 and 1x1", [RepBlock(3, 8, (5, 3, 1)), RepBlock(8, 8, (5, 3, 1))]),
        _stack("large numbers", [RepBlock(3, 8), RepBlock(8, 8), RepBlock(8, 8)], scale=1e4),
        _stack("small numbers", [RepBlock(3, 8), RepBlock(8, 8), RepBlock(8, 8)], scale=1e-4),
        _pooling(),
    ]
    return found


def _stack(name: str, blocks: list[RepBlock], *, spread: float = 0.5, scale: float = 1.0, seed: int = 0) -> Case:
    model = trained(stack(blocks), seed, spread)
    with torch.no_grad():
        blocks[0].norms[0].weight.mul_(scale)
    channels = blocks[0].convs[0].in_channels
    return Case(name, model, folded_stack(model), image(channels, 16), equal=True)


def _pooling() -> Case:
    """An average pooling that counts its padding is a convolution."""
    block = trained(Pooled(6), seed=20)
    block.pool.count_include_pad = True
    ninths = torch.eye(6, dtype=torch.float64)[:, :, None, None].expand(6, 6, 3, 3) / 9
    folded = conv_of(total([normed(block.conv.weight, block.norm), normed(ninths, block.after_pool)]), padding=1)
    before, after = (nn.Sequential(layer, nn.ReLU()).eval() for layer in (block, folded))
    return Case("average pooling that counts its padding", before, after, image(6), equal=True)


def random_right(seed: int) -> Case:
    """A random stack of random blocks."""
    rng = np.random.default_rng(seed)
    groups = int(rng.choice([1, 1, 2, 4]))
    channels = int(rng.choice([4, 8, 12]))
    kernels = [tuple(int(k) for k in rng.choice([1, 3, 5], size=rng.integers(1, 5))) for _ in range(3)]
    blocks = [RepBlock(channels, channels, kernels[0], groups=groups, skip=bool(rng.integers(2)))]
    for place in range(int(rng.integers(0, 3))):
        wider = channels * int(rng.choice([1, 1, 2]))
        blocks.append(
            RepBlock(
                channels,
                wider,
                kernels[place + 1],
                stride=int(rng.choice([1, 1, 1, 2])),
                groups=int(rng.choice([1, groups])),
                dilation=int(rng.choice([1, 1, 2])),
                skip=bool(rng.integers(2)),
            )
        )
        channels = wider
    spread, scale = float(rng.uniform(0, 0.99)), float(10.0 ** rng.integers(-3, 4))
    return _stack(f"random {seed}", blocks, spread=spread, scale=scale, seed=seed)
