"""Training around our layers: several processes, mixed precision, averaged weights."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
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
from refold.torch import (
    ExpressionBlock,
    RepVGGBlock,
    initialize_from_data,
    low_rank_adaptation,
    orthogonal_weights,
    spectral_normalization,
    weight_normalization,
    wrappers,
)

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


class Pair(nn.Module):
    """Two layers to cut along what lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Any) -> Any:
        return torch.relu(self.second(self.first(x)))


def pair() -> Any:
    torch.manual_seed(0)
    return Pair().eval()


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    ways = {"DDP": distributed, "FSDP2": sharded, "TP": cut, "data": from_pieces_of_a_batch, "others": in_every_way}
    for way, fold in ways.items():
        found = fold(rank)
        if rank == 0:
            torch.save(found, f"{folder}/{way}.pt")
    model = torch.distributed.fsdp.fully_shard(network(), mesh=mesh()).eval()
    dist.barrier()
    said = [waited_for_in_vain(rank, model, dist.FileStore(f"{folder}/news", PROCESSES))]
    dist.destroy_process_group()
    with pytest.raises(refold.InputError) as caught:
        refold.fold(model, batch()[0])
    if rank == 0:
        torch.save({"sentences": [*said, str(caught.value)]}, f"{folder}/alone.pt")


def waited_for_in_vain(rank: int, model: Any, store: Any) -> str:
    """What the first process is told if it looks into a model alone; the other one waits until it was."""
    if rank > 0:
        store.wait(["said"])
        return ""
    wrappers.PATIENCE = timedelta(seconds=1)
    with pytest.raises(refold.InputError) as caught:
        refold.inspect(model, batch()[0])
    store.set("said", "yes")
    return str(caught.value)


def mesh() -> Any:
    return torch.distributed.device_mesh.init_device_mesh("cpu", (PROCESSES,))


def distributed(rank: int) -> dict[str, Any]:
    model = network()
    trained = nn.parallel.DistributedDataParallel(model)
    train(trained, *(part.chunk(PROCESSES)[rank] for part in batch()))
    plain = refold.fold(trained.eval(), batch()[0])  # the wrapper is looked through
    return {"state": model.state_dict(), "plain": plain.state_dict()}


def sharded(rank: int) -> dict[str, Any]:
    """Trained and folded in pieces, as people do it: layers by themselves, one of them compiled."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor

    trained = network()
    for layer in trained[:2]:
        fully_shard(layer, mesh=mesh())
    trained[1] = torch.compile(trained[1], backend="eager")
    trained = fully_shard(trained, mesh=mesh())
    train(trained, *(part.chunk(PROCESSES)[rank] for part in batch()))
    x = batch()[0]
    wanted = trained.eval()(x)  # after this, some of the weights are whole for a while
    plain = refold.fold(trained, x)
    assert all(isinstance(parameter, DTensor) for parameter in trained.parameters())
    assert not any(isinstance(module, FSDPModule) for module in plain.modules())
    assert torch.allclose(plain(x), wanted, atol=1e-5)
    assert torch.allclose(trained(x), wanted, atol=1e-6)  # and it goes on as before
    certificate = refold.prove(trained, plain, x)
    assert certificate.ok
    state = get_model_state_dict(trained, options=StateDictOptions(full_state_dict=True))
    return {"state": state, "plain": plain.state_dict(), "notes": refold.inspect(trained, x).notes}


def cut(rank: int) -> dict[str, Any]:
    """Tensor parallelism, and one that leaves every process with its piece of the result."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    model = parallelize_module(pair(), mesh(), {"first": ColwiseParallel(), "second": RowwiseParallel()})
    plain = refold.fold(model, x)
    assert refold.prove(model, plain, x).ok
    with pytest.raises(refold.InputError) as caught:
        refold.fold(parallelize_module(pair(), mesh(), {"second": ColwiseParallel()}), x)
    return {"plain": plain.state_dict(), "given": x, "gives": plain(x), "sentence": str(caught.value)}


