"""The way back: parameters under which a block is, in inference, a convolution that is given.

A block has many more parameters than the convolution, so it can start at any convolution. All branches but one
are drawn at random and start small; the one that has the window of the convolution itself gets what is missing.
Each batch norm starts as the identity map (up to the factor that makes its branch small) at the statistics that it
is given, so that a batch with these statistics gives the same in training as in inference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, final

import numpy as np

from refold.algebra import AffineConv, Refusal, Window
from refold.algebra.affine import Array
from refold.blocks.expression import (
    BatchNorm,
    Chain,
    Conv,
    Expression,
    Leaf,
    Scale,
    Sizes,
    Sum,
    channels_out,
    interpret,
    parameters,
)
from refold.blocks.fold import equivalent, fold

# The size of each drawn branch beside that of the convolution (Frobenius norms): enough to be trained apart from
# the others, and too little to cost the numbers of the convolution their digits where the branches add up again.
SHARE = 0.1

Numbers = Mapping[str, Array]
# Mean and variance, by channel, of what a batch norm reads.
Statistics = tuple[Array, Array]
# What is left of numbers once they are stored.
Rounding = Callable[[Array], Array]


class BlockFunction(Protocol):
    """What makes the expression of a block in the place of a convolution; each in :data:`refold.blocks.BLOCKS` is
    one. None leaves the convolution as it is."""

    def __call__(
        self,
        channels_in: int,
        filters: int,
        kernel_size: Sizes,
        stride: Sizes,
        dilation: Sizes,
        groups: int,
        *,
        norm: BatchNorm,
        axes: int,
    ) -> Expression | None:
        """The expression."""
        ...


@final
@dataclass(frozen=True, eq=False, slots=True)
class Unfolded:
    """An expression with the numbers of its parameters, under which it is a certain convolution."""

    expression: Expression
    target: AffineConv
    numbers: Numbers


# How a convolution is unfolded, by its path, itself, the batch norm and the rounding of its framework.
Choose = Callable[[str, AffineConv, BatchNorm, Rounding], Unfolded | Refusal]


def stand_in(block: BlockFunction, target: AffineConv, norm: BatchNorm) -> Expression | Refusal:
    """The expression of ``block`` in the place of ``target``, if it is a convolution over the same positions."""
    if not 1 <= len(target.windows) <= 3:
        return Refusal("it has no spatial axes, and blocks have one to three")
    if target.is_transposed or any(window.floating for window in target.windows):
        return Refusal(
            "it reads other positions than the convolutions of a block (transposed, or padded by its size)"
        )
    axes = len(target.windows)
    taps, strides, dilations = (
        tuple(getattr(window, name) for window in target.windows) for name in ("taps", "stride", "dilation")
    )
    channels = (target.channels_in, target.channels_out)
    try:
        expression = block(*channels, taps, strides, dilations, target.groups, norm=norm, axes=axes)
        if expression is None:
            return Refusal("the block leaves it")
        plain = equivalent(expression, target.channels_in, axes)
    except ValueError as error:
        return Refusal(f"the block does not fit it: {error}")
    if isinstance(plain, Refusal):
        return Refusal(f"the block is not one convolution: {plain.reason}")
    if channels_out(expression, target.channels_in) != target.channels_out or plain.groups != target.groups:
        return Refusal("the block has other channels or groups")
    if plain.windows != target.windows:
        return Refusal(f"it reads {_told(target.windows)}, and the block {_told(plain.windows)}")
    return expression


def unfold(
    expression: Expression, target: AffineConv, *, seed: int = 0, rounding: Rounding = np.asarray
) -> Unfolded | Refusal:
    """``expression`` with parameters under which it is ``target`` in inference, drawn with ``seed``.

    The numbers are float64 values that ``rounding`` leaves as they are; what rounding does to the drawn ones is
    made good in the branch that gets what is missing. Refused if no branch can get it: that is one with the window
    and the groups of the convolution, followed by nothing but batch norms and factors.
    """
    main = _main(expression, target)
    if isinstance(main, Refusal):
        return main
    numbers = _drawn(expression, target, np.random.default_rng(seed))
    # One number, or one per channel, per branch makes it small: that of its last part.
    knobs = [_knob(expression, prefix) for prefix in _prefixes(expression) if prefix != main.prefix]
    silent = numbers | {knob: np.zeros_like(numbers[knob]) for knob in knobs if knob} | _none(numbers, main.kernel)
    nothing = _folded(expression, silent, target)
    if isinstance(nothing, Refusal):
        return nothing
    wanted = SHARE * (_norm(target.kernel) or 1.0)
    for knob in filter(None, knobs):
        alone = _folded(expression, silent | {knob: numbers[knob]}, target)
        size = 0.0 if isinstance(alone, Refusal) else _norm(alone.kernel - nothing.kernel)
        numbers[knob] = numbers[knob] * (wanted / size if size > 0.0 else 1.0)
    return _completed(Unfolded(expression, target, {k: rounding(v) for k, v in numbers.items()}), rounding)


def at_statistics(
    unfolded: Unfolded, statistics: Mapping[str, Statistics], *, rounding: Rounding = np.asarray
) -> Unfolded | Refusal:
    """The same, with other statistics in the batch norms that ``statistics`` names by their path, and with factors
    and offsets that make up for them."""
    numbers = dict(unfolded.numbers)
    for path, leaf in leaves_of(unfolded.expression).items():
        if isinstance(leaf, BatchNorm) and path in statistics:
            mean, variance = map(rounding, statistics[path])
            gain = numbers[f"{path}/gamma"] / np.sqrt(numbers[f"{path}/variance"] + leaf.epsilon)
            numbers[f"{path}/beta"] = rounding(numbers[f"{path}/beta"] + gain * (mean - numbers[f"{path}/mean"]))
            numbers[f"{path}/gamma"] = rounding(gain * np.sqrt(variance + leaf.epsilon))
            numbers |= {f"{path}/mean": mean, f"{path}/variance": variance}
    return _completed(Unfolded(unfolded.expression, unfolded.target, numbers), rounding)


@final
class Moments:
    """Mean and variance by channel of all numbers that were added, whatever their order of magnitude (the pairwise
    update of Chan, Golub and LeVeque 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: Array = np.zeros(1)
        self._squares: Array = np.zeros(1)

    def add(self, channels: Array) -> None:
        """More numbers, of shape ``(channels, ...)``."""
        flat = channels.reshape(len(channels), -1)
        if flat.shape[1]:
            mean = flat.mean(axis=1)
            count = self.count + flat.shape[1]
            apart = mean - self._mean
            self._squares = (
                self._squares
                + np.square(flat - mean[:, None]).sum(axis=1)
                + apart**2 * (self.count * flat.shape[1] / count)
            )
            self._mean = self._mean + apart * (flat.shape[1] / count)
            self.count = count

    @property
    def statistics(self) -> Statistics:
        """Mean and variance (that of the numbers themselves, divided by their count)."""
        return self._mean, self._squares / self.count


def seen(moments: Mapping[str, Moments]) -> dict[str, Statistics]:
    """The statistics of the batch norms that saw finite numbers."""
    pairs = {path: found.statistics for path, found in moments.items() if found.count}
    return {path: pair for path, pair in pairs.items() if all(np.all(np.isfinite(array)) for array in pair)}


@final
class Watch:
    """What the batch norms of some blocks see: ``moments`` by the place of a block and the path of a norm in it."""

    def __init__(self, made: Mapping[str, tuple[Any, Unfolded]]) -> None:
        self.made = made
        self.moments: dict[str, dict[str, Moments]] = {
            place: {
                path: Moments()
                for path, leaf in leaves_of(unfolded.expression).items()
                if isinstance(leaf, BatchNorm)
            }
            for place, (_, unfolded) in made.items()
        }

    def norms(self) -> Iterator[tuple[Any, str, Moments]]:
        """Each batch norm: its block, its path there, and where to note what it reads."""
        for place, moments in self.moments.items():
            for path, own in moments.items():
                yield self.made[place][0], path, own

    def settle(self, rounding: Callable[[Any], Rounding]) -> None:
        """Let the batch norms start at what they saw; ``rounding`` is that of a block."""
        for place, (block, unfolded) in self.made.items():
            moved = at_statistics(unfolded, seen(self.moments[place]), rounding=rounding(block))
            if isinstance(moved, Unfolded):
                block.set_numbers(moved.numbers)


def leaves_of(expression: Expression) -> dict[str, Leaf]:
    """The leaves of an expression by their path, in order."""
    found: dict[str, Leaf] = {}
    interpret(expression, None, lambda path, leaf, _: found.update({path: leaf}), lambda _: None)
    return found


# ---- the branch that gets what is missing ----------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class _Main:
    """The start of its leaves' names, its kernel, and its offset if it has one."""

    prefix: str
    kernel: str
    offset: str | None


def _main(expression: Expression, target: AffineConv) -> _Main | Refusal:
    for prefix, branch in _prefixes(expression).items():
        first, *others = branch.parts if isinstance(branch, Chain) else (branch,)
        fits = isinstance(first, Conv) and (first.windows, first.groups) == (target.windows, target.groups)
        if fits and all(isinstance(part, BatchNorm) or _is_factor(part) for part in others):
            leaves = {path: leaf for path, leaf in leaves_of(expression).items() if path.startswith(prefix)}
            norms = [f"{path}/beta" for path, leaf in leaves.items() if isinstance(leaf, BatchNorm)]
            kernel = f"{prefix}conv/kernel"
            own = [f"{prefix}conv/bias"] if isinstance(first, Conv) and first.bias else []
            return _Main(prefix, kernel, next(iter([*norms[::-1], *own]), None))
    return Refusal("no branch of the block has the kernel of the whole convolution to itself")


def _is_factor(part: Expression) -> bool:
    return isinstance(part, Scale) and part.initial != 0.0


def _completed(unfolded: Unfolded, rounding: Rounding) -> Unfolded | Refusal:
    """What is missing goes into the main branch: first of the kernel, then of the bias."""
    expression, target, numbers = unfolded.expression, unfolded.target, dict(unfolded.numbers)
    main = _main(expression, target)
    assert isinstance(main, _Main)
    without = _folded(expression, numbers | _none(numbers, main.kernel), target)
    ones = _folded(expression, numbers | {main.kernel: np.ones_like(numbers[main.kernel])}, target)
    if isinstance(without, Refusal):
        return without
    if isinstance(ones, Refusal):
        return ones
    # Every number of the kernel goes into the sum times the same factor, per output channel.
    factor = (ones.kernel - without.kernel)[(slice(None), *(slice(0, 1),) * (ones.kernel.ndim - 1))]
    if not np.all(factor):
        return Refusal("the block multiplies its main branch by 0")
    numbers[main.kernel] = rounding((target.kernel - without.kernel) / factor)
    now = _folded(expression, numbers, target)
    if isinstance(now, Refusal):
        return now
    missing = target.bias - now.bias
    if main.offset is None:
        if np.any(missing):
            return Refusal("the convolution has a bias, and the main branch of the block has no place for one")
        return Unfolded(expression, target, numbers)
    moved = _folded(expression, numbers | {main.offset: numbers[main.offset] + 1.0}, target)
    assert isinstance(moved, AffineConv)
    numbers[main.offset] = rounding(numbers[main.offset] + missing / (moved.bias - now.bias))
    return Unfolded(expression, target, numbers)


# ---- drawing ---------------------------------------------------------------------------------------


def _drawn(expression: Expression, target: AffineConv, rng: np.random.Generator) -> dict[str, Array]:
    """Kernels that keep the variance of what they read, factors as the expression says, and batch norms that are
    the identity map."""
    numbers: dict[str, Array] = {}
    leaves = leaves_of(expression)
    for name, shape in parameters(expression, target.channels_in, len(target.windows)).items():
        path, _, kind = name.rpartition("/")
        leaf = leaves[path]
        match kind:
            case "kernel":
                numbers[name] = rng.normal(size=shape) / np.sqrt(prod(shape[1:]))
            case "variance":
                numbers[name] = np.ones(shape)
            case "gamma":
                assert isinstance(leaf, BatchNorm)
                numbers[name] = np.full(shape, np.sqrt(1.0 + leaf.epsilon))
            case "factor":
                assert isinstance(leaf, Scale)
                numbers[name] = np.full(shape, leaf.initial)
            case _:
                numbers[name] = np.zeros(shape)
    return numbers


def _knob(expression: Expression, prefix: str) -> str | None:
    """The parameter that multiplies all of a branch; None if it has none."""
    for path, leaf in reversed(leaves_of(expression).items()):
        if path.startswith(prefix):
            match leaf:
                case BatchNorm():
                    return f"{path}/gamma"
                case Scale(trainable=True):
                    return f"{path}/factor"
                case Conv():
                    return f"{path}/kernel"
                case _:
                    continue
    return None


def _prefixes(expression: Expression) -> dict[str, Expression]:
    """The branches of an expression by the start of their leaves' names."""
    if isinstance(expression, Sum):
        return {f"branch{index}/": term for index, term in enumerate(expression.terms)}
    return {"": expression}


def _folded(expression: Expression, numbers: Numbers, target: AffineConv) -> AffineConv | Refusal:
    return fold(expression, numbers, target.channels_in, len(target.windows))


def _none(numbers: Numbers, name: str) -> dict[str, Array]:
    return {name: np.zeros_like(numbers[name])}


def _norm(kernel: Array) -> float:
    return float(np.linalg.norm(kernel))


def _told(windows: Sequence[Window]) -> str:
    def one(window: Window) -> str:
        step = f" in steps of {window.stride}" if window.stride > 1 else ""
        apart = f", {window.dilation} apart" if window.dilation > 1 else ""
        return f"{window.taps} positions{apart}{step} with a padding of ({window.before}, {window.after})"

    told = [one(window) for window in windows]
    return told[0] if len(set(told)) == 1 else "; ".join(told)
