"""Weight normalizations, written once, for every framework.

Each is a pair ``decompose(w) -> (direction, gain, offset)`` and ``compose(direction, gain, offset) -> w`` on a
matrix with one row per output unit and on a namespace of array functions: numpy (:data:`NUMPY`),
``keras.ops``, or any other that has the few functions of :class:`Namespace`. Methods that see the whole
matrix (:class:`Spectral`, :class:`LowRank`, :class:`Orthogonal`) need those of :class:`MatrixNamespace`; they
have ``attach`` in the place of ``decompose``, because they take a weight apart into other things.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from refold.weights.activations import ACTIVATION_GAINS, activation_gain
from refold.weights.centered import Centered
from refold.weights.conventions import (
    DeepMindScaledStandardization,
    OfficialStandardization,
    TimmStandardization,
)
from refold.weights.fit import fit_rows
from refold.weights.low_rank import LowRank, LowRankParts
from refold.weights.magnitude import MagnitudePreserving
from refold.weights.method import Normalization, Pulled, composed, pulled
from refold.weights.namespace import NUMPY, Array, MatrixNamespace, Namespace, dtype_name, widen, working_dtype
from refold.weights.orthogonal import Orthogonal, OrthogonalParts
from refold.weights.outputs import outputs, pays
from refold.weights.rms import RootMeanSquare
from refold.weights.rows import Rows
from refold.weights.scaling import Parts
from refold.weights.spectral import Spectral, SpectralState, spectral_error
from refold.weights.standardization import Standardization
from refold.weights.unit import Unit

# The names that every front end accepts.
METHODS: dict[str, Callable[..., Normalization]] = {
    "unit": Unit,
    "layer": Standardization,
    "rms": RootMeanSquare,
    "centered": Centered,
    "magnitude": MagnitudePreserving,
    "official-standardization": OfficialStandardization,
    "timm-standardization": TimmStandardization,
    "timm-scaled-standardization": partial(TimmStandardization, scaled=True),
    "deepmind-scaled-standardization": DeepMindScaledStandardization,
}


def method(name: str, epsilon: float | None = None) -> Normalization:
    """The normalization of this name, with its own epsilon where none is given.

    Methods with more to choose (the activation of :class:`Centered`) are made by their class.

    Raises:
        ValueError: the name is unknown, or epsilon is negative or not a number.
    """
    if name not in METHODS:
        raise ValueError(f"there is no weight normalization named {name!r}: choose one of {', '.join(METHODS)}")
    if epsilon is None:
        return METHODS[name]()
    if not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon must be a finite number that is not negative, not {epsilon}")
    return METHODS[name](epsilon=float(epsilon))


__all__ = [
    "ACTIVATION_GAINS",
    "METHODS",
    "NUMPY",
    "Array",
    "Centered",
    "DeepMindScaledStandardization",
    "LowRank",
    "LowRankParts",
    "MagnitudePreserving",
    "MatrixNamespace",
    "Namespace",
    "Normalization",
    "OfficialStandardization",
    "Orthogonal",
    "OrthogonalParts",
    "Parts",
    "Pulled",
    "RootMeanSquare",
    "Rows",
    "Spectral",
    "SpectralState",
    "Standardization",
    "TimmStandardization",
    "Unit",
    "activation_gain",
    "composed",
    "dtype_name",
    "fit_rows",
    "method",
    "outputs",
    "pays",
    "pulled",
    "spectral_error",
    "widen",
    "working_dtype",
]