def others() -> Any:
    """What sees the whole matrix, or has vectors that each call in training moves on."""
    torch.manual_seed(0)
    sigma, spectral = (spectral_normalization(nn.Linear(6, 6), gain=gain) for gain in (True, False))
    dora = low_rank_adaptation(nn.Linear(6, 6), 2, magnitude=True)
    return nn.Sequential(sigma, nn.Tanh(), spectral, nn.Tanh(), orthogonal_weights(nn.Linear(6, 6)), dora)


def numbers() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator), torch.randint(0, 6, (8,), generator=generator)


def in_every_way(rank: int) -> dict[str, Any]:
    """Trained by wrappers that hand weights around; twice called before a gradient, where that is a trap."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    x, y = (part.chunk(PROCESSES)[rank] for part in numbers())
    plain = others()
    train(nn.parallel.DistributedDataParallel(plain), x, y)
    sharded = fully_shard(others(), mesh=mesh())
    train(sharded, x, y)
    folded = refold.fold(sharded.eval(), numbers()[0])
    assert torch.allclose(folded(x), sharded(x), atol=1e-5)
    twice = nn.parallel.DistributedDataParallel(others())
    (twice(x) * twice(2 * x)).sum().backward()
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    return {"DDP": plain.state_dict(), "FSDP2": state, "folded": folded.state_dict()}


def from_pieces_of_a_batch(rank: int) -> dict[str, Any]:
    """Data-dependent initialization of one model by its wrapper, of another by the group."""
    piece = batch()[0].split((3, 5))[rank]
    wrapped, model = nn.parallel.DistributedDataParallel(network()), network()
    assert len(initialize_from_data(wrapped, piece)) == 2
    initialize_from_data(model, piece, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="has its weights in pieces"):
        initialize_from_data(torch.distributed.fsdp.fully_shard(network(), mesh=mesh()), piece)
    return {"wrapped": wrapped.module.state_dict(), "grouped": model.state_dict()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What the first of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(one_process, (str(folder),), PROCESSES)
    return lambda way: torch.load(folder / f"{way}.pt")


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo over files")

NAMES = {
    "0.weight": (4, 2, 3, 3),
    "0.bias": (4,),
    "1.conv.weight": (4, 4, 3, 3),
    "1.conv.bias": (4,),
    "4.weight": (3, 4),
    "4.bias": (3,),
}


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_two_processes_train_the_weights_of_one_and_they_fold(way: str, found: Any) -> None:
    alone, (x, y) = network(), batch()
    train(alone, x, y)
    alone.eval()
    state, plain_there = found(way)["state"], found(way)["plain"]
    for name, value in alone.state_dict().items():
        assert torch.allclose(state[name], value, atol=1e-5), name
    gathered = network().eval()
    gathered.load_state_dict(state)
    plain = refold.fold(gathered, x)
    assert {key: tuple(value.shape) for key, value in plain.state_dict().items()} == NAMES
    assert torch.allclose(plain(x), alone(x), atol=1e-5)
    # The same as from the form in which each process has a piece of it.
    assert set(plain_there) == set(NAMES)
    for name, value in plain.state_dict().items():
        assert type(plain_there[name]) is torch.Tensor
        assert torch.allclose(plain_there[name], value, atol=1e-6)


@pytest.mark.parametrize("way", ["wrapped", "grouped"])
def test_a_batch_in_pieces_initializes_as_a_whole_one(way: str, found: Any) -> None:
    alone, states = network(), found("data")
    initialize_from_data(alone, batch()[0])
    for name, value in alone.state_dict().items():
        assert torch.allclose(states[way][name], value, atol=1e-6), name


def test_methods_of_whole_matrices_train_in_two_processes(found: Any) -> None:
    alone, (x, y) = others(), numbers()
    train(alone, x, y)
    there = found("others")
    for way in ("DDP", "FSDP2"):
        for name, value in alone.state_dict().items():
            assert torch.allclose(there[way][name], value, atol=1e-5), (way, name)
    plain = refold.fold(alone.eval(), x)
    for name, value in plain.state_dict().items():
        assert torch.allclose(there["folded"][name], value, atol=1e-5), name


def test_weights_in_pieces_are_named(found: Any) -> None:
    assert "its weights were gathered from the pieces that several processes have" in found("FSDP2")["notes"]


def test_tensor_parallel_weights_fold_or_are_refused(found: Any) -> None:
    there = found("TP")
    assert torch.allclose(there["gives"], pair()(there["given"]), atol=1e-6)
    assert {key: tuple(value.shape) for key, value in there["plain"].items()} == {
        "linear.weight": (4, 4),
        "linear.bias": (4,),
    }
    assert "gives something else with the pieces of its weights that this process has" in there["sentence"]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Any]:
    """A mesh of this one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    if dist.is_initialized():
        dist.destroy_process_group()


