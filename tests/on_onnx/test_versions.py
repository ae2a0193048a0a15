"""The same networks in every version of ONNX's operators that is read, each written as that version wants it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder, assert_same_function, operators
from onnx.defs import onnx_opset_version

import refold
from refold.errors import InputError

OLDEST, NEWEST = 7, onnx_opset_version()


class Versioned(Builder):
    """Operators that took other inputs or attributes in other versions."""

    def pad(self, x: str, *widths: int) -> str:
        if self.opset < 11:
            return str(self.op("Pad", x, pads=widths, value=0.0))
        if self.opset < 18:
            return str(self.op("Pad", x, self.ints(*widths), self.constant(np.float32(0.0))))
        half = len(widths) // 2
        near = [*widths[2:half], *widths[half + 2 :]]
        return str(self.op("Pad", x, self.ints(*near), "", self.ints(2, -1)))

    def slice(self, x: str, start: int, end: int, axis: int) -> str:
        if self.opset < 10:
            return str(self.op("Slice", x, starts=[start], ends=[end], axes=[axis]))
        return str(self.op("Slice", x, self.ints(start), self.ints(end), self.ints(axis), self.ints(1)))

    def split(self, x: str, *sizes: int) -> list[str]:
        if self.opset < 13:
            return list(self.op("Split", x, outputs=len(sizes), axis=1, split=sizes))
        return list(self.op("Split", x, self.ints(*sizes), outputs=len(sizes), axis=1))

    def dropout(self, x: str) -> str:
        if self.opset < 12:
            return str(self.op("Dropout", x, ratio=0.3))
        return str(self.op("Dropout", x, self.constant(np.float32(0.3)), self.constant(np.bool_(False))))

    def clip(self, x: str) -> str:
        if self.opset < 11:
            return str(self.op("Clip", x, min=0.0, max=6.0))
        return str(self.op("Clip", x, self.constant(np.float32(0.0)), self.constant(np.float32(6.0))))

    def sum_over(self, x: str, *axes: int, keepdims: int = 1) -> str:
        if self.opset < 13:
            return str(self.op("ReduceSum", x, axes=axes, keepdims=keepdims))
        return str(self.op("ReduceSum", x, self.ints(*axes), keepdims=keepdims))

    def mean_over(self, x: str, *axes: int) -> str:
        if self.opset < 18:
            return str(self.op("ReduceMean", x, axes=axes, keepdims=1))
        return str(self.op("ReduceMean", x, self.ints(*axes), keepdims=1))

    def squeeze(self, x: str, *axes: int) -> str:
        if self.opset < 13:
            return str(self.op("Squeeze", x, axes=axes))
        return str(self.op("Squeeze", x, self.ints(*axes)))

    def one_parameter(self, *shape: int) -> str:
        """A parameter that the graph computes, as old exporters write it."""
        made = self.op(
            "Constant", value=onnx.numpy_helper.from_array(self.rng.normal(size=shape).astype("float32"))
        )
        return str(made)

    def head(self, x: str, features: int, classes: int) -> str:
        """A linear layer, with the bias that Gemm needs before version 11, and a factor."""
        y = self.op("Gemm", x, self.random(classes, features), self.random(classes), transB=1, alpha=0.5)
        return str(self.op("Mul", y, self.constant(np.full((1,), 3.0))))


def network(opset: int) -> onnx.ModelProto:
    b = Versioned(opset=opset, ir_version=3 if opset < 9 else 8 if opset < 19 else 10)
    x = b.input("N", 4, 8, 8)
    # A block of three branches, one of them with a weight normalization left in the graph, behind a border.
    v, g = b.one_parameter(6, 4, 3, 3), b.constant(b.rng.uniform(0.5, 2.0, (6, 1, 1, 1)))
    norm = b.op("Sqrt", b.sum_over(b.op("Mul", v, v), 1, 2, 3))
    weight = b.op("Mul", b.op("Div", v, norm), g)
    wide = b.op("Conv", b.pad(x, 0, 0, 1, 1, 0, 0, 1, 1), weight, b.random(6))
    small = b.bn(b.conv(x, 4, 6, 1, bias=False), 6)
    pooled = b.conv(x, 4, 6, 1, bias=False)
    pooled = b.op("AveragePool", pooled, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1)
    y = b.clip(b.dropout(b.op("Sum", b.op("Identity", wide), small, b.op("Neg", pooled))))
    # Channels that are parted, put together again in another order, shuffled, and moved behind the positions.
    y = b.conv(y, 6, 8)
    one, two = b.split(y, 3, 5)
    y = b.op("Concat", b.op("Mul", two, b.random(5, 1, 1)), b.op("Add", one, b.random(1, 3, 1, 1)), axis=1)
    y = b.op(
        "Reshape", b.op("Transpose", b.op("Reshape", y, b.ints(0, 2, 4, 64)), perm=[0, 2, 1, 3]), b.ints(0, 8, 8, 8)
    )
    y = b.op("Gather", y, b.ints(7, 0, 1, 2, 3, 6), axis=1)
    y = b.op("Transpose", b.op("Add", b.op("Transpose", y, perm=[0, 2, 3, 1]), b.random(6)), perm=[0, 3, 1, 2])
    y = b.op("Relu", b.slice(b.op("Cast", y, to=1), 1, 5, 1))
    # A head.
    y = b.mean_over(y, 2, 3)
    return b.model(b.head(b.squeeze(y, 2, 3), 4, 3))


LEFT = {"Conv": 2, "Clip": 1, "Relu": 1, "ReduceMean": 1, "Squeeze": 1, "Gemm": 1}


@pytest.mark.parametrize("opset", range(OLDEST, NEWEST + 1))
def test_every_version_folds_to_the_same(opset: int) -> None:
    model = network(opset)
    onnx.checker.check_model(model, full_check=True)
    plain = refold.fold(model)
    onnx.checker.check_model(plain, full_check=True)
    assert operators(plain) == LEFT
    assert plain.opset_import == model.opset_import
    assert_same_function(model, plain, 8)
    assert not refold.inspect(plain).changes_something
    certificate = refold.prove(model, plain)
    assert str(certificate.verdict) == "proved", str(certificate)


@pytest.mark.parametrize("ir_version", range(3, onnx.IR_VERSION + 1))
def test_every_version_of_the_format(ir_version: int) -> None:
    b = Builder(opset=8 if ir_version < 4 else 13, ir_version=ir_version)
    x = b.input("N", 4, 8, 8)
    model = b.model(b.op("Relu", b.bn(b.op("Add", b.conv(x, 4, 4), b.conv(x, 4, 4, 1)), 4)))
    plain = refold.fold(model)
    onnx.checker.check_model(plain, full_check=True)
    assert operators(plain) == {"Conv": 1, "Relu": 1}
    assert plain.ir_version == max(ir_version, 4)
    assert_same_function(model, plain, 8)


@pytest.mark.parametrize("opset", [OLDEST - 1, NEWEST + 1])
def test_other_versions_are_said_not_to_be_read(opset: int) -> None:
    model: Any = network(OLDEST)
    model.opset_import[0].version = opset
    with pytest.raises(InputError, match=f"version {opset} of ONNX's operators"):
        refold.fold(model)
