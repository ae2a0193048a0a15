"""Models and what must be left of them: every entry says which operators remain after folding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from graphs import Builder
from onnx import TensorProto, helper, numpy_helper


@dataclass(frozen=True)
class Entry:
    name: str
    build: Callable[[], onnx.ModelProto]
    left: Mapping[str, int]
    sizes: tuple[int, ...] = (9, 6)
    u: float = 2.0**-24
    proof: str = "proved"
    marks: Mapping[str, Any] = field(default_factory=dict)


ENTRIES: list[Entry] = []


def entry(left: dict[str, int], **settings: Any) -> Callable[[Callable[[], onnx.ModelProto]], Any]:
    def add(build: Callable[[], onnx.ModelProto]) -> Any:
        ENTRIES.append(Entry(build.__name__, build, left, **settings))
        return build

    return add


def start(c: int = 4, *space: Any, **settings: Any) -> tuple[Builder, str]:
    b = Builder(**settings)
    return b, b.input("N", c, *(space or ("H", "W")))


# ---- blocks --------------------------------------------------------------------------------------


@entry({"Conv": 1, "Relu": 1})
def repvgg() -> onnx.ModelProto:
    b, x = start(4)
    y = b.op("Add", b.bn(b.conv(x, 4, 4, bias=False), 4), b.bn(b.conv(x, 4, 4, 1, bias=False), 4))
    return b.model(b.op("Relu", b.op("Add", y, b.bn(x, 4))))


@entry({"Conv": 1, "Relu": 1})
def repvgg_stride_two() -> onnx.ModelProto:
    b, x = start(4)
    y = b.bn(b.conv(x, 4, 6, bias=False, strides=[2, 2]), 6)
    return b.model(b.op("Relu", b.op("Add", y, b.bn(b.conv(x, 4, 6, 1, bias=False, strides=[2, 2]), 6))))


@entry({"Conv": 1})
def asymmetric_branches() -> onnx.ModelProto:
    b, x = start(3)
    one = b.conv(x, 3, 5)
    two = b.op("Conv", x, b.random(5, 3, 1, 3), pads=[0, 1, 0, 1])
    three = b.op("Conv", x, b.random(5, 3, 3, 1), pads=[1, 0, 1, 0])
    return b.model(b.op("Sum", one, two, three))


@entry({"Conv": 1})
def dilated_depthwise_branches() -> onnx.ModelProto:
    b, x = start(4)
    one = b.conv(x, 4, 4, 5, group=4)
    two = b.conv(x, 4, 4, 3, group=4, dilations=[2, 2], pads=[2] * 4)
    return b.model(b.op("Add", b.bn(one, 4), b.bn(two, 4)))


@entry({"Conv": 1})
def linear_expansion_without_padding() -> onnx.ModelProto:
    b, x = start(3)
    y = b.conv(b.conv(b.conv(x, 3, 12, 1), 12, 12, 3, pads=[0] * 4), 12, 5, 1)
    return b.model(y)


@entry({"Conv": 1})
def linear_expansion_with_padding_and_no_bias() -> onnx.ModelProto:
    b, x = start(3)
    return b.model(b.conv(b.conv(b.conv(x, 3, 12, 1, bias=False), 12, 12, 3), 12, 5, 1))


@entry({"Conv": 2})
def bias_before_zero_padding_stays_apart() -> onnx.ModelProto:
    b, x = start(3)
    return b.model(b.conv(b.conv(x, 3, 12, 1), 12, 5, 3))


@entry({"Conv": 1})
def bias_before_a_border_of_that_bias() -> onnx.ModelProto:
    b, x = start(3, 8, 8, dtype="float64")
    y = b.conv(x, 3, 4, 1, bias=False)
    shift = b.rng.normal(size=(1, 4, 1, 1))
    y = b.op("Add", y, b.constant(shift))
    middle = b.op("Pad", y, b.ints(0, 0, 1, 1, 0, 0, 1, 1))
    inside = np.zeros((1, 1, 10, 10), dtype=bool)
    inside[:, :, 1:-1, 1:-1] = True
    border = b.op("Where", b.constant(inside), middle, b.constant(shift))
    return b.model(b.conv(border, 4, 5, pads=[0] * 4))


@entry({"Conv": 1})
def average_pool_branch() -> onnx.ModelProto:
    b, x = start(3)
    y = b.op("AveragePool", b.conv(x, 3, 4, 1, bias=False), kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1)
    return b.model(b.op("Add", b.bn(y, 4), b.conv(x, 3, 4, 3)))


@entry({"AveragePool": 1, "Conv": 2, "Add": 1})
def average_pool_that_does_not_count_its_border() -> onnx.ModelProto:
    b, x = start(3)
    y = b.op("AveragePool", b.conv(x, 3, 4, 1, bias=False), kernel_shape=[3, 3], pads=[1] * 4)
    return b.model(b.op("Add", y, b.conv(x, 3, 4, 3)))


@entry({"Conv": 2}, sizes=(9,))
def ceil_mode_that_changes_nothing() -> onnx.ModelProto:
    b, x = start(3, 9, 9)
    y = b.op("AveragePool", b.conv(x, 3, 3, 1), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    return b.model(b.bn(y, 3))


@entry({"AveragePool": 1, "Conv": 1}, sizes=(8,))
def ceil_mode_that_reaches_over_the_border() -> onnx.ModelProto:
    b, x = start(3, 8, 8)
    y = b.op("AveragePool", b.conv(x, 3, 3, 1), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    return b.model(y)


@entry({"Conv": 1})
def channels_gathered_in_another_order() -> onnx.ModelProto:
    b, x = start(6)
    y = b.op("Gather", b.conv(x, 6, 6), b.ints(0, 3, -5, 4, 2), axis=1)
    return b.model(b.bn(y, 5))


@entry({"Conv": 1}, sizes=(8,))
def shuffle_by_reshapes() -> onnx.ModelProto:
    b, x = start(6, 8, 8)
    y = b.conv(x, 6, 6)
    y = b.op("Transpose", b.op("Reshape", y, b.ints(-1, 2, 3, 8, 8)), perm=[0, 2, 1, 3, 4])
    return b.model(b.conv(b.op("Reshape", y, b.ints(-1, 6, 8, 8)), 6, 4, 1))


@entry({"Conv": 1})
def split_and_concat() -> onnx.ModelProto:
    b, x = start(4)
    one, two = b.op("Split", b.conv(x, 4, 6), b.ints(2, 4), outputs=2, axis=1)
    return b.model(b.op("Concat", b.bn(two, 4), one, axis=1))


@entry({"Conv": 1})
def branches_side_by_side() -> onnx.ModelProto:
    b, x = start(4)
    return b.model(b.op("Concat", b.conv(x, 4, 2), b.conv(x, 4, 3), axis=1))


@entry({"Conv": 1})
def pad_then_conv() -> onnx.ModelProto:
    b, x = start(3)
    y = b.op("Pad", x, b.ints(0, 0, 0, 1, 0, 0, 2, 3), mode="constant")
    return b.model(b.conv(y, 3, 4, pads=[0] * 4))


@entry({"Pad": 1, "Conv": 1})
def reflecting_pad_stays() -> onnx.ModelProto:
    b, x = start(3)
    return b.model(b.conv(b.op("Pad", x, b.ints(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect"), 3, 4, pads=[0] * 4))


@entry({"Conv": 1, "Slice": 1})
def crop_then_conv() -> onnx.ModelProto:
    b, x = start(3)
    y = b.op("Slice", b.conv(x, 3, 4, 1), b.ints(1, 1), b.ints(-1, -2), b.ints(2, 3))
    return b.model(y)


@entry({"Conv": 1})
def crop_against_padding() -> onnx.ModelProto:
    b, x = start(3)
    y = b.op("Slice", b.conv(x, 3, 4, 3), b.ints(1, 1), b.ints(-1, -1), b.ints(2, 3))
    return b.model(b.bn(y, 4))


@entry({"Conv": 1})
def batch_norm_before_an_unpadded_conv() -> onnx.ModelProto:
    b, x = start(3)
    return b.model(b.conv(b.bn(x, 3), 3, 4, pads=[0] * 4))


@entry({"BatchNormalization": 1, "Conv": 1})
def batch_norm_of_the_batch_stays() -> onnx.ModelProto:
    b, x = start(3)
    inputs = [b.constant(np.ones(4)) for _ in range(4)]
    return b.model(b.op("BatchNormalization", b.conv(x, 3, 4), *inputs, training_mode=1, outputs=3)[0])


# ---- one dimension, three, padding by words ------------------------------------------------------


@entry({"Conv": 1})
def one_dimension() -> onnx.ModelProto:
    b, x = start(4, "T")
    y = b.op("Add", b.conv(x, 4, 4, 5, axes=1), x)
    return b.model(b.bn(b.op("Add", y, b.conv(x, 4, 4, 1, axes=1)), 4))


@entry({"Conv": 1}, sizes=(5,))
def three_dimensions() -> onnx.ModelProto:
    b, x = start(2, "D", "H", "W")
    return b.model(b.op("Add", b.conv(x, 2, 3, 3, axes=3), b.conv(x, 2, 3, 1, axes=3)))


@entry({"Conv": 1})
def same_upper_with_a_stride_at_any_size() -> onnx.ModelProto:
    b, x = start(3)
    y = b.conv(x, 3, 4, 3, auto_pad="SAME_UPPER", strides=[2, 2])
    return b.model(b.bn(y, 4))


@entry({"Conv": 1}, sizes=(8,))
def same_lower_at_a_known_size() -> onnx.ModelProto:
    b, x = start(3, 8, 8)
    return b.model(b.bn(b.conv(x, 3, 4, 4, auto_pad="SAME_LOWER", strides=[2, 2]), 4))


@entry({"Conv": 1})
def valid_padding() -> onnx.ModelProto:
    b, x = start(3)
    return b.model(b.op("Neg", b.conv(x, 3, 4, 3, auto_pad="VALID")))


# ---- constants in every place --------------------------------------------------------------------


def _scaled(*shapes: tuple[int, ...], first: bool = False, kinds: str = "Mul Add") -> onnx.ModelProto:
    b, x = start(3)
    y = b.conv(x, 3, 4)
    for shape, kind in zip(shapes, kinds.split(), strict=True):
        constant = b.constant(b.rng.uniform(0.5, 2.0, shape))
        y = b.op(kind, *((constant, y) if first else (y, constant)))
    return b.model(y)


for _shapes in [((), ()), ((1,), (1,)), ((4, 1, 1), (1, 4, 1, 1)), ((1, 1, 1, 1), (1, 1, 1))]:
    for _first in (False, True):
        for _kinds in ("Mul Add", "Add Mul", "Sub Mul") + (() if _first else ("Div Sub",)):
            ENTRIES.append(
                Entry(
                    f"constants {_shapes} {_kinds}{' first' if _first else ''}",
                    lambda s=_shapes, f=_first, k=_kinds: _scaled(*s, first=f, kinds=k),
                    {"Conv": 1},
                    sizes=(5,),
                )
            )


@entry({"Conv": 1, "Add": 1}, sizes=(8,))
def a_constant_that_varies_over_space_stays() -> onnx.ModelProto:
    b, x = start(3, 8, 8)
    return b.model(b.op("Add", b.conv(x, 3, 4), b.random(1, 1, 8, 8)))


@entry({"Conv": 1}, sizes=(8,))
def parameters_expanded_over_space() -> onnx.ModelProto:
    b, x = start(3, 8, 8)
    wide = b.op("Expand", b.random(1, 4, 1, 1), b.ints(1, 4, 8, 8))
    return b.model(b.op("Mul", b.conv(x, 3, 4), wide))


@entry({"Conv": 1, "Div": 1})
def a_constant_divided_by_a_tensor_stays() -> onnx.ModelProto:
    b, x = start(3)
    return b.model(b.op("Div", b.constant(np.ones(1)), b.conv(x, 3, 4)))


@entry({"Conv": 1})
def identity_and_dropout() -> onnx.ModelProto:
    b, x = start(3)
    y = b.op("Dropout", b.op("Identity", b.conv(x, 3, 4)), b.constant(np.float32(0.5)))
    return b.model(b.bn(y, 4))


@entry({"Conv": 1})
def mean_of_branches() -> onnx.ModelProto:
    b, x = start(3)
    return b.model(b.op("Mean", b.conv(x, 3, 4), b.conv(x, 3, 4, 1), b.conv(x, 3, 4, 5)))


@entry({"Conv": 1})
def weight_normalization_left_in_the_graph() -> onnx.ModelProto:
    b, x = start(3)
    v, g = b.random(4, 3, 3, 3), b.constant(b.rng.uniform(0.5, 2, (4, 1, 1, 1)))
    norm = b.op("Sqrt", b.op("ReduceSum", b.op("Mul", v, v), b.ints(1, 2, 3), keepdims=1))
    w = b.op("Mul", g, b.op("Div", v, norm))
    return b.model(b.op("Conv", x, w, b.random(4), pads=[1] * 4))


@entry({"Conv": 1})
def weights_in_constant_nodes() -> onnx.ModelProto:
    b, x = start(3)
    w = b.op("Constant", value=numpy_helper.from_array(b.rng.normal(size=(4, 3, 3, 3)).astype("float32")))
    y = b.op("Conv", x, w, pads=[1] * 4)
    half = b.op("Constant", value_float=0.5)
    return b.model(b.op("Mul", y, half))


# ---- matrices ------------------------------------------------------------------------------------


@entry({"Gemm": 1}, sizes=(5,))
def gemm_chain() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", 6)
    y = b.op("Gemm", x, b.random(6, 8), b.random(8), alpha=0.5, beta=2.0)
    y = b.op("Gemm", y, b.random(5, 8), b.random(1, 5), transB=1)
    return b.model(b.bn(y, 5))


@entry({"Gemm": 1}, sizes=(5,))
def matmul_add_batchnorm() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", 6)
    return b.model(b.bn(b.op("Add", b.op("MatMul", x, b.random(6, 8)), b.random(8)), 8))


@entry({"MatMul": 1, "Add": 1}, sizes=(5,))
def matmuls_over_a_sequence() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", "L", 6)
    y = b.op("Add", b.op("MatMul", x, b.random(6, 12)), b.random(12))
    return b.model(b.op("Mul", b.op("Add", b.op("MatMul", y, b.random(12, 5)), b.random(5)), b.random(5)))


@entry({"MatMul": 1, "Add": 1}, sizes=(5,))
def one_matmul_and_its_bias_stay_as_they_are() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", "L", 6)
    return b.model(b.op("Add", b.op("MatMul", x, b.random(6, 12)), b.random(12)))


@entry({"Conv": 1}, sizes=(5,))
def matrix_on_the_left() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", 4, "L")
    y = b.op("MatMul", b.random(6, 4), x)
    return b.model(b.op("Add", y, b.random(6, 1)))


@entry({"Gemm": 1, "Relu": 1}, sizes=(5,))
def low_rank_is_kept_apart_or_joined_by_cost() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", 6)
    y = b.op("Gemm", b.op("Gemm", x, b.random(6, 20), b.random(20)), b.random(20, 6), b.random(6))
    return b.model(b.op("Relu", y))


@entry({"Conv": 2})
def bottleneck_stays_apart() -> onnx.ModelProto:
    b, x = start(16, 32, 32)
    return b.model(b.conv(b.conv(x, 16, 2, 1, bias=False), 2, 16, 1))


@entry({"Conv": 2})
def depthwise_then_pointwise_stays_apart() -> onnx.ModelProto:
    b, x = start(16, 32, 32)
    return b.model(b.conv(b.conv(x, 16, 16, 3, group=16, bias=False), 16, 16, 1))


# ---- channels last -------------------------------------------------------------------------------


@entry({"Transpose": 2, "Conv": 1}, sizes=(7,))
def channels_last_with_bias_and_scale() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", "H", "W", 3)
    y = b.op("Transpose", b.conv(b.op("Transpose", x, perm=[0, 3, 1, 2]), 3, 4, bias=False), perm=[0, 2, 3, 1])
    return b.model(b.op("Mul", b.op("Add", y, b.random(4)), b.random(4)))


@entry({"Transpose": 2, "Conv": 1}, sizes=(7,))
def channels_last_branches() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", "H", "W", 4)

    def conv(k: int) -> str:
        y = b.conv(b.op("Transpose", x, perm=[0, 3, 1, 2]), 4, 4, k)
        return str(b.op("Transpose", y, perm=[0, 2, 3, 1]))

    return b.model(b.op("Add", b.op("Add", conv(3), conv(1)), x))


@entry({"Transpose": 1, "Conv": 1}, sizes=(7,))
def sequence_turned_to_channels_first() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", "L", 6)
    y = b.op("Transpose", b.op("MatMul", x, b.random(6, 8)), perm=[0, 2, 1])
    return b.model(b.conv(y, 8, 3, 3, axes=1))


def _normed_tokens(b: Builder, y: str, c: int, back: str) -> str:
    """A batch norm over the channels of tokens, ``(N, L, c)``, which are one batch to it; ``back`` is how the shape
    that they had is said."""
    flat = b.op("Flatten", y, axis=2) if back == "Shape" else b.op("Reshape", y, b.ints(-1, c))
    normed = b.bn(flat, c)
    if back == "Shape":  # as torch.onnx writes reshape_as
        return str(b.op("Reshape", normed, b.op("Shape", y)))
    if back == "Concat":
        first = b.op("Unsqueeze", b.op("Gather", b.op("Shape", y), b.constant(np.int64(0))), b.ints(0))
        return str(b.op("Reshape", normed, b.op("Concat", first, b.ints(-1, c), axis=0)))
    return str(b.op("Reshape", normed, b.ints(-1, 7, c)))


def _tokens(back: str) -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", 7 if back == "ints" else "L", 6)
    y = _normed_tokens(b, b.op("MatMul", x, b.random(6, 8)), 8, back)
    return b.model(b.op("Relu", y))


@entry({"MatMul": 1, "Add": 1, "Relu": 1}, sizes=(7, 5))
def batch_norm_of_tokens_that_are_given_their_shape_back() -> onnx.ModelProto:
    return _tokens("Shape")


@entry({"MatMul": 1, "Add": 1, "Relu": 1}, sizes=(7, 5))
def batch_norm_of_tokens_with_a_shape_put_together() -> onnx.ModelProto:
    return _tokens("Concat")


@entry({"MatMul": 1, "Add": 1, "Relu": 1})
def batch_norm_of_tokens_at_a_known_size() -> onnx.ModelProto:
    return _tokens("ints")


@entry({"Relu": 1, "MatMul": 1, "Add": 2, "ReduceMean": 1, "Gemm": 1}, sizes=(7,))
def batch_norm_of_tokens_in_a_residual_branch_before_a_mean() -> onnx.ModelProto:
    b = Builder()
    x = b.input("N", "L", 6)
    y = b.op("MatMul", b.op("Relu", x), b.random(6, 6))
    y = b.op("Add", _normed_tokens(b, y, 6, "Shape"), x)
    return _headed(b, b.op("ReduceMean", y, b.ints(1), keepdims=0), 6)


@entry({"Relu": 1, "Flatten": 1, "BatchNormalization": 1, "Shape": 1, "Reshape": 1, "Tanh": 1}, sizes=(7,))
def batch_norm_of_tokens_between_nonlinearities_stays() -> onnx.ModelProto:
    b = Builder()
    y = b.op("Relu", b.input("N", "L", 6))
    return b.model(b.op("Tanh", _normed_tokens(b, y, 6, "Shape")))


@entry({"MatMul": 1, "Flatten": 1, "BatchNormalization": 1, "Reshape": 1, "Relu": 1})
def batch_norm_of_tokens_that_are_given_another_shape() -> onnx.ModelProto:
    b = Builder()
    y = b.op("MatMul", b.input("N", 6, 6), b.random(6, 6))
    y = b.bn(b.op("Flatten", y, axis=2), 6)
    return b.model(b.op("Relu", b.op("Reshape", y, b.ints(-1, 3, 12))))


@entry({"MatMul": 1, "Reshape": 2, "BatchNormalization": 1, "Relu": 1})
def batch_norm_over_tokens_instead_of_channels_stays() -> onnx.ModelProto:
    b = Builder()
    y = b.op("MatMul", b.input("N", 6, 6), b.random(6, 6))
    y = b.bn(b.op("Reshape", y, b.ints(-1, 6, 2, 3)), 6)
    return b.model(b.op("Relu", b.op("Reshape", y, b.ints(-1, 6, 6))))


@entry({"Conv": 1, "Relu": 1})
def batch_norm_in_two_dimensions_of_a_line() -> onnx.ModelProto:
    b = Builder()
    y = b.conv(b.input("N", 3, 6), 3, 6, axes=1)
    y = b.bn(b.op("Reshape", y, b.ints(-1, 6, 2, 3)), 6)
    return b.model(b.op("Relu", b.op("Reshape", y, b.ints(-1, 6, 6))))


@entry({"Conv": 1}, sizes=(7,))
def transposes_that_cancel() -> onnx.ModelProto:
    b, x = start(3)
    y = b.op("Transpose", b.op("Transpose", b.conv(x, 3, 4), perm=[0, 2, 3, 1]), perm=[0, 3, 1, 2])
    return b.model(b.bn(y, 4))


@entry({"Transpose": 2, "Conv": 1, "MatMul": 3, "Add": 3, "Relu": 3}, sizes=(7,))
def channels_last_residual_block_in_pieces() -> onnx.ModelProto:
    """As converters from TensorFlow write one: every convolution between transposes, batch norms as four operators,
    casts that change nothing between all of them."""
    b = Builder()

    def norm(x: str, c: int) -> str:
        for kind in ("Add", "Sub", "Mul", "Add"):
            x = b.op(kind, b.op("Cast", x, to=1), b.random(c))
        return str(b.op("Cast", b.op("Cast", x, to=1), to=1))

    def conv(x: str, i: int, o: int, k: int) -> str:
        x = b.op("Transpose", b.op("Cast", x, to=1), perm=[0, 3, 1, 2])
        return norm(b.op("Transpose", b.conv(x, i, o, k, bias=False), perm=[0, 2, 3, 1]), o)

    x = b.input("N", "H", "W", 4)
    y = b.op("Relu", conv(x, 4, 3, 1))
    y = b.op("Relu", conv(y, 3, 3, 3))
    total = b.op("Add", conv(y, 3, 8, 1), conv(x, 4, 8, 1))
    return b.model(b.op("Relu", b.op("Cast", total, to=1)))


@entry({"Conv": 1, "Relu": 1})
def train_time_block_as_paddle_writes_it() -> onnx.ModelProto:
    """Every bias is a reshaped constant added behind the convolution, and every step ends in an identity."""
    b = Builder(opset=17)
    x = b.op("Identity", b.input("N", 4, "H", "W"))

    def branch(k: int) -> str:
        bias = b.op("Reshape", b.random(4), b.ints(1, 4, 1, 1))
        y = b.op("Identity", b.op("Add", b.conv(x, 4, 4, k, bias=False), bias))
        return str(b.op("Identity", b.bn(y, 4)))

    alpha = b.op("Reshape", b.constant(b.rng.uniform(0.5, 2.0, 1)), b.ints(1))
    y = b.op("Identity", b.op("Add", branch(3), b.op("Mul", branch(1), alpha)))
    y = b.op("Identity", b.op("Add", y, b.bn(x, 4)))
    scaled = b.op("Add", b.op("Mul", y, b.constant(np.float32(0.5))), b.constant(np.float32(0.25)))
    return b.model(b.op("Relu", b.op("Identity", scaled)))


@entry({"Transpose": 2, "Conv": 1, "Relu": 1}, sizes=(7,))
def train_time_block_of_flax_as_jax2onnx_writes_it() -> onnx.ModelProto:
    b = Builder(opset=21, ir_version=10)
    x = b.op("Transpose", b.input("N", "H", "W", 4), perm=[0, 3, 1, 2])

    def norm(y: str) -> str:
        return str(b.op("Transpose", b.bn(y, 4, momentum=0.99), perm=[0, 2, 3, 1]))

    convs = [b.conv(x, 4, 4, k, bias=False, auto_pad="SAME_UPPER") for k in (3, 1)]
    y = b.op("Add", norm(convs[0]), norm(convs[1]))
    return b.model(b.op("Relu", b.op("Add", y, norm(x))))


@entry({"Transpose": 2, "Conv": 1, "Relu": 1}, sizes=(7,))
def train_time_block_of_keras_on_jax_as_jax2onnx_writes_it() -> onnx.ModelProto:
    """Kernels are turned around in the graph, and batch norms are arithmetic on reshaped constants."""
    b = Builder(opset=21, ir_version=10)
    x = b.input("N", "H", "W", 4)
    turned = b.op("Transpose", x, perm=[0, 3, 1, 2])

    def conv(k: int) -> str:
        w = b.op("Transpose", b.random(k, k, 4, 4), perm=[3, 2, 0, 1])
        y = b.op("Conv", turned, w, pads=[k // 2] * 4, strides=[1, 1], dilations=[1, 1])
        return str(b.op("Transpose", y, perm=[0, 2, 3, 1]))

    def reshaped(array: Any) -> str:
        return str(b.op("Reshape", b.constant(array), b.ints(1, 1, 1, 4), allowzero=0))

    def norm(y: str) -> str:
        root = b.op("Sqrt", b.op("Add", reshaped(b.rng.uniform(0.3, 2.0, 4)), b.constant(np.float32(1e-3))))
        gain = b.op("Mul", b.op("Div", b.constant(np.float32(1)), root), reshaped(b.rng.uniform(0.5, 2.0, 4)))
        shift = b.op("Mul", b.op("Neg", reshaped(b.rng.normal(size=4))), gain)
        shift = b.op("Add", shift, reshaped(b.rng.normal(size=4)))
        return str(b.op("Add", b.op("Mul", y, gain), shift))

    y = b.op("Add", norm(conv(3)), norm(conv(1)))
    return b.model(b.op("Relu", b.op("Add", y, norm(x))))


# ---- what runtimes put together again ------------------------------------------------------------


@entry({"Conv": 2, "Div": 1, "Erf": 1, "Add": 1, "Mul": 2}, sizes=(7,))
def pieces_of_a_gelu_stay() -> onnx.ModelProto:
    b, x = start(3)
    y = b.op("Identity", b.bn(b.conv(x, 3, 4), 4))
    inner = b.op("Erf", b.op("Div", y, b.constant(np.sqrt(2.0))))
    y = b.op("Mul", b.op("Mul", y, b.op("Add", inner, b.constant(1.0))), b.constant(0.5))
    return b.model(b.bn(b.conv(y, 4, 2), 2))


@entry({"Conv": 1, "Mul": 6, "Tanh": 1, "Add": 2}, sizes=(7,))
def pieces_of_a_gelu_by_tanh_stay() -> onnx.ModelProto:
    b, x = start(3)
    y = b.bn(b.conv(x, 3, 4), 4)
    cube = b.op("Mul", b.op("Mul", b.op("Mul", y, y), y), b.constant(0.044715))
    inner = b.op("Tanh", b.op("Mul", b.op("Add", y, cube), b.constant(np.sqrt(2 / np.pi))))
    half = b.op("Mul", y, b.constant(0.5))
    return b.model(b.op("Mul", half, b.op("Add", inner, b.constant(1.0))))


@entry({"ReduceMean": 2, "Sub": 1, "Pow": 1, "Add": 3, "Sqrt": 1, "Div": 1, "Mul": 1, "MatMul": 1}, sizes=(5,))
def pieces_of_a_layer_normalization_stay() -> onnx.ModelProto:
    b = Builder(opset=17)
    x = b.input("N", "L", 6)
    centered = b.op("Sub", x, b.op("ReduceMean", x, axes=[-1]))
    variance = b.op("ReduceMean", b.op("Pow", centered, b.constant(2.0)), axes=[-1])
    y = b.op("Div", centered, b.op("Sqrt", b.op("Add", variance, b.constant(1e-5))))
    y = b.op("Add", b.op("Mul", y, b.random(6)), b.random(6))
    return b.model(b.op("Mul", b.op("Add", b.op("MatMul", y, b.random(6, 5)), b.random(5)), b.constant(2.0)))


@entry({"AveragePool": 1, "Relu": 2}, sizes=(7,))
def what_only_lost_identities_stays_the_node_that_it_was() -> onnx.ModelProto:
    b, x = start(4)
    y = b.op("Identity", b.op("Identity", b.op("Relu", x)))
    y = b.op("AveragePool", y, kernel_shape=[2, 2], strides=[2, 2], name="pool")
    return b.model(b.op("Relu", b.op("Identity", y)))


@entry({"Sigmoid": 1, "Tanh": 1, "Relu": 1, "Add": 2})
def sums_of_several_tensors_are_added_in_pairs() -> onnx.ModelProto:
    b, x = start(4)
    one, two, three = (b.op(kind, x) for kind in ("Sigmoid", "Tanh", "Relu"))
    return b.model(b.op("Add", b.op("Identity", b.op("Add", one, two)), three))


# ---- what must survive ---------------------------------------------------------------------------


@entry({"Conv": 2})
def an_inner_value_that_is_an_output() -> onnx.ModelProto:
    b, x = start(3)
    y = b.conv(x, 3, 4, 1)
    return b.model(y, b.conv(b.bn(y, 4), 4, 5, pads=[0] * 4))


@entry({"Conv": 2, "Relu": 1, "Add": 1})
def shared_weights() -> onnx.ModelProto:
    b, x = start(4)
    w = b.random(4, 4, 3, 3)
    y = b.op("Relu", b.op("Add", b.op("Conv", x, w, pads=[1] * 4), x))
    return b.model(b.op("Add", b.op("Conv", y, w, pads=[1] * 4), x))


@entry({"Conv": 1, "If": 1, "Greater": 1, "ReduceMean": 1})
def values_that_subgraphs_read() -> onnx.ModelProto:
    b, x = start(3)
    y = b.bn(b.conv(x, 3, 4), 4)
    condition = b.op("Greater", b.op("ReduceMean", y, keepdims=0), b.constant(np.float32(0.0)))
    info = helper.make_tensor_value_info
    then = helper.make_graph(
        [helper.make_node("Relu", [y], ["t"])], "then", [], [info("t", TensorProto.FLOAT, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Neg", [y], ["e"])], "else", [], [info("e", TensorProto.FLOAT, None)]
    )
    return b.model(b.op("If", condition, then_branch=then, else_branch=other))


@entry({"QuantizeLinear": 1, "DequantizeLinear": 2, "Conv": 1, "BatchNormalization": 1})
def quantized_weights_stay() -> onnx.ModelProto:
    b, x = start(3)
    scale, zero = b.constant(np.float32(0.05)), b.constant(np.int8(0))
    stored = b.constant(b.rng.integers(-90, 90, (4, 3, 3, 3)).astype("int8"))
    w = b.op("DequantizeLinear", stored, scale, zero)
    q = b.op("DequantizeLinear", b.op("QuantizeLinear", x, scale, zero), scale, zero)
    return b.model(b.bn(b.op("Conv", q, w, pads=[1] * 4), 4))


@entry({"Conv": 1}, u=2.0**-11, sizes=(7,))
def half_precision() -> onnx.ModelProto:
    b, x = start(4, dtype="float16")
    return b.model(b.bn(b.op("Add", b.conv(x, 4, 4), x), 4))


@entry({"Conv": 1}, u=2.0**-53, sizes=(7,))
def double_precision() -> onnx.ModelProto:
    b, x = start(4, dtype="float64")
    return b.model(b.bn(b.op("Add", b.conv(x, 4, 4), x), 4))


@entry({"Conv": 2, "BatchNormalization": 1, "Cast": 2}, sizes=(7,))
def changes_of_precision_stay() -> onnx.ModelProto:
    b, x = start(3)
    y = b.op("Cast", b.conv(x, 3, 4), to=TensorProto.DOUBLE)
    b.dtype = "float64"
    y = b.op("Cast", b.bn(y, 4), to=TensorProto.FLOAT)
    b.dtype = "float32"
    return b.model(b.conv(y, 4, 2))


@entry({"Conv": 2, "ConvTranspose": 1, "Sigmoid": 1, "Mul": 1, "GlobalAveragePool": 1}, sizes=(7,))
def squeeze_excitation_and_transposed_convolution() -> onnx.ModelProto:
    b, x = start(4)
    y = b.bn(b.conv(x, 4, 4), 4)
    gate = b.op("Sigmoid", b.conv(b.op("GlobalAveragePool", y), 4, 4, 1))
    return b.model(b.op("ConvTranspose", b.op("Mul", y, gate), b.random(4, 3, 2, 2), strides=[2, 2]))


@entry({"Conv": 3, "Relu": 2, "Concat": 1})
def norm_behind_a_concatenation() -> onnx.ModelProto:
    b, x = start(4)
    deep = b.conv(b.op("Relu", b.bn(b.conv(x, 4, 4), 4)), 4, 3, 1, bias=False)
    both = b.op("Concat", deep, b.conv(x, 4, 5, 1), axis=1)
    return b.model(b.op("Relu", b.bn(both, 8)))


@entry({"ConvTranspose": 1, "Relu": 1}, sizes=(5, 4))
def transposed_convolution_and_norm() -> onnx.ModelProto:
    b, x = start(4)
    scaled = b.op("Mul", x, b.random(4, 1, 1))
    y = b.op("ConvTranspose", scaled, b.random(4, 3, 4, 4), strides=[2, 2], pads=[1, 1, 1, 1])
    return b.model(b.op("Relu", b.bn(y, 3)))


@entry({"ConvTranspose": 1}, sizes=(5, 4))
def transposed_branches_in_groups() -> onnx.ModelProto:
    b, x = start(4, opset=13)  # run as it ships: the reference evaluator falls over with groups
    wide = {"strides": [2, 3], "group": 2, "dilations": [1, 2], "output_padding": [1, 0]}
    one = b.op("ConvTranspose", x, b.random(4, 2, 3, 3), pads=[1, 1, 1, 2], **wide)
    other = b.op("ConvTranspose", x, b.random(4, 2, 2, 3), b.random(4), pads=[0, 1, 1, 2], **wide)
    return b.model(b.bn(b.op("Add", b.bn(one, 4), other), 4))


@entry({"ConvTranspose": 1, "Conv": 1, "Relu": 1}, sizes=(5, 4))
def a_bias_before_a_transposed_convolution_stays_before_it() -> onnx.ModelProto:
    b, x = start(4)
    y = b.op("ConvTranspose", b.conv(x, 4, 4, 1), b.random(4, 3, 2, 2), strides=[2, 2])
    return b.model(b.op("Relu", y))


@entry({"Conv": 1, "Shape": 1, "Reshape": 1, "Gather": 1, "Concat": 1}, sizes=(8, 6))
def sizes_computed_in_the_graph() -> onnx.ModelProto:
    b, x = start(3)
    y = b.bn(b.conv(x, 3, 4), 4)
    batch = b.op("Gather", b.op("Shape", x), b.ints(0), axis=0)
    return b.model(b.op("Reshape", y, b.op("Concat", batch, b.ints(-1), axis=0)))


@entry({"Conv": 1})
def old_operators() -> onnx.ModelProto:
    b, x = start(3, opset=9, ir_version=4)
    y = b.op("Pad", b.conv(x, 3, 4, 1, bias=False), pads=[0, 0, 1, 1, 0, 0, 1, 1])
    y = b.conv(b.op("Dropout", y, ratio=0.3), 4, 4, pads=[0] * 4)
    return b.model(b.bn(b.op("Slice", y, starts=[1], ends=[3], axes=[1]), 2))


@entry({"Conv": 1})
def initializers_listed_as_inputs_before_version_four() -> onnx.ModelProto:
    b, x = start(3, opset=8, ir_version=3)
    return b.model(b.bn(b.conv(x, 3, 4), 4))


@entry({"Conv": 1, "BatchNormalization": 1}, sizes=(7,))
def an_initializer_that_callers_may_replace() -> onnx.ModelProto:
    b, x = start(3)
    w = b.random(4, 3, 3, 3, name="w")
    b.input(4, 3, 3, 3, name="w")
    return b.model(b.bn(b.op("Conv", x, w, pads=[1] * 4), 4))


@entry({"Mul": 1, "Add": 1, "HardSwish": 1, "Relu": 1})
def factors_where_nothing_says_which_axis_is_the_channels() -> onnx.ModelProto:
    b, x = start(4)
    y = b.op("Mul", b.op("HardSwish", x), b.constant(np.full((1,), 0.5)))
    return b.model(
        b.op("Relu", b.op("Mul", b.op("Add", y, b.constant(np.full((), 2.0))), b.constant(np.ones(1) * 3)))
    )


@entry({"Conv": 1, "Relu": 1})
def factors_per_channel_that_are_all_the_same() -> onnx.ModelProto:
    b, x = start(3)
    y = b.op("Mul", b.conv(x, 3, 4), b.constant(np.ones((4, 1, 1))))
    return b.model(b.op("Relu", b.op("Add", y, b.constant(np.full((1, 4, 1, 1), 0.5)))))


@entry({"Conv": 1, "Relu": 1})
def sizes_of_minus_one_are_not_known() -> onnx.ModelProto:
    b = Builder()
    x = b.input(-1, 3, -1, -1)
    return b.model(b.op("Relu", b.bn(b.conv(x, 3, 4), 4)))


# ---- what once took a second fold ----------------------------------------------------------------


@entry({"Conv": 3, "Concat": 1})
def averages_of_what_is_joined_and_read_elsewhere() -> onnx.ModelProto:
    b, x = start(4)
    double = b.op("Add", x, x)
    norm = b.bn(b.op("Mul", b.op("Neg", double), b.random(4, 1, 1)), 4)
    means = b.op("AveragePool", b.op("Concat", norm, double, axis=1), kernel_shape=[3, 3])
    return b.model(means, b.conv(b.op("Neg", norm), 4, 2, 1))


@entry({"Conv": 3, "Add": 1, "Relu": 1}, sizes=(7,))
def branches_on_a_sum_behind_an_identity() -> onnx.ModelProto:
    """A mixer of FastViT on the sum before it: one convolution of that sum, and not two and a sum of their own."""
    b, x = start(4)
    hidden = b.op("Relu", b.conv(x, 4, 8, 1))
    # As dropouts come out of an exporter, between the convolution and its factor.
    y = b.op("Mul", b.op("Identity", b.conv(hidden, 8, 4, 1)), b.random(4, 1, 1))
    y = b.op("Add", x, y)
    mixed = b.op("Add", b.bn(b.conv(y, 4, 4, 1, group=4), 4), b.bn(y, 4))
    mixed = b.op("Add", mixed, b.bn(b.conv(y, 4, 4, 3, group=4), 4))
    mixed = b.op("Sub", mixed, b.op("Identity", b.bn(y, 4)))
    return b.model(b.op("Add", y, b.op("Mul", mixed, b.random(4, 1, 1))))


# ---- what depends on a type only -----------------------------------------------------------------


@entry({"Conv": 1, "Relu": 1})
def biases_that_take_their_type_from_the_data() -> onnx.ModelProto:
    """As PyTorch's exporter writes a convolution without a bias if it does not optimize."""
    b, x = start(4)
    w = b.random(4, 4, 3, 3)
    channels = b.op("Expand", b.op("Slice", b.op("Shape", w), b.ints(0), b.ints(1)), b.ints(1))
    zero = b.op("CastLike", b.op("Constant", value=numpy_helper.from_array(np.int64(0))), x)
    y = b.op("Conv", x, w, b.op("Expand", zero, channels), pads=[1] * 4)
    half = b.op("CastLike", b.op("Constant", value_float=0.5), y)
    y = b.op("CastLike", b.op("Mul", b.bn(y, 4), half), b.constant(np.float32(0)))
    return b.model(b.op("Relu", b.op("Add", y, b.conv(x, 4, 4, 1))))


