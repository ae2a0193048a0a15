"""Models as people write them, each with what folding must leave of it.

Every entry builds a model with non-trivial weights (random batch norm statistics, biases, negative
scales) and says how many operators with weights or sums must remain: ``operators`` counts all layers
and operations of the folded model but its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers, ops


@dataclass(frozen=True)
class Entry:
    name: str
    build: Callable[[], Any]
    operators: int
    says: tuple[str, ...] = ()  # what the plan must say of what is kept apart


ZOO: list[Entry] = []


def entry(operators: int, *says: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def note(build: Callable[[], Any]) -> Callable[[], Any]:
        ZOO.append(Entry(build.__name__, build, operators, says))
        return build

    return note


def randomize(model: Any, seed: int = 0) -> Any:
    """Weights of ordinary size, none of them at a value that hides a mistake (0, 1)."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if "seed" in variable.name:
            continue
        shape = tuple(variable.shape)
        if "variance" in variable.name:
            value = rng.uniform(0.3, 2.0, shape)
        elif len(shape) > 1:
            fan_in = max(int(np.prod(shape[:-1])), 1)
            value = rng.normal(size=shape) / np.sqrt(fan_in)
        else:
            value = rng.uniform(0.3, 1.2, shape) * rng.choice([-1.0, 1.0], shape)
        variable.assign(value)
    return model


def functional(shape: tuple[int | None, ...], body: Callable[[Any], Any], **kwargs: Any) -> Any:
    inputs = keras.Input(shape, **kwargs)
    return randomize(keras.Model(inputs, body(inputs)))


def conv_bn(x: Any, filters: int, size: Any, **kwargs: Any) -> Any:
    kwargs = {"padding": "same", "use_bias": False, **kwargs}
    return layers.BatchNormalization()(layers.Conv2D(filters, size, **kwargs)(x))


# ---- chains ----------------------------------------------------------------------------------------


@entry(2)
def conv_bn_relu() -> Any:
    return functional((8, 8, 3), lambda x: layers.ReLU()(conv_bn(x, 4, 3)))


@entry(1)
def conv_with_activation_after_bn_in_front_of_valid() -> Any:
    def body(x: Any) -> Any:
        return layers.Conv2D(4, 3, activation="relu")(layers.BatchNormalization()(x))

    return functional((8, 8, 3), body)


@entry(2, "zero padding after a bias is not a convolution at the border")
def bn_in_front_of_padded_conv() -> Any:
    return functional((8, 8, 3), lambda x: layers.Conv2D(4, 3, padding="same")(layers.BatchNormalization()(x)))


@entry(1)
def bn_without_shift_in_front_of_padded_conv() -> Any:
    def body(x: Any) -> Any:
        return layers.Conv2D(4, 3, padding="same")(layers.Rescaling(1 / 127.0)(x))

    return functional((8, 8, 3), body)


@entry(2, "zero padding after a bias is not a convolution at the border")
def biased_pointwise_before_padded() -> Any:
    def body(x: Any) -> Any:
        return layers.Conv2D(6, 3, padding="same")(layers.Conv2D(8, 1)(x))

    return functional((8, 8, 5), body)


@entry(1)
def unbiased_pointwise_before_padded() -> Any:
    def body(x: Any) -> Any:
        return layers.Conv2D(6, 3, padding="same")(layers.Conv2D(8, 1, use_bias=False)(x))

    return functional((8, 8, 5), body)


@entry(2, "together they would take")
def bottleneck_stays() -> Any:
    def body(x: Any) -> Any:
        return layers.Conv2D(16, 3)(layers.Conv2D(2, 1)(x))

    return functional((8, 8, 16), body)


@entry(2, "together they would take")
def depthwise_separable_stays() -> Any:
    def body(x: Any) -> Any:
        x = layers.DepthwiseConv2D(3, padding="same")(x)
        return layers.BatchNormalization()(layers.Conv2D(8, 1)(layers.BatchNormalization()(x)))

    return functional((8, 8, 6), body)


