"""Train-time nets exported by torch come down to one convolution per block."""

from __future__ import annotations

import onnx
import pytest
import torch
from graphs import assert_same_function, feeds_of, operators, run

import refold
from blocks import BLOCKS, export, trained


@pytest.mark.parametrize("free", [False, True], ids=["fixed batch", "any batch"])
@pytest.mark.parametrize("exporter", ["script", "dynamo"])
@pytest.mark.parametrize("name", BLOCKS)
def test_one_convolution_per_block(name: str, exporter: str, free: bool) -> None:
    net = trained(BLOCKS[name])
    # The dynamo exporter takes a batch of 1 for fixed; the other one writes the batch of the example into borders.
    x = torch.randn(2 if exporter == "dynamo" and free else 1, 3, 8, 8)
    model = export(net, x, exporter, free)
    plain = refold.fold(model)
    onnx.checker.check_model(plain, full_check=True)
    left = operators(plain)
    assert left["Conv"] == 3
    assert set(left) <= {"Conv", "Relu", "ReduceMean", "Gemm", "Constant"}
    assert_same_function(model, plain, 8, batch=3 if free else 1)
    feeds = feeds_of(plain, 8, 1)
    with torch.no_grad():
        expected = net(torch.from_numpy(next(iter(feeds.values()))))
    torch.testing.assert_close(torch.from_numpy(run(plain, feeds)[0]), expected, rtol=1e-4, atol=1e-5)
    assert not refold.inspect(plain).changes_something
    certificate = refold.prove(model, plain)
    assert certificate.ok
    assert str(certificate.verdict) == "proved", str(certificate)
