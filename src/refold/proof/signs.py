"""Random signs on all leaves at once: what comes out differs by a random sum of the errors of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from refold.frontend import AnyArray
from refold.proof.grid import Sizes
from refold.proof.trial import Evidence, Trial, ratio

PROBES = 40
# A sum of n terms d_i w_i x_i with |d_i| <= u and random signs x_i is above t u |w|_2 with a probability
# below 2 exp(-t*t/2) (Hoeffding 1963, theorem 2). |w|_2 itself is estimated from the probes, by at most
# a factor of 2 too low but for a probability below 1e-7.
DEVIATIONS = 16.0


def random_signs(trial: Trial, sizes: Sequence[Sizes], evidence: Evidence) -> None:
    """Compare both models on random signs, see ``DEVIATIONS``."""

    def fill(batches: list[AnyArray], rows: AnyArray, numbers: AnyArray) -> None:
        for batch in batches:
            batch[rows] = trial.rng.choice([-1.0, 1.0], size=(len(rows), *batch.shape[1:]))

    squares: AnyArray = np.zeros(())
    differences, largest = [], 0.0
    for _, one, two, scales in trial.responses(sizes, PROBES, fill, evidence):
        if not (np.isfinite(one).all() and np.isfinite(two).all()):
            evidence.add(float("inf"), "the response to a probe is not finite")
            return
        squares = squares + np.sum(one**2, axis=0)
        differences.append(np.max(np.abs(two - one), axis=0))
        largest = max(largest, float(np.max(scales)))
    if not differences:
        return
    evidence.impulses += PROBES
    norm = np.sqrt(squares / PROBES)
    allowed = DEVIATIONS * trial.u * norm + sum(prod(leaf) for leaf in sizes) * trial.eta
    shares = ratio(np.max(differences, axis=0), allowed + trial.noise(sizes) * largest)
    worst = float(np.max(shares, initial=0.0))
    evidence.add(worst, f"random probes differ by {worst:.3g} times what rounding explains")