@entry(1)
def linear_expansion() -> Any:
    def body(x: Any) -> Any:
        x = layers.Conv2D(32, 1, use_bias=False)(x)
        x = layers.Conv2D(32, 3, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(layers.Conv2D(8, 1)(x))

    return functional((8, 8, 8), body)


@entry(1)
def dense_chain() -> Any:
    def body(x: Any) -> Any:
        x = layers.BatchNormalization()(layers.Dense(32)(x))
        return layers.Dense(4)(layers.Dropout(0.5)(layers.Dense(16)(x)))

    return functional((10,), body)


@entry(1)
def dense_on_sequences() -> Any:
    def body(x: Any) -> Any:
        x = layers.EinsumDense("abc,cd->abd", output_shape=(None, 12), bias_axes="d")(x)
        return layers.Dense(4)(layers.LayerNormalization(center=False, scale=False)(x) if False else x)

    return functional((5, 10), body)


@entry(3)
def bn_between_relus_stays_one_operator() -> Any:
    def body(x: Any) -> Any:
        return layers.ReLU()(layers.BatchNormalization()(layers.BatchNormalization()(layers.ReLU()(x))))

    return functional((8, 8, 3), body)


@entry(1)
def pad_then_valid() -> Any:
    def body(x: Any) -> Any:
        return layers.Conv2D(4, 3)(layers.ZeroPadding2D(1)(x))

    return functional((8, 8, 3), body)


@entry(2)
def strided_padding_in_torch_style() -> Any:
    def body(x: Any) -> Any:
        x = layers.Conv2D(4, 3, strides=2, use_bias=False)(layers.ZeroPadding2D(1)(x))
        return layers.BatchNormalization()(x)

    return functional((8, 8, 3), body)


@entry(1)
def pointwise_then_average_pool() -> Any:
    def body(x: Any) -> Any:
        return layers.AveragePooling2D(2)(layers.Conv2D(1, 1)(x))

    return functional((8, 8, 1), body)


# ---- branches ----------------------------------------------------------------------------------------


def repvgg(x: Any, filters: int, strides: int = 1, identity: bool = True) -> Any:
    branches = [conv_bn(x, filters, 3, strides=strides), conv_bn(x, filters, 1, strides=strides)]
    if identity:
        branches.append(layers.BatchNormalization()(x))
    return layers.Add()(branches)


@entry(4)
def repvgg_twice() -> Any:
    return functional((8, 8, 4), lambda x: layers.ReLU()(repvgg(layers.ReLU()(repvgg(x, 4)), 4)))


@entry(1)
def same_with_stride_two_at_a_known_even_size() -> Any:
    return functional((8, 8, 4), lambda x: repvgg(x, 6, strides=2, identity=False))


@entry(1)
def same_with_stride_two_at_a_known_odd_size() -> Any:
    return functional((9, 9, 4), lambda x: repvgg(x, 6, strides=2, identity=False))


@entry(3, "fix the input size")
def same_with_stride_two_at_an_unknown_size() -> Any:
    return functional((None, None, 4), lambda x: repvgg(x, 6, strides=2, identity=False))


@entry(1)
def equal_same_branches_with_stride_two_at_an_unknown_size() -> Any:
    def body(x: Any) -> Any:
        return layers.Add()([conv_bn(x, 6, 3, strides=2), conv_bn(x, 6, 3, strides=2)])

    return functional((None, None, 4), body)


@entry(1)
def repvgg_at_an_unknown_size() -> Any:
    return functional((None, None, 4), lambda x: repvgg(x, 4))


@entry(1)
def asymmetric_branches() -> Any:
    def body(x: Any) -> Any:
        return layers.Add()([conv_bn(x, 4, 3), conv_bn(x, 4, (1, 3)), conv_bn(x, 4, (3, 1))])

    return functional((7, 9, 4), body)


@entry(1)
def dilated_branches() -> Any:
    def body(x: Any) -> Any:
        return layers.Add()([conv_bn(x, 4, 5), conv_bn(x, 4, 3, dilation_rate=2), conv_bn(x, 4, 3)])

    return functional((9, 9, 4), body)


@entry(3, "together they would take")
def a_lone_dilated_branch_that_would_grow() -> Any:
    def body(x: Any) -> Any:
        return layers.Add()([conv_bn(x, 4, 3), conv_bn(x, 4, 3, dilation_rate=3)])

    return functional((9, 9, 4), body)


@entry(1)
def average_pool_branch() -> Any:
    def body(x: Any) -> Any:
        pool = layers.AveragePooling2D(3, strides=1)(conv_bn(x, 4, 1))
        return layers.Add()([conv_bn(x, 4, 3, padding="valid"), layers.BatchNormalization()(pool)])

    return functional((8, 8, 4), body)


@entry(4, "leaves padded positions out of the average")
def padded_average_pool_branch() -> Any:
    def body(x: Any) -> Any:
        pool = layers.AveragePooling2D(3, strides=1, padding="same")(x)
        return layers.Add()([conv_bn(x, 4, 3), layers.BatchNormalization()(pool)])

    return functional((8, 8, 4), body)


@entry(1)
def diverse_branch_padded_first() -> Any:
    def body(x: Any) -> Any:
        padded = layers.ZeroPadding2D(1)(x)
        long = conv_bn(conv_bn(padded, 8, 1), 4, 3, padding="valid")
        pool = layers.AveragePooling2D(3, 1)(conv_bn(padded, 4, 1))
        short = layers.Cropping2D(1)(conv_bn(padded, 4, 1))
        return layers.Add()([conv_bn(x, 4, 3), long, layers.BatchNormalization()(pool), short])

    return functional((8, 8, 4), body)


@entry(1)
def depthwise_branches() -> Any:
    def body(x: Any) -> Any:
        a = layers.BatchNormalization()(layers.DepthwiseConv2D(5, padding="same")(x))
        b = layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x))
        return layers.Add()([a, b, x])

    return functional((8, 8, 4), body)


