"""A batch norm in inference as an operator of the neutral graph."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from refold.algebra import affine
from refold.graph.graph import Affine, Op, Opaque


def batch_norm(
    mean: npt.ArrayLike,
    variance: npt.ArrayLike,
    epsilon: float,
    gamma: npt.ArrayLike | None,
    beta: npt.ArrayLike | None,
    channel_axis: int,
    rank: int,
) -> Op:
    """See :func:`refold.algebra.affine.batch_norm`; opaque where that is not finite."""
    conv = affine.batch_norm(mean, variance, epsilon, gamma, beta, rank - 2)
    if not conv.is_finite:
        return Opaque("a variance plus epsilon is not positive, or a statistic is not finite")
    offset = 0.0 if beta is None else float(np.max(np.abs(np.asarray(beta, dtype=np.float64)), initial=0.0))
    return Affine(conv, channel_axis % rank, summand=offset)
