"""Models with If, Loop and Scan, and what must be left of them, inside and outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from graphs import Builder
from models import Entry
from onnx import TensorProto, helper

ENTRIES: list[Entry] = []


def entry(left: dict[str, int], **settings: Any) -> Callable[[Callable[[], onnx.ModelProto]], Any]:
    def add(build: Callable[[], onnx.ModelProto]) -> Any:
        ENTRIES.append(Entry(build.__name__, build, left, **settings))
        return build

    return add


def everywhere(model: onnx.ModelProto) -> Counter[str]:
    """The operators of a model, those in bodies included."""
    found: Counter[str] = Counter()

    def visit(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            found[node.op_type] += 1
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    visit(attribute.g)

    visit(model.graph)
    return found


@dataclass
class Inner(Builder):
    """The graph of a body in the making, with names of its own: ``prefix`` stands before all of them."""

    prefix: str = "in"

    def constant(self, array: Any, name: str | None = None, dtype: Any = None) -> str:
        self.count += 1
        return super().constant(array, name or f"{self.prefix}_c{self.count}", dtype)

    def op(self, kind: str, *inputs: str, name: str | None = None, outputs: int = 1, **attributes: Any) -> Any:
        self.count += 1
        name = name or f"{self.prefix}_{kind.lower()}{self.count}"
        return super().op(kind, *inputs, name=name, outputs=outputs, **attributes)

    def graph(self, *outputs: Any, rank: int = 4) -> onnx.GraphProto:
        """The graph; an output is a name, or a name with its type."""
        infos = []
        for output in outputs:
            name, kind = output if isinstance(output, tuple) else (output, self.type)
            infos.append(
                helper.make_tensor_value_info(name, kind, [None] * (0 if kind == TensorProto.BOOL else rank))
            )
        return helper.make_graph(self.nodes, self.prefix, self.inputs, infos, self.initializers)


def loop_body(prefix: str = "in", **settings: Any) -> Inner:
    """The start of a Loop's body: the number of the run, and whether there is another one."""
    b = Inner(prefix=prefix, **settings)
    b.input(name=f"{prefix}_run", type=TensorProto.INT64)
    b.input(name=f"{prefix}_go", type=TensorProto.BOOL)
    return b


def finished(b: Builder, *outputs: str, ranks: int = 4) -> onnx.ModelProto:
    """The model; shape inference gives up on what loops carry along, and the checker wants to see shapes."""
    model = b.model(*outputs)
    for place, info in enumerate(model.graph.output):
        if not info.type.tensor_type.HasField("shape"):
            sizes = [f"o{place}_{axis}" for axis in range(ranks)]
            info.type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, sizes))
    return model


def is_positive(b: Builder, x: str) -> str:
    return str(b.op("Greater", b.op("ReduceMean", x, keepdims=0), b.constant(np.float32(0.0))))


def block(b: Builder, x: str, c: int = 4) -> str:
    """A block to train with: one convolution when folded."""
    one = b.bn(b.conv(x, c, c, bias=False), c)
    return str(b.op("Add", one, b.bn(b.conv(x, c, c, 1, bias=False), c)))


def norm_behind(b: Builder, x: str, c: int = 4) -> str:
    return str(b.bn(b.conv(x, c, c), c))


# ---- If ------------------------------------------------------------------------------------------


@entry({"If": 1, "Greater": 1, "ReduceMean": 1, "Conv": 2, "Relu": 1, "Sigmoid": 1})
def blocks_in_branches() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", 4, "H", "W")
    condition = is_positive(b, x)
    one, two = Inner(prefix="one", seed=1), Inner(prefix="two", seed=2)
    then = one.graph(one.op("Relu", block(one, x)))
    other = two.graph(two.op("Sigmoid", norm_behind(two, x)))
    return b.model(b.op("If", condition, then_branch=then, else_branch=other))


@entry({"If": 1, "Conv": 3, "Sigmoid": 1, "Less": 1, "ReduceMean": 1, "Abs": 1})
def a_branch_that_is_never_taken() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", 4, "H", "W")
    y = b.op("Sigmoid", norm_behind(b, x))
    never = b.op("Less", b.op("ReduceMean", b.op("Abs", y), keepdims=0), b.constant(np.float32(-1.0)))
    one, two = Inner(prefix="one", seed=1), Inner(prefix="two", seed=2)
    then, other = one.graph(block(one, y)), two.graph(norm_behind(two, y))
    return b.model(b.op("If", never, then_branch=then, else_branch=other))