@entry(3, "together they would take")
def grouped_branches() -> Any:
    def body(x: Any) -> Any:
        return layers.Add()([conv_bn(x, 8, 3, groups=4), conv_bn(x, 8, 1, groups=2), x])

    return functional((6, 6, 8), body)


@entry(1)
def concat_then_pointwise() -> Any:
    def body(x: Any) -> Any:
        both = layers.Concatenate()([conv_bn(x, 8, 3), conv_bn(x, 8, 3), x])
        return layers.BatchNormalization()(layers.Conv2D(4, 1)(both))

    return functional((8, 8, 4), body)


@entry(1)
def concat_of_equal_branches() -> Any:
    def body(x: Any) -> Any:
        return layers.Concatenate()([conv_bn(x, 3, 3), conv_bn(x, 5, 3)])

    return functional((8, 8, 4), body)


@entry(1)
def subtracted_branch_and_scalars() -> Any:
    def body(x: Any) -> Any:
        return layers.Subtract()([conv_bn(x, 4, 3) * 0.5, 2.0 * x]) / 3.0 - 1.0 + (-x)

    return functional((8, 8, 4), body)


@entry(6, "needed elsewhere too")
def tapped_middle() -> Any:
    inputs = keras.Input((8, 8, 4))
    middle = layers.Conv2D(4, 3, padding="same", use_bias=False)(inputs)
    total = layers.Add()([layers.BatchNormalization()(middle), conv_bn(inputs, 4, 1)])
    return randomize(keras.Model(inputs, [layers.ReLU()(total), layers.ReLU()(middle)]))


@entry(5)
def residual_across_a_relu_stays() -> Any:
    def body(x: Any) -> Any:
        y = conv_bn(layers.ReLU()(conv_bn(x, 4, 3)), 4, 3)
        return layers.ReLU()(layers.Add()([y, x]))

    return functional((8, 8, 4), body)


@entry(3)
def nested_sums() -> Any:
    def body(x: Any) -> Any:
        inner = layers.BatchNormalization()(repvgg(x, 4))
        y = layers.Add()([inner, conv_bn(x, 4, 5)])
        return layers.Dense(3)(layers.GlobalAveragePooling2D()(y))

    return functional((8, 8, 4), body)


# ---- one and three axes, channels first -----------------------------------------------------------------


@entry(1)
def one_axis() -> Any:
    def body(x: Any) -> Any:
        a = layers.BatchNormalization()(layers.Conv1D(4, 5, padding="same")(x))
        b = layers.BatchNormalization()(layers.Conv1D(4, 1)(x))
        return layers.Add()([a, b, x])

    return functional((11, 4), body)


