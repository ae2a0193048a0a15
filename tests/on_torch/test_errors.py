"""Bad input gets one sentence, and the model stays as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from zoo import conv_bn, made, randomize

import refold

pytestmark = pytest.mark.filterwarnings(
    "ignore:Complex modules are:UserWarning",
    "ignore:Sparse CSR tensor support:UserWarning",
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning",
)

IMAGE = torch.zeros(2, 4, 9, 9)


def plain_model() -> Any:
    return randomize(nn.Sequential(conv_bn(4, 4), nn.ReLU()))


def with_bad_statistics(value: float) -> Any:
    model = plain_model()
    model[0][1].running_var[0] = value
    return model


def writes_into_a_piece(s: Any, x: Any) -> Any:
    y = x * 2
    first, _ = y.chunk(2, 1)
    first.add_(1)
    return y


def sub_training() -> Any:
    model = plain_model()
    model[0][1].train()
    return model


def sparse_weight() -> Any:
    model = nn.Linear(3, 3).eval()
    model.weight = nn.Parameter(model.weight.detach().to_sparse_csr())
    return model


def with_weight(value: float) -> Any:
    model = plain_model()
    with torch.no_grad():
        model[0][0].weight[0] = value
    return model


def with_complex_nan() -> Any:
    return made(lambda s, x: (x * s.gate).real, gate=nn.Parameter(torch.tensor(complex(1.0, float("nan")))))


def fails(s: Any, x: Any) -> Any:
    raise ValueError("no such thing\nat all")


def numbers_in(model: Any) -> dict[str, bytes]:
    """All that a model holds, as bytes, so that NaN is NaN; of what has no numbers, nothing."""
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not (nn.parameter.is_lazy(tensor) or tensor.is_meta):
            found[name] = tensor.detach().to_dense().numpy().tobytes()
    return found


def looks(s: Any, x: Any) -> Any:
    return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("build", "example", "sentence"),
    [
        (lambda: plain_model().train(), IMAGE, "is in training mode, in which it is another function"),
        (plain_model, None, "does not say the shape of its inputs: give an example"),
        (
            plain_model,
            torch.zeros(2, 3, 9, 9),
            r"'Sequential' does not run on an example of float32 \(2, 3, 9, 9\): its '0.0' \(Conv2d\) says: .* "
            "channels instead; give an example that it takes",
        ),
        (
            plain_model,
            torch.zeros(2, 4),
            "does not run on an example of float32 .* its '0.0' .* but got input of size",
        ),
        (plain_model, IMAGE.double(), "does not run on an example of float64 .* expected scalar type Double"),
        (plain_model, IMAGE.long(), "does not run on an example of int64"),
        (
            plain_model,
            (IMAGE, IMAGE),
            "does not run on an example of .*, float32 .* takes 2 positional arguments but 3",
        ),
        (plain_model, {"x": IMAGE}, r"does not run on an example .* conv2d\(\) received an invalid combination"),
        (plain_model, (2, -4, 9, 9), "has a size below 1; give sizes, with None for those that may change"),
        (plain_model, (None, 4, 10**6, 10**6), r"would have 8.0e\+12 numbers: give a smaller one"),
        (plain_model, np.array(["image"]), "of type <U5 holds no numbers that torch has"),
        (plain_model, IMAGE.to_sparse(), "is stored as torch.sparse_coo: give a dense one"),
        (sub_training, IMAGE, r"in training mode \(its module '0.1' is\)"),
        (
            lambda: nn.Sequential(nn.LazyConv2d(4, 3)).eval(),
            IMAGE,
            "'0.weight' .* not initialized, .* call the model on",
        ),
        (lambda: nn.Sequential(nn.LazyBatchNorm2d()).eval(), IMAGE, "'0.weight' of .* is not initialized"),
        (
            sparse_weight,
            torch.zeros(2, 3),
            "'weight' of the model 'Linear' is stored as torch.sparse_csr: make it dense",
        ),
        (
            lambda: with_weight(float("nan")),
            IMAGE,
            "'0.0.weight' of the model 'Sequential' holds numbers that are not fin",
        ),
        (lambda: with_weight(float("inf")), IMAGE, "not finite .NaN or infinity.: load weights that are"),
        (lambda: nn.ModuleList([conv_bn(4, 4)]).eval(), IMAGE, 'missing the required "forward"'),
        (lambda: made(fails), IMAGE, r"does not run on an example of .*: no such thing; give"),
        (lambda: made(lambda s, x: (x, object())), IMAGE, "returns something that is neither a tensor nor a list"),
        (plain_model, "image", "an example input of type str is neither a tensor nor a shape"),
        (plain_model, torch.zeros(()), "holds no example: its first axis is the batch"),
        (plain_model, IMAGE.to(torch.complex64), "holds complex numbers"),
        (with_complex_nan, IMAGE, "'gate' of the model 'Lambda' holds numbers that are not finite"),
        (lambda: plain_model().to("meta"), IMAGE, "'0.0.weight' .* has no numbers: load the model's weights first"),
        (lambda: made(looks), IMAGE, "cannot be followed: its forward looks at the values of a tensor"),
        (lambda: made(lambda s, x: x.shape[0]), IMAGE, "it returns no tensor"),
        (lambda: made(lambda s, x: s.w, w=nn.Parameter(torch.ones(1))), IMAGE, "does not depend on its inputs"),
        (lambda: made(lambda s, x: x.relu_()), IMAGE, "writes into its input"),
        (lambda: made(writes_into_a_piece), IMAGE, "reads a view of a tensor after that was"),
        (lambda: torch.jit.script(plain_model()), IMAGE, "is scripted, which hides what it computes"),
        (lambda: made(lambda s, x: x + torch.rand_like(x)), IMAGE, "chance"),
    ],
)
def test_one_sentence(build: Any, example: Any, sentence: str) -> None:
    model = build()
    modes, state = [module.training for module in model.modules()], numbers_in(model)
    for verb in (refold.fold, refold.inspect, lambda model, example: refold.prove(model, model, example)):
        with pytest.raises(refold.InputError, match=sentence) as caught:
            verb(model, example)
        assert "\n" not in str(caught.value)
    assert [module.training for module in model.modules()] == modes
    assert numbers_in(model) == state


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_statistics_that_make_no_number_are_kept_apart(value: float) -> None:
    model = with_bad_statistics(value)
    kept = [str(kept) for kept in refold.inspect(model, IMAGE).kept]
    assert any("a variance plus epsilon is not positive, or a statistic is not finite" in k for k in kept)


def test_a_variance_of_zero_folds_with_the_epsilon() -> None:
    model = with_bad_statistics(0.0)
    plain = refold.fold(model, IMAGE)
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(plain(x), model(x), rtol=1e-4, atol=1e-3)
    assert refold.prove(model, plain, x).ok


def test_an_example_without_numbers_is_a_shape() -> None:
    model, example = plain_model(), IMAGE.to("meta")
    plain = refold.fold(model, example)
    assert refold.prove(model, plain, example).ok
    assert set(plain.state_dict()) == {"0.0.weight", "0.0.bias"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantized_example_is_refused() -> None:
    example = torch.quantize_per_tensor(IMAGE, 1.0, 0, torch.qint8)
    with pytest.raises(refold.InputError, match="is quantized: give a dense one"):
        refold.fold(plain_model(), example)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_modules_stay_as_they_are() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), {nn.Linear}).eval()
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    plan = refold.inspect(model, x)
    assert not plan.regions
    assert torch.equal(refold.fold(model, x)(x), model(x))


def test_integer_weights_are_left_alone() -> None:
    def forward(s: Any, x: Any) -> Any:
        return nn.functional.conv2d(x.long(), s.kernel).float()

    model = made(forward)
    model.register_buffer("kernel", torch.ones(4, 4, 1, 1, dtype=torch.long))
    assert not refold.inspect(model, torch.ones(2, 4, 9, 9)).regions


def test_a_weight_beyond_the_largest_number_is_refused() -> None:
    model = randomize(conv_bn(4, 4))
    with torch.no_grad():
        model[0].weight[0] = 1e30
        model[1].weight[0] = 1e30
    kept = [str(kept) for kept in refold.inspect(model, IMAGE).kept]
    assert any("a weight would not be finite" in k for k in kept)
