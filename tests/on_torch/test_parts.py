"""Models that can be followed in part only: what they call folds, and their own code stays what it is."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import RepVGG, conv_bn, made, randomize

import refold
from refold.proof.certificate import Verdict

IMAGE = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(3))


class Searching(nn.Module):
    """Calls a block as often as the numbers say, at two sizes, with a round trip through numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(4, 8)
        self.block = RepVGG(8, 8)
        self.levels = nn.ModuleList([conv_bn(8, 8), conv_bn(8, 8, stride=2)])
        self.head = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
        self.auxiliary = conv_bn(8, 8)
        self.gain = nn.Parameter(torch.empty(()))

    def forward(self, x: Any) -> Any:
        x = F.relu(self.stem(x))
        count = 0
        while x.norm() > 1 and count < 3:
            x = self.block(x) * self.gain
            x[:, :, :5, :5] += self.block(x[:, :, :5, :5])
            count += 1
        for level in self.levels:
            x = level(x)
        if bool(torch.isnan(x).any()):
            x = self.auxiliary(x)
        pooled = torch.from_numpy(x.detach().numpy().mean((2, 3)))
        return self.head(pooled)


def convolutions(model: Any) -> int:
    return sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())


def norms(model: Any) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def error(model: Any, plain: Any, *args: Any) -> float:
    """How far the folded model is from the original, both in float64, by the largest number."""
    with torch.no_grad():
        args = tuple(arg.double() if isinstance(arg, torch.Tensor) else arg for arg in args)
        wanted, found = copy.deepcopy(model).double()(*args), copy.deepcopy(plain).double()(*args)
    return float((wanted - found).abs().max() / wanted.abs().max())


def test_what_a_model_calls_folds_where_its_own_code_looks_at_numbers() -> None:
    model = randomize(Searching())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan, plain = refold.inspect(model, IMAGE), refold.fold(model, IMAGE)
    assert type(plain) is Searching
    assert (convolutions(plain), norms(plain)) == (1 + 1 + 2 + 1 + 1, 1)  # the auxiliary was not called
    assert {region.value.partition(".")[0] for region in plan.regions} == {"stem", "block", "levels", "head"}
    assert [str(kept) for kept in plan.kept] == [
        "kept apart: its forward looks at the values of a tensor (Searching)"
    ]
    assert plan.notes == ("'auxiliary' stays as it is: it was not called on the example",)
    assert sum(p.numel() for p in plain.parameters()) <= plan.parameters_after
    for x in (IMAGE, IMAGE * 1e-3, torch.randn(1, 4, 30, 20), torch.zeros(3, 4, 9, 9)):
        assert error(model, plain, x) < 1e-6
    assert not refold.inspect(plain, IMAGE).changes_something, "folding a folded model changes nothing"
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


def test_the_certificate_proves_each_part_and_measures_the_whole() -> None:
    model = randomize(Searching())
    plain = refold.fold(model, IMAGE)
    certificate = refold.prove(model, plain, IMAGE)
    assert certificate.verdict is Verdict.MEASURED
    assert certificate.ok
    assert len(certificate.regions) == 5
    assert all(region.verdict is Verdict.PROVED for region in certificate.regions)
    (said,) = (result for result in certificate.structure if result.verdict is Verdict.MEASURED)
    assert "its own code was not followed" in said.sentence
    assert {end.inputs for end in certificate.end_to_end} >= {"given", "normal", "zeros", "large", "subnormal"}


@pytest.mark.parametrize("where", ["block.conv.bias", "levels.1.0.weight", "gain", "auxiliary.0.weight"])
def test_a_certificate_is_refused_if_anything_is_off(where: str) -> None:
    model = randomize(Searching())
    plain = refold.fold(model, IMAGE)
    with torch.no_grad():
        plain.get_parameter(where).view(-1)[0] += 1e-4
    assert not refold.prove(model, plain, IMAGE).ok


