"""Train-time blocks as Keras layers: several branches to train, one convolution to ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, assert_never, final

import keras
import numpy as np
import numpy.typing as npt
from keras import layers, ops

from refold import blocks
from refold.algebra import AffineConv, Refusal, Window
from refold.algebra.affine import Array
from refold.blocks import AveragePool, BatchNorm, Conv, Expression, Leaf, Scale
from refold.keras.axes import CONV, DEPTHWISE, PLAIN, KernelAxes

Shape = tuple[int | None, ...]

CONVOLUTIONS = {1: layers.Conv1D, 2: layers.Conv2D, 3: layers.Conv3D}
DEPTHWISE_CONVOLUTIONS = {1: layers.DepthwiseConv1D, 2: layers.DepthwiseConv2D}
AVERAGE_POOLS = {1: layers.AveragePooling1D, 2: layers.AveragePooling2D, 3: layers.AveragePooling3D}
ZERO_PADDINGS = {1: layers.ZeroPadding1D, 2: layers.ZeroPadding2D, 3: layers.ZeroPadding3D}


@final
@keras.saving.register_keras_serializable(package="refold")
class BranchScale(keras.Layer):
    """``y = factor * x`` with one trainable factor, or one ``per_channel``, that starts at ``initial``."""

    def __init__(
        self, initial: float = 1.0, per_channel: bool = False, data_format: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.initial = initial
        self.per_channel = per_channel
        self.data_format = _data_format(data_format)

    def build(self, input_shape: Shape) -> None:
        """Create the factor."""
        channels = input_shape[-1 if self.data_format == "channels_last" else 1]
        self.factor = self.add_weight(
            name="factor",
            shape=(channels,) if self.per_channel else (),
            initializer=keras.initializers.Constant(self.initial),
        )

    def call(self, inputs: Any) -> Any:
        """``inputs`` times the factor."""
        if self.per_channel and self.data_format == "channels_first":
            return ops.multiply(inputs, ops.reshape(self.factor, (-1,) + (1,) * (len(inputs.shape) - 2)))
        return ops.multiply(inputs, self.factor)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The shape of the input."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        own = {"initial": self.initial, "per_channel": self.per_channel, "data_format": self.data_format}
        return {**super().get_config(), **own}


class Block(keras.Layer):
    """A layer that computes an expression of branches (see :mod:`refold.blocks`), then an activation.

    A block of your own is a subclass with :meth:`make_expression`, or an :class:`ExpressionBlock`. Input and
    output are ``(batch, *space, channels)`` or, with ``data_format="channels_first"``, ``(batch, channels,
    *space)``, with 1 to 3 spatial axes.

    Args:
        activation: applied to the sum of the branches.
        data_format: ``"channels_last"`` or ``"channels_first"``; by default what Keras is configured to.
        kernel_initializer: of the kernel of every branch. Each draws numbers of its own: equal branches
            with equal numbers would stay equal for ever.
        kernel_regularizer: of the kernel of every branch.
        deploy: build the one convolution instead of the branches. Set in the configuration of a block that
            :meth:`convert_to_deploy` converted, so that it loads as what it is.
    """

    parts: dict[str, Any]
    _shape: Shape
    _expression: Expression

    def __init__(
        self,
        *,
        activation: Any = None,
        data_format: str | None = None,
        kernel_initializer: Any = "glorot_uniform",
        kernel_regularizer: Any = None,
        deploy: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.activation = keras.activations.get(activation)
        self.data_format = _data_format(data_format)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.deploy = bool(deploy)

    def make_expression(self, channels_in: int, axes: int) -> Expression:
        """What the block computes in front of its activation, for so many channels and spatial axes."""
        raise NotImplementedError(f"{type(self).__name__} says no expression")

    def get_equivalent_kernel_bias(self) -> tuple[Array, Array]:
        """The one convolution that the block is in inference: its kernel ``(*taps, in/groups, filters)``,
        as Keras stores kernels, and its bias ``(filters,)``, in float64.

        Raises ValueError if the block is not built, or if no convolution equals it.
        """
        folded = self._folded()
        kernel = CONV.from_core(folded.kernel, folded.groups)
        return kernel, folded.bias

    def convert_to_deploy(self) -> None:
        """Replace the branches by the one convolution that they are in inference; for good, in place.

        Compile a model that holds the block again afterwards: compiled functions and optimizers remember
        the branches (and so does, on the torch backend, ``parameters()`` of the model around the block,
        until it is saved and loaded). :func:`refold.fold` folds whole models and leaves the original as it
        is. Does nothing if the block is converted already. Raises ValueError if it is not built, or if no
        convolution equals it.
        """
        if self.deploy:
            return
        folded = self._folded()
        plain = Conv(folded.channels_out, folded.windows, folded.groups, bias=True)
        with keras.name_scope(self.name, caller=self):
            converted = self._make_parts(plain, self._shape)
        # Keras locks what a built layer holds; its own LoRA and quantization open the lock in this way.
        self._tracker.unlock()
        for part in self.parts.values():
            self._tracker.untrack(part)
        self.parts = converted
        self._tracker.lock()
        self._post_build()  # the torch backend lists the variables of a built layer once more
        self._expression = plain
        self.set_numbers({"conv/kernel": folded.kernel, "conv/bias": folded.bias})
        self.deploy = True

    def set_numbers(self, values: Mapping[str, Array]) -> None:
        """Set weights, given under the names and in the layout of the expression (see
        :func:`refold.blocks.parameters`); each is rounded once to its type. Raises ValueError if the block is not
        built."""
        if not self.built:
            raise ValueError(f"{self.name} has no weights yet: build it, or call it on an input, first")
        for name, (variable, axes) in self._variables().items():
            if name in values:
                stored = axes.from_core(values[name], variable.shape[-2] if len(variable.shape) > 1 else 1)
                variable.assign(stored)

    # ---- Keras ---------------------------------------------------------------------------------------

    def build(self, input_shape: Shape) -> None:
        """Create the layers of the branches, or, with ``deploy``, the one convolution."""
        channels, axes = self._channels(input_shape), len(input_shape) - 2
        self._expression = self.make_expression(channels, axes)
        blocks.parameters(self._expression, channels, axes)  # raises in words where something does not fit
        if self.deploy:
            plain = blocks.equivalent(self._expression, channels, axes)
            if isinstance(plain, Refusal):
                raise ValueError(f"{self.name} is not one convolution: {plain.reason}")
            self._expression = plain
        self._shape = tuple(input_shape)
        # Layers by the name of their part of the expression, such as "branch0/conv".
        self.parts = self._make_parts(self._expression, self._shape)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The activation of what the expression makes of ``inputs``."""

        def apply(path: str, leaf: Leaf, tensor: Any) -> Any:
            if isinstance(leaf, BatchNorm):
                return self.parts[path](tensor, training=training)
            padding = self.parts.get(f"{path}/padding")
            return self.parts[path](tensor if padding is None else padding(tensor))

        return self.activation(blocks.interpret(self._expression, inputs, apply, _sum))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The shape of the output; sizes that are not known stay so."""
        channels, axes = self._channels(input_shape), len(input_shape) - 2
        last = self.data_format == "channels_last"

        def apply(path: str, leaf: Leaf, shape: Shape) -> Shape:
            number, space = (shape[-1], shape[1:-1]) if last else (shape[1], shape[2:])
            if isinstance(leaf, Conv | AveragePool):
                space = tuple(
                    None if n is None else window.output_size(n)
                    for n, window in zip(space, leaf.windows, strict=True)
                )
            if isinstance(leaf, Conv):
                number = leaf.filters
            return (shape[0], *space, number) if last else (shape[0], number, *space)

        expression = self.make_expression(channels, axes)
        return blocks.interpret(expression, tuple(input_shape), apply, lambda branches: branches[0])

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {
            **super().get_config(),
            "activation": keras.activations.serialize(self.activation),
            "data_format": self.data_format,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "deploy": self.deploy,
        }

    # ---- parts ---------------------------------------------------------------------------------------

    def _channels(self, shape: Shape) -> int:
        if not 3 <= len(shape) <= 5:
            raise ValueError(f"{self.name} works on 1 to 3 spatial axes, got an input of shape {tuple(shape)}")
        channels = shape[-1 if self.data_format == "channels_last" else 1]
        if channels is None:
            raise ValueError(f"{self.name} must know the number of input channels, got {tuple(shape)}")
        return int(channels)

    def _folded(self) -> AffineConv:
        if not self.built:
            raise ValueError(f"{self.name} has no weights yet: build it, or call it on an input, first")
        channels, axes = self._channels(self._shape), len(self._shape) - 2
        folded = blocks.fold(self._expression, self._part_weights(), channels, axes)
        if isinstance(folded, Refusal):
            raise ValueError(f"{self.name} is not one convolution: {folded.reason}")
        return folded

    def _part_weights(self) -> dict[str, Array]:
        """The weights of all parts, under the names and in the layout of the expression."""
        return {name: axes.to_core(_number(variable)) for name, (variable, axes) in self._variables().items()}

    def _variables(self) -> dict[str, tuple[Any, KernelAxes]]:
        """The weights of all parts by their names in the expression, each with its axes."""
        found: dict[str, tuple[Any, KernelAxes]] = {}
        for path, layer in self.parts.items():
            match layer:
                case layers.BatchNormalization():
                    names = {"gamma": layer.gamma, "beta": layer.beta}
                    names |= {"mean": layer.moving_mean, "variance": layer.moving_variance}
                    found.update({f"{path}/{name}": (variable, PLAIN) for name, variable in names.items()})
                case BranchScale():
                    found[f"{path}/factor"] = layer.factor, PLAIN
                case _ if hasattr(layer, "kernel"):
                    found[f"{path}/kernel"] = layer.kernel, _kernel_axes(layer)
                    if layer.use_bias:
                        found[f"{path}/bias"] = layer.bias, PLAIN
        return found

    def _make_parts(self, expression: Expression, input_shape: Shape) -> dict[str, Any]:
        """The built layers of ``expression``, by name."""
        parts: dict[str, Any] = {}

        def add(path: str, layer: Any, shape: Shape) -> Shape:
            layer.trainable = self.trainable
            layer.build(shape)
            parts[path] = layer
            return tuple(layer.compute_output_shape(shape))

        def apply(path: str, leaf: Leaf, shape: Shape) -> Shape:
            if isinstance(leaf, Conv | AveragePool) and _padding(leaf) is None:
                widths = tuple((window.before, window.after) for window in leaf.windows)
                shape = add(f"{path}/padding", self._make_padding(f"{path}/padding", widths), shape)
            return add(path, self._make_part(path, leaf, self._channels(shape), len(parts)), shape)

        blocks.interpret(expression, input_shape, apply, lambda branches: branches[0])
        return parts

    def _make_padding(self, path: str, widths: tuple[tuple[int, int], ...]) -> Any:
        padding = widths[0] if len(widths) == 1 else widths
        return ZERO_PADDINGS[len(widths)](padding, data_format=self.data_format, **self._common(path))

    def _make_part(self, path: str, leaf: Leaf, channels: int, index: int) -> Any:
        common = self._common(path)
        match leaf:
            case Conv():
                return self._make_conv(leaf, channels, index, common)
            case BatchNorm():
                axis = -1 if self.data_format == "channels_last" else 1
                return layers.BatchNormalization(axis, leaf.momentum, leaf.epsilon, **common)
            case Scale(trainable=False):
                return layers.Rescaling(leaf.initial, **common)
            case Scale():
                return BranchScale(leaf.initial, leaf.per_channel, self.data_format, **common)
            case AveragePool():
                size, strides = _of(leaf.windows, "taps"), _of(leaf.windows, "stride")
                padding = _padding(leaf) or "valid"
                pool = AVERAGE_POOLS[len(leaf.windows)]
                return pool(size, strides, padding, data_format=self.data_format, **common)
            case _:
                assert_never(leaf)

    def _make_conv(self, leaf: Conv, channels: int, index: int, common: dict[str, Any]) -> Any:
        axes, strides = len(leaf.windows), _of(leaf.windows, "stride")
        settings = {
            "strides": strides,
            "padding": _padding(leaf) or "valid",
            "data_format": self.data_format,
            "dilation_rate": _of(leaf.windows, "dilation"),
            "use_bias": leaf.bias,
            **common,
        }
        initializer = _own_initializer(self.kernel_initializer, index)
        # The depthwise layers are faster than groups where both can say it; TensorFlow has them for equal
        # strides only.
        if leaf.groups == channels > 1 and axes in DEPTHWISE_CONVOLUTIONS and len(set(strides)) == 1:
            return DEPTHWISE_CONVOLUTIONS[axes](
                _of(leaf.windows, "taps"),
                depth_multiplier=leaf.filters // channels,
                depthwise_initializer=initializer,
                depthwise_regularizer=self.kernel_regularizer,
                **settings,
            )
        return CONVOLUTIONS[axes](
            leaf.filters,
            _of(leaf.windows, "taps"),
            groups=leaf.groups,
            kernel_initializer=initializer,
            kernel_regularizer=self.kernel_regularizer,
            **settings,
        )

    def _common(self, path: str) -> dict[str, Any]:
        return {"name": path.replace("/", "_"), "dtype": self.dtype_policy}


@final
@keras.saving.register_keras_serializable(package="refold")
class ExpressionBlock(Block):
    """Any expression as a layer: ``ExpressionBlock(Sum(conv(3) | bn, Identity() | bn), activation="relu")``.

    Args:
        expression: what to compute; one that :func:`refold.blocks.to_config` wrote is read back.
        kwargs: as in :class:`Block`.
    """

    def __init__(self, expression: Expression | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._given = blocks.from_config(expression) if isinstance(expression, dict) else expression

    def make_expression(self, channels_in: int, axes: int) -> Expression:
        """The expression that was given."""
        return self._given

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {**super().get_config(), "expression": blocks.to_config(self._given)}


def _sum(branches: Sequence[Any]) -> Any:
    total = branches[0]
    for branch in branches[1:]:
        total = ops.add(total, branch)
    return total


def _padding(leaf: Conv | AveragePool) -> str | None:
    """What Keras calls the padding of ``leaf``; None where it has no word for it."""
    if all(window.before == window.after == 0 for window in leaf.windows):
        return "valid"
    # Keras' "same" does not count the zeros that a pool reads, and has another place at another stride.
    if isinstance(leaf, Conv) and all(_is_same(window) for window in leaf.windows):
        return "same"
    return None


def _is_same(window: Window) -> bool:
    return window.stride == 1 and (window.before, window.after) == (window.reach // 2, -(-window.reach // 2))


def _of(windows: tuple[Window, ...], name: str) -> tuple[int, ...]:
    return tuple(getattr(window, name) for window in windows)


def _kernel_axes(layer: Any) -> KernelAxes:
    return DEPTHWISE if isinstance(layer, tuple(DEPTHWISE_CONVOLUTIONS.values())) else CONV


def _own_initializer(initializer: Any, index: int) -> Any:
    """An initializer like this one that draws other numbers."""
    config = initializer.get_config() if isinstance(initializer, keras.initializers.Initializer) else {}
    seed = config.get("seed", "none")
    if seed is None:
        return type(initializer).from_config(config)
    if isinstance(seed, int):
        return type(initializer).from_config(config | {"seed": seed + index})
    return initializer


def _number(variable: Any) -> npt.NDArray[np.float64]:
    return np.asarray(ops.convert_to_numpy(variable), dtype=np.float64)


def _data_format(data_format: str | None) -> str:
    if data_format is None:
        return str(keras.config.image_data_format())
    if data_format not in ("channels_last", "channels_first"):
        raise ValueError(f"data_format is 'channels_last' or 'channels_first', got {data_format!r}")
    return data_format
