"""Folding ONNX models: few operators, the same function, everything else as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import Builder, assert_same_function, operators
from models import ENTRIES, Entry, repvgg
from onnx import helper

import refold


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_folds_to_its_minimum_and_stays_the_same_function(entry: Entry) -> None:
    model = entry.build()
    onnx.checker.check_model(model, full_check=True)
    before = model.SerializeToString()
    plain = refold.fold(model)
    assert model.SerializeToString() == before
    assert isinstance(plain, onnx.ModelProto)
    onnx.checker.check_model(plain, full_check=True)
    assert operators(plain) == entry.left
    assert [v.name for v in plain.graph.output] == [v.name for v in model.graph.output]
    for size in entry.sizes:
        assert_same_function(model, plain, size, entry.u)
    again = refold.fold(plain)
    assert operators(again) == entry.left
    assert not refold.inspect(plain).changes_something
    certificate = refold.prove(model, plain)
    assert certificate.ok, str(certificate)
    assert str(certificate.verdict) == entry.proof, str(certificate)


def test_models_of_the_ir_stay_models_of_the_ir() -> None:
    model = ir.from_proto(repvgg())
    plain = refold.fold(model)
    assert isinstance(plain, ir.Model)
    assert [node.op_type for node in plain.graph] == ["Conv", "Relu"]
    assert len(list(model.graph)) > 2
    assert refold.prove(model, plain).ok


def test_names_and_metadata_survive() -> None:
    b = Builder()
    x = b.input("N", 3, 8, 8, name="image")
    hidden = b.op("Relu", b.bn(b.conv(x, 3, 4), 4), name="hidden")
    model = b.model(b.op("Softmax", b.conv(hidden, 4, 2), name="scores"), hidden)
    model.producer_name, model.doc_string, model.graph.name = "somebody", "a model", "main"
    helper.set_model_props(model, {"classes": "cat,dog"})
    model.graph.node[2].doc_string = "an activation"
    plain = refold.fold(model)
    assert [v.name for v in plain.graph.input] == ["image"]
    assert [v.name for v in plain.graph.output] == ["scores", "hidden"]
    assert (plain.producer_name, plain.doc_string, plain.graph.name) == ("somebody", "a model", "main")
    assert {p.key: p.value for p in plain.metadata_props} == {"classes": "cat,dog"}
    kept = {node.name: node for node in plain.graph.node}
    for node in model.graph.node[2:]:
        same = kept[node.name]
        assert (same.op_type, list(same.input), list(same.output)) == (
            node.op_type,
            list(node.input),
            list(node.output),
        )
        assert (same.doc_string, list(same.attribute)) == (node.doc_string, list(node.attribute))


def test_operators_of_others_are_left_alone() -> None:
    b = Builder()
    x = b.input("N", 3, 8, 8)
    y = b.op("Secret", b.bn(b.conv(x, 3, 4), 4), domain="com.example", power=3)
    b.initializers.append(helper.make_tensor("w", 1, [4, 4, 1, 1], np.ones(16)))
    model = b.model(y, domains=["com.example"])
    model.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(1, ["N", 4, 8, 8]))
    plain = refold.fold(model)
    assert operators(plain) == {"Conv": 1, "Secret": 1}
    assert plain.graph.node[1] == onnx.ModelProto.FromString(model.SerializeToString()).graph.node[2]


def test_local_functions_are_left_alone() -> None:
    b = Builder()
    x = b.input("N", 3, 8, 8)
    body = [helper.make_node("Sigmoid", ["a"], ["s"]), helper.make_node("Mul", ["a", "s"], ["b"])]
    swish = helper.make_function("own", "Swish", ["a"], ["b"], body, [helper.make_opsetid("", 18)])
    y = b.op("Swish", b.bn(b.conv(x, 3, 4), 4), domain="own")
    model = b.model(b.bn(b.conv(y, 4, 2), 2), functions=[swish], domains=["own"])
    model.graph.value_info.append(helper.make_tensor_value_info(y, 1, ["N", 4, 8, 8]))
    plain = refold.fold(model)
    assert operators(plain) == {"Conv": 2, "Swish": 1}
    assert plain.functions == model.functions
    assert_same_function(model, plain)
    assert refold.prove(model, plain).ok


def test_functions_that_hold_what_folds_are_inlined() -> None:
    b = Builder()
    x = b.input("N", 4, 8, 8)

    def function(name: str, body: list[onnx.NodeProto], *inputs: str, **settings: Any) -> onnx.FunctionProto:
        opsets = [helper.make_opsetid("", settings.get("opset", 18)), helper.make_opsetid("own", 1)]
        attributes = settings.get("attributes", [])
        return helper.make_function("own", name, inputs, ["y"], body, opsets, attributes)

    swish = [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["x", "s"], ["y"])]
    scaled = helper.make_node("Conv", ["x", "w"], ["c"])
    pads = onnx.AttributeProto(name="pads", ref_attr_name="pads", type=onnx.AttributeProto.INTS)
    scaled.attribute.append(pads)
    branch = [scaled, helper.make_node("Mul", ["c", "a"], ["y"])]
    block = [
        helper.make_node("Branch", ["x", "w3", "a"], ["one"], domain="own", pads=[1] * 4),
        helper.make_node("Branch", ["x", "w1", "a"], ["two"], domain="own", pads=[0] * 4),
        helper.make_node("Add", ["one", "two"], ["sum"]),
        helper.make_node("Swish", ["sum"], ["y"], domain="own"),
    ]
    functions = [
        function("Swish", swish, "x"),
        function("Branch", branch, "x", "w", "a", attributes=["pads"]),
        function("Block", block, "x", "w3", "w1", "a"),
    ]
    y = x
    for _ in range(2):
        weights = [b.random(4, 4, 3, 3), b.random(4, 4, 1, 1), b.constant(b.rng.uniform(0.5, 2, (4, 1, 1)))]
        y = b.op("Block", y, *weights, domain="own")
    model = b.model(y, functions=functions, domains=["own"])
    model.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(1, ["N", 4, 8, 8]))
    onnx.checker.check_model(model)
    plain = refold.fold(model)
    onnx.checker.check_model(plain, full_check=True)
    assert operators(plain) == {"Conv": 2, "Swish": 2}
    assert [function.name for function in plain.functions] == ["Swish"]
    assert [value.name for value in plain.graph.output] == [y]
    assert_same_function(model, plain, 8)
    assert not refold.inspect(plain).changes_something
    certificate = refold.prove(model, plain)
    assert certificate.ok
    assert str(certificate.verdict) == "proved", str(certificate)


def test_calls_stay_calls_where_nothing_folds_or_they_run_in_a_circle() -> None:
    def model(body: list[onnx.NodeProto], opset: int = 18) -> onnx.ModelProto:
        b = Builder()
        x = b.input("N", 4, 8, 8)
        own = helper.make_function(
            "own", "F", ["x", "w"], ["y"], body, [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
        )
        y = b.op("F", x, b.random(4, 4, 3, 3), domain="own")
        made = b.model(b.op("Neg", y), functions=[own], domains=["own"])
        made.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(1, ["N", 4, 6, 6]))
        return made

    conv, relu = helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["y"])
    unchanged = model([conv, relu])
    same = refold.fold(unchanged)
    assert operators(same) == {"F": 1, "Neg": 1}
    assert [node.op_type for node in same.functions[0].node] == ["Conv", "Relu"]
    other_meaning = model([conv, helper.make_node("Neg", ["c"], ["y"])], opset=17)
    assert operators(refold.fold(other_meaning)) == {"F": 1, "Neg": 1}
    circle = model([conv, relu])
    circle.functions[0].node[1].CopyFrom(helper.make_node("F", ["c", "w"], ["y"], domain="own"))
    assert operators(refold.fold(circle)) == {"F": 1, "Neg": 1}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_weights_that_would_overflow_are_not_folded(dtype: str) -> None:
    b = Builder(dtype=dtype)
    x = b.input("N", 3, 8, 8)
    largest = float(np.finfo(dtype).max)
    w = b.constant(np.full((4, 3, 1, 1), largest / 4))
    y = b.op("Mul", b.op("Conv", x, w), b.constant(np.full((4, 1, 1), 64.0)))
    model = b.model(b.op("Relu", y))
    plain = refold.fold(model)
    assert operators(plain) == operators(model)
    assert "finite" in str(refold.inspect(model))


@pytest.mark.parametrize("variance", [-1.0, float("nan")])
def test_batch_norms_without_a_scale_are_not_folded(variance: float) -> None:
    b = Builder()
    x = b.input("N", 3, 8, 8)
    inputs = [b.constant(np.ones(4)) for _ in range(3)] + [b.constant(np.full(4, variance))]
    model = b.model(b.op("BatchNormalization", b.conv(x, 3, 4), *inputs))
    assert operators(refold.fold(model)) == {"Conv": 1, "BatchNormalization": 1}


def test_a_border_near_the_bias_is_said_to_be_the_bias() -> None:
    def bordered(nudge: float) -> onnx.ModelProto:
        b = Builder()
        x = b.input("N", 3, 8, 8)
        bias = b.rng.normal(size=(1, 4, 1, 1)).astype("float32")
        y = b.op("Conv", x, b.random(4, 3, 1, 1), b.constant(bias.reshape(-1)))
        inside = np.zeros((1, 1, 10, 10), dtype=bool)
        inside[:, :, 1:-1, 1:-1] = True
        wide = b.op("Pad", y, b.ints(0, 0, 1, 1, 0, 0, 1, 1))
        border = b.constant(bias * np.float32(1 + nudge))
        return b.model(b.conv(b.op("Where", b.constant(inside), wide, border), 4, 5, pads=[0] * 4))

    near, far = bordered(2.0**-22), bordered(2.0**-12)
    plain = refold.fold(near)
    assert operators(plain) == {"Conv": 1}
    certificate = refold.prove(near, plain)
    assert certificate.ok
    assert any("taken for that bias" in note for note in certificate.notes)
    assert operators(refold.fold(far))["Conv"] == 2
