"""What an expression means, said again and slowly: float64 loops that share no code with refold."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from refold.algebra import AffineConv
from refold.blocks import AveragePool, BatchNorm, Chain, Conv, Expression, Identity, Scale, Sum

Array = npt.NDArray[np.float64]


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Array]:
    """Parameters with no 0 and no 1 that could hide a mistake, shifts and negative factors included."""
    rng = np.random.default_rng(seed)
    drawn = {name: rng.uniform(0.3, 1.5, shape) for name, shape in shapes.items()}
    return {
        name: value if name.endswith("variance") else value * rng.choice([-1.0, 1.0], value.shape)
        for name, value in drawn.items()
    }


def convolve(x: Array, kernel: Array, windows: Any, groups: int) -> Array:
    """``x (channels, *space)`` under ``kernel (out, in/groups, *taps)``, one output at a time."""
    padded = np.pad(x, [(0, 0), *((w.before, w.after) for w in windows)])
    sizes = [
        (size - w.dilation * (w.taps - 1) - 1) // w.stride + 1
        for size, w in zip(padded.shape[1:], windows, strict=True)
    ]
    out = np.zeros((kernel.shape[0], *sizes))
    rows, columns = kernel.shape[0] // groups, kernel.shape[1]
    for place in np.ndindex(*sizes):
        reads = tuple(
            slice(i * w.stride, i * w.stride + w.dilation * (w.taps - 1) + 1, w.dilation)
            for i, w in zip(place, windows, strict=True)
        )
        patch = padded[(slice(None), *reads)]
        for o in range(kernel.shape[0]):
            group = o // rows
            out[(o, *place)] = np.sum(kernel[o] * patch[group * columns : (group + 1) * columns])
    return out


def run_affine(conv: AffineConv, x: Array) -> Array:
    return convolve(x, conv.kernel, conv.windows, conv.groups) + along(conv.bias, x)


def along(vector: Array, x: Array) -> Array:
    return np.asarray(vector).reshape((-1,) + (1,) * (x.ndim - 1))


def evaluate(expression: Expression, parameters: dict[str, Array], x: Array, path: str = "") -> Array:
    """The value of ``expression`` in inference; names of parameters are worked out here once more."""
    if isinstance(expression, Sum):
        return np.sum(
            [evaluate(term, parameters, x, f"{path}branch{i}/") for i, term in enumerate(expression.terms)], axis=0
        )
    parts = list(expression.parts) if isinstance(expression, Chain) else [expression]
    names = {Conv: "conv", BatchNorm: "batch_norm", Scale: "scale", Sum: "sum"}
    counts: dict[str, int] = {}
    for part in parts:
        if isinstance(part, Identity):
            continue
        if isinstance(part, AveragePool):
            kernel = np.ones((x.shape[0], 1, *(w.taps for w in part.windows)))
            x = convolve(x, kernel / kernel[0].size, part.windows, x.shape[0])
            continue
        name = names[type(part)]
        here = f"{path}{name}{counts.get(name) or ''}"
        counts[name] = counts.get(name, 0) + 1
        if isinstance(part, Sum):
            x = evaluate(part, parameters, x, f"{here}/")
        elif isinstance(part, Conv):
            x = convolve(x, parameters[f"{here}/kernel"], part.windows, part.groups)
            if part.bias:
                x = x + along(parameters[f"{here}/bias"], x)
        elif isinstance(part, BatchNorm):
            deviation = np.sqrt(parameters[f"{here}/variance"] + part.epsilon)
            x = (x - along(parameters[f"{here}/mean"], x)) / along(deviation, x)
            x = x * along(parameters[f"{here}/gamma"], x) + along(parameters[f"{here}/beta"], x)
        else:
            factor = parameters[f"{here}/factor"] if part.trainable else np.float64(part.initial)
            x = x * (along(factor, x) if part.per_channel and part.trainable else factor)
    return x
