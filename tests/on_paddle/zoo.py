"""Models as people write them, each with the number of operators that folding must leave of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Entry:
    name: str
    build: Callable[[], Any]
    operators: int
    shape: Any
    says: tuple[str, ...] = ()  # what the plan must say of what is kept apart


ZOO: list[Entry] = []


def entry(operators: int, shape: Any, *says: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def note(build: Callable[[], Any]) -> Callable[[], Any]:
        ZOO.append(Entry(build.__name__, lambda: randomize(build()), operators, shape, says))
        return build

    return note


def randomize(model: Any, seed: int = 0) -> Any:
    """Weights of ordinary size, none of them at a value that hides a mistake (0, 1); in eval mode."""
    rng = np.random.default_rng(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        shape = tuple(tensor.shape)
        if "variance" in name:
            value = rng.uniform(0.3, 2.0, shape)
        elif len(shape) > 1:
            value = rng.normal(size=shape) / np.sqrt(max(int(np.prod(shape[1:])), 1))
        else:
            value = rng.uniform(0.3, 1.2, shape) * rng.choice([-1.0, 1.0], shape)
        tensor.set_value(paddle.to_tensor(np.asarray(value, dtype="float32")).astype(tensor.dtype))
    model.eval()
    return model


class Body(nn.Layer):
    """Layers with a forward that is a function: ``Body(lambda self, x: ..., conv=nn.Conv2D(...))``."""

    def __init__(self, body: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.body = body
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Any) -> Any:
        return self.body(self, x)


def conv(a: int, b: int, k: Any, **kwargs: Any) -> Any:
    padding = kwargs.pop("padding", k // 2 if isinstance(k, int) else [n // 2 for n in k])
    return nn.Conv2D(a, b, k, padding=padding, **kwargs)


def conv_bn(a: int, b: int, k: Any, **kwargs: Any) -> Any:
    return nn.Sequential(conv(a, b, k, bias_attr=False, **kwargs), nn.BatchNorm2D(b))


IMAGE = (None, 4, 8, 9)
FREE = (None, 4, None, None)


# ---- chains ----------------------------------------------------------------------------------------


@entry(2, IMAGE)
def conv_bn_relu() -> Any:
    return nn.Sequential(nn.Conv2D(4, 5, 3), nn.BatchNorm2D(5), nn.ReLU())


@entry(1, IMAGE)
def bn_in_front_of_valid() -> Any:
    return nn.Sequential(nn.BatchNorm2D(4), nn.Conv2D(4, 5, 3))


@entry(2, IMAGE, "zero padding after a bias is not a convolution at the border")
def bn_in_front_of_padded() -> Any:
    return nn.Sequential(nn.BatchNorm2D(4), conv(4, 5, 3))


@entry(2, IMAGE, "zero padding after a bias is not a convolution at the border")
def biased_pointwise_before_padded() -> Any:
    return nn.Sequential(nn.Conv2D(4, 8, 1), conv(8, 5, 3))


@entry(1, IMAGE)
def unbiased_pointwise_before_padded() -> Any:
    return nn.Sequential(nn.Conv2D(4, 8, 1, bias_attr=False), conv(8, 5, 3))


@entry(2, IMAGE, "together they would take")
def depthwise_separable_stays() -> Any:
    return nn.Sequential(conv(4, 4, 3, groups=4, bias_attr=False), nn.BatchNorm2D(4), nn.Conv2D(4, 8, 1))


@entry(1, (None, 10))
def dense_chain() -> Any:
    return nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1D(32), nn.Dropout(0.5), nn.Linear(32, 4))


@entry(1, (None, 10))
def dropout_that_scales_in_inference() -> Any:
    return nn.Sequential(nn.Linear(10, 6), nn.Dropout(0.4, mode="downscale_in_infer"), nn.Linear(6, 4))


@entry(1, (None, 7, 10))
def dense_on_sequences() -> Any:
    return nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 4))


@entry(3, IMAGE)
def two_norms_between_relus_stay_one_operator() -> Any:
    return nn.Sequential(nn.ReLU(), nn.BatchNorm2D(4), nn.BatchNorm2D(4), nn.ReLU())


@entry(3, (None, 6))
def two_norms_of_features() -> Any:
    return nn.Sequential(nn.ReLU(), nn.BatchNorm1D(6), nn.BatchNorm1D(6), nn.ReLU())


@entry(1, IMAGE)
def pad_then_valid() -> Any:
    return nn.Sequential(nn.Pad2D([1, 0, 2, 1]), nn.Conv2D(4, 5, 3), nn.BatchNorm2D(5))


@entry(2, IMAGE, "padding with 'reflect' is not a convolution at the border")
def reflected() -> Any:
    return nn.Sequential(nn.Conv2D(4, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2D(4))


@entry(1, IMAGE)
def same_padding_of_even_kernels() -> Any:
    return nn.Sequential(nn.Conv2D(4, 5, 4, padding="SAME"), nn.BatchNorm2D(5))


@entry(1, IMAGE)
def asymmetric_padding() -> Any:
    return nn.Sequential(nn.Conv2D(4, 5, 3, padding=[2, 0, 0, 1], stride=2), nn.BatchNorm2D(5))


@entry(1, IMAGE)
def padding_of_all_four_axes() -> Any:
    return nn.Sequential(nn.Conv2D(4, 5, 3, padding=[[0, 0], [0, 0], [1, 2], [0, 1]]), nn.BatchNorm2D(5))


@entry(1, (None, 4, 11))
def one_axis() -> Any:
    return nn.Sequential(nn.Conv1D(4, 6, 3, padding=[2, 0], dilation=1), nn.BatchNorm1D(6))


@entry(1, (None, 3, 5, 4, 6))
def three_axes() -> Any:
    return nn.Sequential(nn.Conv3D(3, 4, (3, 1, 3), padding=(1, 0, 1)), nn.BatchNorm3D(4))


@entry(1, (None, 8, 9, 4))
def channels_last() -> Any:
    last = {"data_format": "NHWC"}
    return nn.Sequential(nn.Conv2D(4, 6, 3, padding=1, **last), nn.BatchNorm2D(6, **last))


@entry(1, (None, 11, 4))
def channels_last_on_one_axis() -> Any:
    last = {"data_format": "NLC"}
    return nn.Sequential(nn.Conv1D(4, 6, 3, padding=1, **last), nn.BatchNorm1D(6, **last))


@entry(2, IMAGE)
def transposed_stays() -> Any:
    return nn.Sequential(nn.Conv2DTranspose(4, 5, 3), nn.ReLU())


@entry(1, IMAGE)
def average_pool_that_counts_padding() -> Any:
    return nn.Sequential(nn.AvgPool2D(3, 2, padding=1, exclusive=False), nn.Conv2D(4, 1, 1))


@entry(2, IMAGE, "leaves padded positions out of the average")
def average_pool_that_does_not() -> Any:
    return nn.Sequential(nn.AvgPool2D(3, 2, padding=1), nn.Conv2D(4, 2, 1))


@entry(1, (None, 4, 11))
def average_pool_of_one_axis() -> Any:
    return nn.Sequential(nn.AvgPool1D(3, 2), nn.Conv1D(4, 1, 1))


@entry(1, (None, 4, 8, 8))
def adaptive_pool_of_equal_windows() -> Any:
    return nn.Sequential(nn.AdaptiveAvgPool2D(4), nn.Conv2D(4, 1, 1))


@entry(2, (None, 4, 9, 9), "its windows have different sizes")
def adaptive_pool_of_other_windows() -> Any:
    return nn.Sequential(nn.AdaptiveAvgPool2D(4), nn.Conv2D(4, 2, 1))


# ---- branches ----------------------------------------------------------------------------------------


class RepVGG(nn.Layer):
    def __init__(self, a: int, b: int, stride: int = 1, groups: int = 1, alpha: float | None = None) -> None:
        super().__init__()
        self.three = conv_bn(a, b, 3, stride=stride, groups=groups)
        self.one = conv_bn(a, b, 1, stride=stride, groups=groups)
        self.identity = nn.BatchNorm2D(a) if a == b and stride == 1 else None
        self.alpha = None
        if alpha is not None:
            self.alpha = self.create_parameter([1], default_initializer=nn.initializer.Constant(alpha))
        self.act = nn.ReLU()

    def forward(self, x: Any) -> Any:
        y = self.one(x)
        y = self.three(x) + (y if self.alpha is None else self.alpha * y)
        return self.act(y if self.identity is None else y + self.identity(x))


@entry(4, IMAGE)
def repvgg_twice() -> Any:
    return nn.Sequential(RepVGG(4, 4, alpha=-0.5), RepVGG(4, 6, stride=2))


@entry(4, FREE)
def repvgg_at_an_unknown_size() -> Any:
    return nn.Sequential(RepVGG(4, 4, groups=2), RepVGG(4, 6, stride=2))


@entry(1, IMAGE)
def asymmetric_branches() -> Any:
    return Body(
        lambda m, x: m.a(x) + m.b(x) + m.c(x), a=conv_bn(4, 4, 3), b=conv_bn(4, 4, (1, 3)), c=conv_bn(4, 4, (3, 1))
    )


@entry(1, IMAGE)
def dilated_branches() -> Any:
    a, b = conv_bn(4, 4, 5), conv_bn(4, 4, 3, dilation=2, padding=2)
    return Body(lambda m, x: m.a(x) - m.b(x) * 0.5, a=a, b=b)


@entry(1, IMAGE)
def diverse_branch_padded_first() -> Any:
    def body(m: Any, x: Any) -> Any:
        padded = F.pad(x, [1, 1, 1, 1])
        return m.a(x) + m.c(m.b(padded)) + m.d(m.pool(m.e(padded))) + m.f(padded)[:, :, 1:-1, 1:-1]

    return Body(
        body,
        a=conv_bn(4, 4, 3),
        b=conv_bn(4, 6, 1),
        c=conv_bn(6, 4, 3, padding=0),
        d=nn.BatchNorm2D(4),
        e=conv_bn(4, 4, 1),
        pool=nn.AvgPool2D(3, 1),
        f=conv_bn(4, 4, 1),
    )


@entry(1, IMAGE)
def depthwise_branches() -> Any:
    a, b = conv(4, 4, 5, groups=4), conv_bn(4, 4, 3, groups=4)
    return Body(lambda m, x: m.a(x) + m.b(x) + x, a=a, b=b)


@entry(1, IMAGE)
def concat_then_pointwise() -> Any:
    a, b, last = conv_bn(4, 8, 3), conv_bn(4, 8, 3), nn.Conv2D(20, 4, 1)
    return Body(lambda m, x: m.last(paddle.concat([m.a(x), m.b(x), x], axis=1)), a=a, b=b, last=last)


@entry(1, IMAGE)
def split_and_join_is_a_grouped_convolution() -> Any:
    def body(m: Any, x: Any) -> Any:
        a, b = paddle.split(x, 2, axis=1)
        return paddle.concat([m.a(a), m.b(b)], axis=1)

    return Body(body, a=conv(2, 4, 3), b=conv(2, 4, 3))


@entry(1, IMAGE)
def chunk_slice_and_getitem() -> Any:
    def body(m: Any, x: Any) -> Any:
        a, b = paddle.chunk(x, 2, axis=1)
        c = paddle.slice(x, [1], [1], [3])
        return m.a(a) + m.b(b) + m.a(c) - m.b(x[:, ::2])

    return Body(body, a=conv(2, 4, 3), b=conv(2, 4, 3))


def shuffle(x: Any, groups: int) -> Any:
    b, c, h, w = x.shape
    y = paddle.reshape(x, [b, groups, c // groups, h, w])
    return paddle.reshape(paddle.transpose(y, [0, 2, 1, 3, 4]), [b, c, h, w])


@entry(1, FREE)
def shuffle_between_pointwise() -> Any:
    a, b = nn.Conv2D(4, 8, 1), nn.Conv2D(8, 3, 1)
    return Body(lambda m, x: m.b(shuffle(m.a(x), 2)), a=a, b=b)


@entry(1, IMAGE)
def shuffle_layer_between_pointwise() -> Any:
    return nn.Sequential(nn.Conv2D(4, 8, 1), nn.ChannelShuffle(4), nn.Conv2D(8, 3, 1))


@entry(1, IMAGE)
def arithmetic_of_numbers() -> Any:
    def body(m: Any, x: Any) -> Any:
        y = 2 - m.a(x) * 0.5
        y = paddle.scale(y / 3, scale=0.7, bias=0.2, bias_after_scale=False)
        return 1.5 * (-y) + paddle.add_n([y, x])

    return Body(body, a=conv(4, 4, 3))


@entry(1, IMAGE)
def keywords_turned_around() -> Any:
    return Body(lambda m, x: paddle.subtract(y=m.a(x), x=m.b(x)), a=conv(4, 4, 3), b=conv(4, 4, 3))


@entry(3, IMAGE)
def keywords_that_reach_the_operator() -> Any:
    """``paddle.multiply`` and its like hand on what they are given by name; PP-LCNet calls them so."""

    def body(m: Any, x: Any) -> Any:
        y = paddle.add(y=m.a(x), x=paddle.multiply(x=x, y=paddle.full([1], 3.0)))
        y = paddle.subtract(other=y, input=m.b(x))
        return paddle.multiply(y=F.relu(y), x=y)

    return Body(body, a=conv(4, 4, 3), b=conv(4, 4, 3))


class Gates(nn.Layer):
    """Constants per channel: a parameter, a buffer, a number that forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4, 3)
        self.gate = self.create_parameter([1, 4, 1, 1])
        self.register_buffer("mean", paddle.ones([4]))

    def forward(self, x: Any) -> Any:
        mean = self.mean.reshape([1, -1, 1, 1])
        return self.conv(x) * self.gate - mean + paddle.to_tensor([1.0, 2.0, 3.0, 4.0]).reshape([4, 1, 1])


