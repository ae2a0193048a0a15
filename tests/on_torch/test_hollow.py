"""What is left out of the larger of two recordings: only numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import refold
from refold.errors import InputError
from refold.torch import hollow

X = torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(0))
KERNEL = torch.ones(4, 6, 3, 3)
ONES = torch.ones(6)


def cases() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    return {
        "conv2d": (F.conv2d, (X, KERNEL), {"stride": 2, "padding": 1}),
        "conv2d, its bias": (F.conv2d, (X, KERNEL, torch.ones(4)), {}),
        "conv_transpose2d": (F.conv_transpose2d, (X, torch.ones(6, 4, 3, 3)), {"stride": 2}),
        "linear": (F.linear, (X, torch.ones(5, 8)), {}),
        "matmul": (torch.matmul, (X, torch.ones(8, 3)), {}),
        "@": (torch.Tensor.__matmul__, (X, torch.ones(6, 8, 3)), {}),
        "avg_pool2d": (F.avg_pool2d, (X, 3, 2, 1), {}),
        "max_pool2d": (F.max_pool2d, (X, 2), {}),
        "batch_norm": (F.batch_norm, (X, ONES, ONES, ONES, ONES), {}),
        "+": (torch.Tensor.__add__, (X, torch.ones(6, 1, 8)), {}),
        "a number -": (torch.Tensor.__rsub__, (X, 2.0), {}),
        "a number *": (torch.mul, (X, 3), {}),
        "relu": (F.relu, (X,), {}),
        "gelu": (F.gelu, (X,), {"approximate": "tanh"}),
        "softmax": (F.softmax, (X, -1), {}),
        # What is not known by its shape, or would be something else: computed.
        "another type": (F.softmax, (X,), {"dim": 1, "dtype": torch.float64}),
        "channels last": (F.relu, (X.contiguous(memory_format=torch.channels_last),), {}),
        "turned": (torch.Tensor.__add__, (X.transpose(1, 2), 1.0), {}),
        "two types": (torch.add, (X, X.double()), {}),
        "batch norm by the batch": (F.batch_norm, (X, None, None), {"training": True}),
        "a sum": (torch.sum, (X, 1), {}),
    }


@pytest.mark.parametrize("name", cases())
def test_gives_what_the_function_gives_but_for_the_numbers(name: str) -> None:
    function, args, kwargs = cases()[name]
    found, wanted = hollow.call(function, args, kwargs), function(*args, **kwargs)
    assert (found.shape, found.dtype, found.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
    assert found.untyped_storage().data_ptr() != X.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (F.conv2d, (X, torch.ones(4, 5, 3, 3))),
        (F.conv2d, (X, torch.ones(4, 6, 20, 20))),
        (F.linear, (X, torch.ones(5, 9))),
        (torch.matmul, (X, torch.ones(9, 3))),
        (F.batch_norm, (X, torch.ones(5), torch.ones(5))),
        (torch.Tensor.__add__, (X, torch.ones(6, 1, 7))),
        (F.avg_pool2d, (X, 20)),
    ],
)
def test_sizes_that_do_not_fit_raise(function: Any, args: tuple[Any, ...]) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        hollow.call(function, args, {})


def test_what_is_written_in_place_counts_as_written() -> None:
    for function, kwargs in ((F.relu, {"inplace": True}), (F.hardtanh, {"inplace": True}), (torch.relu_, {})):
        x = X.clone()
        version = x._version
        assert hollow.call(function, (x,), kwargs) is x
        assert x._version > version


def test_autocast_is_not_guessed() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert hollow.call(F.conv2d, (X, KERNEL), {}).dtype == torch.bfloat16


class Convolved(TorchDispatchMode):
    """The sizes of the inputs of the convolutions that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and args[0].device.type != "meta":
            self.sizes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("size", "computed"), [(32, (2, 3, 32, 32)), (224, (3, 3, 96, 96))])
def test_only_the_smaller_recording_and_its_check_compute(size: int, computed: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    with Convolved() as seen:
        plain = refold.fold(model, torch.zeros(1, 3, size, size))
    assert seen.sizes == [computed, computed]
    assert refold.prove(model, plain, torch.zeros(1, 3, size, size)).ok


class Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 0.5
        while bool(x.abs().max() < 1.0):  # of zeros: for ever
            x = x * 2.0
        return x


@pytest.mark.parametrize("scripted", [False, True])
def test_code_that_goes_by_numbers_never_sees_zeros(scripted: bool) -> None:
    doubling = torch.jit.script(Doubling()) if scripted else Doubling()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), doubling).eval()
    x = torch.randn(1, 3, 8, 8)
    plain = refold.fold(model, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert torch.allclose(plain(x), model(x), atol=1e-6)


class Fixed(nn.Module):
    """Takes inputs of one size only, and says so late."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("bias", torch.ones(4, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) + self.bias


def test_a_size_that_does_not_fit_is_seen_without_numbers() -> None:
    model = Fixed().eval()
    plain = refold.fold(model, torch.zeros(1, 3, 8, 8))
    assert plain(torch.zeros(5, 3, 8, 8)).shape == (5, 4, 8, 8)
    with pytest.raises(RuntimeError):
        plain(torch.zeros(1, 3, 72, 72))


def test_a_model_that_does_not_run_says_why() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(7, 5)).eval()
    with pytest.raises(InputError, match="cannot be multiplied"):
        refold.fold(model, torch.zeros(1, 3, 8, 8))
