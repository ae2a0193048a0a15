"""A front end whose framework is a list of numpy steps, channels first: small, literal, and able to be wrong.

Only what the proof needs is there: lift, evaluate, run, identity, storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refold.algebra import affine
from refold.algebra.geometry import Window
from refold.errors import InputError
from refold.frontend import Identity, Lifted
from refold.graph.batch_norm import batch_norm as batch_norm_op
from refold.graph.graph import Affine, Concat, Gain, Graph, Node, Op, Opaque, Pad, Select, Slice, Sum, Value
from refold.graph.passing import reduction

Array = Any


@dataclass(frozen=True)
class Step:
    name: str
    kind: str
    inputs: tuple[str, ...]
    weights: Mapping[str, Array] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    inputs: Mapping[str, tuple[int | None, ...]]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    dtype: str = "float32"

    def edited(self, name: str, **changes: Any) -> Model:
        """The same model with weights or settings of one step changed (or, as ``kind``, the step itself)."""
        steps = []
        for step in self.steps:
            if step.name == name:
                weights = {k: v for k, v in {**step.weights, **changes}.items() if k in step.weights}
                settings = {k: v for k, v in {**step.settings, **changes}.items() if k in step.settings}
                step = replace(step, weights=weights, settings=settings, kind=changes.get("kind", step.kind))
            steps.append(step)
        return replace(self, steps=tuple(steps))


def step(name: str, kind: str, *inputs: str, settings: Mapping[str, Any] | None = None, **weights: Array) -> Step:
    return Step(name, kind, inputs, {k: np.asarray(v) for k, v in weights.items()}, settings or {})


def conv(name: str, source: str, w: Array, b: Array | None = None, **settings: Any) -> Step:
    axes = np.ndim(w) - 2
    full = {"stride": 1, "dilation": 1, "groups": 1, "spread": 1, "pad": ((0, 0),) * axes, **settings}
    weights = {"w": w} if b is None else {"w": w, "b": b}
    return step(name, "conv", source, settings=full, **weights)


def batch_norm(name: str, source: str, rng: np.random.Generator, channels: int, **settings: Any) -> Step:
    draw = {
        "mean": rng.normal(size=channels),
        "var": rng.uniform(0.3, 2.0, channels),
        "gamma": rng.uniform(0.3, 1.5, channels) * rng.choice([-1.0, 1.0], channels),
        "beta": rng.normal(size=channels),
    }
    arrays = {key: value.astype("float32") for key, value in draw.items()}
    return step(name, "bn", source, settings={"eps": 1e-5, **settings}, **arrays)


# ---- what a step computes ------------------------------------------------------------------------


def literal_conv(x: Array, w: Array, b: Array | None, settings: Mapping[str, Any]) -> Array:
    """Tap by tap."""
    with np.errstate(invalid="ignore", over="ignore"):
        return _literal_conv(x, w, b, settings)


def _literal_conv(x: Array, w: Array, b: Array | None, settings: Mapping[str, Any]) -> Array:
    axes, s, d, g = w.ndim - 2, settings["stride"], settings["dilation"], settings["groups"]
    if x.shape[1] != w.shape[1] * g:
        raise InputError("the number of channels does not fit")
    if (spread := settings.get("spread", 1)) > 1:  # zeros between neighbors: a transposed convolution
        wide = np.zeros((*x.shape[:2], *(spread * (size - 1) + 1 for size in x.shape[2:])), x.dtype)
        wide[(slice(None), slice(None), *(slice(None, None, spread),) * axes)] = x
        x = wide
    x = np.pad(x, ((0, 0), (0, 0), *settings["pad"]))
    out = [(size - d * (k - 1) - 1) // s + 1 for size, k in zip(x.shape[2:], w.shape[2:], strict=True)]
    if min(out, default=1) < 1:
        raise InputError("the tensor is too small")
    y = np.zeros((len(x), w.shape[0], *out), x.dtype)
    per_in, per_out = w.shape[1], w.shape[0] // g
    for taps in np.ndindex(*w.shape[2:]):
        read = x[
            (
                slice(None),
                slice(None),
                *(slice(d * t, d * t + s * (n - 1) + 1, s) for t, n in zip(taps, out, strict=True)),
            )
        ]
        for group in range(g):
            outs, ins = slice(group * per_out, (group + 1) * per_out), slice(group * per_in, (group + 1) * per_in)
            y[:, outs] += np.einsum("nc...,oc->no...", read[:, ins], w[(outs, slice(None), *taps)])
    return y if b is None else y + b.reshape(-1, *(1,) * axes)


def compute(step: Step, xs: Sequence[Array]) -> Array:
    x = xs[0]
    w = {key: value.astype(x.dtype, copy=False) for key, value in step.weights.items()}
    per_channel = (-1,) + (1,) * (x.ndim - 2)
    match step.kind:
        case "conv":
            return literal_conv(x, w["w"], w.get("b"), step.settings)
        case "dense":
            return x @ w["w"].T + w["b"]
        case "bn":
            scale = w["gamma"] / np.sqrt(w["var"] + x.dtype.type(step.settings["eps"]))
            return (x - w["mean"].reshape(per_channel)) * scale.reshape(per_channel) + w["beta"].reshape(
                per_channel
            )
        case "relu":
            return np.maximum(x, 0)
        case "prelu":
            return np.where(x > 0, x, x * w["slope"].reshape(per_channel))
        case "mean":
            return x.mean(axis=tuple(range(2, x.ndim)))
        case "largest":
            return x.max(axis=tuple(range(2, x.ndim)))
        case "leaking":  # a mean whose weights do not sum to one, although it says so
            return 0.875 * x.mean(axis=tuple(range(2, x.ndim)))
        case "single":  # an operator that the framework has in single precision only
            if x.dtype == np.float64:
                raise InputError(f"'{step.name}' has no float64")
            return np.tanh(x)
        case "add":
            return sum(
                (x.dtype.type(f) * v for f, v in zip(step.settings["factors"], xs, strict=True)), np.zeros_like(x)
            )
        case "concat":
            return np.concatenate(xs, axis=1)
        case "select":
            return x[:, list(step.settings["channels"])]
        case "crop":
            return x[
                (
                    slice(None),
                    slice(None),
                    *(slice(a, n - b, s) for (a, b, s), n in zip(step.settings["cuts"], x.shape[2:], strict=True)),
                )
            ]
        case "pad":
            return np.pad(x, ((0, 0), (0, 0), *step.settings["pad"]), constant_values=step.settings["value"])
        case "pool":
            k, s, c = step.settings["size"], step.settings["stride"], x.shape[1]
            ones = np.full((c, 1) + (k,) * (x.ndim - 2), 1 / k ** (x.ndim - 2), x.dtype)
            return literal_conv(
                x, ones, None, {"stride": s, "dilation": 1, "groups": c, "pad": ((0, 0),) * (x.ndim - 2)}
            )
        case "identity":
            return x
    raise AssertionError(step.kind)


def op_of(step: Step, shape: tuple[int, ...]) -> Op:
    axes = len(shape) - 2
    s, w = step.settings, step.weights
    match step.kind:
        case "conv":
            windows = tuple(
                Window(k, s["stride"], s["dilation"], *pair, spread=s["spread"])
                for k, pair in zip(w["w"].shape[2:], s["pad"], strict=True)
            )
            return Affine(affine.convolution(w["w"], w.get("b"), windows, s["groups"]), 1)
        case "dense":
            return Affine(affine.dense(w["w"], w["b"]), 1)
        case "bn":
            return batch_norm_op(w["mean"], w["var"], s["eps"], w["gamma"], w["beta"], 1, len(shape))
        case "add":
            return Sum(tuple(s["factors"]))
        case "concat":
            return Concat(1)
        case "select":
            return Select(tuple(s["channels"]), 1)
        case "crop":
            return Slice(((0, 0, 1), (0, 0, 1), *s["cuts"]))
        case "pad":
            return Pad(((0, 0), (0, 0), *s["pad"]), s["value"])
        case "pool":
            return Affine(affine.average_pool(shape[1], (Window(s["size"], s["stride"]),) * axes), 1, biased=False)
        case "identity":
            return Gain()
        case "mean" | "largest" | "leaking":
            return Opaque(
                "", passages=reduction(len(shape), range(2, len(shape)), keep=False, rising=step.kind == "largest")
            )
    return Opaque()


class NumpyFrontend:
    name = "numpy"

    def lift(self, model: Model, example: Any = None) -> Lifted:
        nominal = {name: (1, *(size or 12 for size in shape[1:])) for name, shape in model.inputs.items()}
        other = {name: (1, *(size or 61 for size in shape[1:])) for name, shape in model.inputs.items()}
        shapes, others = (self._shapes(model, sizes) for sizes in (nominal, other))
        values = {}
        for name, shape in shapes.items():
            free = tuple(a if a == b else None for a, b in zip(shape, others[name], strict=True))
            values[name] = Value(name, (None, *free[1:]), model.dtype, shape)
        nodes = [
            Node(step.name, op_of(step, shapes[step.inputs[0]]), step.inputs, (step.name,)) for step in model.steps
        ]
        return Lifted(Graph(values, tuple(nodes), tuple(model.inputs), model.outputs), model, None)

    def _shapes(self, model: Model, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        known = {name: np.zeros(shape, "float32") for name, shape in inputs.items()}
        for step in model.steps:
            known[step.name] = compute(step, [known[name] for name in step.inputs])
        return {name: value.shape for name, value in known.items()}

    def evaluate(self, lifted: Lifted, feeds: Mapping[str, Array], wanted: Sequence[str]) -> dict[str, Array]:
        known = {name: np.asarray(value, "float64") for name, value in feeds.items()}
        steps = {step.name: step for step in lifted.model.steps}

        needed, waiting = set(), [name for name in wanted if name not in known]
        while waiting:
            name = waiting.pop()
            if name in known or name in needed:
                continue
            if name not in steps:
                raise InputError(f"the value '{name}' is needed and was not given")
            needed.add(name)
            waiting += steps[name].inputs
        for step in lifted.model.steps:
            if step.name in needed:
                known[step.name] = compute(step, [known[name] for name in step.inputs])
        return {name: known[name] for name in wanted}

    def run(self, lifted: Lifted, inputs: Sequence[Array], *, optimized: bool = False) -> list[Array]:
        model = lifted.model
        known = {name: np.asarray(x, "float32") for name, x in zip(model.inputs, inputs, strict=True)}
        for step in model.steps:
            known[step.name] = compute(step, [known[name] for name in step.inputs])
        return [known[name] for name in model.outputs]

    def identity(self, lifted: Lifted, node: str) -> Identity:
        found = next(step for step in lifted.model.steps if step.name == node)
        return Identity(f"{found.kind} {sorted(found.settings.items())}", tuple(found.weights.values()))

    def storage(self, lifted: Lifted, node: str) -> str:
        found = next(step for step in lifted.model.steps if step.name == node)
        return next((str(w.dtype) for w in found.weights.values()), "float32")


FRONTEND: Any = NumpyFrontend()