@entry({"If": 1, "Greater": 1, "ReduceMean": 1, "Conv": 1, "Identity": 1})
def weights_of_the_outer_graph() -> onnx.ModelProto:
    """Kernels and norms that lie outside are constants inside."""
    b = Builder()
    x = b.input("N", 4, "H", "W")
    w, scale = b.random(4, 4, 3, 3, name="w"), b.random(4, 1, 1, name="scale")
    one, two = Inner(prefix="one", seed=1), Inner(prefix="two", seed=2)
    then = one.graph(one.op("Mul", one.op("Conv", x, w, pads=[1] * 4), scale))
    return b.model(b.op("If", is_positive(b, x), then_branch=then, else_branch=two.graph(two.op("Identity", x))))


@entry({"If": 1, "Greater": 1, "ReduceMean": 1, "Conv": 1, "Mul": 1, "Identity": 1})
def a_weight_that_callers_may_replace() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", 4, "H", "W")
    w, scale = b.random(4, 4, 3, 3, name="w"), b.random(4, 1, 1, name="scale")
    b.input(4, 1, 1, name="scale")
    one, two = Inner(prefix="one", seed=1), Inner(prefix="two", seed=2)
    then = one.graph(one.op("Mul", one.op("Conv", x, w, pads=[1] * 4), scale))
    return b.model(b.op("If", is_positive(b, x), then_branch=then, else_branch=two.graph(two.op("Identity", x))))


@entry({"If": 1, "Greater": 1, "ReduceMean": 1, "Identity": 2}, proof="measured")
def what_computes_nothing_in_a_branch() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", 4, "H", "W")
    one, two = Inner(prefix="one", seed=1), Inner(prefix="two", seed=2)
    then = one.graph(one.op("Neg", one.op("Neg", x)))
    return b.model(b.op("If", is_positive(b, x), then_branch=then, else_branch=two.graph(two.op("Identity", x))))


@entry({"If": 1, "Greater": 1, "ReduceMean": 1, "Conv": 3})
def branches_that_give_other_sizes() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", 4, 8, 8)
    one, two = Inner(prefix="one", seed=1), Inner(prefix="two", seed=2)
    then = one.graph(one.bn(one.conv(x, 4, 4, strides=[2, 2]), 4), rank=4)
    other = two.graph(norm_behind(two, x), rank=4)
    y = b.op("If", is_positive(b, x), then_branch=then, else_branch=other)
    return b.model(block(b, y))


@entry({"If": 2, "Greater": 2, "ReduceMean": 2, "Conv": 3, "Relu": 1, "Add": 1, "BatchNormalization": 1})
def branches_in_branches() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", 4, "H", "W")
    one, two = Inner(prefix="one", seed=1), Inner(prefix="two", seed=2)
    three, four = Inner(prefix="three", seed=3), Inner(prefix="four", seed=4)
    y = one.op("Relu", block(one, x))
    inner = one.op(
        "If",
        is_positive(one, y),
        then_branch=three.graph(block(three, y)),
        else_branch=four.graph(four.bn(four.op("Add", y, x), 4)),
    )
    other = two.graph(norm_behind(two, x))
    return b.model(b.op("If", is_positive(b, x), then_branch=one.graph(inner), else_branch=other))


# ---- Loop ----------------------------------------------------------------------------------------


@entry({"Loop": 1, "Conv": 2, "Relu": 1, "Identity": 1})
def a_block_that_runs_often() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", 4, "H", "W")
    y = norm_behind(b, x)
    inner = loop_body()
    state = inner.input(None, 4, None, None, name="in_state")
    go = inner.op("Identity", "in_go")
    body = inner.graph((go, TensorProto.BOOL), inner.op("Relu", block(inner, state)))
    return finished(b, b.op("Loop", b.ints(3), "", y, body=body))


@entry({"Loop": 1, "Conv": 2, "Tanh": 1, "Identity": 1, "Add": 1}, u=2.0**-20)  # large numbers under the tanh
def a_loop_that_stacks_and_captures() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", 4, 6, 6)
    inner = loop_body()
    state = inner.input(None, None, None, None, name="in_state")
    go = inner.op("Identity", "in_go")
    y = inner.op("Tanh", inner.op("Add", block(inner, state), x))
    body = inner.graph((go, TensorProto.BOOL), y, norm_behind(inner, y))
    states, stacked = b.op("Loop", b.constant(np.int64(2)), b.constant(np.asarray(True)), x, outputs=2, body=body)
    return finished(b, states, stacked)


@entry({"Loop": 1, "Conv": 1, "Tanh": 1, "Greater": 1, "ReduceMean": 1, "And": 1, "Less": 1})
def a_loop_that_stops_by_itself() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", 4, "H", "W")
    inner = loop_body()
    state = inner.input(None, 4, None, None, name="in_state")
    y = inner.op("Tanh", norm_behind(inner, state))
    few = inner.op("Less", "in_run", inner.constant(np.int64(4)))
    body = inner.graph((inner.op("And", few, is_positive(inner, y)), TensorProto.BOOL), y)
    return finished(b, b.op("Loop", b.constant(np.int64(2**62)), "", x, body=body))


