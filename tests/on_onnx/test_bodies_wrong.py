"""Models that compute something else inside of a body, where the first run, or any run on random inputs, hides it,
and what else may go wrong around what stays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from bodies import Inner, a_branch_that_is_never_taken, blocks_in_branches, everywhere, finished, loop_body
from graphs import Builder
from onnx import TensorProto, helper, numpy_helper

import refold

Edit = Callable[[onnx.ModelProto], None]


def _inside(model: onnx.ModelProto, name: str) -> onnx.GraphProto:
    graphs = [a.g for node in model.graph.node for a in node.attribute if a.name == name]
    return graphs[0]


def _two_states() -> onnx.ModelProto:
    """Both states start as the same tensor, which the body captures as well."""
    b = Builder()
    x = b.input("N", 4, 5, 5)
    inner = loop_body()
    one, two = inner.input(None, 4, 5, 5, name="in_one"), inner.input(None, 4, 5, 5, name="in_two")
    y = inner.op("Tanh", inner.bn(inner.conv(one, 4, 4), 4))
    z = inner.op("Sigmoid", inner.op("Add", two, x))
    go = inner.op("Identity", "in_go")
    body = inner.graph((go, TensorProto.BOOL), y, z)
    return finished(b, *b.op("Loop", b.ints(3), "", x, x, outputs=2, body=body))


def _swapped_states(model: onnx.ModelProto) -> None:
    outputs = _inside(model, "body").output
    first, second = outputs[1].name, outputs[2].name
    outputs[1].name, outputs[2].name = second, first


def _the_start_instead_of_the_state(model: onnx.ModelProto) -> None:
    for node in _inside(model, "body").node:
        node.input[:] = ["x" if name == "in_one" else name for name in node.input]


def _the_other_state(model: onnx.ModelProto) -> None:
    for node in _inside(model, "body").node:
        node.input[:] = ["in_two" if name == "in_one" else name for name in node.input]


def _the_state_instead_of_what_is_captured(model: onnx.ModelProto) -> None:
    for node in _inside(model, "body").node:
        node.input[:] = ["in_two" if name == "x" else name for name in node.input]


def _another_count(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    assert numpy_helper.to_array(tensor) == 3
    tensor.CopyFrom(numpy_helper.from_array(np.asarray([1], dtype=np.int64), tensor.name))


EDITS: tuple[Edit, ...] = (
    _swapped_states,
    _the_start_instead_of_the_state,
    _the_other_state,
    _the_state_instead_of_what_is_captured,
    _another_count,
)


@pytest.mark.parametrize("edit", EDITS)
def test_loops_that_carry_something_else(edit: Edit) -> None:
    model = _two_states()
    plain = refold.fold(model)
    assert everywhere(plain)["Conv"] == 1
    assert "BatchNormalization" not in everywhere(plain)
    assert str(refold.prove(model, plain).verdict) == "proved"
    edit(plain)
    onnx.checker.check_model(plain)
    certificate = refold.prove(model, plain)
    assert str(certificate.verdict) == "refuted", str(certificate)


def test_branches_that_were_exchanged() -> None:
    model = a_branch_that_is_never_taken()
    plain = refold.fold(model)
    wrong = onnx.ModelProto()
    wrong.CopyFrom(plain)
    attributes = next(node for node in wrong.graph.node if node.op_type == "If").attribute
    attributes[0].name, attributes[1].name = attributes[1].name, attributes[0].name
    assert not refold.prove(model, wrong).ok


def test_names_stay_and_only_what_nobody_reads_any_more_goes() -> None:
    b = Builder()
    x = b.input("N", 4, 5, 5)
    own, shared = b.random(4, 4, 3, 3, name="only_inside"), b.random(4, 4, 1, 1, name="shared")
    y = b.op("Relu", b.op("Conv", x, shared))
    condition = b.op("Greater", b.op("ReduceMean", y, keepdims=0), b.constant(np.float32(0.0)))
    one, two = Inner(prefix="one", seed=1), Inner(prefix="two", seed=2)
    then = one.graph(one.bn(one.op("Conv", y, own, pads=[1] * 4), 4))
    other = two.graph(two.bn(two.op("Conv", y, shared), 4))
    model = b.model(b.op("If", condition, then_branch=then, else_branch=other, name="choice"))
    plain = refold.fold(model)
    stored = {tensor.name for tensor in plain.graph.initializer}
    assert "shared" in stored
    assert "only_inside" not in stored
    for name in ("then_branch", "else_branch"):
        old, new = _inside(model, name), _inside(plain, name)
        assert [value.name for value in new.output] == [value.name for value in old.output]
        assert [node.op_type for node in new.node] == ["Conv"]
        assert new.node[0].input[0] == y
    plan = refold.inspect(model)
    assert {region.value for region in plan.regions} == {
        "n_choice/then_branch/one_batchnormalization11",
        "n_choice/else_branch/two_batchnormalization11",
    }


# ---- what belongs to an operator that stays ------------------------------------------------------


def test_what_a_call_calls_and_an_unknown_body_captures_belong_to_it() -> None:
    def called(slope: float) -> onnx.ModelProto:
        opsets = [helper.make_opsetid("", 18)]
        node = helper.make_node("LeakyRelu", ["a"], ["b"], alpha=slope)
        function = helper.make_function("own", "F", ["a"], ["b"], [node], opsets)
        b = Builder()
        model = b.model(
            b.op("F", b.op("Abs", b.input("N", 4)), domain="own"), functions=[function], domains=["own"]
        )
        model.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, ["N", 4]))
        return model

    # Behind an Abs no input shows the difference: what is not run is told by what it is.
    assert str(refold.prove(called(0.1), called(0.1)).verdict) == "proved"
    assert str(refold.prove(called(0.1), called(0.2)).verdict) != "proved"


def test_sizes_that_differ_by_branch_are_not_known() -> None:
    model = blocks_in_branches()
    assert refold.inspect(model).graph.values[model.graph.output[0].name].shape == (None, 4, None, None)
