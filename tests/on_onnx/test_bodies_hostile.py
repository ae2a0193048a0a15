"""Files with bodies that are wrong, endless or nested without end: one sentence, within bounds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bodies import (
    Inner,
    a_loop_that_stops_by_itself,
    a_scan_from_behind_over_another_axis,
    block,
    finished,
    loop_body,
)
from graphs import Builder
from onnx import TensorProto, helper, numpy_helper

import refold
from refold.cli import main
from refold.onnx.subgraphs import bodies_of


def _loop(count: Any, *, goes_on: bool = True, stacks: bool = False) -> onnx.ModelProto:
    """A block that runs ``count`` times; with None, for as long as its condition holds: for ever."""
    b = Builder()
    x = b.input(1, 4, 3, 3)
    inner = loop_body()
    state = inner.input(None, 4, 3, 3, name="in_state")
    ends = [(inner.op("Identity", "in_go"), TensorProto.BOOL), inner.op("Tanh", block(inner, state))]
    ends += [inner.op("Tile", ends[1], inner.ints(2**12, 1, 1, 1))] if stacks else []
    first = "" if count is None else b.constant(np.int64(count))
    body = inner.graph(*ends)
    condition = b.constant(np.asarray(goes_on))
    found = b.op("Loop", first, condition, x, outputs=2 if stacks else 1, body=body)
    return finished(b, *(found if stacks else [found]), ranks=5 if stacks else 4)


@pytest.mark.parametrize("count", [None, 2**62])
def test_endless_loops_fold_and_are_proved_without_being_run(count: int | None) -> None:
    model = _loop(count)
    plain = refold.fold(model)
    assert [node.op_type for node in plain.graph.node[0].attribute[0].g.node].count("Conv") == 1
    certificate = refold.prove(model, plain)
    assert str(certificate.verdict) == "proved", str(certificate)
    assert any("more than 4,096 times" in note for note in certificate.notes)
    assert not certificate.end_to_end


def test_loops_that_stack_more_than_memory_holds_are_not_run() -> None:
    model = _loop(2**12, stacks=True)
    certificate = refold.prove(model, refold.fold(model))
    assert str(certificate.verdict) == "proved", str(certificate)
    assert any("GiB" in note for note in certificate.notes)


def test_loops_without_runs() -> None:
    model = _loop(2**62, goes_on=False, stacks=True)
    assert refold.prove(model, refold.fold(model)).end_to_end


def test_loops_that_end_by_themselves_are_measured() -> None:
    model = a_loop_that_stops_by_itself()
    assert refold.prove(model, refold.fold(model)).end_to_end


def _nested(depth: int) -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", 4, 6, 6)
    condition = b.op("Greater", b.op("ReduceMean", x, keepdims=0), b.constant(np.float32(0.0)))

    def branch(level: int, side: str) -> onnx.GraphProto:
        inner = Inner(prefix=f"d{level}{side}", seed=level)
        y = block(inner, x)
        if level:
            inside = inner.op("If", condition, then_branch=branch(level - 1, "t"), else_branch=_plain(level, x))
            y = inner.op("Add", y, inside)
        return inner.graph(y)

    return b.model(b.op("If", condition, then_branch=branch(depth, "t"), else_branch=_plain(depth + 1, x)))


def _plain(level: int, x: str) -> onnx.GraphProto:
    inner = Inner(prefix=f"d{level}e", seed=level)
    return inner.graph(inner.op("Identity", x))


def test_deep_nesting_ends_soon() -> None:
    model = _nested(25)
    start = time.monotonic()
    plan = refold.inspect(model)
    assert len([region for region in plan.regions if region.nodes]) == 8  # so deep bodies are looked into
    assert refold.prove(model, refold.fold(model), end_to_end=False).ok
    assert time.monotonic() - start < 60  # not exponential: it takes about two seconds


def test_loops_in_loops_that_grow_end_soon() -> None:
    """Every level takes some rounds to find out which sizes stay: together that would be exponential."""

    def body(level: int) -> onnx.GraphProto:
        inner = loop_body(f"d{level}", seed=level)
        state = inner.input(None, None, name=f"d{level}_state")
        y = inner.op("Concat", state, state, axis=level % 2)
        if level:
            y = inner.op("Loop", inner.ints(1), "", y, body=body(level - 1))
        return inner.graph((inner.op("Identity", f"d{level}_go"), TensorProto.BOOL), y, rank=2)

    b = Builder()
    x = b.input(1, 1)
    model = finished(b, b.op("Loop", b.ints(1), "", x, body=body(20)), ranks=2)
    start = time.monotonic()
    assert not refold.inspect(model).changes_something
    assert time.monotonic() - start < 60


def _edited(edit: Any) -> onnx.ModelProto:
    model = _loop(3)
    edit(model.graph.node[0].attribute[0].g)
    return model


def _read_missing(graph: onnx.GraphProto) -> None:
    graph.node[1].input[0] = "nowhere"


def _read_itself(graph: onnx.GraphProto) -> None:
    graph.node[1].input[0] = "loop3"


def _read_later(graph: onnx.GraphProto) -> None:
    graph.node[1].input[0] = graph.node[-1].output[0]


def _give_nothing(graph: onnx.GraphProto) -> None:
    graph.output[1].name = "nowhere"


def _too_few(graph: onnx.GraphProto) -> None:
    del graph.output[1:]


@pytest.mark.parametrize("edit", [_read_missing, _read_itself, _read_later, _give_nothing, _too_few])
def test_bodies_that_are_wrong_end_in_one_sentence(
    edit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = _edited(edit)
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    path.write_bytes(model.SerializeToString())
    if edit is _too_few:  # no sentence of ONNX forbids it, no runtime takes it: an atom
        assert not refold.inspect(model).changes_something
        return
    with pytest.raises(refold.InputError) as caught:
        refold.inspect(model)
    assert "\n" not in str(caught.value)
    assert main(["fold", str(path), "-o", str(out)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize("axes", [[7], [0, 1]], ids=["an axis that is not there", "too many axes"])
def test_scans_over_axes_that_are_wrong(axes: list[int]) -> None:
    model = a_scan_from_behind_over_another_axis()
    scan = model.graph.node[0]
    attribute = next(a for a in scan.attribute if a.name == "scan_input_axes")
    attribute.CopyFrom(helper.make_attribute("scan_input_axes", axes))
    plain = refold.fold(model)
    assert refold.prove(model, plain, end_to_end=False).ok


def test_functions_with_endless_loops_are_not_followed() -> None:
    model = _loop(None)
    loop = model.graph.node[0]
    for attribute in loop.attribute:
        for tensor in attribute.g.initializer:
            node = helper.make_node("Constant", [], [tensor.name], value=tensor)
            attribute.g.node.insert(0, node)
        del attribute.g.initializer[:]
    constants = [helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    for version in (18, 17):  # of another version it stays a call
        opsets = [helper.make_opsetid("", version)]
        function = helper.make_function("own", "F", ["x"], list(loop.output), [*constants, loop], opsets)
        graph = helper.make_graph(
            [helper.make_node("F", ["x"], ["y"], domain="own")],
            "g",
            model.graph.input,
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 3, 3])],
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
        called = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=9)
        certificate = refold.prove(called, refold.fold(called))
        assert not certificate.end_to_end
        assert any("loops" in note or "4,096" in note for note in certificate.notes), str(certificate)


def test_weights_in_another_file_that_only_a_body_reads(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("N", 32, 8, 8)
    one, two = Inner(prefix="one", seed=1), Inner(prefix="two", seed=2)
    condition = b.op("Greater", b.op("ReduceMean", x, keepdims=0), b.constant(np.float32(0.0)))
    model = b.model(
        b.op(
            "If",
            condition,
            then_branch=one.graph(block(one, x, 32)),
            else_branch=two.graph(two.bn(two.conv(x, 32, 32, 1), 32)),
        )
    )
    inside = [a.g for node in model.graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    data = b""
    for graph in inside:
        for tensor in graph.initializer:
            array = numpy_helper.to_array(tensor)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            entries = (("location", "weights"), ("offset", str(len(data))), ("length", str(array.nbytes)))
            for key, value in entries:
                tensor.external_data.add(key=key, value=value)
            data += array.tobytes()
    (tmp_path / "weights").write_bytes(data)
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    path.write_bytes(model.SerializeToString())
    assert main(["fold", str(path), "-o", str(out)]) == 0
    assert main(["prove", str(path), str(out)]) == 0
    assert main(["inspect", str(out), "--fail-if-foldable"]) == 0
    assert main(["inspect", str(path), "--fail-if-foldable"]) == 1


def test_only_known_operators_have_bodies() -> None:
    import onnx_ir as ir

    graph = ir.from_proto(a_loop_that_stops_by_itself()).graph
    loop = next(node for node in graph if node.op_type == "Loop")
    assert len(bodies_of(loop, 18)) == 1
    loop.domain = "own"
    assert not bodies_of(loop, 18)