@entry(1, IMAGE)
def constants_per_channel() -> Any:
    return Gates()


class Functional(nn.Layer):
    """Everything by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.w = self.create_parameter([4, 4, 3, 3])
        self.b = self.create_parameter([4], is_bias=True)
        self.m = self.create_parameter([6, 4])
        for name in ("mean", "variance", "gamma", "beta"):
            self.register_buffer(name, paddle.ones([4]))

    def forward(self, x: Any) -> Any:
        y = F.conv2d(x, self.w, self.b, padding=1)
        y = F.batch_norm(y, self.mean, self.variance, self.gamma, self.beta)
        y = F.relu(y)
        y = F.adaptive_avg_pool2d(y, 1).flatten(1)
        y = F.dropout(paddle.matmul(y, self.m, transpose_y=True), 0.3, training=self.training)
        return y @ self.m * 0.1


@entry(5, IMAGE)
def functions_only() -> Any:
    return Functional()


class ComputedKernel(nn.Layer):
    """A kernel that forward computes: a masked, standardized one."""

    def __init__(self) -> None:
        super().__init__()
        self.w = self.create_parameter([4, 4, 3, 3])
        self.bn = nn.BatchNorm2D(4)

    def forward(self, x: Any) -> Any:
        w = self.w - self.w.mean(axis=[1, 2, 3], keepdim=True)
        return F.relu(self.bn(F.conv2d(x, w / w.norm(), padding=1)))


@entry(2, IMAGE)
def computed_kernel() -> Any:
    return ComputedKernel()


@entry(2, IMAGE)
def weight_norm_of_paddle() -> Any:
    return nn.Sequential(nn.utils.weight_norm(nn.Conv2D(4, 5, 3)), nn.BatchNorm2D(5), nn.ReLU())


# ---- whole networks ------------------------------------------------------------------------------------


@entry(5, IMAGE)
def residual_across_a_relu_stays() -> Any:
    return Body(lambda m, x: F.relu(m.b(F.relu(m.a(x))) + x), a=conv_bn(4, 4, 3), b=conv_bn(4, 4, 3))


@entry(6, IMAGE, "needed elsewhere too")
def tapped_middle() -> Any:
    def body(m: Any, x: Any) -> Any:
        middle = m.c(x)
        return F.relu(m.n(middle) + m.o(x)), F.relu(middle)

    return Body(body, c=conv(4, 4, 3, bias_attr=False), n=nn.BatchNorm2D(4), o=conv_bn(4, 4, 1))


@entry(4, IMAGE)
def shared_convolution() -> Any:
    return Body(lambda m, x: (m.b(m.c(x)), F.relu(m.c(F.relu(x)))), c=conv(4, 4, 3), b=nn.BatchNorm2D(4))


class TwoInputs(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(4, 3, 3), conv_bn(4, 3, 3)

    def forward(self, left: Any, right: Any) -> Any:
        return {"sum": F.relu(self.a(left) + self.b(right)), "left": self.a(left)}


@entry(5, (IMAGE, IMAGE))
def two_inputs() -> Any:
    return TwoInputs()


class DictInput(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn(4, 3, 3)

    def forward(self, inputs: Any) -> Any:
        return [F.relu(self.body(inputs["image"])), inputs["scale"] * 2.0]


@entry(3, {"image": IMAGE, "scale": (None, 2)})
def dict_of_inputs() -> Any:
    return DictInput()


class LooksAtValues(nn.Layer):
    def forward(self, x: Any) -> Any:
        return F.relu(x) if float(x.max()) > 0 else -x


@entry(3, IMAGE, "its forward looks at the values of a tensor")
def a_layer_that_looks_at_values_stays_whole() -> Any:
    return nn.Sequential(conv_bn(4, 4, 3), LooksAtValues(), conv_bn(4, 4, 3))


class WritesInto(nn.Layer):
    def forward(self, x: Any) -> Any:
        y = paddle.zeros_like(x)
        y.set_value(x)
        return y


@entry(3, IMAGE, "its forward writes into a tensor")
def a_layer_that_sets_values_stays_whole() -> Any:
    return nn.Sequential(conv_bn(4, 4, 3), WritesInto(), conv_bn(4, 4, 3))


@entry(4, IMAGE, "it writes over a piece of a tensor")
def a_piece_that_is_written_over() -> Any:
    def body(m: Any, x: Any) -> Any:
        y = m.a(x)
        y[:, 1:3] = x[:, 1:3]
        return m.b(y)

    return Body(body, a=conv_bn(4, 4, 3), b=conv_bn(4, 4, 3))


class PadsWithShift(nn.Layer):
    """A batch norm, padded with what it gives for 0, as PaddleSlim's DiverseBranchBlock does it."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm, self.width = nn.BatchNorm2D(channels), width

    def forward(self, x: Any) -> Any:
        norm, width = self.norm, self.width
        border = norm.bias - norm._mean * norm.weight / paddle.sqrt(norm._variance + norm._epsilon)
        y = F.pad(norm(x), [width] * 4)
        for side in (slice(0, width), slice(-width, None)):
            y[:, :, side, :] = border.reshape([1, -1, 1, 1])
            y[:, :, :, side] = border.reshape([1, -1, 1, 1])
        return y