def test_what_stays_is_a_module_as_its_author_wrote_it(alone: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(RepVGGBlock(2, 4), nn.PReLU(4), nn.LSTM(9, 3, batch_first=True)).eval()
    model.blocks = [model[0]]  # and a list that torch does not know of
    model[1].register_forward_hook(lambda module, inputs, output: output[:, 0])
    frozen = model[1].weight.requires_grad_(False)
    x = batch()[0]
    wanted = [result.detach() for result in (model(x)[0], *model(x)[1])]
    sharded = fully_shard(model, mesh=alone)
    plain = refold.fold(sharded, x)
    assert all(
        torch.allclose(one, two, atol=1e-5) for one, two in zip((plain(x)[0], *plain(x)[1]), wanted, strict=True)
    )
    assert type(plain.get_submodule("2")) is nn.LSTM
    assert not plain.get_submodule("1").weight.requires_grad
    assert not frozen.requires_grad
    copied = copy.deepcopy(plain)  # which a module of FSDP refuses
    assert not any("fsdp" in name for module in copied.modules() for name in vars(module))


def test_half_precision_of_fsdp_is_not_in_the_weights(alone: Any) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    sharded, x = fully_shard(network(), mesh=alone, mp_policy=policy), batch()[0]
    sharded(x).float().sum().backward()
    assert all(bool(parameter.grad.full_tensor().isfinite().all()) for parameter in sharded.parameters())
    sharded.eval()(x)  # after this, the weights are whole for a while, in half precision
    plain, wanted = refold.fold(sharded, x), network().eval()
    assert all(parameter.dtype == torch.float32 for parameter in plain.parameters())
    assert torch.allclose(plain(x), wanted(x), atol=1e-5)


def test_weights_that_cannot_be_gathered_are_refused(found: Any) -> None:
    assert "in pieces on several processes and cannot be gathered" in found("alone")["sentences"][1]
    said = found("alone")["sentences"][0]
    assert "of which not all came to gather them within 1 seconds: let every one of them make this call" in said


@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_the_older_fsdp_is_refused(alone: Any) -> None:
    wrapped = torch.distributed.fsdp.FullyShardedDataParallel(network(), device_id=torch.device("cpu")).eval()
    with pytest.raises(refold.InputError, match="FullyShardedDataParallel, which hides its weights: gather them"):
        refold.fold(wrapped, batch()[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_converted_as_a_whole_it_trains(dtype: Any) -> None:
    model, (x, y) = network().to(dtype), batch()
    F.cross_entropy(model(x.to(dtype)).float(), y).backward()
    assert all(parameter.grad.dtype == dtype for parameter in model.parameters())
    plain = refold.fold(model.eval(), x.to(dtype))
    assert torch.allclose(plain(x.to(dtype)), model(x.to(dtype)), atol=0.05)


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
