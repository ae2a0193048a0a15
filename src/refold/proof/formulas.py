"""Regions by formula: every weight is compared, at the price of a few random probes.

Feeding all unit impulses to a wide region means running it once for each of its inputs. But the kernel can be
said from outside: a :class:`Formula` claims that a region is one affine convolution of each of its leaves, with all
its float64 weights. Nothing of it is believed:

1. Both models' formulas are held against the models' own operators, on normal random probes and on the same grids
   that all impulses would be fed to. If a row of the formula differs by ``D`` from what the operators do, a probe
   ``x`` shows ``D.x``, which is normal with the deviation ``|D|``; so it stays below ``t`` with a probability of at
   most ``sqrt(2/pi) t / |D|`` (the normal density is nowhere larger than at 0), and under all of the probes with
   that to the power of their number. (Freivalds 1977 checks products of matrices like this.)
2. The two formulas are then compared weight by weight, like impulses are: the second model's must be the first
   one's, each rounded once.

A formula that does not hold proves nothing and refutes nothing: then the region is examined in another way.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, pi, sqrt
from typing import final

import numpy as np

from refold.algebra.affine import AffineConv
from refold.algebra.evaluate import evaluate
from refold.algebra.geometry import Window, same
from refold.frontend import AnyArray
from refold.graph.graph import Formula
from refold.proof.grid import Grids, Sizes
from refold.proof.trial import Evidence, Trial, ratio

PROBES = 16
MISSED = 40  # a formula that is off by more than _resolution says passes with a probability of 2^-MISSED at most
_MOST_NUMBERS = 2**24  # of the windows of some probes
_AT_ONCE = 2**20  # weights that are compared, so that they stay in the processor's memory


def by_formula(trial: Trial, grids: Grids, evidence: Evidence) -> bool:
    """Compare both models weight by weight through formulas; False, with nothing noted, where that does not prove
    that they are equal."""
    formulas = [_formula(trial, which) for which in (0, 1)]
    if formulas[0] is None or formulas[1] is None:
        return False
    found = Evidence()
    seen: set[tuple[object, ...]] = set()
    for sizes in grids.sizes:
        comparison = _Comparison(trial, (formulas[0], formulas[1]), sizes)
        if not comparison.is_confirmed(found):
            return False
        if comparison.windows not in seen and not comparison.compare_weights(found):
            return False
        seen.add(comparison.windows)
    evidence.take(found)
    return True


def _formula(trial: Trial, which: int) -> Formula | None:
    models, side = trial.models, trial.sides[which]
    if models.witness is None:
        return None
    return models.witness(side.graph, side.cone.value, side.cone.leaves, side.cone.nodes)


@final
class _Comparison:
    """Two formulas at one grid."""

    def __init__(self, trial: Trial, formulas: tuple[Formula, Formula], sizes: Sequence[Sizes]) -> None:
        self.trial, self.formulas, self.sizes = trial, formulas, sizes
        # The maps of each model by the number of the leaf: values of the original may share a leaf.
        self.maps: list[list[list[AffineConv]]] = []
        for formula, side in zip(formulas, trial.sides, strict=True):
            maps: list[list[AffineConv]] = [[] for _ in sizes]
            for leaf, conv in formula.form.terms.items():
                maps[side.number[leaf]].append(conv)
            self.maps.append(maps)
        self.windows = tuple(
            _windows(conv, self._space(number))
            for maps in self.maps
            for number, own in enumerate(maps)
            for conv in own
        )

    def _axis(self, number: int, which: int = 1) -> int:
        """The axis of a leaf's channels."""
        side = self.trial.sides[which]
        return next(self.formulas[which].axes[leaf] for leaf in side.cone.leaves if side.number[leaf] == number)

    def _space(self, number: int) -> Sizes:
        axis = self._axis(number) - 1
        return tuple(size for place, size in enumerate(self.sizes[number]) if place != axis)

    # ---- against the models' own operators -----------------------------------------------------------

    def is_confirmed(self, evidence: Evidence) -> bool:
        """Whether both formulas do what the models' operators do."""
        probes = [np.zeros((PROBES, *leaf)) for leaf in self.sizes]

        def fill(batches: list[AnyArray], rows: AnyArray, numbers: AnyArray) -> None:
            for batch, own in zip(batches, probes, strict=True):
                own[numbers] = self.trial.rng.standard_normal((len(numbers), *own.shape[1:]))
                batch[rows] = own[numbers]

        noise = 2 * self.trial.noise(self.sizes)
        largest, rest = 0.0, PROBES
        for numbers, one, two, scales in self.trial.responses(self.sizes, PROBES, fill, evidence):
            for which, response in enumerate((one, two)):
                said = self._applied(which, [own[numbers] for own in probes])
                if said is None or said.shape != response.shape:
                    return False
                gap = np.max(np.abs(said - response).reshape(len(numbers), -1), axis=1, initial=0.0)
                if not np.all(gap <= noise * scales):
                    return False
            largest, rest = max(largest, float(np.max(scales))), rest - len(numbers)
        if evidence.failed() or rest:
            return False
        evidence.impulses += PROBES
        evidence.resolution = max(evidence.resolution, _resolution(noise * largest) / (largest or 1.0))
        return True

    def _applied(self, which: int, probes: Sequence[AnyArray]) -> AnyArray | None:
        """What a formula makes of some probes, without its bias."""
        formula = self.formulas[which]
        total: AnyArray | None = None
        for number, own in enumerate(self.maps[which]):
            if not own:
                continue
            data = np.moveaxis(probes[number], self._axis(number, which), 1)
            for conv in own:
                if data.shape[1] != conv.channels_in or data.ndim != conv.weights.ndim:
                    return None
                part = _evaluated(conv.linear(), data)
                if total is not None and part.shape != total.shape:
                    return None
                total = part if total is None else total + part
        return None if total is None else np.moveaxis(total, 1, formula.axes[self.trial.sides[which].cone.value])

    # ---- against each other --------------------------------------------------------------------------

    def compare_weights(self, evidence: Evidence) -> bool:
        """Whether every weight of the second model is the first one's, rounded once."""
        axis = self.formulas[0].axes[self.trial.sides[0].cone.value] - 1
        if axis != self.formulas[1].axes[self.trial.sides[1].cone.value] - 1:
            return False
        for number in range(len(self.sizes)):
            kernels = _on_one_lattice(self.maps[0][number], self.maps[1][number], self._space(number))
            if kernels is None:
                return False
            one, two = kernels
            sums = np.zeros(len(one))
            step = max(_AT_ONCE // max(one[:1].size, 1), 1)
            for start in range(0, len(one), step):
                rows = slice(start, start + step)
                size = np.abs(one[rows]).reshape(len(one[rows]), -1)
                sums[rows] = size.sum(axis=1)
                peak = size.max(axis=1, initial=0.0, keepdims=True)
                allowed = self.trial.u * size + self.trial.eta + self.trial.noise(self.sizes) * peak
                difference = np.abs(two[rows] - one[rows]).reshape(size.shape)
                evidence.add(float(np.max(ratio(difference, allowed), initial=0.0)), "a weight differs")
            if evidence.failed():
                return False
            shape = [1] * len(self.sizes[number])
            shape[axis] = len(one)
            evidence.sums.append(sums.reshape(shape) if len(one) else np.zeros([1] * len(shape)))
        return True


def _resolution(threshold: float) -> float:
    """How far the rows of two formulas may be off that pass all probes: more passes with a probability of 2^-MISSED
    at most. ``threshold`` is what was allowed; rounding may have hidden as much again."""
    return 2 * threshold * sqrt(2 / pi) * 2 ** ((MISSED + 1) / PROBES)


def _evaluated(conv: AffineConv, data: AnyArray) -> AnyArray:
    """A map on some examples, a few at a time."""
    numbers = max(conv.taps * int(np.prod(data.shape[1:])), 1)
    step = max(_MOST_NUMBERS // numbers, 1)
    return np.concatenate([evaluate(conv, data[start : start + step]) for start in range(0, len(data), step)])


def _windows(conv: AffineConv, space: Sizes) -> tuple[Window, ...]:
    """Its windows at some sizes of its input, where padding 'same' is a number."""
    return tuple(
        same(window.taps, window.stride, window.dilation, size) if window.floating else window
        for window, size in zip(conv.windows, space, strict=True)
    )


def _on_one_lattice(
    first: Sequence[AffineConv], second: Sequence[AffineConv], space: Sizes
) -> tuple[AnyArray, AnyArray] | None:
    """The sums of the kernels of some maps of one tensor, with all taps at their places; None if the maps do not
    move alike.

    An output reads the tap at the offset ``dilation * t - before``, so maps with one stride and one number of
    outputs are equal exactly where their entries at equal offsets are.
    """
    every = [*first, *second]
    if not every:
        return np.zeros((0, 0)), np.zeros((0, 0))
    windows = [_windows(conv, space) for conv in every]
    moves = {
        tuple((w.stride, w.spread, w.output_size(size)) for w, size in zip(own, space, strict=True))
        for own in windows
    }
    if len(moves) > 1 or len({(conv.channels_out, conv.channels_in) for conv in every}) > 1:
        return None
    offsets = [[w.dilation * np.arange(w.taps) - w.before for w in own] for own in windows]
    lattice = [np.unique(np.concatenate(axis)) for axis in zip(*offsets, strict=True)]
    groups = gcd(*(conv.groups for conv in every))
    kernels = [
        _placed(conv, groups, [np.searchsorted(axis, o) for axis, o in zip(lattice, own, strict=True)], lattice)
        for conv, own in zip(every, offsets, strict=True)
    ]
    sums = []
    for part in (kernels[: len(first)], kernels[len(first) :]):
        sums.append(sum(part[1:], start=part[0]) if part else np.zeros_like(kernels[0]))
    return sums[0], sums[1]


def _placed(conv: AffineConv, groups: int, places: Sequence[AnyArray], lattice: Sequence[AnyArray]) -> AnyArray:
    """Its kernel with so few groups, and its taps at these places of a lattice."""
    kernel: AnyArray = conv.kernel
    out, per_group = kernel.shape[:2]
    taps = tuple(len(axis) for axis in lattice)
    if conv.groups == groups and kernel.shape[2:] == taps:
        return kernel
    wide = np.zeros((out, conv.channels_in // groups, *taps))
    rows, inside = out // conv.groups, conv.groups // groups
    for group in range(conv.groups):
        start = per_group * (group % inside)
        own = np.ix_(rows * group + np.arange(rows), start + np.arange(per_group), *places)
        wide[own] = kernel[rows * group : rows * (group + 1)]
    return wide