@entry(1)
def causal() -> Any:
    def body(x: Any) -> Any:
        a = layers.BatchNormalization()(layers.Conv1D(4, 3, padding="causal", dilation_rate=2)(x))
        return layers.Add()([a, layers.Conv1D(4, 5, padding="causal")(x), x])

    return functional((11, 4), body)


@entry(1)
def three_axes() -> Any:
    def body(x: Any) -> Any:
        a = layers.BatchNormalization()(layers.Conv3D(3, 3, padding="same")(x))
        return layers.Add()([a, layers.BatchNormalization()(layers.Conv3D(3, 1)(x)), x])

    return functional((5, 4, 5, 3), body)


@entry(1)
def channels_first() -> Any:
    def body(x: Any) -> Any:
        first = {"data_format": "channels_first"}
        a = layers.Conv2D(4, 3, padding="same", **first)(x)
        b = layers.BatchNormalization(axis=1)(layers.Conv2D(4, 1, **first)(x))
        return layers.Add()([layers.BatchNormalization(axis=1)(a), b, x])

    return functional((4, 7, 8), body)


@entry(1)
def channels_first_with_pooling_and_padding() -> Any:
    def body(x: Any) -> Any:
        first = {"data_format": "channels_first"}
        padded = layers.ZeroPadding2D(1, **first)(x)
        pool = layers.AveragePooling2D(3, 1, **first)(padded)
        return layers.Add()(
            [layers.Conv2D(4, 3, padding="same", **first)(x), layers.Cropping2D(1, **first)(padded), pool]
        )

    return functional((4, 7, 8), body)


# ---- custom layers ----------------------------------------------------------------------------------------


class Branches(layers.Layer):
    """A user's own block: learnable scales, a branch scaled by zero, operators of Python."""

    def __init__(self, filters: int, alpha: float = -0.7, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters, self.start = filters, alpha
        self.conv3 = layers.Conv2D(filters, 3, padding="same", use_bias=False)
        self.conv1 = layers.Conv2D(filters, 1, use_bias=False)
        self.norms = [layers.BatchNormalization() for _ in range(3)]

    def build(self, shape: Any) -> None:
        self.alpha = self.add_weight(shape=(), initializer=keras.initializers.Constant(self.start), name="alpha")
        self.gates = self.add_weight(shape=(self.filters,), initializer="ones", name="gates")
        self.conv3.build(shape)
        self.conv1.build(shape)
        for norm in self.norms:
            norm.build((*shape[:-1], self.filters))

    def call(self, x: Any) -> Any:
        y = self.norms[0](self.conv3(x)) + self.alpha * self.norms[1](self.conv1(x))
        y = y + self.norms[2](x) * self.gates
        return ops.relu(y)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "filters": self.filters, "alpha": self.start}


@entry(4)
def custom_blocks() -> Any:
    return functional((8, 8, 4), lambda x: Branches(4)(Branches(4)(x)))


@entry(2)
def custom_block_with_a_branch_scaled_by_zero() -> Any:
    model = functional((8, 8, 4), lambda x: Branches(4)(x))
    model.layers[-1].alpha.assign(0.0)
    return model


