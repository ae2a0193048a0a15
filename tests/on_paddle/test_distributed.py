"""Data-parallel training in two processes gives the weights of one process, and folds."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn

import refold
from refold.paddle import (
    DiverseBranchBlock,
    RepVggBlock,
    initialize_from_data,
    low_rank_adaptation,
    orthogonal_weights,
    spectral_normalization,
    weight_normalization,
)


def network() -> Any:
    paddle.seed(3)
    return nn.Sequential(
        RepVggBlock(2, 4, alpha=True),
        DiverseBranchBlock(4, 4),
        weight_normalization(nn.Conv2D(4, 2, 3, padding=1)),
        nn.Flatten(),
        weight_normalization(nn.Linear(72, 3), normalizer="layer"),
    )


def data() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(8, 2, 6, 6)).astype("float32"), rng.normal(size=(8, 3)).astype("float32")


def train(model: Any, x: Any, y: Any) -> None:
    """Three steps, with batch norms that do not look at the batch: each process sees another one."""
    model.eval()
    optimizer = paddle.optimizer.SGD(0.01, parameters=model.parameters())
    for _ in range(3):
        (model(paddle.to_tensor(x)) - paddle.to_tensor(y)).square().mean().backward()
        optimizer.step()
        optimizer.clear_grad()


def one_of_two(folder: str) -> None:
    paddle.distributed.init_parallel_env()
    rank = paddle.distributed.get_rank()
    x, y = data()
    model = network()
    train(paddle.DataParallel(model), x[rank::2], y[rank::2])
    save(model, Path(folder) / f"{rank}.npz")
    model = network()
    model.eval()
    piece = paddle.to_tensor(np.split(x, [3])[rank])
    initialize_from_data(paddle.DataParallel(model), piece)
    save(model, Path(folder) / f"{rank}-from-data.npz")


def save(model: Any, path: Path) -> None:
    np.savez(path, **{name: value.numpy() for name, value in model.state_dict().items()})


def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    source = str(Path(refold.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": source},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    model = network()
    train(model, *data())
    ranks = [np.load(tmp_path / f"{rank}.npz") for rank in (0, 1)]
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(ranks[0][name], ranks[1][name], err_msg=name)
        np.testing.assert_allclose(ranks[0][name], value.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)
    model.set_state_dict({name: paddle.to_tensor(ranks[0][name]) for name in ranks[0].files})
    # And the pieces of a batch initialize as the whole one.
    alone = network()
    alone.eval()
    initialize_from_data(alone, paddle.to_tensor(data()[0]))
    for rank in (0, 1):
        found = np.load(tmp_path / f"{rank}-from-data.npz")
        for name, value in alone.state_dict().items():
            np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
    plain = refold.fold(model, (None, 2, 6, 6))
    assert refold.prove(model, plain, (None, 2, 6, 6)).verdict.value == "proved"


WAYS = [
    weight_normalization,
    partial(spectral_normalization, gain=True),
    partial(orthogonal_weights, gain=True),
    partial(low_rank_adaptation, rank=2, magnitude=True),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", [lambda: nn.Linear(5, 3), lambda: nn.Conv2DTranspose(5, 3, 2)])
def test_gradients_are_no_views(build: Any, way: Any) -> None:
    """What paddle.DataParallel would leave out."""
    layer = way(build())
    layer(paddle.ones([2, 5, *[4] * (len(layer.weight.shape) - 2)])).sum().backward()
    trained = [parameter for parameter in layer.parameters() if not parameter.stop_gradient]
    assert all(parameter.grad.is_contiguous() for parameter in trained)


if __name__ == "__main__":
    paddle.distributed.spawn(one_of_two, args=(sys.argv[1],), nprocs=2, backend="gloo")
