"""Complex numbers keep apart what touches them, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_fold import assert_same_function, operators
from torch import nn
from zoo import conv_bn, made, randomize

import refold
from refold.proof.certificate import Verdict

TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
IMAGE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))


def unit_circle(*shape: int) -> Any:
    return torch.polar(torch.ones(shape), torch.randn(shape, generator=torch.Generator().manual_seed(5)))


class Rotary(nn.Module):
    """Rotates pairs of features by a table of complex numbers, as language models do with their queries."""

    def __init__(self, *, gives_complex: bool = False) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.after = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
        self.register_buffer("freqs_cis", unit_circle(5, 4))
        self.gives_complex = gives_complex

    def forward(self, x: Any) -> Any:
        x = self.before(x)
        turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * self.freqs_cis
        return turned if self.gives_complex else self.after(torch.view_as_real(turned).flatten(2).type_as(x))


class SpectralGate(nn.Module):
    """A filter that is trained in the frequencies, between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv_bn(4, 6), conv_bn(6, 6, 1)
        self.gate = nn.Parameter(unit_circle(6, 8, 5))

    def forward(self, x: Any) -> Any:
        x = torch.fft.irfft2(torch.fft.rfft2(self.first(x)) * self.gate, s=x.shape[2:])
        return self.last(x).relu()


@pytest.mark.parametrize(("model", "example", "left"), [(Rotary(), TOKENS, 2), (SpectralGate(), IMAGE, 2)])
def test_a_complex_table_keeps_apart_what_touches_it(model: Any, example: Any, left: int) -> None:
    model = randomize(model)
    plain = refold.fold(model, example)
    assert sum(isinstance(module, nn.Linear | nn.Conv2d) for module in plain.modules()) == left
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert refold.prove(model, plain, example).verdict is Verdict.PROVED
    assert_same_function(model, plain, example)


def test_a_complex_result_is_compared_in_both_of_its_parts() -> None:
    model = randomize(Rotary(gives_complex=True))
    plain = refold.fold(model, TOKENS)
    assert plain(TOKENS).dtype == torch.complex64
    assert refold.prove(model, plain, TOKENS).ok
    for factor in (1.0, 1.0j):
        off = copy.deepcopy(plain)
        off.freqs_cis[0] += 1e-3 * factor
        assert not refold.prove(model, off, TOKENS).ok


@pytest.mark.parametrize("dtype", [torch.complex64, torch.long])
def test_weights_that_are_not_real_are_named(dtype: Any) -> None:
    kernel = nn.Parameter(torch.ones(3, 4, dtype=dtype), requires_grad=False)
    model = made(
        lambda s, x: torch.abs(nn.functional.linear(s.before(x).round().to(s.kernel.dtype), s.kernel)),
        before=nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)),
        kernel=kernel,
    )
    plan, plain = refold.inspect(model, TOKENS), refold.fold(model, TOKENS)
    assert ["its weights are not real numbers" in str(kept) for kept in plan.kept] == [True]
    assert operators(plain) == 5, plain.code
    assert torch.equal(plain.kernel, kernel)
    assert refold.prove(model, plain, TOKENS).ok
