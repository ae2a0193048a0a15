"""From an expression and its parameters to one affine convolution, by the laws of the algebra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import assert_never

import numpy as np
import numpy.typing as npt

from refold.algebra import AffineConv, Refusal, add, batch_norm, compose, identity, scale_shift
from refold.algebra import average_pool as pool
from refold.algebra import convolution as affine
from refold.blocks.expression import AveragePool, BatchNorm, Conv, Expression, Leaf, Scale, interpret
from refold.blocks.expression import parameters as shapes_of

Parameters = Mapping[str, npt.ArrayLike]


def fold(expression: Expression, parameters: Parameters, channels_in: int, axes: int = 2) -> AffineConv | Refusal:
    """The affine convolution that ``expression`` is in inference.

    ``parameters`` holds real arrays under the names and in the shapes that
    :func:`refold.blocks.expression.parameters` gives; the result is float64. Refused where a law is not
    exact (zero padding after a bias, say, or branches of different output sizes) and where the result
    would not be finite. Raises ValueError if parameters are missing, not known or of another shape.
    """
    _check(parameters, shapes_of(expression, channels_in, axes))

    def apply(path: str, leaf: Leaf, before: AffineConv | Refusal) -> AffineConv | Refusal:
        if isinstance(before, Refusal):
            return before
        return compose(_leaf(path, leaf, parameters, before.channels_out, axes), before)

    start: AffineConv | Refusal = identity(channels_in, axes)
    folded = interpret(expression, start, apply, _total)
    if isinstance(folded, AffineConv) and not folded.is_finite:
        return Refusal("the folded weights would not be finite")
    return folded


def equivalent(expression: Expression, channels_in: int, axes: int = 2) -> Conv | Refusal:
    """The one convolution that ``expression`` folds into, whatever its parameters are; refused where some
    parameters would be."""
    # Windows and groups never depend on weights; a padding that only a bias of 0 would allow is refused,
    # since no bias is 0 here.
    generic = {
        name: np.full(shape, 0.0 if name.endswith("kernel") else 1.0)
        for name, shape in shapes_of(expression, channels_in, axes).items()
    }
    folded = fold(expression, generic, channels_in, axes)
    if isinstance(folded, Refusal):
        return folded
    return Conv(folded.channels_out, folded.windows, folded.groups, bias=True)


def _total(branches: Sequence[AffineConv | Refusal]) -> AffineConv | Refusal:
    terms: list[AffineConv] = []
    for branch in branches:
        if isinstance(branch, Refusal):
            return branch
        terms.append(branch)
    return add(terms)


def _leaf(path: str, leaf: Leaf, parameters: Parameters, channels: int, axes: int) -> AffineConv:
    match leaf:
        case Conv():
            bias = parameters[f"{path}/bias"] if leaf.bias else None
            return affine(parameters[f"{path}/kernel"], bias, leaf.windows, leaf.groups)
        case BatchNorm():
            mean, variance, gamma, beta = (
                parameters[f"{path}/{name}"] for name in ("mean", "variance", "gamma", "beta")
            )
            return batch_norm(mean, variance, leaf.epsilon, gamma, beta, axes)
        case Scale():
            factor = parameters[f"{path}/factor"] if leaf.trainable else leaf.initial
            return scale_shift(np.broadcast_to(np.asarray(factor, dtype=np.float64), (channels,)), axes=axes)
        case AveragePool():
            return pool(channels, leaf.windows)
        case _:
            assert_never(leaf)


def _check(parameters: Parameters, shapes: Mapping[str, tuple[int, ...]]) -> None:
    wrong = {name: np.shape(parameters[name]) for name in shapes if name in parameters}
    complaints = [f"{name} is missing" for name in shapes if name not in parameters]
    complaints += [f"{name} is not a parameter of this expression" for name in parameters if name not in shapes]
    complaints += [
        f"{name} has the shape {shape}, not {shapes[name]}"
        for name, shape in wrong.items()
        if shape != shapes[name]
    ]
    if complaints:
        raise ValueError("; ".join(complaints))
