"""Unit impulses: what comes out is one weight of the region after the other.

All of them where that is quick (:func:`all_impulses`); in wide regions many in one tensor, so far from each
other and from the borders that no output sees two (:func:`inner_impulses`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import final

import numpy as np

from refold.frontend import AnyArray
from refold.proof import grid
from refold.proof.grid import GridError, Grids, Side, Sizes
from refold.proof.trial import Evidence, Trial


def all_impulses(trial: Trial, sizes: Sequence[Sizes], evidence: Evidence) -> None:
    """All unit impulses on leaves of these sizes."""
    starts = np.cumsum([0, *(prod(leaf) for leaf in sizes)])
    sums: list[AnyArray] = [np.zeros(()) for _ in sizes]

    def fill(batches: list[AnyArray], rows: AnyArray, numbers: AnyArray) -> None:
        for place, batch in enumerate(batches):
            own = (numbers >= starts[place]) & (numbers < starts[place + 1])
            batch.reshape(len(batch), -1)[rows[own], numbers[own] - starts[place]] = 1.0

    for numbers, one, two, scales in trial.responses(sizes, int(starts[-1]), fill, evidence):
        trial.compare(one, two, scales, trial.noise(sizes), evidence, "a weight")
        for place in range(len(sizes)):
            own = (numbers >= starts[place]) & (numbers < starts[place + 1])
            sums[place] = sums[place] + np.sum(np.abs(one[own]), axis=0)
    evidence.impulses += int(starts[-1])
    evidence.sums = evidence.sums or sums


@final
@dataclass(frozen=True, eq=False)
class Spread:
    """Impulses that no output sees two of. ``places`` gives, for each leaf axis that is not mixed as a
    whole, the positions by their remainder by the stride."""

    sizes: tuple[Sizes, ...]
    places: Mapping[tuple[int, int], tuple[tuple[int, ...], ...]]

    def impulses(self, leaf: int) -> tuple[int, list[AnyArray]]:
        """How many tensors are needed for a leaf, and the flat places of the impulses in each."""
        shape = self.sizes[leaf]
        free = [axis for axis in range(len(shape)) if (leaf, axis) in self.places]
        whole = [axis for axis in range(len(shape)) if axis not in free]
        kinds = list(np.ndindex(*(shape[axis] for axis in whole)))
        rows: list[AnyArray] = []
        for remainders in product(*(self.places[leaf, axis] for axis in free)):
            slots = list(product(*remainders))
            for start in range(0, len(kinds), len(slots)):
                spots = np.zeros((min(len(slots), len(kinds) - start), len(shape)), dtype=np.int64)
                for row, (kind, slot) in enumerate(zip(kinds[start:], slots, strict=False)):
                    spots[row, whole], spots[row, free] = kind, slot
                rows.append(np.asarray(np.ravel_multi_index(tuple(spots.T), shape)))
        return len(rows), rows

    def free_outputs(self, side: Side) -> set[int]:
        """The axes of the output that come from the free axes of the leaves."""
        axes, _ = grid.through(side, self.sizes)
        return {place for place, axis in enumerate(axes[side.cone.value]) if axis.of & set(self.places)}


def spread_out(trial: Trial, grids: Grids) -> Spread | None:
    """Where to put impulses so far from each other and from the borders that no output sees two."""
    if not grids.free:
        return None
    try:
        slots = {1: 64, 2: 8, 3: 4}.get(max(len(leaf) - 1 for leaf in grids.sizes[0]), 3)
        near = grid.spacing(trial.sides, grids.sizes[0])
        if near is None:
            return None
        larger = trial.grids(slots * near)
        if larger.free != grids.free:
            return None
        return Spread(larger.sizes[0], grid.places(trial.sides, larger.sizes[0], larger.free))
    except GridError:
        return None


def inner_impulses(trial: Trial, spread: Spread, evidence: Evidence) -> None:
    """All unit impulses away from the borders. Every output sees at most one of them, so what it gives
    is one weight."""
    sizes = spread.sizes
    every = [spread.impulses(number) for number in range(len(sizes))]
    starts = np.cumsum([0, *(rows for rows, _ in every)])
    sums: list[AnyArray] = [np.zeros(()) for _ in sizes]

    def fill(batches: list[AnyArray], rows: AnyArray, numbers: AnyArray) -> None:
        for place, batch in enumerate(batches):
            own = (numbers >= starts[place]) & (numbers < starts[place + 1])
            for row, number in zip(rows[own], numbers[own] - starts[place], strict=True):
                batch[row].reshape(-1)[every[place][1][number]] = 1.0

    for numbers, one, two, scales in trial.responses(sizes, int(starts[-1]), fill, evidence):
        trial.compare(one, two, scales, trial.noise(sizes), evidence, "a weight")
        shrunk = tuple(axis for axis in range(1, one.ndim) if axis - 1 in spread.free_outputs(trial.sides[0]))
        for place in range(len(sizes)):
            own = (numbers >= starts[place]) & (numbers < starts[place + 1])
            # Twice the sum, for outputs at the border may see more of what cancels inside.
            part = 2 * np.sum(np.abs(one[own]), axis=(0, *shrunk), keepdims=True)[0]
            sums[place] = sums[place] + part
    evidence.impulses += sum(len(flat) for _, rows in every for flat in rows)
    evidence.sums = sums