class OwnKernel(layers.Layer):
    """Calls operations on its own variables, and standardizes its kernel on the way."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(3, 3, shape[-1], 4), name="kernel")
        self.offset = self.add_weight(shape=(4,), name="offset")

    def call(self, x: Any) -> Any:
        kernel = self.kernel - ops.mean(self.kernel, axis=(0, 1, 2), keepdims=True)
        return ops.conv(x, kernel, padding="same") + self.offset


@entry(2)
def kernel_computed_in_call() -> Any:
    return functional((8, 8, 4), lambda x: layers.ReLU()(layers.BatchNormalization()(OwnKernel()(x))))


@entry(2)
def kernel_computed_in_call_and_nothing_to_merge() -> Any:
    return functional((8, 8, 4), lambda x: layers.ReLU()(OwnKernel()(x)))


class Shuffle(layers.Layer):
    def call(self, x: Any) -> Any:
        shape = ops.shape(x)
        y = ops.reshape(x, (-1, shape[1], shape[2], 2, shape[3] // 2))
        return ops.reshape(ops.transpose(y, (0, 1, 2, 4, 3)), (-1, shape[1], shape[2], shape[3]))


@entry(1)
def shuffle_between_pointwise() -> Any:
    return functional((6, 5, 8), lambda x: layers.Conv2D(4, 1)(Shuffle()(layers.Conv2D(8, 1)(x))))


class SplitAndJoin(layers.Layer):
    """Halves of the channels go different ways: a grouped convolution in disguise."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.left = layers.Conv2D(4, 3, padding="same")
        self.right = layers.Conv2D(4, 3, padding="same")

    def build(self, shape: Any) -> None:
        half = (*shape[:-1], shape[-1] // 2)
        self.left.build(half)
        self.right.build(half)

    def call(self, x: Any) -> Any:
        a, b = ops.split(x, 2, axis=-1)
        return ops.concatenate([self.left(a), self.right(b)], axis=-1)


@entry(1)
def split_and_join_is_a_grouped_convolution() -> Any:
    return functional((6, 6, 8), lambda x: SplitAndJoin()(x))


class LooksAtValues(layers.Layer):
    """Cannot be traced: it decides by the numbers."""

    def call(self, x: Any) -> Any:
        if float(ops.convert_to_numpy(ops.sum(self.flag))) > 0:
            return ops.relu(x) if float(ops.max(x)) > 0 else x
        return x

    def build(self, shape: Any) -> None:
        self.flag = self.add_weight(shape=(), initializer="ones", name="flag")


class Sub(keras.Model):
    """A subclassed model with two outputs and a shared convolution."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conv = layers.Conv2D(4, 3, padding="same", use_bias=False)
        self.first, self.second = layers.BatchNormalization(), layers.BatchNormalization()
        self.head = keras.Sequential([layers.GlobalAveragePooling2D(), layers.Dense(8), layers.Dense(3)])

    def call(self, inputs: Any) -> Any:
        a = self.first(self.conv(inputs["left"]))
        b = self.second(self.conv(inputs["right"]))
        return {"class": self.head(ops.relu(a)), "map": ops.sigmoid(b)}


@entry(6)
def subclassed_with_a_shared_convolution() -> Any:
    model = Sub()
    shape = (2, 6, 6, 3)
    model({"left": np.zeros(shape, "float32"), "right": np.zeros(shape, "float32")})
    return randomize(model)


@entry(4)
def shared_layer_and_two_inputs() -> Any:
    left, right = keras.Input((6, 6, 3), name="left"), keras.Input((6, 6, 3), name="right")
    shared = layers.Conv2D(4, 3, padding="same", activation="relu")
    merged = layers.Concatenate()([shared(left), shared(right)])
    out = layers.BatchNormalization()(layers.Conv2D(5, 1)(merged))
    return randomize(keras.Model([left, right], [layers.Softmax()(out), merged]))


@entry(4)
def nested_models() -> Any:
    inner = keras.Sequential(
        [keras.Input((8, 8, 4)), layers.Conv2D(4, 3, use_bias=False), layers.BatchNormalization()]
    )
    whole = keras.Sequential([keras.Input((6, 6, 4)), layers.ReLU(), layers.Conv2D(2, 3, activation="gelu")])
    inputs = keras.Input((8, 8, 4))
    return randomize(keras.Model(inputs, layers.Softmax()(whole(layers.ReLU()(inner(inputs))))))


@entry(4)
def spectral_normalization_is_evaluated() -> Any:
    def body(x: Any) -> Any:
        x = layers.ReLU()(layers.SpectralNormalization(layers.Conv2D(4, 3))(x))
        return layers.ReLU()(layers.BatchNormalization()(layers.SpectralNormalization(layers.Conv2D(4, 3))(x)))

    return functional((8, 8, 3), body)


@entry(6)
def norm_behind_a_concatenation() -> Any:
    def body(x: Any) -> Any:
        deep = layers.Conv2D(3, 1, use_bias=False)(layers.ReLU()(conv_bn(x, 4, 3)))
        both = layers.Concatenate()([deep, layers.Conv2D(5, 1, activation="linear")(x)])
        return layers.ReLU()(layers.BatchNormalization()(both))

    return functional((6, 5, 4), body)


@entry(5)
def norm_behind_a_concatenation_with_channels_first() -> Any:
    def body(x: Any) -> Any:
        x = ops.transpose(x, (0, 3, 1, 2))
        both = ops.concatenate([layers.ReLU()(x), x], axis=1)
        return layers.BatchNormalization(axis=1)(layers.ZeroPadding2D(1, data_format="channels_first")(both))

    return functional((6, 5, 4), body)


@entry(4, "a transposed convolution puts zeros between its inputs, and a bias before it is not there")
def a_bias_before_a_transposed_convolution() -> Any:
    def body(x: Any) -> Any:
        x = layers.Conv2DTranspose(4, 3, strides=2, padding="same", activation="relu")(conv_bn(x, 3, 1))
        return layers.ReLU()(conv_bn(x, 2, 1))

    return functional((5, 5, 3), body)


@entry(1)
def decoder_step() -> Any:
    def body(x: Any) -> Any:
        y = layers.Conv2DTranspose(4, 4, strides=2, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(y) + layers.Conv2DTranspose(4, 2, strides=2)(x)

    return functional((5, None, 3), body)


@entry(2)
def transposed_with_an_activation_along_one_axis() -> Any:
    def body(x: Any) -> Any:
        turned = layers.Conv1DTranspose(4, 5, strides=3, padding="same", output_padding=1, use_bias=False)
        return layers.ReLU()(layers.BatchNormalization()(turned(x)))

    return functional((None, 3), body)


@entry(1)
def slices_of_space_and_channels() -> Any:
    def body(x: Any) -> Any:
        y = layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
        return y[:, 1:-1, 1:-1, :4] + layers.Conv2D(4, 3)(x)

    return functional((8, 8, 4), body)


@entry(2)
def moved_axes() -> Any:
    def body(x: Any) -> Any:
        y = ops.transpose(layers.Conv2D(4, 1)(x), (0, 3, 1, 2))
        return layers.Conv2D(3, 1, data_format="channels_first")(layers.BatchNormalization(axis=1)(y)) * 1.0

    return functional((5, 6, 4), body)


# ---- operators through which factors and shifts per channel pass ------------------------------------


def headed(shape: tuple[int | None, ...], *between: Any) -> Any:
    def body(x: Any) -> Any:
        y = layers.BatchNormalization()(layers.ReLU()(x))
        for layer in between:
            y = layer(y)
        return layers.Dense(3)(y)

    return functional(shape, body)


@entry(3)
def norm_before_a_global_average() -> Any:
    return headed((None, None, 4), layers.GlobalAveragePooling2D())


@entry(3)
def norm_before_a_flattening() -> Any:
    return headed((5, 6, 4), layers.Flatten())


@entry(4)
def norm_before_an_average_that_leaves_out_its_padding_and_a_flattening() -> Any:
    return headed((7, 6, 4), layers.AveragePooling2D(3, 2, padding="same"), layers.Flatten())


@entry(3)
def norm_before_a_mean_over_a_sequence() -> Any:
    return functional(
        (None, 4),
        lambda x: layers.Dense(3)(ops.mean(layers.BatchNormalization()(ops.tanh(x)), axis=1)),
    )


@entry(3)
def norm_behind_an_upsampling() -> Any:
    def body(x: Any) -> Any:
        y = layers.UpSampling2D(2)(layers.Conv2D(6, 3)(x))
        return ops.tanh(layers.BatchNormalization()(y))

    return functional((8, 8, 4), body)


@entry(3)
def factors_behind_a_maximum_pool() -> Any:
    def body(x: Any) -> Any:
        y = layers.MaxPooling2D(3, 2, padding="same")(layers.Conv2D(2, 3)(x))
        return layers.ReLU()(layers.Rescaling([0.5, 2.0], [1.0, -3.0])(y))

    return functional((8, 8, 4), body)


@entry(4, "zero padding after a bias is not a convolution at the border")
def norm_before_an_upsampling_and_a_convolution_that_pads() -> Any:
    def body(x: Any) -> Any:
        y = layers.UpSampling2D(2)(layers.BatchNormalization()(layers.ReLU()(x)))
        return layers.Conv2D(6, 3, padding="same")(y)

    return functional((8, 8, 4), body)
