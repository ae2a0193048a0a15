"""Blocks to train with: PaddleDetection's own, and those made of expressions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.nn import functional as F
from test_fold import assert_same_function, operators
from zoo import randomize

import refold
from refold.blocks import BatchNorm, Scale, Sum, average_pool, convolution
from refold.paddle import ACBlock, DiverseBranchBlock, ExpressionBlock, MobileOneBlock, RepVGGBlock, RepVggBlock
from refold.paddle.places import beside


class ConvBN(nn.Layer):
    """As the users of PaddleDetection know it."""

    def __init__(self, ch_in: int, ch_out: int, filter_size: int, padding: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2D(ch_in, ch_out, filter_size, stride=stride, padding=padding, groups=1, bias_attr=False)
        self.bn = nn.BatchNorm2D(ch_out)

    def forward(self, x: Any) -> Any:
        return self.bn(self.conv(x))


class Original(nn.Layer):
    """The block of the document, written out: its interface and its conversion as published."""

    def __init__(self, ch_in: int, ch_out: int, act: str = "relu", alpha: bool = False) -> None:
        super().__init__()
        self.ch_in, self.ch_out = ch_in, ch_out
        self.conv1 = ConvBN(ch_in, ch_out, 3, padding=1)
        self.conv2 = ConvBN(ch_in, ch_out, 1, padding=0)
        self.act = getattr(F, act)
        self.alpha = None
        if alpha:
            self.alpha = self.create_parameter([1], default_initializer=nn.initializer.Constant(1.0))

    def forward(self, x: Any) -> Any:
        if hasattr(self, "conv"):
            y = self.conv(x)
        elif self.alpha is not None:
            y = self.conv1(x) + self.alpha * self.conv2(x)
        else:
            y = self.conv1(x) + self.conv2(x)
        return self.act(y)

    def convert_to_deploy(self) -> None:
        kernel3, bias3 = self.fused(self.conv1)
        kernel1, bias1 = self.fused(self.conv2)
        alpha = 1.0 if self.alpha is None else self.alpha
        self.conv = nn.Conv2D(self.ch_in, self.ch_out, 3, padding=1)
        self.conv.weight.set_value(kernel3 + F.pad(alpha * kernel1, [1, 1, 1, 1]))
        self.conv.bias.set_value(bias3 + alpha * bias1)
        del self.conv1, self.conv2

    @staticmethod
    def fused(branch: Any) -> tuple[Any, Any]:
        scale = branch.bn.weight / (branch.bn._variance + branch.bn._epsilon).sqrt()
        return branch.conv.weight * scale.reshape([-1, 1, 1, 1]), branch.bn.bias - branch.bn._mean * scale


def image(*shape: int, seed: int = 0, dtype: str = "float32") -> Any:
    return paddle.to_tensor(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def assert_close(one: Any, other: Any, rtol: float = 3e-6) -> None:
    a, b = (np.asarray(t.astype("float64").numpy()) for t in (one, other))
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(float(np.abs(a).max()), 1e-30))


ALPHAS = (None, 1.7, -0.6, 0.0)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("channels", [(3, 8), (8, 8), (8, 1), (1, 5)])
@pytest.mark.parametrize("space", [(1, 1), (2, 3), (7, 8)])
def test_the_documents_block_and_ours_are_one(alpha: Any, channels: Any, space: Any) -> None:
    theirs = randomize(Original(*channels, alpha=alpha is not None))
    ours = RepVggBlock(*channels, alpha=alpha is not None)
    ours.eval()
    if alpha is not None:
        theirs.alpha.set_value(paddle.full([1], alpha))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    missing, unexpected = ours.set_state_dict(theirs.state_dict())
    assert not missing
    assert not unexpected
    x = image(2, channels[0], *space)
    before = theirs(x)
    assert_close(before, ours(x), 1e-6)

    back = Original(*channels, alpha=alpha is not None)
    back.eval()
    back.set_state_dict(ours.state_dict())
    np.testing.assert_array_equal(back(x).numpy(), before.numpy())

    plain = refold.fold(theirs, x)
    assert_close(before, plain(x))
    assert refold.prove(ours, plain, x).verdict.value == "proved"
    ours.convert_to_deploy()
    assert_close(before, ours(x))
    ours.convert_to_deploy()  # harmless
    assert list(ours.state_dict()) == ["conv.weight", "conv.bias"]

    theirs.convert_to_deploy()
    deployed = RepVggBlock(*channels, alpha=alpha is not None, deploy=True)
    deployed.eval()
    missing, _ = deployed.set_state_dict(theirs.state_dict())
    assert not missing
    assert_close(before, deployed(x))


class Stage(nn.Layer):
    """A stage of PaddleDetection's CSPResNet, of RepVGG blocks of either origin."""

    def __init__(self, block: type, ch_in: int, ch_out: int) -> None:
        super().__init__()
        middle = (ch_in + ch_out) // 2
        self.conv_down = ConvBN(ch_in, middle, 3, padding=1, stride=2)
        self.conv1, self.conv2 = (ConvBN(middle, middle // 2, 1, padding=0) for _ in range(2))
        self.blocks = nn.Sequential(*(nn.Sequential() for _ in range(2)))
        for inner in self.blocks:
            inner.conv1 = ConvBN(middle // 2, middle // 2, 3, padding=1)
            inner.conv2 = block(middle // 2, middle // 2, act="swish", alpha=True)
        self.attn = nn.Conv2D(middle, middle, 1)
        self.conv3 = ConvBN(middle, ch_out, 1, padding=0)

    def forward(self, x: Any) -> Any:
        x = F.swish(self.conv_down(x))
        left, right = F.swish(self.conv1(x)), F.swish(self.conv2(x))
        for block in self.blocks:
            right = paddle.add(right, block.conv2(F.swish(block.conv1(right))))
        y = paddle.concat([left, right], axis=1)
        return F.swish(self.conv3(y * F.hardsigmoid(self.attn(y.mean((2, 3), keepdim=True)))))


class Backbone(nn.Layer):
    def __init__(self, block: type) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            ("conv1", ConvBN(3, 4, 3, padding=1, stride=2)), ("conv2", ConvBN(4, 8, 3, padding=1))
        )
        self.stages = nn.Sequential(("0", Stage(block, 8, 16)), ("1", Stage(block, 16, 24)))

    def forward(self, inputs: Any) -> Any:
        x = inputs["image"]
        for layer in self.stem:
            x = F.swish(layer(x))
        given = []
        for stage in self.stages:
            x = stage(x)
            given.append(x)
        return given


def test_a_whole_backbone_of_either_block_is_one_network(tmp_path: Path) -> None:
    theirs, ours = randomize(Backbone(Original)), Backbone(RepVggBlock)
    ours.eval()
    paddle.save(theirs.state_dict(), str(tmp_path / "last.pdparams"))
    checkpoint = paddle.load(str(tmp_path / "last.pdparams"))
    assert ours.set_state_dict(checkpoint) == ([], [])
    example = {"image": (None, 3, None, None)}
    inputs = {"image": image(2, 3, 33, 40)}
    wanted = theirs(inputs)
    for one, other in zip(wanted, ours(inputs), strict=True):
        assert_close(one, other)

    plain = refold.fold(ours, example)
    assert refold.prove(theirs, plain, example).verdict.value == "proved"
    for one, other in zip(wanted, plain(inputs), strict=True):
        assert_close(one, other, 1e-5)
    # Nothing is left of batch norms and branches: the convolutions of the deployed network, and what is not linear.
    kinds = [type(layer).__name__ for layer in plain.sublayers() if not layer.sublayers()]
    convolutions = 2 + 2 * (1 + 2 + 2 * 2 + 1 + 1)
    assert kinds == ["Conv2D"] * convolutions
    assert not refold.inspect(plain, example).changes_something

    deployed = Backbone(Original)
    deployed.set_state_dict(ours.state_dict())
    deployed.eval()
    for layer in (*deployed.sublayers(), *ours.sublayers()):
        if isinstance(layer, Original | RepVggBlock):
            layer.convert_to_deploy()
    missing, unexpected = ours.set_state_dict(deployed.state_dict())
    assert not missing
    assert all(name.endswith(".alpha") for name in unexpected)
    for one, other in zip(wanted, ours(inputs), strict=True):
        assert_close(one, other, 1e-5)


def test_the_fold_is_rounded_once() -> None:
    block = randomize(RepVggBlock(4, 6, alpha=True))
    kernel, bias = block.get_equivalent_kernel_bias()
    double = copy.deepcopy(block)
    double.to(dtype="float64")
    exact = Original.fused(double.conv1), Original.fused(double.conv2)
    wanted = exact[0][0] + F.pad(double.alpha * exact[1][0], [1, 1, 1, 1])
    np.testing.assert_array_equal(kernel.numpy(), wanted.numpy().astype("float32"))
    np.testing.assert_allclose(bias.numpy(), (exact[0][1] + double.alpha * exact[1][1]).numpy(), rtol=1e-6)
    assert kernel.dtype == paddle.float32


ACTS: list[Any] = ["relu", "silu", None, {"name": "leaky_relu", "negative_slope": 0.3}, F.tanh, nn.Hardswish()]


@pytest.mark.parametrize("act", ACTS, ids=["name", "silu", "none", "dict", "function", "layer"])
def test_activations_in_all_their_forms(act: Any) -> None:
    block = randomize(RepVggBlock(3, 4, act=act))
    x = image(1, 3, 5, 5)
    before = block(x)
    inner = block.conv1(x) + block.conv2(x)
    wanted = {"relu": F.relu, "silu": F.silu, None: lambda v: v}.get(act if isinstance(act, str) else None)
    if isinstance(act, dict):
        wanted = lambda v: F.leaky_relu(v, 0.3)  # noqa: E731
    elif callable(act):
        wanted = act
    assert_close(wanted(inner), before)
    block.convert_to_deploy()
    assert_close(before, block(x))


def test_a_name_that_is_no_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="act is the name of an activation"):
        RepVggBlock(3, 4, act="no_such_thing")


@pytest.mark.parametrize("kind", [RepVggBlock, RepVGGBlock])
def test_training_mode_is_refused_in_words(kind: Any) -> None:
    block = kind(3, 4)
    block.train()
    names = list(block.state_dict())
    with pytest.raises(ValueError, match=r"in training mode.*call eval"):
        block.convert_to_deploy()
    assert list(block.state_dict()) == names


def test_what_would_not_be_finite_is_refused_and_changes_nothing() -> None:
    block = randomize(RepVggBlock(3, 4))
    block.conv1.bn._variance.set_value(paddle.full([4], -1.0))
    names = list(block.state_dict())
    with pytest.raises(ValueError, match="not be finite"):
        block.convert_to_deploy()
    assert list(block.state_dict()) == names


@pytest.mark.parametrize("kind", [RepVggBlock, RepVGGBlock])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_are_rounded_once(kind: Any, dtype: str) -> None:
    block = randomize(kind(3, 4, alpha=True))
    block.to(dtype=dtype)  # a CPU has no convolution of it, but the algebra needs none
    wide = copy.deepcopy(block)
    wide.to(dtype="float64")
    exact = wide.get_equivalent_kernel_bias()
    block.convert_to_deploy()
    conv = next(layer for layer in block.sublayers() if isinstance(layer, nn.Conv2D))
    for tensor, wanted in zip((conv.weight, conv.bias), exact, strict=True):
        assert str(tensor.dtype) == f"paddle.{dtype}"
        assert tensor.place.is_cpu_place()
        np.testing.assert_array_equal(
            tensor.astype("float64").numpy(), wanted.astype(dtype).astype("float64").numpy()
        )


def test_new_tensors_are_made_where_the_old_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Place:
        def is_gpu_place(self) -> bool:
            return True

        def gpu_device_id(self) -> int:
            return 1

    class Tensor:
        place = Place()

    chosen: list[str] = []
    monkeypatch.setattr(paddle.device, "set_device", chosen.append)
    with beside([paddle.ones([1])]), beside([]):
        pass
    assert chosen == []
    with beside([Tensor()]):
        assert chosen == ["gpu:1"]
    assert chosen == ["gpu:1", "cpu"]


@pytest.mark.parametrize("kind", [RepVggBlock, RepVGGBlock])
def test_precision_and_frozen_weights_survive(kind: Any) -> None:
    block = randomize(kind(3, 4, alpha=True))
    block.to(dtype="float64")
    for parameter in block.parameters():
        parameter.stop_gradient = True
    x = image(1, 3, 5, 5, dtype="float64")
    before = block(x)
    block.convert_to_deploy()
    conv = next(layer for layer in block.sublayers() if isinstance(layer, nn.Conv2D))
    assert conv.weight.dtype == paddle.float64
    assert conv.weight.stop_gradient
    assert conv.bias.stop_gradient
    assert_close(before, block(x), 1e-14)


def test_both_forms_train() -> None:
    block = RepVggBlock(3, 4, alpha=True)
    for deployed in (False, True):
        block.train()
        block(image(2, 3, 5, 5)).sum().backward()
        assert all(parameter.grad is not None for parameter in block.parameters() if not parameter.stop_gradient)
        if not deployed:
            assert float(block.alpha.grad.abs().max()) > 0
            block.eval()
            block.convert_to_deploy()


def test_saves_in_both_forms(tmp_path: Path) -> None:
    block, x = randomize(RepVggBlock(3, 4, alpha=True)), image(2, 3, 6, 5)
    for name in ("rich", "plain"):
        spec = [paddle.static.InputSpec([None, 3, None, None], "float32")]
        paddle.jit.save(block, str(tmp_path / name), input_spec=spec)
        assert_close(block(x), paddle.jit.load(str(tmp_path / name))(x))
        paddle.jit.to_static(block)
        block.convert_to_deploy()


# ---- blocks made of expressions ------------------------------------------------------------------------

KINDS = [RepVGGBlock, ACBlock, DiverseBranchBlock, MobileOneBlock]
SETTINGS: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({}, (2, 4, 7, 8)),
    ({"stride": 2}, (2, 4, 7, 8)),
    ({"kernel_size": 5, "groups": 2}, (2, 4, 7, 8)),
    ({"groups": 4, "stride": (1, 2)}, (2, 4, 7, 8)),
    ({"kernel_size": (1, 3)}, (2, 4, 7, 8)),
    ({"kernel_size": 4}, (2, 4, 7, 8)),
    ({"axes": 1}, (2, 4, 9)),
    ({"axes": 3}, (2, 4, 4, 5, 3)),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("settings", "shape"), SETTINGS, ids=lambda value: str(value))
@pytest.mark.parametrize("filters", [4, 8])
def test_blocks_are_one_convolution(kind: Any, settings: Any, shape: Any, filters: int) -> None:
    block, x = randomize(kind(4, filters, **settings)), image(*shape)
    before = block(x)
    plain = refold.fold(block, x)
    assert operators(plain, x) == 2
    assert_same_function(block, plain, x)
    assert refold.prove(block, plain, x).verdict.value == "proved"
    assert not any(type(layer).__module__.startswith("refold.paddle.b") for layer in plain.sublayers())
    block.convert_to_deploy()
    block.convert_to_deploy()
    assert_close(before, block(x))
    again = kind(4, filters, **settings, deploy=True)
    again.eval()
    missing, unexpected = again.set_state_dict(block.state_dict())
    assert not missing
    assert not unexpected
    np.testing.assert_array_equal(again(x).numpy(), block(x).numpy())


def test_dilation_and_options() -> None:
    x = image(2, 4, 9, 9)
    for block in (
        RepVGGBlock(4, 4, dilation=2, alpha=True, identity=False, act=None),
        MobileOneBlock(4, 4, 1, branches=2),
        DiverseBranchBlock(4, 6, hidden=3, average=False, dilation=2),
        ACBlock(4, 6, dilation=(2, 1), epsilon=1e-3, momentum=0.99),
    ):
        before = randomize(block)(x)
        kernel, bias = block.get_equivalent_kernel_bias()
        assert kernel.shape[:2] == [before.shape[1], 4]
        assert bias.shape == [before.shape[1]]
        block.convert_to_deploy()
        assert_close(before, block(x))


def test_alpha_is_a_parameter_until_it_is_folded() -> None:
    block = RepVGGBlock(4, 4, alpha=True)
    assert float(block.alpha) == 1.0
    assert any(parameter is block.alpha for parameter in block.parameters())
    block.eval()
    block.convert_to_deploy()
    assert block.alpha is None
    assert RepVGGBlock(4, 4).alpha is None


def test_an_expression_of_ones_own() -> None:
    norm = BatchNorm(1e-5)
    expression = Sum(
        convolution(6, 3, stride=2) | norm,
        Scale(0.5, per_channel=True) * (convolution(6, 1, stride=2, bias=True) | norm),
        -2.0 * (average_pool(3, 2) | convolution(6, 1)),
    )
    block, x = randomize(ExpressionBlock(expression, 4, act="silu")), image(2, 4, 8, 7)
    before = block(x)
    assert operators(refold.fold(block, x), x) == 2
    block.convert_to_deploy()
    assert_close(before, block(x))
    with pytest.raises(ValueError, match="groups"):
        ExpressionBlock(convolution(6, 3, groups=3), 4)
    trap = randomize(ExpressionBlock(convolution(6, 1, bias=True) | convolution(6, 3), 4))
    with pytest.raises(ValueError, match=r"not one convolution.*zero padding"):
        trap.convert_to_deploy()


def test_blocks_train() -> None:
    for kind in KINDS:
        model = nn.Sequential(kind(3, 4), nn.Flatten(), nn.Linear(4 * 25, 2))
        optimizer = paddle.optimizer.SGD(0.05, parameters=model.parameters())
        x, target = image(8, 3, 5, 5), paddle.to_tensor(np.arange(8) % 2)
        losses = []
        for _ in range(12):
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            optimizer.clear_grad()
            losses.append(float(loss))
        assert losses[-1] < losses[0]
        model.eval()
        plain = refold.fold(model, x)
        assert_close(model(x), plain(x), 1e-5)


def test_blocks_translate_to_programs_in_both_modes(tmp_path: Path) -> None:
    block = randomize(DiverseBranchBlock(4, 6))
    x = paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype("float32"))
    paddle.jit.save(
        block, str(tmp_path / "block"), input_spec=[paddle.static.InputSpec([None, 4, 8, 8], "float32")]
    )
    loaded = paddle.jit.load(str(tmp_path / "block"))
    np.testing.assert_allclose(loaded(x).numpy(), block(x).numpy(), rtol=1e-5, atol=1e-6)

    eager, translated = copy.deepcopy(block), paddle.jit.to_static(copy.deepcopy(block))
    for model in (eager, translated):
        model.train()
        optimizer = paddle.optimizer.SGD(0.1, parameters=model.parameters())
        for _ in range(2):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.clear_grad()
    for (name, one), two in zip(eager.state_dict().items(), translated.state_dict().values(), strict=True):
        np.testing.assert_allclose(one.numpy(), two.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)