class WithIdentity(nn.Conv2D):
    """A 1x1 convolution whose weight is learned on top of the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1, bias_attr=False)
        self.identity = paddle.eye(channels).reshape([channels, channels, 1, 1])

    def forward(self, x: Any) -> Any:
        return F.conv2d(x, self.weight + self.identity)


@entry(1, IMAGE)
def diverse_branch_written_over() -> Any:
    return Body(
        lambda m, x: m.a(x) + m.b(x) + m.c(x) + m.d(x),
        a=conv_bn(4, 4, 3),
        b=conv_bn(4, 4, 1),
        c=nn.Sequential(
            nn.Conv2D(4, 4, 1, bias_attr=False), PadsWithShift(4, 1), nn.AvgPool2D(3, 1), nn.BatchNorm2D(4)
        ),
        d=nn.Sequential(
            WithIdentity(4),
            PadsWithShift(4, 1),
            nn.Conv2D(4, 4, 3, bias_attr=False),
            nn.BatchNorm2D(4),
        ),
    )


@entry(3, IMAGE, "padding with another constant than the bias before it")
def written_over_with_another_constant() -> Any:
    def body(m: Any, x: Any) -> Any:
        y = F.pad(m.a(x), [1, 1, 1, 1])
        for side in (slice(0, 1), slice(-1, None)):
            y[:, :, side, :] = 0.25
            y[:, :, :, side] = 0.25
        return m.b(y)

    return Body(body, a=nn.Conv2D(4, 4, 1), b=nn.Conv2D(4, 4, 3))


@entry(1, IMAGE)
def branches_of_every_shape() -> Any:
    """What PaddleSlim's SlimRepBlock sums: every odd kernel, a row, a column and the identity."""

    def body(m: Any, x: Any) -> Any:
        total = 0
        for layer in (m.five, m.three, m.one, m.row, m.column, m.identity):
            total += layer(x)
        return total

    return Body(
        body,
        five=conv_bn(4, 4, 5, groups=2),
        three=conv_bn(4, 4, 3, groups=2),
        one=conv_bn(4, 4, 1, groups=2),
        row=conv_bn(4, 4, (1, 5), groups=2),
        column=conv_bn(4, 4, (5, 1), groups=2),
        identity=nn.BatchNorm2D(4),
    )