@entry({"Conv": 1, "CastLike": 2, "BatchNormalization": 1}, sizes=(7,))
def a_cast_to_the_type_of_another_that_changes_it_stays() -> onnx.ModelProto:
    b, x = start(4)
    double = b.constant(np.zeros(1), dtype="float64")
    y = b.op("CastLike", b.conv(x, 4, 4), double)
    b.dtype = "float64"
    y = b.bn(y, 4)
    return b.model(b.op("CastLike", y, x))


# ---- every type, and weights that a caller may replace -------------------------------------------


@entry({"Conv": 1}, u=2.0**-8, sizes=(7,))
def brain_floats() -> onnx.ModelProto:
    b, x = start(4, dtype=ml_dtypes.bfloat16, opset=22, ir_version=10)
    return b.model(b.bn(b.op("Add", b.conv(x, 4, 4), b.conv(x, 4, 4, 1)), 4))


@entry({"Conv": 1, "Mul": 1}, sizes=(7,))
def an_initializer_that_is_an_input_is_no_constant() -> onnx.ModelProto:
    b, x = start(4)
    factor = b.constant(b.rng.uniform(0.5, 2.0, (4, 1, 1)))
    y = b.op("Mul", b.bn(b.conv(x, 4, 4), 4), factor)
    b.input(4, 1, 1, name=factor)
    return b.model(y)


