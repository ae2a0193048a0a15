"""Weight normalization of weights that lie in pieces on several processes, as tensor parallelism leaves them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from refold.torch import low_rank_adaptation, orthogonal_weights, spectral_normalization, weight_normalization

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo over files")
PROCESSES = 2


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))


X = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))


def one_process(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model = parallelize_module(network(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for attach in (spectral_normalization, orthogonal_weights, lambda module: low_rank_adaptation(module, 2)):
        with pytest.raises(ValueError, match="is a DTensor, and what is to be attached sees the whole matrix"):
            attach(model[0])
    for name in ("unit", "layer"):
        model = parallelize_module(network(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        for layer in (model[0], model[2]):
            weight_normalization(layer, normalizer=name)
        out = model(X)
        out.square().sum().backward()
        found: Any = {key: parameter.grad.full_tensor().clone() for key, parameter in model.named_parameters()}
        if rank == 0:
            torch.save({"out": out.detach().clone(), **found}, f"{folder}/{name}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_steps_run_on_pieces(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_process, (str(tmp_path),), PROCESSES)
    for name in ("unit", "layer"):
        alone = network()
        for layer in (alone[0], alone[2]):
            weight_normalization(layer, normalizer=name)
        alone(X).square().sum().backward()
        found = torch.load(tmp_path / f"{name}.pt")
        assert torch.allclose(found.pop("out"), network()(X), atol=1e-5)
        for key, parameter in alone.named_parameters():
            assert torch.allclose(found[key], parameter.grad, atol=1e-5), (name, key)