class Affine(nn.Layer):
    """A learned factor and offset, as PaddleOCR puts them behind branches and activations."""

    def __init__(self, scale: float, bias: float) -> None:
        super().__init__()
        self.scale, self.bias = (
            self.create_parameter([1], default_initializer=nn.initializer.Constant(value))
            for value in (scale, bias)
        )

    def forward(self, x: Any) -> Any:
        return self.scale * x + self.bias


class Rep(nn.Layer):
    """PaddleOCR's LearnableRepLayer: several k x k, a 1x1, the identity; then a scale, an activation, a scale."""

    def __init__(self, a: int, b: int, k: int, stride: Any = 1, groups: int = 1, branches: int = 3) -> None:
        super().__init__()
        self.identity = nn.BatchNorm2D(a) if a == b and stride == 1 else None
        self.wide = nn.LayerList([conv_bn(a, b, k, stride=stride, groups=groups) for _ in range(branches)])
        self.one = conv_bn(a, b, 1, stride=stride, groups=groups) if k > 1 else None
        self.before, self.after = Affine(1.25, -0.25), Affine(0.75, 0.5)
        self.stride = stride

    def forward(self, x: Any) -> Any:
        out = 0
        for branch in (self.identity, self.one, *self.wide):
            if branch is not None:
                out += branch(x)
        out = self.before(out)
        return out if self.stride == 2 else self.after(F.hardswish(out))


