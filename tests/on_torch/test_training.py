"""Training around our layers: several processes, mixed precision, averaged weights."""

from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import refold
from refold.blocks import Identity, Scale, Sum, convolution
from refold.torch import ExpressionBlock, RepVGGBlock, weight_normalization

PROCESSES, STEPS = 2, 3


def network() -> Any:
    """Our layers, without batch norms: those see the batch of their own process."""
    torch.manual_seed(0)
    conv = partial(convolution, 4, bias=True)
    block = ExpressionBlock(Sum(conv(3), Scale(per_channel=True) * conv(1), Identity()), 4, nn.ReLU())
    head = weight_normalization(nn.Linear(4, 3), normalizer="layer")
    stem = weight_normalization(nn.Conv2d(2, 4, 3, stride=2))
    return nn.Sequential(stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def batch() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 2, 9, 9, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def train(model: Any, x: Any, y: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def one_process(rank: int, way: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    model = network()
    x, y = (part.chunk(PROCESSES)[rank] for part in batch())
    if way == "DDP":
        trained: Any = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        trained = fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
    train(trained, x, y)
    trained.eval()
    if way == "DDP":
        state = model.state_dict()
        # The wrapper is looked through.
        plain = refold.fold(trained, batch()[0])
    else:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = get_model_state_dict(trained, options=StateDictOptions(full_state_dict=True))
        plain = None
    if rank == 0:
        torch.save({"state": state, "plain": None if plain is None else plain.state_dict()}, f"{folder}/state.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over files")
@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_two_processes_train_the_weights_of_one_and_they_fold(way: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_process, (way, str(tmp_path)), PROCESSES)
    alone, (x, y) = network(), batch()
    train(alone, x, y)
    alone.eval()
    found = torch.load(tmp_path / "state.pt")
    for name, value in alone.state_dict().items():
        assert torch.allclose(found["state"][name], value, atol=1e-5), name
    gathered = network().eval()
    gathered.load_state_dict(found["state"])
    plain = refold.fold(gathered, x)
    assert {key: tuple(value.shape) for key, value in plain.state_dict().items()} == {
        "0.weight": (4, 2, 3, 3),
        "0.bias": (4,),
        "1.conv.weight": (4, 4, 3, 3),
        "1.conv.bias": (4,),
        "4.weight": (3, 4),
        "4.bias": (3,),
    }
    assert torch.allclose(plain(x), alone(x), atol=1e-5)
    if found["plain"] is not None:
        for name, value in plain.state_dict().items():
            assert torch.allclose(found["plain"][name], value, atol=1e-6)


def test_mixed_precision_trains_and_folds() -> None:
    model, (x, y) = network(), batch()
    before = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(model, x, y)
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plain = refold.fold(model.eval(), x)
    assert torch.allclose(plain(x), model(x), atol=1e-5)


def test_averaged_weights_fold() -> None:
    model, (x, y) = nn.Sequential(RepVGGBlock(2, 4, alpha=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()), batch()
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(2):
        train(model, x, y)
        average.update_parameters(model)
    plain = refold.fold(average.eval(), x)
    assert set(plain.state_dict()) == {"0.conv.weight", "0.conv.bias"}
    assert torch.allclose(plain(x), average(x), atol=1e-5)


def test_compiled_training_folds() -> None:
    model, (x, y) = network(), batch()
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, x, y)
    alone = network()
    train(alone, x, y)
    for name, value in alone.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-5)
    plain = refold.fold(compiled.eval(), x)
    assert torch.allclose(plain(x), alone.eval()(x), atol=1e-5)
