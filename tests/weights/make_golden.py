"""Writes golden.json: what every weight method gives, from its formula, in literal loops of 50 digits.

Shares no code with refold. Run it after adding a case: ``python tests/weights/make_golden.py`` (mpmath comes with
torch). Inputs are multiples of 1/16 times powers of two, so that they are the same numbers in every type.
Gradients are central differences at a step at which their error is below 1e-25.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mpmath
from mpmath import mp, mpf, sqrt

mp.dps = 60
STEP = mpf(10) ** -18
FILE = Path(__file__).with_name("golden.json")


# ---- the formulas ------------------------------------------------------------------------------------


def mean(row):
    return sum(row) / len(row)


def centered(row):
    return [x - mean(row) for x in row]


def norm(row):
    return sqrt(sum(x * x for x in row))


def variance(row):
    return mean([x * x for x in centered(row)])


def divided(row, size):
    return [x / size for x in row]


RELU = sqrt(2 / (1 - 1 / mp.pi))

# One row of each method, with its epsilon e.
ROWS = {
    "Unit": lambda row, e, **_: divided(row, norm(row) + e),
    "RootMeanSquare": lambda row, e, **_: divided(row, norm(row) / sqrt(len(row)) + e),
    "MagnitudePreserving": lambda row, e, **_: divided(row, sqrt(len(row)) * (norm(row) / sqrt(len(row)) + e)),
    "Centered": lambda row, e, activation="linear": [
        (RELU if activation == "relu" else 1) * x for x in divided(centered(row), norm(centered(row)) + e)
    ],
    "Standardization": lambda row, e, **_: divided(centered(row), sqrt(variance(row)) + e),
    "OfficialStandardization": lambda row, e, **_: divided(
        centered(row), sqrt(variance(row) * len(row) / (len(row) - 1)) + e
    ),
    "TimmStandardization": lambda row, e, scaled=False, activation="linear": [
        (RELU if activation == "relu" else 1) * x / (sqrt(len(row)) if scaled else 1)
        for x in divided(centered(row), sqrt(variance(row) + e))
    ],
    "DeepMindScaledStandardization": lambda row, e, **_: divided(
        centered(row), sqrt(max(len(row) * variance(row), e))
    ),
}


def rows(kind, options):
    options = dict(options)
    epsilon = mpf(options.pop("epsilon"))
    centers = kind not in ("Unit", "RootMeanSquare", "MagnitudePreserving")

    def compose(direction, gain, offset):
        made = []
        for row, (g,), (o,) in zip(direction, gain, offset, strict=True):
            empty = not any(centered(row) if centers else row)
            made.append(
                [o + (0 if empty else g * x) for x in (row if empty else ROWS[kind](row, epsilon, **options))]
            )
        return made

    return compose


def matrix(entries):
    return mpmath.matrix(entries)


def listed(made):
    return [[made[i, j] for j in range(made.cols)] for i in range(made.rows)]


def spectral(options):
    epsilon = mpf(options["epsilon"])

    def compose(direction, left, right, gain):
        sigma = (matrix(left) * matrix(direction) * matrix(right).T)[0, 0]
        return [[gain[0][0] * x / (sigma + epsilon) for x in row] for row in direction]

    return compose


def low_rank(options):
    def adapted(base, up, down):
        return listed(matrix(base) + mpf(options["scale"]) * matrix(up) * matrix(down))

    if not options["magnitude"]:
        return adapted
    norms = []  # of the first call: they are constants for the gradient

    def compose(base, up, down, gain):
        made = adapted(base, up, down)
        norms.append([norm(row) for row in made])
        return [[g * x / n for x in row] for row, (g,), n in zip(made, gain, norms[0], strict=True)]

    return compose


def orthogonal(options):
    def compose(direction, base, gain):
        tall = len(base) > len(base[0])
        v, q = (matrix(m).T if tall else matrix(m) for m in (direction, base))
        skew = q.T * v - v.T * q
        one = mpmath.eye(skew.rows)
        if options["map"] == "exponential":
            turn = mpmath.expm(skew)
        else:
            turn = (one + skew / 2) * (one - skew / 2) ** -1
        made = gain[0][0] * q * turn
        return listed(made.T if tall else made)

    return compose


# ---- the cases ---------------------------------------------------------------------------------------

DIRECTION = [
    [0.5, -1.25, 2.0, 0.75, 1.5, -0.0625],
    [-3.0, 0.25, 0.125, 4.5, -0.5, 1.0],
    [1.0, 2.0, 3.0, -1.0, 0.0, 0.5],
    [0.0625, -0.125, 0.25, 0.1875, -0.25, 0.5],
]
TARGET = [
    [1.0, -0.5, 0.25, 2.0, -1.0, 0.5],
    [0.5, 1.5, -2.0, 0.75, 1.0, -0.25],
    [-1.0, 0.25, 0.5, 1.25, -0.75, 2.0],
    [2.0, -1.0, 1.0, 0.5, 0.25, -1.5],
]
GAIN = [[1.5], [0.75], [-2.0], [1.0]]
OFFSET = [[0.25], [-0.5], [0.0], [1.0]]
SMALL = 2.0**-100
LARGE = 2.0**100
ROWS_OF_ALL_SIZES = [[x * size for x in row] for row, size in zip(DIRECTION, (SMALL, LARGE, 1.0, 0.0), strict=True)]
ROWS_WITHOUT_DEVIATION = [DIRECTION[0], [3.0] * 6, [0.0] * 6, [LARGE] * 6]


# Orthonormal in every type, and so are its first rows, its first four rows and columns, and two columns of these.
PERMUTATION = [
    [0.0, -1.0, 0.0, 0.0, 0.0, 0.0],
    [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, 1.0, 0.0, 0.0],
    [0.0, 0.0, -1.0, 0.0, 0.0, 0.0],
]


def row_case(kind, direction=DIRECTION, **options):
    arrays = {"direction": direction, "gain": GAIN, "offset": OFFSET}
    return Case(kind, options, rows(kind, options), arrays, {"direction", "gain", "offset"}, TARGET)


def unit_vector(*entries):
    return [[float(mpf(x) / norm([mpf(y) for y in entries])) for x in entries]]


@dataclass(frozen=True)
class Case:
    """A method, its arrays by name, and which of them are trained."""

    kind: str
    options: dict
    compose: Callable
    arrays: dict
    trained: set
    target: list

    def entry(self, name):
        exact = {key: [[mpf(x) for x in row] for row in value] for key, value in self.arrays.items()}
        weight = self.compose(**exact)
        gradients = {
            key: [[gradient(self, exact, key, i, j) for j in range(len(row))] for i, row in enumerate(value)]
            for key, value in exact.items()
            if key in self.trained
        }
        return {
            "name": name,
            "method": self.kind,
            "options": self.options,
            "arrays": self.arrays,
            "target": self.target,
            "weight": [[float(x) for x in row] for row in weight],
            "gradients": gradients,
        }


def gradient(case, arrays, key, i, j):
    """d sum(target * weight) / d arrays[key][i][j]; 0 for a direction that is none."""
    if key == "direction" and all(x == arrays[key][i][0] for x in arrays[key][i]):
        return 0.0

    def loss(change):
        moved = [list(row) for row in arrays[key]]
        moved[i][j] += change
        made = case.compose(**{**arrays, key: moved})
        pairs = zip(case.target, made, strict=True)
        return sum(mpf(t) * w for row, ws in pairs for t, w in zip(row, ws, strict=True))

    step = STEP * max(abs(x) for x in arrays[key][i])
    step = step or STEP
    return float((loss(step) - loss(-step)) / (2 * step))


def matrix_cases():
    state = {"left": unit_vector(1, -2, 1, 3), "right": unit_vector(1, 2, -1, 3, 0, 1)}
    for name, epsilon, gain in (("spectral", 0.0, 1.0), ("sigma-reparam", 1e-3, 1.75)):
        arrays = {"direction": DIRECTION, **state, "gain": [[gain]]}
        options = {"epsilon": epsilon}
        yield name, Case("Spectral", options, spectral(options), arrays, {"direction", "gain"}, TARGET)

    thin = {"up": [row[:2] for row in TARGET], "down": [[1.0, 0.5, -1.0, 0.0, 2.0, 0.25], TARGET[3]]}
    for name, magnitude in (("lora", False), ("dora", True)):
        arrays = {"base": DIRECTION, **thin, **({"gain": GAIN} if magnitude else {})}
        options = {"scale": 0.5, "magnitude": magnitude}
        yield name, Case("LowRank", options, low_rank(options), arrays, set(arrays) - {"base"}, TARGET)

    for chart in ("cayley", "exponential"):
        for shape, units, inputs in (("two rows", 2, 6), ("four rows", 4, 6), ("square", 4, 4), ("columns", 4, 2)):
            base = [row[:inputs] for row in PERMUTATION[:units]]
            arrays = {"direction": [row[:inputs] for row in DIRECTION[:units]], "base": base, "gain": [[1.5]]}
            options = {"map": chart}
            target = [row[:inputs] for row in TARGET[:units]]
            made = Case("Orthogonal", options, orthogonal(options), arrays, {"direction", "gain"}, target)
            yield f"{chart}, {shape}", made


CASES = {
    "unit": row_case("Unit", epsilon=0.0),
    "unit, epsilon": row_case("Unit", epsilon=0.5),
    "unit, rows of all sizes": row_case("Unit", ROWS_OF_ALL_SIZES, epsilon=0.0),
    "rms": row_case("RootMeanSquare", epsilon=0.0),
    "magnitude": row_case("MagnitudePreserving", epsilon=1e-4),
    "centered": row_case("Centered", epsilon=0.0),
    "centered, relu": row_case("Centered", epsilon=0.0, activation="relu"),
    "centered, constant rows": row_case("Centered", ROWS_WITHOUT_DEVIATION, epsilon=0.0),
    "layer": row_case("Standardization", epsilon=1e-10),
    "layer, epsilon": row_case("Standardization", epsilon=0.5),
    "layer, rows of all sizes": row_case("Standardization", ROWS_OF_ALL_SIZES, epsilon=0.0),
    "official-standardization": row_case("OfficialStandardization", epsilon=1e-5),
    "timm-standardization": row_case("TimmStandardization", epsilon=1e-6),
    "timm-scaled-standardization": row_case("TimmStandardization", epsilon=1e-6, scaled=True),
    "timm, relu": row_case("TimmStandardization", epsilon=1e-6, scaled=True, activation="relu"),
    "deepmind-scaled-standardization": row_case("DeepMindScaledStandardization", epsilon=1e-4),
    "deepmind, epsilon": row_case("DeepMindScaledStandardization", epsilon=1.0),
    **dict(matrix_cases()),
}


if __name__ == "__main__":
    entries = ",\n".join(json.dumps(case.entry(name)) for name, case in CASES.items())
    FILE.write_text(f"[\n{entries}\n]\n", encoding="utf-8")