def looking(body: Callable[[Any, Any], Any], **parts: Any) -> Any:
    """A model that looks at its input before it does something."""
    return made(lambda s, x: body(s, x if x.sum() > 0 else x * 2), **parts)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda s, x: s.net(x) * s.net[0].weight.mean(), "picks something out of it"),
        (lambda s, x: s.net(x) * len(s.net), "counts what is in it"),
        (
            lambda s, x: s.net(x) if isinstance(s.net, nn.Sequential) else x,
            "reads its '__class__'",
        ),
        (
            lambda s, x: s.net(x).argmax(1, keepdim=True) + s.net[1](x),
            "picks something out of it",
        ),
    ],
)
def test_what_is_not_only_called_stays(body: Any, reason: str) -> None:
    model = looking(body, net=conv_bn(4, 4), other=conv_bn(4, 4))
    model.body = lambda s, x: body(s, s.other(x) if x.sum() > 0 else x)
    plain, plan = refold.fold(model, IMAGE), refold.inspect(model, IMAGE)
    assert (norms(plain.net), norms(plain.other)) == (1, 0)
    assert any(note.startswith("'net' is not folded as a whole") and reason in note for note in plan.notes), (
        plan.notes
    )
    assert error(model, plain, IMAGE.abs()) < 1e-6


def test_what_is_inside_of_a_part_that_cannot_be_lifted_folds() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv_bn(4, 4), conv_bn(4, 4)

        def forward(self, x: Any, remember: set[str]) -> Any:
            remember.add("seen")
            return self.second(F.relu(self.first(x)))

    model = looking(lambda s, x: s.stage(x, set()), stage=Stage())
    plain = refold.fold(model, IMAGE)
    assert (convolutions(plain), norms(plain)) == (2, 0)
    assert "it is called with something else than tensors and numbers" in str(refold.inspect(model, IMAGE))
    assert error(model, plain, IMAGE) < 1e-6


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_bn(4, 4)

    def forward(self, x: Any, mask: Any = None, times: int = 1) -> Any:
        y = self.conv(x) * times
        return y if mask is None else y * mask


def test_arguments_by_name_and_numbers_among_them_are_followed() -> None:
    model = looking(
        lambda s, x: s.one(x, times=2, mask=None) + s.two(x=x, mask=x) + s.two(x, x), one=Scaled(), two=Scaled()
    )
    plain = refold.fold(model, IMAGE)
    assert (convolutions(plain), norms(plain)) == (2, 0)
    assert error(model, plain, IMAGE) < 1e-6
    assert refold.prove(model, plain, IMAGE).ok
    with pytest.raises(AssertionError, match="times must be 2, for which this model was folded"):
        plain.one(IMAGE, None, 3)
    with pytest.raises(AssertionError, match="mask must be None"):
        plain.one(IMAGE, IMAGE, 2)


def test_numbers_and_none_among_the_arguments_of_a_model_are_followed() -> None:
    model = randomize(Scaled())
    for example in ((IMAGE, None, 3), (IMAGE, IMAGE), (IMAGE, None)):
        plain = refold.fold(model, example)
        assert norms(plain) == 0
        assert error(model, plain, *example) < 1e-6
        certificate = refold.prove(model, plain, example)
        assert certificate.verdict is Verdict.PROVED
        assert "given" in {end.inputs for end in certificate.end_to_end}


def test_calls_of_several_kinds_leave_a_part_alone() -> None:
    model = looking(lambda s, x: s.part(x) + s.part(x, x), part=Scaled())
    plain = refold.fold(model, IMAGE)
    assert norms(plain.part) == 0, "the convolution inside is called in one way"
    assert "it is called with arguments of several kinds" in str(refold.inspect(model, IMAGE))
    assert error(model, plain, IMAGE) < 1e-6


def test_what_holds_at_one_size_only_is_not_used_at_others() -> None:
    branch = made(lambda s, x: s.conv(x) if x.shape[2] == 9 else x, conv=conv_bn(4, 4))
    other = made(lambda s, x: s.conv(x) if x.shape[2] == 9 else x, conv=conv_bn(4, 4))
    model = looking(
        lambda s, x: s.branch(x) + F.pad(s.branch(x[:, :, :5]), (0, 0, 0, 4)) + s.other(x),
        branch=branch,
        other=other,
    )
    plain = refold.fold(model, (None, 4, 9, 9))
    assert error(model, plain, IMAGE) < 1e-6
    assert norms(plain.branch) == 0, "the convolution inside of it holds at every size"
    assert "it is called at several sizes" in str(refold.inspect(model, (None, 4, 9, 9)))


