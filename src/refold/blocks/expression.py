"""Train-time blocks as expressions: a sum of branches, each a chain of simple parts.

    conv, bn, alpha = partial(convolution, 64), BatchNorm(), Scale()
    Sum(conv(3) | bn, alpha * (conv(1) | bn), Identity() | bn)

An expression says what is computed and which parameters that takes; it holds no numbers and knows no
framework. Expressions are values: where one stands twice (``bn`` above), each place has parameters of its
own. The family is closed, so functions ``match`` on it; most are an :func:`interpret` away.

Parameters have names that do not change when a branch is added: ``branch0/conv/kernel``,
``branch1/batch_norm/mean``. A branch counts from 0; a part that its chain has more than once is numbered
from the second on (``conv``, ``conv1``); a top level that is no sum has no branch in its names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, assert_never, cast, final

from refold.algebra import Window

Sizes = int | tuple[int, ...]
# Padded positions (before, after), per axis.
Widths = tuple[tuple[int, int], ...]

T = TypeVar("T")


class Operators:
    """How expressions are written down: ``a | b`` (b after a), ``a + b``, ``a - b``, ``2.0 * a``."""

    __slots__ = ()

    def __or__(self, following: Expression) -> Chain:
        return Chain(cast("Expression", self), following)

    def __add__(self, other: Expression) -> Sum:
        return Sum(cast("Expression", self), other)

    def __sub__(self, other: Expression) -> Sum:
        return Sum(cast("Expression", self), -1.0 * other)

    def __rmul__(self, factor: float) -> Chain:
        return Chain(cast("Expression", self), Scale(float(factor), trainable=False))


@final
@dataclass(frozen=True, slots=True)
class Conv(Operators):
    """A convolution to ``filters`` channels, with one window per spatial axis; see :func:`convolution`.

    Parameters: ``kernel (filters, in/groups, *taps)`` and, with ``bias``, ``bias (filters,)``.
    """

    filters: int
    windows: tuple[Window, ...]
    groups: int = 1
    bias: bool = False

    def __post_init__(self) -> None:
        if self.filters < 1 or self.groups < 1 or self.filters % self.groups:
            raise ValueError(f"{self.filters} filters do not split into {self.groups} groups")
        _check_windows(self.windows)


@final
@dataclass(frozen=True, slots=True)
class BatchNorm(Operators):
    """Batch normalization over all axes but the channels (arXiv:1502.03167).

    While training, each moving statistic becomes ``momentum * old + (1 - momentum) * batch``. Parameters,
    all of shape ``(channels,)``: ``gamma``, ``beta``, ``mean``, ``variance``.
    """

    epsilon: float = 1e-3
    momentum: float = 0.99


@final
@dataclass(frozen=True, slots=True)
class Scale(Operators):
    """A factor, one number for all channels or one ``per_channel``, that starts at ``initial``.

    Parameter: ``factor``, of shape ``()`` or ``(channels,)``; none if it is not ``trainable``.
    """

    initial: float = 1.0
    per_channel: bool = False
    trainable: bool = True

    def __mul__(self, scaled: Expression) -> Chain:
        return Chain(scaled, self)


@final
@dataclass(frozen=True, slots=True)
class AveragePool(Operators):
    """The mean over each window, padded zeros counted; see :func:`average_pool`. No parameters."""

    windows: tuple[Window, ...]

    def __post_init__(self) -> None:
        _check_windows(self.windows)
        if any(window.dilation > 1 and window.taps > 1 for window in self.windows):
            raise ValueError("an average pool has no dilation")


@final
@dataclass(frozen=True, slots=True)
class Identity(Operators):
    """Its input. No parameters."""


@final
@dataclass(frozen=True, init=False, slots=True)
class Chain(Operators):
    """Its parts one after the other; chains in a chain are one chain."""

    parts: tuple[Expression, ...]

    def __init__(self, *parts: Expression) -> None:
        if not parts:
            raise ValueError("a chain has at least one part")
        flat = tuple(inner for part in parts for inner in (part.parts if isinstance(part, Chain) else (part,)))
        object.__setattr__(self, "parts", flat)


@final
@dataclass(frozen=True, init=False, slots=True)
class Sum(Operators):
    """The sum of its terms, all of which read the same input."""

    terms: tuple[Expression, ...]

    def __init__(self, *terms: Expression) -> None:
        if not terms:
            raise ValueError("a sum has at least one term")
        object.__setattr__(self, "terms", terms)

    def __add__(self, other: Expression) -> Sum:
        return Sum(*self.terms, other)

    def __sub__(self, other: Expression) -> Sum:
        return Sum(*self.terms, -1.0 * other)


# Batch normalization as Keras sets it up.
NORM = BatchNorm()

Leaf = Conv | BatchNorm | Scale | AveragePool
Expression = Leaf | Identity | Chain | Sum


def convolution(
    filters: int,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    padding: Widths | None = None,
    groups: int = 1,
    bias: bool = False,
    axes: int = 2,
) -> Conv:
    """A :class:`Conv` from sizes, each one number or one per axis; ``padding`` defaults to :func:`centered`.

    Raises ValueError if a size does not fit ``axes``, or the filters do not split into the groups.
    """
    return Conv(filters, windows(kernel_size, stride, dilation, padding, axes), groups, bias)


def average_pool(size: Sizes, stride: Sizes = 1, padding: Widths | None = None, axes: int = 2) -> AveragePool:
    """An :class:`AveragePool` from sizes, as in :func:`convolution`."""
    return AveragePool(windows(size, stride, 1, padding, axes))


def centered(kernel_size: Sizes, dilation: Sizes = 1, axes: int = 2) -> Widths:
    """The padding under which a kernel has ``ceil(size / stride)`` outputs, each around its own place.

    It depends on the kernel alone: branches of any kernel sizes stay aligned at every input size and
    every stride. Keras' and TensorFlow's ``'same'`` is this at stride 1, and gives as many outputs
    otherwise, but then moves the kernel with the size of the input, and each kernel differently.
    """
    reaches = [d * (k - 1) for k, d in zip(per_axis(kernel_size, axes), per_axis(dilation, axes), strict=True)]
    return tuple((reach // 2, reach - reach // 2) for reach in reaches)


def windows(
    kernel_size: Sizes, stride: Sizes, dilation: Sizes, padding: Widths | None, axes: int
) -> tuple[Window, ...]:
    """One window per axis. A single tap has no dilation."""
    widths = centered(kernel_size, dilation, axes) if padding is None else padding
    sizes = (per_axis(value, axes) for value in (kernel_size, stride, dilation))
    return tuple(
        Window(taps, step, spread if taps > 1 else 1, before, after)
        for taps, step, spread, (before, after) in zip(*sizes, widths, strict=True)
    )


def per_axis(value: Sizes, axes: int) -> tuple[int, ...]:
    """``value`` for each axis. Raises ValueError if it has another number of them."""
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes:
        raise ValueError(f"{value} does not fit {axes} spatial axes")
    return values


def interpret(
    expression: Expression,
    value: T,
    apply: Callable[[str, Leaf, T], T],
    total: Callable[[Sequence[T]], T],
) -> T:
    """What ``expression`` makes of ``value``: a tensor, a shape, an affine convolution.

    ``apply(path, leaf, value)`` is one leaf on a value; ``total`` is the sum of what the branches give.
    Leaves are visited in the order of their names.
    """
    return _interpret(expression, "", value, apply, total)


def _interpret(
    expression: Expression,
    path: str,
    value: T,
    apply: Callable[[str, Leaf, T], T],
    total: Callable[[Sequence[T]], T],
) -> T:
    match expression:
        case Sum():
            return total(
                [
                    _interpret(term, f"{path}branch{index}/", value, apply, total)
                    for index, term in enumerate(expression.terms)
                ]
            )
        case Chain():
            seen: Counter[str] = Counter()
            for part in expression.parts:
                kind = _kind(part)
                name = f"{path}{kind}{seen[kind] or ''}"
                seen[kind] += 1
                match part:
                    case Conv() | BatchNorm() | Scale() | AveragePool():
                        value = apply(name, part, value)
                    case _:
                        value = _interpret(part, f"{name}/", value, apply, total)
            return value
        case Identity():
            return value
        case Conv() | BatchNorm() | Scale() | AveragePool():
            return _interpret(Chain(expression), path, value, apply, total)
        case _:
            assert_never(expression)


def _kind(part: Expression) -> str:
    match part:
        case Conv():
            return "conv"
        case BatchNorm():
            return "batch_norm"
        case Scale():
            return "scale"
        case AveragePool():
            return "average_pool"
        case Identity():
            return "identity"
        case Sum():
            return "sum"
        case Chain():
            return "chain"
        case _:
            assert_never(part)


def parameters(expression: Expression, channels_in: int, axes: int = 2) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters, by name, for an input of ``channels_in`` channels.

    Raises ValueError, in words, if the parts do not fit each other, the channels or the axes.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def apply(path: str, leaf: Leaf, channels: int) -> int:
        shapes.update({f"{path}/{name}": shape for name, shape in _shapes(path, leaf, channels, axes).items()})
        return leaf.filters if isinstance(leaf, Conv) else channels

    interpret(expression, channels_in, apply, _common)
    return shapes


def channels_out(expression: Expression, channels_in: int) -> int:
    """The number of channels that it gives. Raises ValueError if the branches disagree."""

    def apply(path: str, leaf: Leaf, channels: int) -> int:
        return leaf.filters if isinstance(leaf, Conv) else channels

    return interpret(expression, channels_in, apply, _common)


def _common(branches: Sequence[int]) -> int:
    if len(set(branches)) > 1:
        numbers = ", ".join(str(number) for number in branches)
        raise ValueError(f"the branches have different numbers of channels ({numbers})")
    return branches[0]


def _shapes(path: str, leaf: Leaf, channels: int, axes: int) -> dict[str, tuple[int, ...]]:
    match leaf:
        case Conv():
            _check_axes(path, leaf.windows, axes)
            if channels % leaf.groups:
                raise ValueError(f"{path}: {channels} channels do not split into {leaf.groups} groups")
            taps = tuple(window.taps for window in leaf.windows)
            kernel = {"kernel": (leaf.filters, channels // leaf.groups, *taps)}
            return kernel | {"bias": (leaf.filters,)} if leaf.bias else kernel
        case BatchNorm():
            return dict.fromkeys(("gamma", "beta", "mean", "variance"), (channels,))
        case Scale():
            return {"factor": (channels,) if leaf.per_channel else ()} if leaf.trainable else {}
        case AveragePool():
            _check_axes(path, leaf.windows, axes)
            return {}
        case _:
            assert_never(leaf)


def _check_axes(path: str, own: tuple[Window, ...], axes: int) -> None:
    if len(own) != axes:
        raise ValueError(f"{path}: {len(own)} windows do not fit {axes} spatial axes")


def _check_windows(own: tuple[Window, ...]) -> None:
    if any(window.floating or window.before < 0 or window.after < 0 for window in own):
        raise ValueError(f"the padding of a part is a number of positions, 0 or more, got {own}")
