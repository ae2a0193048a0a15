"""Two hundred random right folds of ONNX graphs are proved, and each again with one subtle fault is refuted.

The folds are made here, with the papers' formulas in float64 and each weight rounded once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import refold
from refold.proof import Certificate, Verdict

Array = Any
CHUNK = 25
FAULTS = ("one border pixel", "two channels swapped", "another epsilon", "one weight off by 1e-5", "bias doubled")


class Graph:
    """Nodes and constants, in the order in which they are added."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, array: Array) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype=np.float32), name))
        return name

    def op(self, kind: str, *inputs: str, to: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [to], name=f"n_{to}", **attributes))
        return to

    def model(self, channels: int, size: int | str, out: str) -> onnx.ModelProto:
        inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", channels, size, size])]
        outputs = [helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "many", inputs, outputs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


class Pair:
    """A network of one or two blocks, its fold, and (``wrong``) the fold with a fault in its last block."""

    def __init__(self, seed: int, fault: str | None = None) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.groups = int(rng.choice([1, 1, 2]))
        channels = self.groups * int(rng.integers(2, 4))
        self.size: int | str = int(rng.choice([5, 6, 8])) if rng.integers(2) else "side"
        self.before, self.after = Graph(), Graph()
        blocks = int(rng.integers(1, 3))
        x = y = "x"
        for index in range(blocks):
            last = index == blocks - 1
            x, y = self.block(f"b{index}", x, y, channels, fault if last else None)
        self.models = self.before.model(channels, self.size, x), self.after.model(channels, self.size, y)

    def norm(self, graph: Graph, name: str, source: str, channels: int) -> tuple[str, Array, Array, float]:
        rng = self.rng
        gamma, beta, mean = rng.uniform(0.5, 1.5, channels), rng.normal(size=channels), rng.normal(size=channels)
        var, eps = rng.uniform(0.3, 2.0, channels), float(np.float32(rng.choice([1e-5, 1e-3])))
        arrays = [np.float32(array) for array in (gamma, beta, mean, var)]
        names = [graph.constant(f"{name}_{i}", array) for i, array in enumerate(arrays)]
        graph.op("BatchNormalization", source, *names, to=name, epsilon=eps)
        gamma, beta, mean, var = (array.astype(np.float64) for array in arrays)
        return name, np.stack([gamma, beta, mean, var]), var, eps

    def block(self, name: str, x: str, y: str, channels: int, fault: str | None) -> tuple[str, str]:
        rng, per = self.rng, channels // self.groups
        three, one = (np.float32(rng.normal(size=(channels, per, k, k)) / (k * per)) for k in (3, 1))
        bias = np.float32(rng.normal(size=channels))
        before = self.before
        wide = before.op(
            "Conv",
            x,
            before.constant(f"{name}_w3", three),
            before.constant(f"{name}_c", bias),
            to=f"{name}_c3",
            pads=[1] * 4,
            group=self.groups,
        )
        narrow = before.op("Conv", x, before.constant(f"{name}_w1", one), to=f"{name}_c1", group=self.groups)
        kernel, total = np.zeros((channels, per, 3, 3)), np.zeros(channels)
        identity = np.zeros((channels, per, 1, 1))
        identity[np.arange(channels), np.arange(channels) % per] = 1.0
        summed = []
        for part, (source, w, c) in enumerate(
            ((wide, three, bias), (narrow, one, np.zeros(channels)), (x, identity, np.zeros(channels)))
        ):
            end, (gamma, beta, mean, _), var, eps = self.norm(before, f"{name}_n{part}", source, channels)
            if fault == "another epsilon" and part == 0:
                eps = 1e-3 if eps < 1e-4 else 1e-5
            scale = gamma / np.sqrt(var + eps)
            full = w.astype(np.float64)
            kernel += (full if full.shape[-1] == 3 else np.pad(full, ((0, 0), (0, 0), (1, 1), (1, 1)))) * scale[
                :, None, None, None
            ]
            total += (c - mean) * scale + beta
            summed.append(end)
        if fault == "two channels swapped":
            kernel[[0, 1]], total[[0, 1]] = kernel[[1, 0]], total[[1, 0]]
        if fault == "one weight off by 1e-5":
            kernel[-1, 0, 0, 2] *= 1 + 1e-5
        if fault == "bias doubled":
            total *= 2
        branches = before.op("Sum", *summed, to=f"{name}_sum")
        after = self.after
        folded = after.op(
            "Conv",
            y,
            after.constant(f"{name}_w", kernel),
            after.constant(f"{name}_b", total),
            to=f"{name}_folded",
            pads=[1] * 4,
            group=self.groups,
        )
        if fault == "one border pixel":
            pixel = np.zeros((1, channels, int(self.size), int(self.size)))
            pixel[0, 1, 0, 2] = 1e-4
            folded = after.op("Add", folded, after.constant(f"{name}_pixel", pixel), to=f"{name}_off")
        return (
            before.op("Relu", branches, to=f"{name}_x"),
            after.op("Relu", folded, to=f"{name}_y"),
        )


def proof(pair: Pair) -> Certificate:
    before, after = pair.models
    after.graph.node[-1].output[0] = before.graph.output[0].name
    after.graph.output[0].name = before.graph.output[0].name
    return refold.prove(before, after, (1, before.graph.input[0].type.tensor_type.shape.dim[1].dim_value, 6, 6))


def fault_of(seed: int) -> str:
    fixed = isinstance(Pair(seed).size, int)
    return FAULTS[seed % 5] if fixed else FAULTS[1 + seed % 4]


@pytest.mark.parametrize("start", range(0, 200, CHUNK))
def test_right_folds_are_proved_and_wrong_ones_refuted(start: int) -> None:
    for seed in range(start, start + CHUNK):
        certificate = proof(Pair(seed))
        assert certificate.verdict is Verdict.PROVED, (seed, certificate)
        fault = fault_of(seed)
        certificate = proof(Pair(seed, fault))
        assert certificate.verdict is Verdict.REFUTED, (seed, fault, certificate)
        assert not certificate.ok


def test_every_fault_is_drawn() -> None:
    assert {fault_of(seed) for seed in range(200)} == set(FAULTS)
