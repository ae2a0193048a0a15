"""What people do with a folded module: it is an ordinary one."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from zoo import ZOO, RepVGG, conv_bn, made, randomize

import refold

NAMES = ("repvgg_network", "split_and_shuffle", "written_in_place", "weight_norm", "nests")
ENTRIES = [entry for entry in ZOO if entry.name in NAMES]


def leaves(nest: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(nest)


def assert_alike(one: Any, two: Any) -> None:
    for a, b in zip(leaves(one), leaves(two), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def folded(entry: Any) -> tuple[Any, Any]:
    x = torch.randn(entry.shape, generator=torch.Generator().manual_seed(1))
    return refold.fold(entry.build(), x), x


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_is_copied_pickled_scripted_exported_and_compiled(entry: Any) -> None:
    plain, x = folded(entry)
    wanted = plain(x)
    assert_alike(copy.deepcopy(plain)(x), wanted)
    assert_alike(pickle.loads(pickle.dumps(plain))(x), wanted)
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    assert_alike(torch.load(file, weights_only=False)(x), wanted)
    assert_alike(torch.jit.script(plain)(x), wanted)
    assert_alike(torch.export.export(plain, (x,)).module()(x), wanted)
    assert_alike(torch.compile(plain, backend="eager")(x), wanted)
    assert leaves(copy.deepcopy(plain).double()(x.double()))[0].dtype == torch.float64


def test_has_plain_modules_under_the_names_that_they_had() -> None:
    model = randomize(nn.Sequential(RepVGG(4, 8, stride=2), nn.PReLU(8), nn.Flatten(), nn.Linear(200, 3)))
    plain = refold.fold(model, torch.randn(2, 4, 9, 9))
    assert set(plain.state_dict()) == {
        "0.conv.weight", "0.conv.bias", "1.weight", "3.weight", "3.bias",
    }  # fmt: skip
    assert type(plain.get_submodule("0.conv")) is nn.Conv2d
    assert type(plain.get_submodule("1")) is nn.PReLU


def test_what_is_folded_into_a_transposed_convolution_has_its_name() -> None:
    up = nn.ConvTranspose2d(4, 3, 3, stride=2)
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), up, nn.BatchNorm2d(3)))
    plain = refold.fold(model, torch.randn(2, 4, 9, 9))
    assert set(plain.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert type(plain.get_submodule("2")) is nn.ConvTranspose2d


def test_frozen_stays_frozen_and_types_devices_and_formats_stay() -> None:
    model = nn.Sequential(conv_bn(4, 4), nn.ReLU(), conv_bn(4, 4))
    model = randomize(model).to(torch.bfloat16).to(memory_format=torch.channels_last)
    model[0].requires_grad_(False)
    plain = refold.fold(model, torch.randn(2, 4, 9, 9, dtype=torch.bfloat16))
    first, second = plain.get_submodule("0.0"), plain.get_submodule("2.0")
    assert [p.requires_grad for p in (*first.parameters(), *second.parameters())] == [False] * 2 + [True] * 2
    assert first.weight.dtype == torch.bfloat16
    assert first.weight.is_contiguous(memory_format=torch.channels_last)


def test_trains_on() -> None:
    plain, x = folded(ENTRIES[0])
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    before = plain(x).square().mean()
    before.backward()
    optimizer.step()
    assert plain(x).square().mean() < before


def test_shared_and_tied_stay_so() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.empty(4, 4))
    again = nn.Linear(4, 4, bias=False)
    again.weight = linear.weight

    def forward(s: Any, x: Any) -> Any:
        y = torch.relu(s.conv(torch.relu(s.conv(x))))
        return s.again(torch.relu(s.linear(y.mean((2, 3)))))

    model = made(forward, conv=conv, linear=linear, again=again, extra=conv_bn(1, 1))
    model.body = lambda s, x: forward(s, s.fold(x))
    model.fold = randomize(conv_bn(4, 4))
    plain = refold.fold(model, torch.randn(2, 4, 9, 9))
    assert plain.linear.weight is plain.again.weight
    assert [node.target for node in plain.graph.nodes if node.op == "call_module"].count("conv") == 2


def test_wrappers_of_torch_are_looked_through() -> None:
    model = randomize(nn.Sequential(conv_bn(4, 4), nn.ReLU()))
    x = torch.randn(2, 4, 9, 9)
    averaged = torch.optim.swa_utils.AveragedModel(model).eval()
    for wrapped in (averaged, nn.DataParallel(model), torch.compile(model, backend="eager")):
        plain = refold.fold(wrapped, x)
        assert set(plain.state_dict()) == {"0.0.weight", "0.0.bias"}
        assert_alike(plain(x), model(x))


def never(graph: Any, inputs: Any) -> Any:
    raise AssertionError("something was compiled")


def compiled_inside(model: Any) -> Any:
    model[0] = torch.compile(model[0], backend=never)
    return model


def compiled_in_place(model: Any) -> Any:
    model.compile(backend=never)
    return model


def checkpointed(model: Any) -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model[0] = checkpoint_wrapper(torch.compile(model[0], backend=never))
    return checkpoint_wrapper(model)


@pytest.mark.parametrize("wrap", [compiled_inside, compiled_in_place, checkpointed])
def test_wrappers_inside_are_looked_through_and_nothing_is_compiled(wrap: Any) -> None:
    model, x = randomize(nn.Sequential(conv_bn(4, 4), nn.ReLU())), torch.randn(2, 4, 9, 9)
    wanted = model(x)
    wrapped = wrap(model)
    names = list(wrapped.state_dict())
    plain = refold.fold(wrapped, x)
    assert set(plain.state_dict()) == {"0.0.weight", "0.0.bias"}
    assert_alike(plain(x), wanted)
    assert refold.prove(wrapped, plain, x).ok
    assert list(wrapped.state_dict()) == names
    assert_alike(refold.fold(plain, x)(x), wanted)


def test_methods_and_lists_of_modules_are_followed_into_what_is_unwrapped() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = conv_bn(4, 4)
            self.listed = [self.block]  # which torch does not know of
            self.forward = self.listed_ones

        def listed_ones(self, x: Any) -> Any:
            return self.listed[0](torch.relu(x))

    model, x = randomize(nn.Sequential(Chosen(), nn.Sequential(nn.ReLU()))), torch.randn(2, 4, 9, 9)
    wanted = model(x)
    model[1] = torch.compile(model[1], backend=never)
    plain = refold.fold(model, x)
    assert_alike(plain(x), wanted)
    assert set(plain.state_dict()) == {"0.block.0.weight", "0.block.0.bias"}


def test_a_module_without_a_certain_size_folds_for_all_sizes() -> None:
    model = randomize(nn.Sequential(conv_bn(4, 4), nn.ReLU(), conv_bn(4, 4, stride=2)))
    plain = refold.fold(model, torch.randn(1, 4, 9, 9))
    for shape in ((1, 4, 9, 9), (5, 4, 12, 31)):
        x = torch.randn(shape)
        assert_alike(plain(x), model(x))


def test_what_goes_another_way_at_another_size_says_at_which_it_was_folded() -> None:
    branch = conv_bn(4, 4)
    model = made(lambda s, x: s.branch(x) if x.shape[2] == 9 else x, branch=branch)
    x = torch.randn(2, 4, 9, 9)
    plain = refold.fold(model, x)
    assert_alike(plain(x), model(x))
    with pytest.raises(AssertionError, match="axis 2 of x must have the size 9"):
        plain(torch.randn(2, 4, 8, 8))


def test_hooks_that_vanish_are_named() -> None:
    model = randomize(nn.Sequential(conv_bn(4, 4), nn.ReLU()))
    model[0][1].register_forward_hook(lambda module, inputs, output: output * 2)
    x = torch.randn(2, 4, 9, 9)
    plain = refold.fold(model, x)
    assert_alike(plain(x), model(x))
    certificate = refold.prove(model, plain, x)
    assert certificate.ok
    assert "0.1" in str(certificate)
    (note,) = refold.inspect(model, x).notes
    assert note in str(refold.inspect(model, x))
    assert "gone where it folds: 0.1" in note


def test_a_size_that_happens_to_be_the_batch_is_not_taken_for_it() -> None:
    def forward(s: Any, x: Any) -> Any:
        y = s.conv(x)  # at the recorded size it has as many rows as the batch has examples
        rows = y.permute(2, 0, 1, 3)
        return rows.reshape(rows.shape[0], -1, y.shape[3]) * s.gain

    model = made(forward, conv=conv_bn(4, 4, 2, stride=2, padding=0), gain=nn.Parameter(torch.empty(())))
    plain = refold.fold(model, torch.randn(1, 4, 4, 8))
    for shape in ((1, 4, 4, 8), (3, 4, 10, 6)):
        x = torch.randn(shape)
        assert_alike(plain(x), model(x))
