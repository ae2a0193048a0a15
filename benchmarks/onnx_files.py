"""Folding ONNX files: refold against the tools that simplify them and the runtimes that optimize them.

Run with ``make bench-onnx``, which exports the networks of ``exports.py`` with torch and has an environment of its
own for the tools. Measured for each network, and for the PP-OCR models that people ship: what each tool leaves of
the file, how far its result is from the original in float64, and how fast it runs in ONNX Runtime and in OpenVINO,
on one thread, in turn (A B C A B C ...). A model of 2.5 GB says what tools take of memory. Writes
``benchmarks/results/onnx_files.json``; names of networks (or "large") measure these only, into the same file.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import measure
import numpy as np
import onnx
import onnx_tools
import onnxruntime
import openvino
import ppocr
from onnx import TensorProto, helper, numpy_helper

from refold.frontend import frontend_of
from refold.verbs import plan_of

EXPORTS = Path(__file__).parents[1] / "build" / "onnx"
REAL = {
    "PP-OCRv4, detector": (ppocr.DETECTOR, (320, 640)),
    "PP-OCRv4, recognizer": (ppocr.RECOGNIZER, (48, 320)),
    "PP-OCR, direction of text": (ppocr.CLASSIFIER, (48, 192)),
}
# What is run in ONNX Runtime, where its own optimizer is at work in all of them, and in OpenVINO.
FORMS = ("original", "onnxsim", "onnxslim", "refold")
LARGE = "large"

Run = Callable[[], Any]


def operators(path: Path) -> dict[str, int]:
    """How many operators a file has, constants not counted, and how many of them are convolutions."""
    kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
    del kinds["Constant"]
    return _counted(kinds)


def _counted(kinds: Counter[str]) -> dict[str, int]:
    return {
        "operators": kinds.total(),
        "convolutions": sum(count for kind, count in kinds.items() if "Conv" in kind and "Integer" not in kind),
    }


def in_onnxruntime(path: Path, x: Any) -> Run:
    """A run in ONNX Runtime with all of its optimizations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, feeds)[0]


def in_openvino(path: Path, x: Any) -> tuple[Run, dict[str, int]]:
    """A run in OpenVINO, and what it made of the model."""
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    request = compiled.create_infer_request()
    kinds: Counter[str] = Counter(
        str(op.get_rt_info()["layerType"].value if hasattr(op.get_rt_info()["layerType"], "value") else op)
        for op in compiled.get_runtime_model().get_ops()
    )
    for name in ("Input", "Output", "Const", "Reorder"):
        del kinds[name]

    def run() -> Any:
        request.infer([x])
        return request.get_output_tensor(0).data.copy()

    return run, _counted(kinds)


def row(name: str, path: Path, x: Any, repeats: int) -> dict[str, Any]:
    """One network."""
    model = onnx.load(path)
    frontend = frontend_of(model)
    lifted = frontend.lift(model)
    (source,), (output,) = lifted.graph.inputs, lifted.graph.outputs
    exact = frontend.evaluate(lifted, {source: x}, [output])[output]
    plan = plan_of(frontend, lifted)
    found: dict[str, Any] = {
        "network": name,
        "input": list(x.shape),
        "multiply_adds": [plan.before.multiply_adds, plan.after.multiply_adds],
        "forms": {"original": operators(path)},
    }
    with tempfile.TemporaryDirectory(prefix="refold-bench-") as folder:
        paths = {"original": path}
        for tool in ("onnxsim", "onnxslim", "ONNX Runtime", "refold"):
            target = Path(folder) / f"{tool}.onnx"
            told = onnx_tools.made(tool, path, target)
            if "failed" not in told:
                paths[tool] = target
                told |= operators(target)
            found["forms"][tool] = told
        runs = {form: in_onnxruntime(paths[form], x) for form in FORMS if form in paths}
        for form, run in runs.items():
            error = np.abs(run().astype("float64") - exact).max() / np.abs(exact).max()
            found["forms"][form]["error"] = float(error)
        found["onnxruntime"] = _speeds(runs, repeats)
        runs = {}
        for form in FORMS:
            if form in paths:
                runs[form], found["forms"][form]["in_openvino"] = in_openvino(paths[form], x)
        found["openvino"] = _speeds(runs, repeats)
    print(json.dumps(found), flush=True)
    return found


def _speeds(runs: Mapping[str, Run], repeats: int) -> dict[str, Any]:
    """Milliseconds of each form, and how many times as fast it is as the original."""
    seconds = measure.in_turn(runs, repeats=repeats)
    return {
        form: {
            "milliseconds": measure.spread([1e3 * second for second in taken]),
            "times_as_fast": measure.times_as_fast(seconds["original"], taken),
        }
        for form, taken in seconds.items()
    }


