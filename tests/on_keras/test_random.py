"""Random models: whatever is drawn, the fold is the same function, proved, and dearer in nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from hypothesis import given, note
from hypothesis import strategies as st
from keras import layers, ops
from test_fold import assert_same_function
from zoo import randomize

import refold

CONV = {1: layers.Conv1D, 2: layers.Conv2D}
TRANSPOSED = {1: layers.Conv1DTranspose, 2: layers.Conv2DTranspose}
DEPTHWISE = {1: layers.DepthwiseConv1D, 2: layers.DepthwiseConv2D}
POOL = {1: layers.AveragePooling1D, 2: layers.AveragePooling2D}
PAD = {1: layers.ZeroPadding1D, 2: layers.ZeroPadding2D}

# TensorFlow has no channels-first convolutions on a CPU.
FORMATS = ["channels_last"] if keras.config.backend() == "tensorflow" else ["channels_last", "channels_first"]

Draw = Callable[[st.SearchStrategy[Any]], Any]


def windowed(draw: Draw, rank: int, form: str) -> dict[str, Any]:
    options = {
        "kernel_size": tuple(draw(st.integers(1, 3)) for _ in range(rank)),
        "padding": draw(st.sampled_from(["same", "same", "valid"])),
        "use_bias": draw(st.booleans()),
        "data_format": form,
    }
    stretch = draw(st.sampled_from(["none", "none", "strides", "dilation_rate"]))
    return options if stretch == "none" else {**options, stretch: 2}


def one_step(draw: Draw, pool: list[Any], rank: int, form: str) -> Any:
    """A layer or an operation on tensors of the pool; they are chosen from the end more often."""
    axis = 1 if form == "channels_first" else -1
    tensor = pool[-1 - draw(st.integers(0, min(2, len(pool) - 1)))]
    channels = tensor.shape[axis]
    alike = [other for other in pool if other.shape == tensor.shape]
    space = [other for other in pool if _space(other, axis) == _space(tensor, axis)]
    kind = draw(st.sampled_from([*KINDS, *([] if rank == 0 else SPATIAL)]))
    match kind:
        case "linear" if rank == 0:
            return layers.Dense(draw(st.sampled_from([2, 4])), use_bias=draw(st.booleans()))(tensor)
        case "linear":
            groups = draw(st.sampled_from([1, 1, 2])) if channels % 2 == 0 else 1
            filters = draw(st.sampled_from([2, 4]))
            return CONV[rank](filters, groups=groups, **windowed(draw, rank, form))(tensor)
        case "norm":
            return layers.BatchNormalization(axis=axis)(tensor)
        case "add":
            return layers.Add()([tensor, draw(st.sampled_from(alike))])
        case "subtract":
            return draw(st.sampled_from(alike)) - tensor
        case "scale":
            return tensor * draw(st.sampled_from([-1.0, 0.5, 0.0]))
        case "concat":
            return layers.Concatenate(axis=axis)([tensor, draw(st.sampled_from(space))])
        case "slice":
            return ops.split(tensor, [1], axis=axis)[draw(st.integers(0, 1))] if channels > 1 else tensor
        case "activation":
            return layers.ReLU()(tensor)
        case "transposed":
            strides, taps = draw(st.integers(1, 3)), tuple(draw(st.integers(1, 4)) for _ in range(rank))
            options = {"padding": draw(st.sampled_from(["same", "valid"])), "use_bias": draw(st.booleans())}
            return TRANSPOSED[rank](3, taps, strides=strides, data_format=form, **options)(tensor)
        case "depthwise":
            return DEPTHWISE[rank](depth_multiplier=draw(st.integers(1, 2)), **windowed(draw, rank, form))(tensor)
        case "pool":
            return POOL[rank](2, strides=draw(st.integers(1, 2)), padding="valid", data_format=form)(tensor)
        case "pad":
            return PAD[rank](draw(st.integers(1, 2)), data_format=form)(tensor)
        case _:
            # Keras' one-dimensional layer knows no data format: it crops the middle axis.
            if rank == 2:
                return layers.Cropping2D(1, data_format=form)(tensor)
            return layers.Cropping1D(1)(tensor) if axis == -1 else tensor


KINDS = ("linear", "linear", "linear", "norm", "norm", "add", "subtract", "scale", "concat", "slice", "activation")
SPATIAL = ("depthwise", "pool", "pad", "crop", "transposed")


def _space(tensor: Any, axis: int) -> list[int | None]:
    sizes = list(tensor.shape)
    del sizes[axis]
    return sizes


def random_model(draw: Draw) -> Any:
    rank, form = draw(st.sampled_from([0, 1, 2, 2])), draw(st.sampled_from(FORMATS))
    space = tuple(draw(st.integers(7, 9)) for _ in range(rank))
    inputs = keras.Input((3, *space) if form == "channels_first" else (*space, 3))
    pool = [inputs]
    for _ in range(draw(st.integers(2, 8))):
        made = one_step(draw, pool, rank, form)
        # Five positions are what a dilated window of three taps needs.
        if all(size is None or 5 <= size <= 40 for size in _space(made, 1 if form == "channels_first" else -1)):
            pool.append(made)
    read = pool[-1 : -1 - draw(st.integers(1, 2)) : -1]
    return randomize(keras.Model(inputs, read), seed=draw(st.integers(0, 100)))


def written(model: Any) -> str:
    """The model, an operation a line, for whoever looks into a failure."""
    lines = []
    for operation in model.operations:
        node = operation._inbound_nodes[-1]
        reads = ", ".join(tensor.name for tensor in node.input_tensors)
        gives = ", ".join(f"{tensor.name} {tuple(tensor.shape[1:])}" for tensor in node.outputs)
        lines.append(f"{gives} = {type(operation).__name__}({reads})")
    return "\n".join(lines)


@given(st.data())
def test_any_model_folds_to_the_same_function(data: Any) -> None:
    model = random_model(data.draw)
    note(written(model))
    plan = refold.inspect(model)
    note(str(plan))
    plain = refold.fold(model)
    assert plan.after.multiply_adds <= plan.before.multiply_adds
    assert plan.after.operators <= plan.before.operators
    assert_same_function(model, plain)
    certificate = refold.prove(model, plain)
    assert certificate.ok, str(certificate)
    if not any("Cropping" in type(operation).__name__ for operation in model.operations):
        # A cropping after a map is said anew as a cropping in front of one, which then meets new neighbors.
        again = refold.inspect(plain)
        assert again.after.operators == again.before.operators, "what is folded has nothing left to fold"
