"""Does ``refold prove`` tell what the tools for ONNX files make of a model from a wrong one?

Run with ``make bench-onnx``. Pairs of an original (four blocks of each kind of ``exports.py``) and what onnxsim,
onnxslim, ONNX Runtime's own optimizer (standard operators only, then with its own) and refold make of it; and each
of these with one weight that is off by a thousandth, the largest of the largest tensor. Writes
``benchmarks/results/onnx_proofs.json``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import numpy as np
import onnx
import onnx_files
import onnx_tools
from onnx import numpy_helper

import refold

TOOLS = ("refold", "onnxsim", "onnxslim", "ONNX Runtime, basic", "ONNX Runtime, extended")
SMALL = onnx_files.EXPORTS / "small"


def spoilt(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with one weight off by a thousandth."""
    wrong = onnx.ModelProto.FromString(model.SerializeToString())
    tensors = [tensor for tensor in wrong.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    tensors += [
        attribute.t
        for node in wrong.graph.node
        for attribute in node.attribute
        if attribute.HasField("t") and attribute.t.data_type == onnx.TensorProto.FLOAT
    ]
    tensor = max(tensors, key=lambda tensor: numpy_helper.to_array(tensor).size)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[np.argmax(np.abs(array))] *= np.float32(1.001)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return wrong


def row(name: str) -> dict[str, Any]:
    """One network."""
    path = SMALL / f"{name}.onnx"
    original = onnx.load(path)
    found: dict[str, Any] = {"network": name, "tools": {}}
    with tempfile.TemporaryDirectory(prefix="refold-bench-") as folder:
        for tool in TOOLS:
            target = Path(folder) / f"{tool}.onnx"
            told = onnx_tools.made(tool, path, target)
            if "failed" not in told:
                made, start = onnx.load(target), time.perf_counter()
                right = refold.prove(original, made)
                told = {
                    "right": str(right.verdict),
                    "worst": max((region.ratio or 0.0 for region in right.regions), default=0.0),
                    "wrong": str(refold.prove(original, spoilt(made)).verdict),
                    "seconds": (time.perf_counter() - start) / 2,
                }
            found["tools"][tool] = told
            print(name, tool, told, flush=True)
    return found


def main() -> int:
    rows = [row(path.stem) for path in sorted(SMALL.glob("*.onnx"))]
    measure.write("onnx_proofs", {**measure.environment("onnxsim", "onnxslim", "onnxruntime"), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