# ---- a model that is larger than a file may be --------------------------------------------------------


def layers(path: Path, width: int, depth: int) -> int:
    """A chain of dense layers, each with a factor behind it, and all their weights beside the file; the bytes of
    the weights."""
    rng = np.random.default_rng(0)
    nodes, tensors, name = [], [], "x"
    beside = path.with_suffix(".data")
    with open(beside, "wb") as data:
        for layer in range(depth):
            shapes = {"weight": (width, width), "bias": (width,), "factor": (width,)}
            for kind, shape in shapes.items():
                array = rng.standard_normal(shape, dtype="float32") / np.float32(np.sqrt(width))
                tensor = TensorProto(name=f"{kind}{layer}", data_type=TensorProto.FLOAT, dims=shape)
                tensor.data_location = TensorProto.EXTERNAL
                entries = {"location": beside.name, "offset": data.tell(), "length": array.nbytes}
                for key, value in entries.items():
                    tensor.external_data.add(key=key, value=str(value))
                data.write(array.tobytes())
                tensors.append(tensor)
            nodes += [
                helper.make_node("Gemm", [name, f"weight{layer}", f"bias{layer}"], [f"a{layer}"]),
                helper.make_node("Mul", [f"a{layer}", f"factor{layer}"], [f"b{layer}"]),
                helper.make_node("Relu", [f"b{layer}"], [f"c{layer}"]),
            ]
            name = f"c{layer}"
        size = data.tell()
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["N", width]) for end in ("x", name)]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return size


def large() -> dict[str, Any]:
    """What the tools take of time and memory, on 40 layers of 64 MiB."""
    with tempfile.TemporaryDirectory(prefix="refold-bench-") as folder:
        source = Path(folder) / "large.onnx"
        layers(source.with_name("tiny.onnx"), 8, 2)
        found: dict[str, Any] = {"bytes": layers(source, 4096, 40), "tools": {}}
        for tool in ("onnxsim", "onnxslim", "ONNX Runtime", "refold"):
            target = Path(folder) / tool / "plain.onnx"
            target.parent.mkdir()
            told = onnx_tools.made(tool, source, target)
            if "failed" not in told:
                kinds = Counter(node.op_type for node in onnx.load(target, load_external_data=False).graph.node)
                told["operators"] = kinds.total()
                if tool == "refold":
                    told["exact"] = _first_is_exact(source, target)
                    found["proof"] = onnx_tools.made(onnx_tools.PROOF, source, target)
            found["tools"][tool] = told
            print(tool, told, flush=True)
            shutil.rmtree(target.parent)
    return found


def _first_is_exact(source: Path, target: Path) -> bool:
    """Whether the first weight of a fold is the product, rounded once."""

    def tensors(path: Path, names: Iterable[str]) -> list[Any]:
        model = onnx.load(path, load_external_data=False)
        known = {tensor.name: tensor for tensor in model.graph.initializer}
        picked = [known[name] for name in names]
        for tensor in picked:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
        return [numpy_helper.to_array(tensor) for tensor in picked]

    weight, factor = tensors(source, ["weight0", "factor0"])
    first = onnx.load(target, load_external_data=False).graph.node[0].input[1]
    (stored,) = tensors(target, [first])
    exact = (weight.astype("float64") * factor).astype("float32")
    return stored.shape == exact.shape and bool(np.array_equal(stored, exact))


def inputs_of(name: str) -> tuple[Path, Any]:
    """The file of a network and what it reads."""
    if name in REAL:
        file, size = REAL[name]
        return ppocr.path_of(file), ppocr.lines_of_text(*size)
    path = EXPORTS / f"{name}.onnx"
    shape = [dim.dim_value for dim in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]
    return path, np.random.default_rng(0).standard_normal(shape, dtype="float32")


def main() -> int:
    exported = sorted(path.stem for path in EXPORTS.glob("*.onnx"))
    every = [*exported, *REAL, LARGE]
    wanted = sys.argv[1:] or every
    known: dict[str, Any] = {"rows": []}
    if sys.argv[1:] and (measure.RESULTS / "onnx_files.json").exists():
        known = json.loads((measure.RESULTS / "onnx_files.json").read_text(encoding="utf-8"))
    rows = {found["network"]: found for found in known["rows"]}
    for name in wanted:
        if name != LARGE:
            rows[name] = row(name, *inputs_of(name), repeats=30)
    result = {
        **measure.environment("onnxsim", "onnxslim", "onnxruntime", "openvino"),
        "threads": 1,
        "rows": list(rows.values()),
        LARGE: large() if LARGE in wanted else known.get(LARGE),
    }
    measure.write("onnx_files", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
