"""The Keras layers of the blocks: they train, they are one convolution, they become it."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import refold
from refold import blocks as expressions
from refold.blocks import BatchNorm, Identity, Scale, Sum, average_pool, convolution
from refold.keras.blocks import Block, BranchScale, ExpressionBlock
from refold.keras.execute import double_precision
from refold.keras.named_blocks import ACBlock, DiverseBranchBlock, MobileOneBlock, RepVGGBlock

AlphaBlock = partial(RepVGGBlock, alpha=True)
NAMED = (AlphaBlock, ACBlock, DiverseBranchBlock, MobileOneBlock)

bn = BatchNorm()
MIXED = Sum(
    convolution(4, (3, 1)) | bn,
    Scale(-0.5, per_channel=True) * (convolution(4, 3, groups=2, bias=True) | bn),
    convolution(6, 1) | convolution(4, (1, 5)) | bn,
    average_pool(3) | Scale(),
    0.25 * Identity() - (Identity() | bn),
)


def mixed(filters: int, **kwargs: Any) -> Any:
    return ExpressionBlock(MIXED, **kwargs)


def numpy(tensor: Any) -> Any:
    return np.asarray(ops.convert_to_numpy(tensor))


def infer(block: Any, x: Any) -> Any:
    """The block compiled, where that is fast: JAX compiles every operation otherwise, and TensorFlow has some
    data formats and types on the CPU in compiled functions only."""

    def forward(x: Any) -> Any:
        return block(x, training=False)

    match keras.config.backend():
        case "jax":
            import jax

            forward = jax.jit(forward)
        case "tensorflow":
            import tensorflow as tf

            forward = tf.function(forward, jit_compile=True, autograph=False)
    return numpy(forward(ops.convert_to_tensor(x)))


def randomize(block: Any, seed: int = 0) -> Any:
    """Statistics as after training, and every factor at neither 0 nor 1."""
    rng = np.random.default_rng(seed)
    for variable in block.weights:
        shape = tuple(variable.shape)
        size = rng.uniform(0.3, 1.2, shape)
        if "variance" not in variable.path:
            size = size * rng.choice([-1.0, 1.0], shape)
        variable.assign(size / np.sqrt(np.prod(shape[:-1])) if len(shape) > 1 else size)
    return block


def draw(shape: tuple[int, ...], dtype: str = "float32", seed: int = 1) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def check(block: Any, shape: tuple[int, ...], loose: float = 1.0) -> None:
    """In float64, the branches are the kernel and bias that the block gives out, and the converted block
    is both."""
    with double_precision():
        randomize_built(block, shape)
        x = ops.convert_to_tensor(draw(shape, "float64"), dtype="float64")
        rich = infer(block, x)
        assert rich.dtype == np.float64
        assert rich.shape == block.compute_output_shape(shape)
        kernel, bias = block.get_equivalent_kernel_bias()
        assert kernel.dtype == bias.dtype == np.float64
        block.convert_to_deploy()
        plain = infer(block, x)
        again = block.get_equivalent_kernel_bias()
    np.testing.assert_allclose(plain, rich, rtol=0, atol=loose * 1e-12 * np.abs(rich).max())
    np.testing.assert_array_equal(again[0], kernel)
    np.testing.assert_array_equal(again[1], bias)


def randomize_built(block: Any, shape: tuple[int, ...]) -> None:
    block.build(shape)
    randomize(block)


def build(make: Any, *args: Any, **kwargs: Any) -> Any:
    # Random kernels are compiled for every shape on JAX, and these are overwritten anyhow.
    return make(*args, dtype="float64", activation=None, kernel_initializer="ones", **kwargs)


# ---- one convolution -------------------------------------------------------------------------------


GEOMETRIES = {
    "plain": (4, {}, (7, 6)),
    "strided, even size": (4, {"strides": 2}, (8, 6)),
    "strided, odd size": (4, {"strides": (2, 3)}, (7, 5)),
    "grouped, oblong": (6, {"groups": 2, "kernel_size": (3, 5)}, (5, 6)),
    "depthwise, even kernel": (4, {"groups": 4, "kernel_size": 2}, (5, 4)),
    "depthwise, strided, more filters": (8, {"groups": 4, "strides": 2}, (6, 5)),
    "depthwise, unequal strides": (4, {"groups": 4, "strides": (2, 1)}, (6, 5)),
    "dilated": (3, {"dilation_rate": 2}, (6, 5)),
    "depthwise, dilated": (4, {"groups": 4, "dilation_rate": 2}, (6, 5)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_block_is_the_kernel_and_bias_that_it_gives_out(name):
    filters, options, size = GEOMETRIES[name]
    check(build(AlphaBlock, filters, **options), (2, *size, 4))


@pytest.mark.parametrize("make", [ACBlock, DiverseBranchBlock, MobileOneBlock])
@pytest.mark.parametrize("name", ["strided, even size", "depthwise, even kernel"])
def test_all_blocks_are_the_kernel_and_bias_that_they_give_out(make, name):
    filters, options, size = GEOMETRIES[name]
    check(build(make, filters, **options), (2, *size, 4))


def test_a_dilated_block_without_a_pool():
    check(build(DiverseBranchBlock, 3, dilation_rate=2, average=False), (2, 6, 5, 4))


@pytest.mark.parametrize(("make", "shape"), [(AlphaBlock, (2, 9, 4)), (DiverseBranchBlock, (2, 4, 5, 3, 4))])
@pytest.mark.parametrize("strides", [1, 2])
def test_a_block_on_a_line_and_in_space(make, shape, strides):
    check(build(make, 4, strides=strides), shape)


@pytest.mark.parametrize(
    ("make", "shape", "strides"),
    [(AlphaBlock, (2, 4, 6, 5), 1), (DiverseBranchBlock, (2, 4, 6, 5), 2), (MobileOneBlock, (2, 4, 9), 2)],
)
def test_channels_first(make, shape, strides):
    check(build(make, 4, strides=strides, data_format="channels_first"), shape)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_any_expression_is_a_layer(data_format):
    # No spatial size equals the number of channels: Keras' bias would go to the wrong axis on TensorFlow then.
    shape = (2, 6, 5, 4) if data_format == "channels_last" else (2, 4, 6, 5)
    check(build(ExpressionBlock, MIXED, data_format=data_format), shape, loose=10)


def test_a_subclass_with_an_expression_is_a_block():
    class Twice(Block):
        def make_expression(self, channels_in: int, axes: int) -> expressions.Expression:
            conv = convolution(channels_in, 3, axes=axes) | bn
            return Sum(conv, conv)

    check(build(Twice), (2, 6, 5, 3))


def test_the_kernel_is_as_keras_stores_kernels():
    block = build(AlphaBlock, 6, (3, 5), strides=2, groups=2)
    with double_precision():
        randomize_built(block, (None, None, None, 4))
        kernel, bias = block.get_equivalent_kernel_bias()
        assert kernel.shape == (3, 5, 2, 6)
        x = ops.convert_to_tensor(draw((2, 8, 7, 4), "float64"))
        padded = ops.pad(x, ((0, 0), (1, 1), (2, 2), (0, 0)))
        expected = ops.conv(padded, ops.convert_to_tensor(kernel), strides=2, padding="valid") + bias
        np.testing.assert_allclose(numpy(block(x, training=False)), numpy(expected), rtol=0, atol=1e-12)


def test_the_kernel_holds_each_branch_in_its_place():
    block = build(AlphaBlock, 3, identity=False)
    randomize_built(block, (None, 5, 5, 3))
    for path in ("branch0/batch_norm", "branch1/batch_norm"):
        block.parts[path].gamma.assign([0.0 if "0" in path else 1.0] * 3)
        block.parts[path].beta.assign([0.0] * 3)
        block.parts[path].moving_mean.assign([0.0] * 3)
        block.parts[path].moving_variance.assign([1.0 - 1e-3] * 3)
    block.alpha.assign(2.0)
    kernel, bias = block.get_equivalent_kernel_bias()
    expected = np.zeros((3, 3, 3, 3))
    expected[1, 1] = 2.0 * numpy(block.parts["branch1/conv"].kernel)[0, 0]
    np.testing.assert_allclose(kernel, expected, rtol=1e-6)
    np.testing.assert_array_equal(bias, np.zeros(3))


# ---- alpha -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-1.7, 0.0, 2.5])
def test_alpha_counts_as_the_number_that_it_is(alpha):
    block = build(AlphaBlock, 4)
    with double_precision():
        randomize_built(block, (2, 6, 5, 4))
        block.alpha.assign(alpha)
        x = ops.convert_to_tensor(draw((2, 6, 5, 4), "float64"))
        branches = [
            numpy(block.parts[f"branch{i}/batch_norm"](block.parts[f"branch{i}/conv"](x), training=False))
            for i in (0, 1)
        ]
        same = numpy(block.parts["branch2/batch_norm"](x, training=False))
        expected = branches[0] + alpha * branches[1] + same
        np.testing.assert_allclose(numpy(block(x, training=False)), expected, rtol=0, atol=1e-12)
        block.convert_to_deploy()
        np.testing.assert_allclose(numpy(block(x, training=False)), expected, rtol=0, atol=1e-12)


def test_alpha_starts_at_one_and_is_there_only_when_asked_for():
    block = AlphaBlock(4)
    assert block.alpha is None
    block.build((None, 8, 8, 4))
    assert numpy(block.alpha) == 1.0
    assert block.alpha.shape == ()
    assert any(block.alpha is variable for variable in block.trainable_variables)
    block.convert_to_deploy()
    assert block.alpha is None
    plain = RepVGGBlock(4)
    plain.build((None, 8, 8, 4))
    assert plain.alpha is None


# ---- training --------------------------------------------------------------------------------------


def toy(make: Any) -> Any:
    inputs = keras.Input((6, 5, 4))
    x = make(4)(inputs)
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


TRAINED = [(AlphaBlock, False), (AlphaBlock, True)]
# Compiling takes torch a minute per model, and not compiling takes the others long.
TRAINED += [(make, keras.config.backend() != "torch") for make in (DiverseBranchBlock, mixed)]


@pytest.mark.parametrize(("make", "jit"), TRAINED)
def test_every_parameter_trains(make, jit):
    model = toy(make)
    before = [numpy(variable).copy() for variable in model.weights]
    model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=jit)
    model.fit(draw((24, 6, 5, 4)), draw((24, 4), seed=2), batch_size=8, epochs=2, verbose=0)
    moved = {v.path: not np.array_equal(numpy(v), old) for v, old in zip(model.weights, before, strict=True)}
    # A bias in front of a batch norm need not move: its gradient is 0 up to rounding.
    still = [path for path, has in moved.items() if not has and not path.endswith("conv/bias")]
    assert not still
    assert all(np.isfinite(numpy(variable)).all() for variable in model.weights)


def test_a_trained_block_folds():
    model = toy(AlphaBlock)
    model.compile("adam", "mse")
    model.fit(draw((32, 6, 5, 4)), draw((32, 4), seed=2), verbose=0)
    x = draw((4, 6, 5, 4), seed=3)
    before = model.predict(x, verbose=0)
    folded = refold.fold(model)
    assert not any(isinstance(layer, Block) for layer in folded.layers)
    np.testing.assert_allclose(folded.predict(x, verbose=0), before, rtol=0, atol=3e-6 * np.abs(before).max())
    model.layers[1].convert_to_deploy()
    np.testing.assert_allclose(numpy(model(x)), before, rtol=0, atol=3e-6 * np.abs(before).max())
    model.compile("adam", "mse")
    np.testing.assert_allclose(model.predict(x, verbose=0), before, rtol=0, atol=3e-6 * np.abs(before).max())
    assert len(model.trainable_variables) == 2
    model.fit(draw((32, 6, 5, 4)), draw((32, 4), seed=2), verbose=0)


@pytest.mark.parametrize("seed", [None, 3])
def test_equal_branches_do_not_start_equal(seed):
    initializer = keras.initializers.GlorotUniform(seed) if seed else "he_normal"
    block = MobileOneBlock(4, branches=3, kernel_initializer=initializer)
    block.build((None, 8, 8, 4))
    kernels = [numpy(block.parts[f"branch{i}/conv"].kernel) for i in range(3)]
    assert not any(np.array_equal(kernels[i], kernels[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    if seed:
        again = MobileOneBlock(4, branches=3, kernel_initializer=initializer)
        again.build((None, 8, 8, 4))
        np.testing.assert_array_equal(numpy(again.parts["branch1/conv"].kernel), kernels[1])


def test_a_frozen_block_stays_as_it_is():
    block = AlphaBlock(4, trainable=False)
    block.build((None, 8, 8, 4))
    before = [numpy(variable).copy() for variable in block.weights]
    assert block.trainable_variables == []
    block(draw((2, 8, 8, 4)), training=True)
    for variable, old in zip(block.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(variable), old)


def test_batch_norms_are_as_asked_for_and_kernels_are_regularized():
    block = DiverseBranchBlock(4, momentum=0.5, epsilon=0.1, kernel_regularizer="l2", groups=4)
    block.build((None, 8, 8, 4))
    norms = [part for part in block.parts.values() if isinstance(part, layers.BatchNormalization)]
    assert {(norm.momentum, norm.epsilon) for norm in norms} == {(0.5, 0.1)}
    assert len(norms) == 6
    assert len(block.losses) == 5


# ---- as Keras keeps it -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "deploy"), [(make, False) for make in (*NAMED, mixed)] + [(AlphaBlock, True), (mixed, True)]
)
def test_a_block_saves_loads_and_clones(make, deploy, tmp_path):
    inputs = keras.Input((None, None, 4))
    model = keras.Model(
        inputs, make(4, activation="gelu", kernel_initializer="ones", kernel_regularizer="l2")(inputs)
    )
    randomize(model.layers[1])
    if deploy:
        model.layers[1].convert_to_deploy()
    x = draw((2, 6, 5, 4))
    expected = numpy(model(x, training=False))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[1].deploy == deploy
    np.testing.assert_array_equal(numpy(loaded(x, training=False)), expected)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(numpy(clone(x, training=False)), expected)
    config = model.layers[1].get_config()
    assert type(model.layers[1]).from_config(json.loads(json.dumps(config))).get_config() == config


def test_weights_of_a_converted_block_load_into_a_new_one(tmp_path):
    trained = build(AlphaBlock, 4)
    randomize_built(trained, (None, 6, 5, 4))
    trained.convert_to_deploy()
    fresh = build(AlphaBlock, 4, deploy=True)
    fresh.build((None, 6, 5, 4))
    fresh.set_weights(trained.get_weights())
    np.testing.assert_array_equal(fresh.get_equivalent_kernel_bias()[0], trained.get_equivalent_kernel_bias()[0])


def test_conversion_leaves_one_convolution_and_the_dtype():
    block = RepVGGBlock(4, dtype="mixed_bfloat16")
    block.build((None, 6, 5, 4))
    block.convert_to_deploy()
    assert [tuple(variable.shape) for variable in block.weights] == [(3, 3, 4, 4), (4,)]
    assert {variable.dtype for variable in block.weights} == {"float32"}
    assert list(block.parts) == ["conv"]
    assert block.trainable_variables == block.weights
    if keras.config.backend() == "torch":
        assert {tuple(parameter.shape) for parameter in block.parameters()} == {(3, 3, 4, 4), (4,)}
    assert "bfloat16" in str(block(draw((1, 6, 5, 4))).dtype)
    narrow = RepVGGBlock(4, dtype="bfloat16")
    narrow.build((None, 6, 5, 4))
    narrow.convert_to_deploy()
    assert {variable.dtype for variable in narrow.weights} == {"bfloat16"}


def test_conversion_twice_changes_nothing():
    block = AlphaBlock(4)
    randomize_built(block, (None, 6, 5, 4))
    block.convert_to_deploy()
    before = block.get_weights()
    block.convert_to_deploy()
    for old, new in zip(before, block.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_block_in_a_sequential_and_in_a_wrapper():
    model = keras.Sequential([layers.TimeDistributed(AlphaBlock(3)), layers.Flatten()])
    assert numpy(model(draw((2, 3, 6, 5, 2)))).shape == (2, 3 * 6 * 5 * 3)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    block = AlphaBlock(4, dtype=policy)
    x = draw((2, 6, 5, 4))
    assert "16" in str(block(x).dtype)
    randomize(block)
    exact = AlphaBlock(4)
    exact.build(x.shape)
    exact.set_weights(block.get_weights())
    expected = numpy(exact(x, training=False))
    got = np.asarray(numpy(ops.cast(block(x, training=False), "float32")))
    np.testing.assert_allclose(got, expected, rtol=0, atol=0.05 * np.abs(expected).max())


def test_the_call_can_be_followed_on_symbolic_tensors():
    for make in NAMED:
        block = make(4)
        block.build((None, 6, 5, 4))
        outputs = block.call(keras.KerasTensor((None, 6, 5, 4)), training=False)
        assert isinstance(outputs, keras.KerasTensor)
        assert outputs.shape == (None, 6, 5, 4)
        assert block.compute_output_shape((None, None, None, 4)) == (None, None, None, 4)


# ---- what is refused -----------------------------------------------------------------------------------


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="no weights yet"):
        RepVGGBlock(4).convert_to_deploy()
    with pytest.raises(ValueError, match="no weights yet"):
        RepVGGBlock(4).get_equivalent_kernel_bias()
    with pytest.raises(ValueError, match="average=False"):
        DiverseBranchBlock(4, dilation_rate=2).build((None, 8, 8, 4))
    with pytest.raises(ValueError, match="1 to 3 spatial axes"):
        RepVGGBlock(4).build((None, 4))
    with pytest.raises(ValueError, match="number of input channels"):
        RepVGGBlock(4).build((None, 8, 8, None))
    with pytest.raises(ValueError, match="data_format"):
        RepVGGBlock(4, data_format="NHWC")
    with pytest.raises(ValueError, match="do not split"):
        RepVGGBlock(4, groups=3).build((None, 8, 8, 3))


def test_an_expression_that_is_no_convolution_trains_but_does_not_convert():
    block = ExpressionBlock(convolution(4, 1) | bn | convolution(4, 3))
    assert numpy(block(draw((2, 6, 5, 3)))).shape == (2, 6, 5, 4)
    randomize(block)
    for refused in (block.convert_to_deploy, block.get_equivalent_kernel_bias):
        with pytest.raises(ValueError, match="zero padding after a bias"):
            refused()
    assert not block.deploy
    with pytest.raises(ValueError, match="zero padding after a bias"):
        ExpressionBlock(convolution(4, 1) | bn | convolution(4, 3), deploy=True).build((None, 6, 5, 3))


def test_a_weight_that_is_not_finite_does_not_convert():
    block = AlphaBlock(4)
    block.build((None, 6, 5, 4))
    block.alpha.assign(float("nan"))
    with pytest.raises(ValueError, match="finite"):
        block.convert_to_deploy()
    assert len(block.weights) == 15


def test_a_scale_is_a_layer_of_its_own():
    scale = BranchScale(2.0, per_channel=True, data_format="channels_first")
    x = draw((2, 3, 4, 5))
    np.testing.assert_array_equal(numpy(scale(x)), 2.0 * x)
    assert BranchScale.from_config(scale.get_config()).get_config() == scale.get_config()
