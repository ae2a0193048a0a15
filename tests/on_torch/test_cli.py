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

def leaves():
    raise SystemExit(3)

def needs(width):
    return net()

def none():
    return None

def state():
    return net().state_dict()

def meta():
    with torch.device("meta"):
        return RepVGG(4, 4)

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


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_folds_an_exported_program(batch: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = randomize(RepVGG(4, 4))
    x = torch.randn(batch, 4, 9, 9)
    torch.export.save(torch.export.export(model, (x,)), "rich.pt2")
    assert main(["fold", "rich.pt2", "--trust", "-o", "plain.pt2"]) == 0
    assert "PROVED" in capsys.readouterr().out
    assert torch.allclose(torch.export.load("plain.pt2").module()(x), model(x), atol=1e-5)


def test_the_demo_tells_its_story(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--framework", "torch", "--epochs", "1", "--out", str(tmp_path / "demo")]) == 0
    assert "PROVED" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"rich.pt2", "plain.pt2", "plain.safetensors", "report.html", "certificate.json"} <= written


SHAPE = ["--shape", "N,4,9,9"]


def bad_files() -> None:
    """Weights and programs as they arrive after a bad day, under names that say what is wrong."""
    state = randomize(RepVGG(4, 4)).state_dict()
    torch.save(state, "good.pt")
    torch.save(RepVGG(4, 4), "pickled.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), "other.pt")
    torch.save({name: tensor[:1] if tensor.ndim else tensor for name, tensor in state.items()}, "shapes.pt")
    torch.save(dict(list(state.items())[1:]), "less.pt")
    torch.save({**state, "more": torch.ones(1)}, "more.pt")
    torch.save({7: torch.ones(1)}, "numbered.pt")
    torch.save([torch.ones(1)], "list.pt")
    torch.save({name: tensor * 0.0 / 0.0 for name, tensor in state.items()}, "nan.pt")
    torch.save({name: tensor.to(torch.complex64) for name, tensor in state.items()}, "complex.pt")
    torch.save({name: tensor.long() for name, tensor in state.items()}, "integers.pt")
    torch.save({name: tensor.to_sparse() for name, tensor in state.items() if tensor.ndim > 2}, "sparse.pt")
    torch.save({name: tensor.to("meta") for name, tensor in state.items()}, "meta.pt")
    whole = Path("good.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    Path("cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    Path("long.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    Path("renamed.safetensors").write_bytes(whole)
    Path("renamed.pt2").write_bytes(whole)
    Path("text.txt").write_text("hello")
    Path("empty.pt").write_bytes(b"")
    Path("folder.pt2").mkdir()
    Path("taken.pt2").write_text("mine")
    Path("beside.safetensors").write_text("mine")
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.randn(2, 4, 9, 9),)), "rich.pt2")
    program = Path("rich.pt2").read_bytes()
    Path("cut.pt2").write_bytes(program[: len(program) // 2])


WEIGHTS = {
    "missing.pt": "there is no such file",
    "folder.pt2": "this is a folder, not a file",
    "empty.pt": "the file is empty",
    "pickled.pt": "which torch would have to run code to read; save model.state_dict() alone",
    "text.txt": "it is damaged, or holds more than tensors",
    "list.pt": "it holds more than weights by name",
    "numbered.pt": "it holds more than weights by name",
    "other.pt": "its weights do not fit the model: Missing key(s)",
    "less.pt": 'its weights do not fit the model: Missing key(s) in state_dict: "alpha"',
    "more.pt": 'its weights do not fit the model: Unexpected key(s) in state_dict: "more"',
    "shapes.pt": "its weights do not fit the model: size mismatch for dense.0.weight",
    "complex.pt": "'alpha' in it holds complex64 where the model has float32",
    "integers.pt": "'alpha' in it holds int64 where the model has float32",
    "nan.pt": "'alpha' of the model 'RepVGG' holds numbers that are not finite",
    "sparse.pt": "'dense.0.weight' in it is no plain tensor",
    "meta.pt": "'alpha' in it is no plain tensor",
    "cut.pt": "no weights can be read from it: PytorchStreamReader failed",
    "cut.safetensors": "no weights can be read from it",
    "long.safetensors": "no weights can be read from it: Error while deserializing: header too large",
    "renamed.safetensors": "no weights can be read from it",
}
MODELS = {
    "NAME:nothing": "there is no 'nothing' in it",
    "NAME:broken": "calling it without arguments failed: RuntimeError: no weights here",
    "NAME:leaves": "calling it without arguments failed: SystemExit: 3",
    "NAME:needs": "missing 1 required positional argument: 'width'",
    "NAME:none": "none gives no model: a builtins.NoneType is not a model that refold reads",
    "NAME:state": "state gives no model: a collections.OrderedDict is not a model",
    "NAME:meta": "'alpha' of the model 'RepVGG' is on the meta device, and so has no numbers",
    "NAME:net()": "neither a model file (.keras, .onnx, .pt2, .json) nor the name of a function",
    "NAME": "nor the name of a function that makes a model (package.module:function)",
    "no_such_module:net": "the module 'no_such_module' cannot be imported",
    "missing.pt2": "there is no such file",
    "folder.pt2": "this is a folder, not a file",
    "cut.pt2": "this is no exported program",
    "renamed.pt2": "this is no exported program that this torch reads, or it is damaged",
    "good.pt": "a file of weights is no model; name the function that makes the model",
}
OUTPUTS = {
    "taken.pt2": "taken.pt2 exists; choose another name",
    "folder.pt2": "folder.pt2 exists; choose another name",
    "beside.pt2": "beside.safetensors exists; choose another name",
    "nowhere/plain.pt2": "there is no folder",
    "taken.pt2/plain.pt2": "there is no folder",
    "plain.pt": "refold does not read files that end in '.pt'",
    "plain.onnx": "the result is a model of torch; give it the ending of one",
}
EXAMPLES = {
    "N,3,9,9": "does not run on an example of float32 (2, 3, 9, 9): its 'dense.0' (Conv2d) says: Given groups=1",
    "N,4": "does not run on an example of float32 (2, 4)",
    "N,4,1,1000000000": "give a smaller one",
}
BAD = [
    *((["NAME:net", *SHAPE, "--weights", file], sentence) for file, sentence in WEIGHTS.items()),
    *(([model, *SHAPE, "--trust"], sentence) for model, sentence in MODELS.items()),
    *((["NAME:net", *SHAPE, "-o", output], sentence) for output, sentence in OUTPUTS.items()),
    *((["NAME:net", "--shape", shape], sentence) for shape, sentence in EXAMPLES.items()),
    (["NAME:net"], "does not say the shape of its inputs"),
    (["NAME:net", *SHAPE, *SHAPE], "takes 2 positional arguments but 3 were given"),
    (["NAME:net", *SHAPE, "-o", "folder.pt2", "--force"], "folder.pt2: this is a folder, not a file"),
    (["rich.pt2", "--trust", "--weights", "good.pt"], "--weights is for a model that is named as"),
    (["rich.pt2", "--trust", "-o", "rich.pt2"], "is the model itself; choose another name"),
]


@pytest.fixture(scope="module")
def bad_day(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad_day")
    (path / "bad_nets.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        bad_files()
    return path


def state_of(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in str(path)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=lambda part: " ".join(part) if len(part) < 9 else None)
def test_bad_input_is_one_sentence(
    bad_day: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(bad_day)
    before = state_of(bad_day)
    output = [] if "-o" in arguments else ["-o", "plain.pt2"]
    named = [argument.replace("NAME", "bad_nets") for argument in arguments]
    assert main(["fold", *named, *output]) == 2
    captured = capfd.readouterr()
    assert sentence in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert state_of(bad_day) == before


def test_a_model_made_without_numbers_takes_those_of_the_file(folder: Path) -> None:
    torch.save(randomize(RepVGG(4, 4), seed=5).state_dict(), "weights.pt")
    assert main(["fold", name(folder, "meta"), *SHAPE, "--weights", "weights.pt", "-o", "plain.pt2"]) == 0
    x = torch.randn(2, 4, 9, 9)
    plain = torch.export.load("plain.pt2").module()
    assert torch.allclose(plain(x), randomize(RepVGG(4, 4), seed=5)(x), atol=1e-5)


def test_exported_programs_are_not_read_without_trust(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("model.pt2").write_bytes(b"whatever")
    assert main(["inspect", "model.pt2"]) == 2
    assert "add --trust" in capsys.readouterr().err
    assert main(["inspect", "model.pt2", "--trust"]) == 2
    assert "no exported program" in capsys.readouterr().err