@entry({"Gemm": 2}, sizes=(5,))
def a_gemm_that_turns_its_data_mixes_the_batch() -> onnx.ModelProto:
    b = Builder()
    x = b.input(6, "N")
    y = b.op("Gemm", x, b.random(6, 8), b.random(8), transA=1)
    return b.model(b.op("Gemm", y, b.random(8, 5), b.random(5), beta=0.5))


# ---- operators through which factors and shifts per channel pass -----------------------------------


def _headed(b: Builder, y: str, features: int) -> onnx.ModelProto:
    return b.model(b.op("Gemm", y, b.random(features, 5), b.random(5)))


@entry({"Relu": 1, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1})
def batch_norm_before_a_global_average_at_any_size() -> onnx.ModelProto:
    b, x = start(4)
    y = b.op("GlobalAveragePool", b.bn(b.op("Relu", x), 4))
    return _headed(b, b.op("Flatten", y), 4)


@entry({"Relu": 1, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}, sizes=(6,))
def batch_norm_before_a_global_average_at_a_known_size() -> onnx.ModelProto:
    b, x = start(4, 6, 6)
    y = b.op("GlobalAveragePool", b.bn(b.op("Relu", x), 4))
    return _headed(b, b.op("Flatten", y), 4)


@entry({"Relu": 1, "ReduceMean": 1, "Gemm": 1})
def batch_norm_before_a_mean() -> onnx.ModelProto:
    b, x = start(4)
    y = b.op("ReduceMean", b.bn(b.op("Relu", x), 4), b.ints(2, 3), keepdims=0)
    return _headed(b, y, 4)


