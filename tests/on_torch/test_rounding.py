"""Where the error of a folded block comes from: one convolution in float32, and not its weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from zoo import conv_bn, made, randomize

import refold

IMAGE = torch.randn(2, 32, 20, 20, generator=torch.Generator().manual_seed(1))


def norm_behind_the_sum() -> Any:
    """QARepVGG: the identity and the pointwise convolution have no batch norm of their own."""
    return made(
        lambda s, x: s.norm(s.dense(x) + s.point(x) + x),
        dense=conv_bn(32, 32), point=nn.Conv2d(32, 32, 1), norm=nn.BatchNorm2d(32),
    )  # fmt: skip


def branches_that_cancel() -> Any:
    """FastViT's mixers: the difference of two branches, scaled, beside an identity."""
    model = made(
        lambda s, x: x + s.scale * (s.mixed(x) - s.norm(x)),
        mixed=conv_bn(32, 32, groups=32), norm=nn.BatchNorm2d(32), scale=nn.Parameter(torch.empty(32, 1, 1)),
    )  # fmt: skip
    return randomize(model, 2)


def distance(one: Any, two: Any) -> float:
    return float((one.double() - two.double()).square().mean().sqrt())


@pytest.mark.parametrize("build", [norm_behind_the_sum, branches_that_cancel])
def test_the_weights_are_nearer_to_the_function_than_the_original_is(build: Any) -> None:
    model = build()
    plain = refold.fold(model, IMAGE)
    (conv,) = (module for module in plain.modules() if isinstance(module, nn.Conv2d))
    twice = copy.deepcopy(model).double()
    with torch.no_grad():
        wanted = twice(IMAGE.double())
        # The weights by hand: the answer to one in each channel, in float64.
        zero = torch.zeros(1, 32, 5, 5, dtype=torch.float64)
        bias = twice(zero)
        taps = []
        for channel in range(32):
            one = zero.clone()
            one[0, channel, 2, 2] = 1.0
            taps.append((twice(one) - bias)[0, :, 1:4, 1:4].flip(1, 2))
        kernel = torch.stack(taps, 1)
        kernel = kernel if conv.groups == 1 else kernel.diagonal().movedim(-1, 0)[:, None]
        by_hand = copy.deepcopy(conv)
        by_hand.weight.copy_(kernel)
        by_hand.bias.copy_(bias[0, :, 2, 2])
        own, folded = distance(model(IMAGE), wanted), distance(plain(IMAGE), wanted)
        weights_alone = distance(copy.deepcopy(plain).double()(IMAGE.double()), wanted)
        assert weights_alone < own
        assert weights_alone < folded
        # The fold that is made by hand, of weights that are exact but for one rounding, has the same error.
        assert folded == pytest.approx(distance(by_hand(IMAGE), wanted), rel=0.05)
    assert refold.prove(model, plain, IMAGE).ok
