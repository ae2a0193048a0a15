"""The command line on models that code makes, and on exported programs."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from zoo import RepVGG, randomize

from refold.cli import main
from refold.torch.files import restore
from refold.torch.wrappers import as_one, unwrapped


class Net(RepVGG):
    """Like the one in the file."""

    def __init__(self) -> None:
        super().__init__(4, 4)


SOURCE = """
import torch
from zoo import RepVGG, randomize

def net():
    return randomize(RepVGG(4, 4)).train()

def broken():
    raise RuntimeError("no weights here")

model = net()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / f"nets_{tmp_path.name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def name(folder: Path, what: str) -> str:
    return f"nets_{folder.name}:{what}"


def test_folds_what_a_factory_makes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = randomize(RepVGG(4, 4), seed=5)
    safetensors.torch.save_file(model.state_dict(), "weights.safetensors")
    arguments = ["--weights", "weights.safetensors", "--shape", "N,4,H,W"]
    assert main(["inspect", name(folder, "net"), *arguments, "--fail-if-foldable"]) == 1
    assert main(["fold", name(folder, "net"), *arguments, "-o", "plain.pt2"]) == 0
    assert "PROVED" in capsys.readouterr().out
    # What was written runs without refold, and without the class.
    plain = torch.export.load("plain.pt2").module()
    for shape in ((1, 4, 9, 9), (3, 4, 12, 20)):
        x = torch.randn(shape)
        assert torch.allclose(plain(x), model(x), atol=1e-5)
    assert set(safetensors.torch.load_file("plain.safetensors")) == {"conv.weight", "conv.bias"}
    proof = ["prove", name(folder, "net"), "plain.pt2", *arguments]
    assert main(proof) == 2
    assert main([*proof, "--trust"]) == 0
    assert main(["fold", name(folder, "net"), *arguments, "-o", "plain.pt2"]) == 2  # exists


def wrapped(model: torch.nn.Module, around: str) -> torch.nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    if around == "inside":
        model.dense = checkpoint_wrapper(torch.compile(model.dense, backend="eager"))
        return torch.nn.DataParallel(torch.compile(model, backend="eager"))
    return {"average": torch.optim.swa_utils.AveragedModel, "parallel": torch.nn.DataParallel}[around](model)


@pytest.mark.parametrize("around", ["average", "parallel", "inside"])
def test_checkpoints_of_wrapped_models_load(folder: Path, around: str) -> None:
    model = randomize(Net(), seed=5)
    wanted = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save({"state_dict": wrapped(model, around).state_dict(), "epoch": torch.tensor(3)}, "checkpoint.pt")
    assert main(["inspect", name(folder, "net"), "--weights", "checkpoint.pt", "--shape", "N,4,9,9"]) == 0
    # A wrapped model takes those of a plain one, and of one that is wrapped otherwise.
    torch.save(wanted, "plain.pt")
    for path in ("plain.pt", "checkpoint.pt"):
        for again in ("average", "parallel", "inside"):
            loaded = restore(wrapped(randomize(Net()), again), Path(path))
            state = unwrapped(as_one(loaded)).state_dict()
            assert all(torch.equal(state[key], value) for key, value in wanted.items())


def test_folds_an_exported_program(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = randomize(RepVGG(4, 4))
    x = torch.randn(2, 4, 9, 9)
    torch.export.save(torch.export.export(model, (x,)), "rich.pt2")
    assert main(["fold", "rich.pt2", "--trust", "-o", "plain.pt2"]) == 0
    assert "PROVED" in capsys.readouterr().out
    assert torch.allclose(torch.export.load("plain.pt2").module()(x), model(x), atol=1e-5)


def test_the_demo_tells_its_story(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert main(["demo", "--framework", "torch", "--epochs", "1", "--out", str(tmp_path / "demo")]) == 0
    assert "PROVED" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"rich.pt2", "plain.pt2", "plain.safetensors", "report.html", "certificate.json"} <= written


@pytest.mark.parametrize(
    ("model", "arguments", "sentence"),
    [
        ("net", [], "does not say the shape of its inputs"),
        ("nothing", [], "there is no 'nothing' in it"),
        ("broken", [], "calling it without arguments failed: RuntimeError: no weights here"),
        ("net", ["--shape", "N,4,9,9", "--weights", "missing.pt"], "there is no such file"),
        ("net", ["--shape", "N,4,9,9", "--weights", "pickled.pt"], "which torch would have to run code to read"),
        ("net", ["--shape", "N,4,9,9", "--weights", "other.pt"], "its weights do not fit the model"),
        ("net", ["--shape", "N,4,9,9", "--weights", "cut.safetensors"], "no weights can be read from it"),
    ],
)
def test_bad_input_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], model: str, arguments: list[str], sentence: str
) -> None:
    torch.save(RepVGG(4, 4), "pickled.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), "other.pt")
    Path("cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    before = sorted(folder.iterdir())
    assert main(["fold", name(folder, model), *arguments, "-o", "plain.pt2"]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert sorted(path for path in folder.iterdir() if path.name != "__pycache__") == before


def test_exported_programs_are_not_read_without_trust(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("model.pt2").write_bytes(b"whatever")
    assert main(["inspect", "model.pt2"]) == 2
    assert "add --trust" in capsys.readouterr().err
    assert main(["inspect", "model.pt2", "--trust"]) == 2
    assert "no exported program" in capsys.readouterr().err
