"""Models with more weights than memory has room for: what is not folded is never in memory as a whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from graphs import Builder, operators
from onnx import TensorProto, numpy_helper

import refold
from refold.onnx import files

# In a process of its own, which says by how many MiB its memory grew.
FOLD = """
import sys
from pathlib import Path
import refold
from refold.onnx import files

def peak():  # a process' own: what getrusage says starts with that of its parent
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

source, target = map(Path, sys.argv[1:])
refold.fold(files.load(source.with_name("tiny.onnx")))
start = peak()
model = files.load(source)
plan = refold.inspect(model)
files.save(refold.fold(model), target)
print(peak() - start)
"""


def layers(folder: Path, name: str, width: int, depth: int) -> Path:
    """A chain of scaled dense layers with all its weights beside it."""
    b = Builder()
    x = b.input("N", width)
    for _ in range(depth):
        x = b.op("Gemm", x, b.random(width, width), b.random(width))
        x = b.op("Relu", b.op("Mul", x, b.random(width)))
    model = b.model(x)
    with open(folder / f"{name}.data", "wb") as data:
        for tensor in model.graph.initializer:
            raw = numpy_helper.to_array(tensor).tobytes()
            entries = {"location": f"{name}.data", "offset": data.tell(), "length": len(raw)}
            tensor.ClearField("raw_data")
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))
            tensor.data_location = TensorProto.EXTERNAL
            data.write(raw)
    path = folder / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_folding_takes_memory_for_what_folds_only(tmp_path: Path) -> None:
    layers(tmp_path, "tiny", 8, 2)
    path, plain = layers(tmp_path, "rich", 1024, 40), tmp_path / "plain.onnx"  # 160 MiB, 4 MiB a layer
    command = [sys.executable, "-c", FOLD, str(path), str(plain)]
    environment = {**os.environ, "PYTHONPATH": str(Path(refold.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment)
    assert float(done.stdout) < 60
    folded, original = onnx.load(plain), onnx.load(path)
    assert operators(folded) == {"Gemm": 40, "Relu": 40}
    weight, scale = (numpy_helper.to_array(original.graph.initializer[place]) for place in (0, 2))
    (stored,) = [t for t in folded.graph.initializer if t.name == folded.graph.node[0].input[1]]
    exact = weight.astype("float64") * scale
    np.testing.assert_array_equal(numpy_helper.to_array(stored), exact.astype("float32"))


def test_what_is_replaced_takes_its_old_weights_with_it(tmp_path: Path) -> None:
    path, plain = layers(tmp_path, "rich", 32, 3), tmp_path / "plain.onnx"
    for _ in range(2):
        files.save(refold.fold(files.load(path)), plain, overwrite=True)
        assert len(list(tmp_path.glob("plain*"))) == 2
    assert refold.prove(files.load(path), files.load(plain)).ok
    # What others named, and what the model that is written still reads, stays.
    files.save(refold.fold(files.load(plain)), plain, overwrite=True)
    files.save(refold.fold(files.load(path)), path, overwrite=True)
    assert (tmp_path / "rich.data").exists()
    assert refold.prove(files.load(path), files.load(plain)).ok


def test_large_models_run_operator_by_operator_as_a_whole(tmp_path: Path) -> None:
    from refold.onnx import stepwise
    from refold.onnx.execute import Session, run
    from refold.onnx.lift import lift_model

    model = files.load(layers(tmp_path, "rich", 32, 3))
    _, record, _ = lift_model(model)
    x = np.random.default_rng(0).normal(size=(2, 32)).astype("float32")
    (whole,) = run(Session(record, False), [x])
    (alone,) = stepwise.run(model, {"x": x}, [str(model.graph.outputs[0].name)])
    np.testing.assert_array_equal(alone, whole)
