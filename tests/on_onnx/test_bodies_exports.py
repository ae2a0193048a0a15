"""Control flow as PyTorch exports it, and random bodies."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from bodies import Inner, everywhere, finished, loop_body
from graphs import Builder, feeds_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

import refold


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.small = torch.nn.Conv2d(4, 4, 3, padding=1, bias=False), torch.nn.Conv2d(4, 4, 1)
        self.norm, self.other = torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4)
        for norm in (self.norm, self.other):
            torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
            torch.nn.init.normal_(norm.running_mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.wide(x)) + self.other(self.small(x)))


class Chosen(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Block(), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.mean() > 0, lambda x: self.one(x), lambda x: self.two(x), (x,))


class Repeated(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Block(), Block()

    def forward(self, x: torch.Tensor, count: int) -> torch.Tensor:
        for _ in range(count):
            if bool(x.mean() > 0.5):
                x = self.one(x)
            else:
                x = self.two(x)
        return x


def _check(model: onnx.ModelProto, feeds: dict[str, Any], expected: torch.Tensor) -> None:
    plain = refold.fold(model)
    onnx.checker.check_model(plain, full_check=True)
    assert everywhere(plain)["Conv"] == 2
    assert "BatchNormalization" not in everywhere(plain)
    np.testing.assert_allclose(run(plain, feeds)[0], expected.numpy(), rtol=1e-4, atol=1e-4)
    assert not refold.inspect(plain).changes_something
    certificate = refold.prove(model, plain)
    assert str(certificate.verdict) == "proved", str(certificate)


def test_branches_of_the_dynamo_exporter() -> None:
    torch.manual_seed(0)
    net, x = Chosen().eval(), torch.randn(2, 4, 8, 8)
    program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
    assert program is not None
    model = program.model_proto
    with torch.no_grad():
        _check(model, {model.graph.input[0].name: x.numpy()}, net(x))


def test_loops_and_branches_of_scripts() -> None:
    torch.manual_seed(0)
    net, x = Repeated().eval(), torch.randn(2, 4, 8, 8)
    script = torch.jit.script(net)
    file = io.BytesIO()
    arguments = {"opset_version": 17, "input_names": ["x", "count"], "dynamic_axes": {"x": {0: "N"}}}
    torch.onnx.export(script, (x, torch.tensor(3)), file, dynamo=False, **arguments)
    with torch.no_grad():
        _check(onnx.load_from_string(file.getvalue()), {"x": x.numpy(), "count": np.asarray(3)}, net(x, 3))


# ---- random bodies -------------------------------------------------------------------------------

STEPS = ("conv", "small", "norm", "scale", "shift", "sum", "relu", "neg")


def _grown(b: Builder, values: list[str], plan: list[tuple[str, int]]) -> str:
    values = list(values)
    for kind, pick in plan:
        x = values[pick % len(values)]
        match kind:
            case "conv":
                y = b.conv(x, 2, 2, bias=bool(pick % 2))
            case "small":
                y = b.conv(x, 2, 2, 1)
            case "norm":
                y = b.bn(x, 2)
            case "scale":
                y = b.op("Mul", x, b.random(2, 1, 1))
            case "shift":
                y = b.op("Add", x, b.random(1, 2, 1, 1))
            case "sum":
                y = b.op("Add", x, values[(pick + 1) % len(values)])
            case "relu":
                y = b.op("Relu", x)
            case _:
                y = b.op("Neg", x)
        values.append(str(y))
    return str(b.op("Tanh", values[-1]))


PLANS = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 5)), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None)
@given(PLANS, PLANS, PLANS, st.booleans(), st.integers(0, 3))
@pytest.mark.filterwarnings("ignore")
def test_random_bodies_compute_what_they_computed(
    outside: Any, first: Any, second: Any, nested: bool, runs: int
) -> None:
    b = Builder(seed=len(first))
    x = b.input("N", 2, 4, 5)
    y = _grown(b, [x], outside)
    inner = loop_body(seed=3)
    state = inner.input(None, 2, 4, 5, name="in_state")
    values = [state, y]
    if nested:
        one, two = Inner(prefix="one", seed=1), Inner(prefix="two", seed=2)
        condition = inner.op("Greater", inner.op("ReduceMean", state, keepdims=0), inner.constant(np.float32(0.0)))
        branches = one.graph(_grown(one, [state, y], second)), two.graph(_grown(two, [y, state], first))
        values.append(inner.op("If", condition, then_branch=branches[0], else_branch=branches[1]))
    end = _grown(inner, values[::-1], first)
    go = inner.op("Identity", "in_go")
    model = finished(b, b.op("Loop", b.ints(runs), "", y, body=inner.graph((go, TensorProto.BOOL), end)))
    plain = refold.fold(model)
    onnx.checker.check_model(plain, full_check=True)
    feeds = feeds_of(model)
    for before, after in zip(run(model, feeds), run(plain, feeds), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4)
    certificate = refold.prove(model, plain, end_to_end=False)
    assert str(certificate.verdict) == "proved", str(certificate)