@entry({"Relu": 1, "AveragePool": 1, "Reshape": 1, "Gemm": 1}, sizes=(6,))
def batch_norm_before_an_average_and_a_flattening() -> onnx.ModelProto:
    b, x = start(4, 6, 6)
    y = b.op("AveragePool", b.bn(b.op("Relu", x), 4), kernel_shape=[3, 3], strides=[3, 3], pads=[1] * 4)
    return _headed(b, b.op("Reshape", y, b.ints(-1, 16)), 16)


def _from_a_convolution(kind: str, *more: str, positive: bool = True, **attributes: Any) -> onnx.ModelProto:
    """A convolution, an operator, a batch norm, a nonlinearity."""
    b, x = start(4)
    y = b.op(
        kind, b.conv(x, 4, 8, 3), *(b.constant(np.array(m, dtype=b.dtype)) if m else "" for m in more), **attributes
    )
    channels = 2 if kind == "DepthToSpace" else 8
    scale = b.constant(np.linspace(0.5 if positive else -1.0, 2.0, channels).reshape(channels, 1, 1))
    return b.model(b.op("Relu", b.op("Add", b.op("Mul", y, scale), b.random(channels, 1, 1))))


@entry({"Conv": 1, "MaxPool": 1, "Relu": 1})
def factors_behind_a_maximum_pool() -> onnx.ModelProto:
    return _from_a_convolution("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)


@entry({"Conv": 1, "DepthToSpace": 1, "Relu": 1})
def factors_behind_a_pixel_shuffle() -> onnx.ModelProto:
    return _from_a_convolution("DepthToSpace", blocksize=2)


@entry({"Conv": 1, "MaxPool": 1, "Mul": 1, "Add": 1, "Relu": 1})
def factors_of_both_signs_stay_behind_a_maximum_pool() -> onnx.ModelProto:
    return _from_a_convolution("MaxPool", positive=False, kernel_shape=[2, 2])