def test_inside_of_a_model_that_is_followed() -> None:
    head = looking(lambda s, x: s.mix(x)[:, :, x.mean((0, 1, 2)) > -9], mix=conv_bn(4, 4))
    model = randomize(nn.Sequential(conv_bn(4, 4), nn.ReLU(), head, head, nn.ReLU(), conv_bn(4, 4)))
    plain = refold.fold(model, IMAGE)
    assert isinstance(plain, torch.fx.GraphModule)
    assert (convolutions(plain), norms(plain)) == (3, 0)
    certificate = refold.prove(model, plain, IMAGE)
    assert certificate.ok
    assert sum(region.verdict is Verdict.PROVED for region in certificate.regions) == 3
    assert error(model, plain, IMAGE) < 1e-6


def test_parts_inside_of_parts() -> None:
    inner = looking(lambda s, x: s.mix(x), mix=conv_bn(4, 4))
    outer = made(lambda s, x: s.inner(s.before(x)) if x.mean() < 9 else x, inner=inner, before=conv_bn(4, 4))
    model = randomize(looking(lambda s, x: s.outer(x), outer=outer))
    plain = refold.fold(model, IMAGE)
    assert (convolutions(plain), norms(plain)) == (2, 0)
    certificate = refold.prove(model, plain, IMAGE)
    assert certificate.ok
    assert {region.where.rpartition(".")[0] for region in certificate.regions} == {
        "outer.before",
        "outer.inner.mix",
    }


def test_shared_parts_stay_shared_and_tied_weights_tied() -> None:
    shared, linear, tied = conv_bn(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    tied.weight = linear.weight
    model = looking(
        lambda s, x: s.two(F.relu(s.one(x))) + s.tied(F.relu(s.linear(x.mT)).relu()).mT[:, :, :, :9],
        one=shared, two=shared, linear=linear, tied=tied,
    )  # fmt: skip
    x = IMAGE[:, :, :4]
    plain = refold.fold(model, x)
    assert plain.one is plain.two
    assert plain.linear.weight is plain.tied.weight
    assert norms(plain) == 0
    assert error(model, plain, x) < 1e-6


def test_weights_that_are_computed_become_plain_inside_too() -> None:
    model = looking(lambda s, x: s.conv(x), conv=nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)))
    plain = refold.fold(model, IMAGE)
    assert convolutions(plain) == 1
    assert not any("parametrizations" in name for name in plain.state_dict())
    assert refold.inspect(model, IMAGE).evaluated == ("conv",)
    assert error(model, plain, IMAGE) < 1e-6


def test_is_copied_and_saved_like_the_original() -> None:
    plain = refold.fold(randomize(Searching()), IMAGE)
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    for again in (copy.deepcopy(plain), torch.load(file, weights_only=False)):
        with torch.no_grad():
            assert torch.equal(again(IMAGE), plain(IMAGE))


def test_chance_is_refused_and_not_taken_for_the_same() -> None:
    model = looking(lambda s, x: s.conv(x) + torch.rand_like(x), conv=conv_bn(4, 4))
    with pytest.raises(refold.InputError, match="looks at the values of a tensor"):
        refold.fold(model, IMAGE)


def test_what_siblings_would_fold_to_stays_with_the_reason() -> None:
    """On another way through the code, the batch norm may read something else."""

    def forward(s: Any, x: Any) -> Any:
        y = s.conv(x)
        y = s.bn(y) if y.mean() < 9 else y
        return s.last(F.relu(y)) + s.side(x)

    model = made(
        forward, conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4), last=conv_bn(4, 4), side=nn.Conv2d(4, 4, 1)
    )
    plain, plan = refold.fold(model, IMAGE), refold.inspect(model, IMAGE)
    assert (convolutions(plain), norms(plain)) == (3, 1)
    assert plan.notes == (
        "'bn' is not folded into 'conv', whose result it reads: code that was not followed calls both, and may use "
        "them otherwise for other numbers; in one module (nn.Sequential) they fold",
    )
    for x in (IMAGE, IMAGE + 100):
        assert error(model, plain, x) < 1e-6