@entry({"Loop": 1, "Conv": 1, "Identity": 1, "Concat": 1, "Slice": 1})
def a_value_that_grows() -> onnx.ModelProto:
    """Of what is carried along only the channels stay."""
    b = Builder()
    x = b.input("N", 4, 6)
    inner = loop_body()
    state = inner.input(None, 4, None, name="in_state")
    last = inner.op("Slice", state, inner.ints(-1), inner.ints(2**40), inner.ints(2))
    new = inner.bn(inner.conv(last, 4, 4, 1, axes=1), 4)
    go = inner.op("Identity", "in_go")
    body = inner.graph((go, TensorProto.BOOL), inner.op("Concat", state, new, axis=2), rank=3)
    return finished(b, b.op("Loop", b.ints(3), "", x, body=body), ranks=3)


@entry({"Loop": 1, "Conv": 2, "Mul": 2, "Identity": 1})
def weights_that_are_carried_along() -> onnx.ModelProto:
    """A factor that changes from run to run, and a kernel that is carried, are no constants."""
    b = Builder()
    x = b.input("N", 4, "H", "W")
    w, scale = b.random(4, 4, 1, 1), b.constant(b.rng.uniform(0.5, 2.0, (4, 1, 1)))
    inner = loop_body()
    state = inner.input(None, 4, None, None, name="in_state")
    factor = inner.input(4, 1, 1, name="in_factor")
    kernel = inner.input(4, 4, 1, 1, name="in_kernel")
    y = inner.op("Conv", norm_behind(inner, state), kernel)
    go = inner.op("Identity", "in_go")
    body = inner.graph(
        (go, TensorProto.BOOL),
        inner.op("Mul", y, factor),
        inner.op("Mul", factor, inner.constant(np.float32(0.5))),
        kernel,
    )
    for info, shape in zip(body.output[2:], ([4, 1, 1], [4, 4, 1, 1]), strict=True):
        info.type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, shape))
    return finished(b, b.op("Loop", b.ints(2), "", x, scale, w, outputs=3, body=body)[0])


@entry({"Loop": 2, "If": 1, "Conv": 3, "Identity": 3, "Greater": 1, "ReduceMean": 1})
def a_branch_in_a_loop_in_a_loop() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", 4, "H", "W")
    outer, inner = loop_body("outer", seed=1), loop_body("inner", seed=2)
    state = outer.input(None, 4, None, None, name="outer_state")
    deeper = inner.input(None, 4, None, None, name="inner_state")
    one, two = Inner(prefix="one", seed=3), Inner(prefix="two", seed=4)
    chosen = inner.op(
        "If",
        is_positive(inner, deeper),
        then_branch=one.graph(norm_behind(one, deeper)),
        else_branch=two.graph(two.op("Identity", state)),
    )
    nested = inner.graph((inner.op("Identity", "inner_go"), TensorProto.BOOL), block(inner, chosen))
    y = outer.op("Loop", outer.ints(2), "", norm_behind(outer, state), body=nested)
    body = outer.graph((outer.op("Identity", "outer_go"), TensorProto.BOOL), y)
    return finished(b, b.op("Loop", b.ints(2), "", x, body=body))


# ---- Scan ----------------------------------------------------------------------------------------


@entry({"Scan": 1, "Conv": 2, "Relu": 1, "Add": 1})
def a_scan_over_frames() -> onnx.ModelProto:
    b = Builder()
    start, frames = b.input(2, 4, 5, 5), b.input("T", 2, 4, 5, 5, name="frames")
    inner = Inner()
    state = inner.input(None, 4, 5, 5, name="in_state")
    frame = inner.input(None, 4, 5, 5, name="in_frame")
    y = inner.op("Relu", inner.op("Add", block(inner, frame), state))
    body = inner.graph(y, norm_behind(inner, y))
    return finished(b, *b.op("Scan", start, frames, outputs=2, body=body, num_scan_inputs=1))


@entry({"Scan": 1, "Gemm": 1, "Tanh": 1, "Concat": 1, "Identity": 1})
def a_scan_from_behind_over_another_axis() -> onnx.ModelProto:
    b = Builder()
    state0, words = b.input("N", 4), b.input("N", "T", 4, name="words")
    inner = Inner()
    state, word = inner.input(None, 4, name="in_state"), inner.input(None, 4, name="in_word")
    y = inner.op("MatMul", inner.op("Concat", state, word, axis=1), inner.random(8, 4))
    y = inner.op("Tanh", inner.op("Mul", inner.op("Add", y, inner.random(4)), inner.random(4)))
    settings = {"scan_input_axes": [1], "scan_input_directions": [1], "scan_output_axes": [1]}
    body = inner.graph(y, inner.op("Identity", y), rank=2)
    return finished(
        b,
        *b.op(
            "Scan", state0, words, outputs=2, body=body, num_scan_inputs=1, scan_output_directions=[1], **settings
        ),
    )
