"""Expressions are values: how they are written, named, checked and stored."""

from __future__ import annotations

import dataclasses
import json

import pytest

from refold.algebra import Window
from refold.blocks import (
    BLOCKS,
    AveragePool,
    BatchNorm,
    Chain,
    Conv,
    Identity,
    Scale,
    Sum,
    average_pool,
    centered,
    channels_out,
    convolution,
    diverse_branch,
    from_config,
    interpret,
    mobileone,
    parameters,
    repvgg,
    to_config,
)

bn, conv = BatchNorm(), convolution(4, 3)


def test_operators_build_flat_chains_and_sums():
    assert conv | bn | bn == Chain(conv, bn, bn)
    assert conv | (bn | conv) == Chain(conv, bn, conv)
    assert Scale() * (conv | bn) == Chain(conv, bn, Scale())
    assert 2.0 * conv == Chain(conv, Scale(2.0, trainable=False))
    assert conv + bn + Identity() == Sum(conv, bn, Identity())
    assert conv - bn == Sum(conv, Chain(bn, Scale(-1.0, trainable=False)))
    assert Sum(conv) - bn == conv - bn


def test_expressions_are_values():
    assert repvgg(4, 4) == repvgg(4, 4)
    assert hash(repvgg(4, 4)) == hash(repvgg(4, 4))
    assert repvgg(4, 4) != repvgg(4, 4, alpha=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        conv.filters = 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sum(conv).terms = ()


def test_the_names_of_parameters_are_these():
    norm = ("gamma", "beta", "mean", "variance")
    assert list(parameters(repvgg(4, 4, alpha=True), 4)) == [
        "branch0/conv/kernel",
        *(f"branch0/batch_norm/{name}" for name in norm),
        "branch1/conv/kernel",
        *(f"branch1/batch_norm/{name}" for name in norm),
        "branch1/scale/factor",
        *(f"branch2/batch_norm/{name}" for name in norm),
    ]
    assert list(parameters(Sum(conv) | conv | conv | Scale(2.0, trainable=False), 4)) == [
        "sum/branch0/conv/kernel",
        "conv/kernel",
        "conv1/kernel",
    ]
    assert list(parameters(convolution(4, 1, bias=True), 4)) == ["conv/kernel", "conv/bias"]


def test_a_branch_more_leaves_the_other_names_alone():
    few, many = parameters(mobileone(4, 6, branches=2), 4), parameters(mobileone(4, 6, branches=3), 4)
    assert set(few) < set(many)


def test_the_shapes_of_parameters():
    shapes = parameters(diverse_branch(4, 6, (3, 5), groups=2, hidden=8), 4)
    assert shapes["branch0/conv/kernel"] == (6, 2, 3, 5)
    assert shapes["branch2/conv/kernel"] == (8, 2, 1, 1)
    assert shapes["branch2/batch_norm/mean"] == (8,)
    assert shapes["branch2/conv1/kernel"] == (6, 4, 3, 5)
    assert parameters(Scale(per_channel=True), 3) == {"scale/factor": (3,)}
    assert parameters(Scale(), 3) == {"scale/factor": ()}


def test_centered_padding_depends_on_the_kernel_only():
    assert centered(3) == ((1, 1), (1, 1))
    assert centered((2, 5), (1, 2)) == ((0, 1), (4, 4))
    for taps in range(1, 6):
        for stride in range(1, 4):
            (window,) = convolution(1, taps, stride, 2, axes=1).windows
            assert [window.output_size(n) for n in range(1, 9)] == [-(-n // stride) for n in range(1, 9)]


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="do not split into 3 groups"):
        convolution(4, 3, groups=3)
    with pytest.raises(ValueError, match="5 channels do not split into 2 groups"):
        parameters(convolution(4, 3, groups=2), 5)
    with pytest.raises(ValueError, match="does not fit 2 spatial axes"):
        convolution(4, (3, 3, 3))
    with pytest.raises(ValueError, match="conv: 2 windows do not fit 1 spatial axes"):
        parameters(conv, 4, axes=1)
    with pytest.raises(ValueError, match=r"different numbers of channels \(4, 3\)"):
        channels_out(Sum(conv, Identity()), 3)
    with pytest.raises(ValueError, match="at least one"):
        Sum()
    with pytest.raises(ValueError, match="at least one"):
        Chain()
    with pytest.raises(ValueError, match="0 or more"):
        Conv(4, (Window(before=-1, after=0),))
    with pytest.raises(ValueError, match="0 or more"):
        Conv(4, (Window(3, 2, floating=True),))
    with pytest.raises(ValueError, match="no dilation"):
        AveragePool((Window(3, 1, 2),))


def test_interpret_goes_through_every_leaf_once():
    expression = (conv | Sum(bn, Scale() * Identity(), average_pool(3))) | bn
    visited = interpret(expression, (), lambda path, leaf, seen: (*seen, path), lambda seen: sum(seen, ()))
    assert visited == (
        *("conv", "sum/branch0/batch_norm"),
        *("conv", "sum/branch1/scale"),
        *("conv", "sum/branch2/average_pool"),
        "batch_norm",
    )


@pytest.mark.parametrize("block", BLOCKS)
def test_an_expression_survives_as_json(block):
    expression = block(4, 4, 3, 2, groups=2) | Scale(0.5, per_channel=True) | Sum(Identity(), -1.0 * Identity())
    assert from_config(json.loads(json.dumps(to_config(expression)))) == expression


@pytest.mark.parametrize("config", [{}, {"kind": "lambda"}, {"kind": "conv"}, {"kind": "scale", "code": 1}])
def test_other_data_is_no_expression(config):
    with pytest.raises(ValueError, match="of an expression"):
        from_config(config)
