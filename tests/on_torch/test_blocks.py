"""The blocks: the train form, the one convolution, and what loads into what."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import randomize

import refold
from refold.blocks import BatchNorm, Identity, Scale, Sum, convolution
from refold.torch import ACBlock, DiverseBranchBlock, ExpressionBlock, MobileOneBlock, RepVGGBlock

BLOCKS = (RepVGGBlock, ACBlock, DiverseBranchBlock, MobileOneBlock)


def wave(channels: int, axes: int, size: int = 7) -> Any:
    return torch.randn(2, channels, *(size,) * axes, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("block", BLOCKS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    axes=st.integers(1, 3),
    kernel=st.sampled_from([1, 2, 3, 5]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    filters=st.sampled_from([4, 8]),
    seed=st.integers(0, 9),
)
def test_one_convolution_is_the_train_form(
    block: Any, axes: int, kernel: int, stride: int, dilation: int, groups: int, filters: int, seed: int
) -> None:
    if block is DiverseBranchBlock:
        dilation = 1  # its pool has none
    train = randomize(block(4, filters, kernel, stride, dilation, groups, axes=axes), seed)
    x = wave(4, axes)
    exact = copy.deepcopy(train).double()(x.double())
    deployed = copy.deepcopy(train)
    deployed.convert_to_deploy()
    assert len(list(deployed.parameters())) == 2
    scale = exact.abs().max().item() or 1.0
    own, converted = ((form(x).double() - exact).abs().max().item() / scale for form in (train, deployed))
    assert converted <= max(4 * own, 3e-6)
    kernel_and_bias = train.get_equivalent_kernel_bias()
    assert all(
        torch.equal(a, b) for a, b in zip(kernel_and_bias, deployed.get_equivalent_kernel_bias(), strict=True)
    )


@pytest.mark.parametrize("block", BLOCKS)
def test_folds_whole_and_is_proved(block: Any) -> None:
    model = randomize(nn.Sequential(block(4, 4), block(4, 8, stride=2)))
    x = wave(4, 2)
    plain = refold.fold(model, x)
    assert set(plain.state_dict()) == {f"{i}.conv.{name}" for i in (0, 1) for name in ("weight", "bias")}
    assert refold.prove(model, plain, x).ok


@pytest.mark.parametrize("alpha", [0.7, 0.0, -1.5])
def test_alpha_counts_as_it_is(alpha: float) -> None:
    block = randomize(RepVGGBlock(4, 4, alpha=True))
    with torch.no_grad():
        block.alpha.fill_(alpha)
    before = block(wave(4, 2))
    block.convert_to_deploy()
    assert block.alpha is None
    assert torch.allclose(block(wave(4, 2)), before, atol=1e-5)


def test_every_parameter_trains() -> None:
    block = RepVGGBlock(4, 4, alpha=True, act=None)
    block(wave(4, 2)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in block.parameters())


def test_converted_weights_load_into_a_deployed_block() -> None:
    block = randomize(RepVGGBlock(4, 8, stride=2))
    before = block(wave(4, 2))
    block.convert_to_deploy()
    block.convert_to_deploy()  # once more changes nothing
    fresh = RepVGGBlock(4, 8, stride=2, deploy=True).eval()
    fresh.load_state_dict(block.state_dict())
    assert torch.allclose(fresh(wave(4, 2)), before, atol=1e-5)


def test_type_device_and_frozenness_stay() -> None:
    block = randomize(RepVGGBlock(4, 4)).to(torch.bfloat16).requires_grad_(False)
    block.convert_to_deploy()
    assert {(p.dtype, p.requires_grad) for p in block.parameters()} == {(torch.bfloat16, False)}
    assert block(wave(4, 2).bfloat16()).dtype == torch.bfloat16


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="training mode, in which it is no one convolution"):
        RepVGGBlock(4, 4).convert_to_deploy()


def test_a_block_of_your_own_is_an_expression() -> None:
    conv, norm = partial(convolution, 4), BatchNorm(1e-5, 0.9)
    expression = Sum(conv(3) | norm, Scale(per_channel=True) * (conv((1, 3)) | norm), Identity())
    block = randomize(ExpressionBlock(expression, 4, nn.GELU()))
    x = wave(4, 2)
    plain = refold.fold(nn.Sequential(block).eval(), x)
    assert set(plain.state_dict()) == {"0.conv.weight", "0.conv.bias"}
    assert torch.allclose(plain(x), block(x), atol=1e-5)


def test_what_is_no_convolution_says_so() -> None:
    conv = partial(convolution, 4)
    block = randomize(ExpressionBlock(Sum(conv(3, bias=True) | conv(3)), 4))
    with pytest.raises(ValueError, match="not one convolution"):
        block.convert_to_deploy()
    with pytest.raises(ValueError, match="different numbers of channels"):
        ExpressionBlock(Sum(conv(3), convolution(6, 3)), 4)


def test_exports_and_compiles_in_training_form() -> None:
    block, x = randomize(RepVGGBlock(4, 4, alpha=True)), wave(4, 2)
    assert torch.allclose(torch.export.export(block, (x,)).module()(x), block(x), atol=1e-6)
    assert torch.allclose(torch.compile(block, backend="eager")(x), block(x), atol=1e-6)
    assert torch.allclose(torch.fx.symbolic_trace(block)(x), block(x), atol=1e-6)
