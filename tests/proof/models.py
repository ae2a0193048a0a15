"""Models of numpy steps, and their folds made by hand: with formulas of their own, not with the engine's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from proof.numpy_frontend import FRONTEND, Model, Step, batch_norm, conv, step
from refold.proof import Certificate, prove

Array = Any


def check(before: Model, after: Model, **options: Any) -> Certificate:
    return prove(FRONTEND, FRONTEND.lift(before), FRONTEND.lift(after), **options)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return (rng.normal(size=shape) / np.sqrt(max(np.prod(shape[1:]), 1))).astype("float32")


def scale_of(bn: Step) -> tuple[Array, Array]:
    w = {key: value.astype("float64") for key, value in bn.weights.items()}
    scale = w["gamma"] / np.sqrt(w["var"] + bn.settings["eps"])
    return scale, w["beta"] - w["mean"] * scale


def fused(kernel: Array, bias: Array, bn: Step) -> tuple[Array, Array]:
    scale, shift = scale_of(bn)
    lead = (-1,) + (1,) * (kernel.ndim - 1)
    return kernel.astype("float64") * scale.reshape(lead), bias.astype("float64") * scale + shift


def centered(kernel: Array, taps: int, axes: int = 2) -> Array:
    gap = (taps - kernel.shape[-1]) // 2
    return np.pad(kernel, ((0, 0), (0, 0), *((gap, gap),) * axes))


@dataclass
class Built:
    """A model, its fold, and the value that each block gives."""

    before: Model
    after: Model
    blocks: tuple[str, ...]


def repvgg(
    name: str, source: str, rng: np.random.Generator, cin: int, cout: int, stride: int = 1, groups: int = 1
) -> tuple[list[Step], Step]:
    """A block of three branches that ends in ``{name}/add``, and the convolution that it equals."""
    pad, options = ((1, 1), (1, 1)), {"stride": stride, "groups": groups}
    three, one = normal(rng, cout, cin // groups, 3, 3), normal(rng, cout, cin // groups, 1, 1)
    bias = normal(rng, cout)
    steps = [
        conv(f"{name}/c3", source, three, bias, pad=pad, **options),
        batch_norm(f"{name}/b3", f"{name}/c3", rng, cout),
        conv(f"{name}/c1", source, one, **options),
        batch_norm(f"{name}/b1", f"{name}/c1", rng, cout),
    ]
    parts = [fused(three, bias, steps[1]), fused(centered(one, 3), np.zeros(cout), steps[3])]
    summed = [f"{name}/b3", f"{name}/b1"]
    if cin == cout and stride == 1:
        steps.append(batch_norm(f"{name}/bi", source, rng, cin))
        per = cin // groups
        eye = np.zeros((cin, per, 1, 1))
        eye[np.arange(cin), np.arange(cin) % per] = 1
        parts.append(fused(centered(eye, 3), np.zeros(cin), steps[-1]))
        summed.append(f"{name}/bi")
    steps.append(step(f"{name}/add", "add", *summed, settings={"factors": (1.0,) * len(summed)}))
    kernel, total = (np.sum([part[i] for part in parts], axis=0).astype("float32") for i in (0, 1))
    return steps, conv(f"{name}/folded", source, kernel, total, pad=pad, **options)


def stack(
    rng: np.random.Generator,
    blocks: int = 3,
    channels: int = 4,
    size: int | None = 7,
    groups: int = 1,
    stride: int = 1,
) -> Built:
    """Blocks with activations between, and a dense head."""
    before, after, names = [], [], []
    source_before = source_after = "x"
    for index in range(blocks):
        name = f"block{index}"
        steps, folded = repvgg(name, source_before, rng, channels, channels, stride if index == 0 else 1, groups)
        before += [*steps, step(f"{name}/relu", "relu", f"{name}/add")]
        folded = replace(folded, inputs=(source_after,))
        after += [folded, step(f"{name}/out", "relu", folded.name)]
        source_before, source_after = f"{name}/relu", f"{name}/out"
        names.append(f"{name}/add")
    head = {"w": normal(rng, 3, channels), "b": normal(rng, 3)}
    slope = normal(rng, channels)
    for steps, source in ((before, source_before), (after, source_after)):
        steps.append(step("act", "prelu", source, slope=slope))
        steps.append(step("pooled", "mean", "act"))
        steps.append(step("head", "dense", "pooled", **head))
    inputs = {"x": (None, channels, size, size)}
    return Built(Model(inputs, tuple(before), ("head",)), Model(inputs, tuple(after), ("head",)), tuple(names))