@entry(10, IMAGE)
def text_recognition_backbone() -> Any:
    """Two depthwise-separable steps of PP-LCNetV3: of the scales behind an activation, those that a padded
    convolution follows stay, the one in front of the 1x1 goes."""
    return nn.Sequential(Rep(4, 4, 3, groups=4), Rep(4, 8, 1), Rep(8, 8, 5, stride=(2, 1), groups=8), Rep(8, 8, 1))


class BakesSize(nn.Layer):
    def forward(self, x: Any) -> Any:
        return x.reshape([int(x.shape[0]), 4, -1]).flatten(1)


@entry(2, IMAGE, "bound to a size of its input")
def a_layer_that_bakes_the_batch_stays_whole() -> Any:
    return nn.Sequential(conv_bn(4, 4, 3), BakesSize())


class Csp(nn.Layer):
    """The shape of PP-YOLOE's backbone: a stem, stages of cross-stage-partial RepVGG residuals, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(4, 4, 3, stride=2), nn.Silu(), conv_bn(4, 8, 3), nn.Silu())
        self.left, self.right = conv_bn(8, 4, 1), conv_bn(8, 4, 1)
        self.blocks = nn.Sequential(RepVGG(4, 4, alpha=0.3), RepVGG(4, 4, alpha=-0.3))
        self.attention = nn.Conv2D(8, 8, 1)
        self.out = conv_bn(8, 6, 1)

    def forward(self, x: Any) -> Any:
        x = self.stem(x)
        y = paddle.concat([F.silu(self.left(x)), self.blocks(F.silu(self.right(x)))], axis=1)
        weight = F.hardsigmoid(self.attention(y.mean((2, 3), keepdim=True)))
        return F.silu(self.out(y * weight))


@entry(19, (None, 4, 16, 16))
def csp_resnet() -> Any:
    return Csp()


# ---- batch norms behind concatenations ---------------------------------------------------------------


@entry(6, IMAGE)
def cross_stage_partial() -> Any:
    return Body(
        lambda m, x: F.silu(m.bn(paddle.concat([m.deep(F.silu(m.stem(x))), m.short(x)], axis=1))),
        stem=nn.Sequential(nn.Conv2D(4, 4, 3, padding=1), nn.BatchNorm2D(4)),
        deep=nn.Conv2D(4, 3, 1, bias_attr=False),
        short=nn.Conv2D(4, 5, 1),
        bn=nn.BatchNorm2D(8),
    )


# ---- transposed convolutions -------------------------------------------------------------------------


@entry(2, IMAGE)
def decoder_step() -> Any:
    return nn.Sequential(nn.Conv2DTranspose(4, 6, 4, 2, 1), nn.BatchNorm2D(6), nn.ReLU())


@entry(1, FREE)
def transposed_branches_are_one() -> Any:
    return Body(
        lambda self, x: self.b(self.a(x)) + self.c(x) * 2,
        a=nn.Conv2DTranspose(4, 6, 4, 2, 1, bias_attr=False),
        b=nn.BatchNorm2D(6),
        c=nn.Conv2DTranspose(4, 6, 2, 2),
    )


@entry(2, IMAGE, "a transposed convolution puts zeros between its inputs, and a bias before it is not there")
def a_bias_before_a_transposed_convolution() -> Any:
    return nn.Sequential(nn.Conv2D(4, 4, 1), nn.Conv2DTranspose(4, 6, 2, 2), nn.BatchNorm2D(6))


@entry(1, (None, 5, 6, 4))
def transposed_with_channels_last() -> Any:
    last = {"data_format": "NHWC"}
    return nn.Sequential(nn.Conv2DTranspose(4, 6, 3, 2, **last), nn.BatchNorm2D(6, **last))


# ---- operators through which factors and shifts per channel pass ------------------------------------


def headed(*between: Any, features: int = 4) -> Any:
    return nn.Sequential(nn.ReLU(), nn.BatchNorm2D(4), *between, nn.Linear(features, 3))


@entry(4, FREE)
def norm_before_a_global_average() -> Any:
    return headed(nn.AdaptiveAvgPool2D(1), nn.Flatten())


@entry(3, FREE)
def norm_before_a_mean() -> Any:
    norm, head = nn.BatchNorm2D(4), nn.Linear(4, 3)
    return Body(lambda s, x: s.head(s.norm(F.relu(x)).mean([2, 3])), norm=norm, head=head)


@entry(4, IMAGE)
def norm_before_an_average_that_leaves_out_its_padding_and_a_flattening() -> Any:
    return headed(nn.AvgPool2D(3, 2, 1), nn.Flatten(), features=80)


@entry(4, (None, 4, 9))
def norm_before_a_global_average_along_one_axis() -> Any:
    return nn.Sequential(nn.ReLU(), nn.BatchNorm1D(4), nn.AdaptiveAvgPool1D(1), nn.Flatten(), nn.Linear(4, 3))


@entry(3, IMAGE)
def norm_behind_an_upsampling() -> Any:
    turned = nn.Upsample(scale_factor=2, mode="bilinear")
    return nn.Sequential(nn.Conv2D(4, 6, 3), turned, nn.BatchNorm2D(6), nn.Tanh())


@entry(3, IMAGE)
def norm_behind_a_pixel_shuffle() -> Any:
    return nn.Sequential(nn.Conv2D(4, 8, 3), nn.PixelShuffle(2), nn.BatchNorm2D(2), nn.Tanh())


@entry(3, IMAGE)
def factors_behind_a_maximum_pool() -> Any:
    pool, conv = nn.MaxPool2D(3, 2, 1), nn.Conv2D(4, 6, 3)
    return Body(lambda s, x: F.relu(s.pool(s.conv(x)) * 2.0 - 3.0), pool=pool, conv=conv)


@entry(4, IMAGE, "a factor that is not positive does not pass through a maximum")
def norm_with_negative_factors_behind_a_maximum_pool() -> Any:
    return nn.Sequential(nn.Conv2D(4, 6, 3), nn.MaxPool2D(2), nn.BatchNorm2D(6), nn.Sigmoid())
