"""A region on real values of its leaves, against a bound that holds for every input."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt

import numpy as np

from refold.frontend import AnyArray
from refold.proof.pairing import Pairing
from refold.proof.trial import EPS, Evidence, Link, Models, ratio, respond, roundoff


def local(models: Models, link: Link, evidence: Evidence, pairing: Pairing) -> tuple[float, float] | None:
    """The largest error of a region on real values of its leaves, and its ratio to a bound that holds for
    every input; None if there are no values, or no bound is known."""
    values = pairing.values
    if any(theirs[0] not in values for _, theirs in link.leaves) or not evidence.sums or evidence.bias is None:
        return None
    batches = [np.asarray(values[theirs[0]], dtype=np.float64) for _, theirs in link.leaves]
    with np.errstate(all="ignore"):
        # Both were computed from these leaves already, if the leaves are where the second model was given the
        # original's values.
        one, two = values.get(link.before.value), pairing.seen.get(link.after.value)
        if one is None:
            one = respond(models, link, batches, 0)[link.before.value]
        if two is None or not all(pairing.pins.get(mine) in theirs for mine, theirs in link.leaves):
            two = respond(models, link, batches, 1)[link.after.value]
        if one.shape != two.shape or not np.isfinite(one).all():
            return None
        difference = np.abs(two - one)
        error = float(np.max(difference, initial=0.0))
        u, eta = roundoff(models, link.after)
        bound: AnyArray = _widened(np.abs(evidence.bias[0]), one.shape[1:])
        terms = 1.0
        for batch, total in zip(batches, evidence.sums, strict=True):
            largest = float(np.max(np.abs(batch), initial=0.0))
            bound = bound + _widened(total, one.shape[1:]) * largest
            terms += prod(batch.shape[1:])
        scale = float(np.max(bound, initial=0.0))
        allowed = u * bound * (1 + 1e-6) + eta * terms + 8 * EPS * (8 + sqrt(terms)) * scale
        return error, float(np.max(ratio(difference, allowed), initial=0.0))


def _widened(array: AnyArray, shape: Sequence[int]) -> AnyArray:
    """The largest entries along the axes that are smaller here than they really are."""
    shrunk = tuple(axis for axis, size in enumerate(shape) if array.shape[axis] != size)
    return np.broadcast_to(np.max(array, axis=shrunk, keepdims=True), tuple(shape))
