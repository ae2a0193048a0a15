"""Random geometries of Paddle's operators, and random networks, against Paddle's own operators in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from paddle import nn
from paddle.nn import functional as F
from test_fold import assert_same_function
from zoo import randomize

import refold
from refold.paddle.frontend import FRONTEND

CONVS = {1: nn.Conv1D, 2: nn.Conv2D, 3: nn.Conv3D}
TRANSPOSED = {1: nn.Conv1DTranspose, 2: nn.Conv2DTranspose, 3: nn.Conv3DTranspose}
NORMS = {1: nn.BatchNorm1D, 2: nn.BatchNorm2D, 3: nn.BatchNorm3D}
POOLS = {1: nn.AvgPool1D, 2: nn.AvgPool2D, 3: nn.AvgPool3D}
LAST = {1: "NLC", 2: "NHWC", 3: "NDHWC"}
FIRST = {1: "NCL", 2: "NCHW", 3: "NCDHW"}


@st.composite
def convolutions(draw: Any) -> tuple[Any, tuple[int, ...]]:
    """A convolution and its batch norm, with any geometry that Paddle has words for, and an input shape."""
    axes = draw(st.integers(1, 3))
    channels, groups = draw(st.sampled_from([(4, 1), (4, 2), (4, 4), (3, 1), (3, 3)]))
    filters = groups * draw(st.integers(1, 2))
    taps = [draw(st.integers(1, 3)) for _ in range(axes)]
    stride = [draw(st.integers(1, 3)) for _ in range(axes)]
    dilation = [draw(st.integers(1, 2)) for _ in range(axes)]
    padding = draw(
        st.one_of(
            st.integers(0, 2),
            st.sampled_from(["SAME", "VALID"]),
            st.lists(st.integers(0, 2), min_size=axes, max_size=axes),
            st.lists(st.integers(0, 2), min_size=2 * axes, max_size=2 * axes),
        )
    )
    last = draw(st.booleans()) and groups == 1
    layout = (LAST if last else FIRST)[axes]
    conv = CONVS[axes](
        channels,
        filters,
        taps,
        stride=stride,
        dilation=dilation,
        padding=padding,
        groups=groups,
        bias_attr=None if draw(st.booleans()) else False,
        data_format=layout,
    )
    norm = NORMS[axes](filters, data_format="NC" + layout[2:] if axes == 1 and not last else layout)
    space = [draw(st.integers(5, 7)) for _ in range(axes)]
    shape = (2, *space, channels) if last else (2, channels, *space)
    return randomize(nn.Sequential(conv, norm)), shape


def data(shape: tuple[int, ...], seed: int = 0) -> Any:
    return paddle.to_tensor(np.random.default_rng(seed).normal(size=shape).astype("float32"))


# A case takes several runs of Paddle.
FEW = settings(max_examples=settings.default.max_examples // 6)


@FEW
@given(convolutions())
def test_convolutions_of_every_geometry(case: tuple[Any, tuple[int, ...]]) -> None:
    model, shape = case
    x = data(shape)
    plain = refold.fold(model, x)
    assert len(FRONTEND.lift(plain, x).graph.nodes) == 1
    assert_same_function(model, plain, x)
    assert refold.prove(model, plain, x).verdict.value == "proved"


@FEW
@given(
    axes=st.integers(1, 3),
    taps=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
    exclusive=st.booleans(),
    ceil_mode=st.booleans(),
    size=st.integers(5, 8),
)
def test_average_pools_of_every_geometry(
    axes: int, taps: int, stride: int, padding: int, exclusive: bool, ceil_mode: bool, size: int
) -> None:
    padding = min(padding, taps // 2)
    pool = POOLS[axes](taps, stride, padding, exclusive=exclusive, ceil_mode=ceil_mode)
    model = randomize(nn.Sequential(pool, CONVS[axes](3, 1, 1)))
    x = data((2, 3, *(size,) * axes))
    assume(np.isfinite(model(x).numpy()).all())  # Paddle divides 0 by 0 in windows that lie outside
    assert_same_function(model, refold.fold(model, x), x)


@FEW
@given(
    axes=st.integers(1, 3),
    taps=st.integers(1, 4),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    crop=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    extra=st.integers(0, 1),
    groups=st.sampled_from([1, 2, 4]),
    biased=st.booleans(),
)
def test_transposed_convolutions_of_every_geometry(
    axes: int, taps: int, stride: int, dilation: int, crop: tuple[int, int], extra: int, groups: int, biased: bool
) -> None:
    crop = (min(crop[0], dilation * (taps - 1)), min(crop[1], dilation * (taps - 1)))
    turned = TRANSPOSED[axes](
        4,
        2 * groups,
        taps,
        stride=stride,
        padding=list(crop) * axes,
        output_padding=min(extra, stride - 1),
        dilation=dilation,
        groups=groups,
        bias_attr=None if biased else False,
    )
    model = randomize(nn.Sequential(turned, NORMS[axes](2 * groups)))
    x = data((2, 4, *(5, 4, 3)[:axes]))
    plain = refold.fold(model, x)
    assert len(FRONTEND.lift(plain, x).graph.nodes) == 1
    assert_same_function(model, plain, x)
    assert refold.prove(model, plain, x).verdict.value == "proved"


class Drawn(nn.Layer):
    """A network of drawn steps, each on tensors that are there already."""

    def __init__(self, steps: list[tuple[str, int, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.LayerList()
        self.factors = self.create_parameter([4, 1, 1])
        for kind, _, _, choice in steps:
            self.layers.append(self.make(kind, choice))

    def make(self, kind: str, choice: int) -> Any:
        match kind:
            case "conv":
                k = (1, 3, 3, 5)[choice]
                return nn.Conv2D(4, 4, k, padding=k // 2, groups=(1, 2, 4, 1)[choice], bias_attr=bool(choice % 2))
            case "norm":
                return nn.BatchNorm2D(4)
            case "dense":
                return nn.Linear(4, 4, bias_attr=None if choice % 2 else False)
            case "pool":
                return nn.AvgPool2D(3, 1, padding=1, exclusive=bool(choice % 2))
            case _:
                return nn.Identity()

    def forward(self, x: Any) -> Any:
        known = [x]
        for layer, (kind, first, second, choice) in zip(self.layers, self.steps, strict=True):
            a, b = known[first % len(known)], known[second % len(known)]
            match kind:
                case "add":
                    y = a + b
                case "subtract":
                    y = a - b * (0.5, -1.0, 2.0, 1.0)[choice]
                case "scale":
                    y = (1.5, -0.5, 0.25, 3.0)[choice] * a + choice
                case "halves":
                    left, right = paddle.split(a, 2, axis=1)
                    y = paddle.concat([right, left], axis=1)
                case "pad":
                    y = F.pad(a, [1, 0, 0, 1], value=float(choice))[:, :, 1:, :-1]
                case "turned":
                    y = paddle.subtract(y=a, x=b)
                case "added":
                    y = a.clone()
                    y.add_(b)
                case "channels":
                    y = a * self.factors / (choice + 1)
                case "dense":
                    y = layer(a.transpose([0, 2, 3, 1])).transpose([0, 3, 1, 2])
                case "strided":
                    y = F.interpolate(layer(a)[:, :, :: choice + 1, ::-1][:, ::-1], size=a.shape[2:])
                case "many":
                    y = paddle.add_n([a, b, a]) if choice % 2 else paddle.stack([a, b], axis=1).sum(axis=1)
                case "relu":
                    y = F.relu(a)
                case _:
                    y = layer(a)
            known.append(y)
        return known[-1], known[len(known) // 2]


KINDS = (
    *("conv", "conv", "norm", "pool", "dense", "add", "add", "subtract", "turned", "added", "many"),
    *("scale", "channels", "halves", "pad", "strided", "relu"),
)
STEPS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 8), st.integers(0, 8), st.integers(0, 3)),
    min_size=2,
    max_size=9,
)


@settings(max_examples=settings.default.max_examples // 8)
@given(STEPS, st.booleans())
def test_random_networks(steps: list[tuple[str, int, int, int]], free: bool) -> None:
    model = randomize(Drawn(steps))
    shape = (None, 4, None, None) if free else (None, 4, 6, 7)
    plan, plain = refold.inspect(model, shape), refold.fold(model, shape)
    assert plan.after.operators <= plan.before.operators
    assert plan.after.multiply_adds <= plan.before.multiply_adds
    before, after = FRONTEND.lift(model, shape), FRONTEND.lift(plain, shape)
    x = data((2, 4, 7, 6)) if free else data((2, 4, 6, 7))
    feeds = {before.graph.inputs[0]: x.numpy()}
    reference = FRONTEND.evaluate(before, feeds, before.graph.outputs)
    folded = FRONTEND.run(after, [x.numpy()])
    original = FRONTEND.run(before, [x.numpy()])
    for name, a, b in zip(before.graph.outputs, folded, original, strict=True):
        scale = max(float(np.abs(reference[name]).max()), 1e-6)
        own = float(np.abs(b - reference[name]).max())
        assert float(np.abs(a - reference[name]).max()) <= max(6 * own, 3e-6 * scale)
    assert refold.prove(model, plain, shape).ok
