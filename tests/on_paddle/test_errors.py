"""Bad input gets one sentence, from the verbs and on the command line; models and files stay as they were."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn
from zoo import IMAGE, Body, conv_bn, randomize

import refold
from refold.cli import main
from refold.paddle import RepVGGBlock, RepVggBlock, files, weight_normalization


def plain_model() -> Any:
    return randomize(nn.Sequential(conv_bn(4, 4, 3), nn.ReLU()))


def in_part_training() -> Any:
    model = plain_model()
    model[0][1].train()
    return model


def body(function: Callable[..., Any]) -> Any:
    model = Body(function)
    model.eval()
    return model


def half() -> Any:
    model = plain_model()
    model.to(dtype="float16")
    return model


def writes_by_value(m: Any, x: Any) -> Any:
    x.set_value(x * 2)
    return x


MODELS: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "training": (lambda: nn.Sequential(conv_bn(4, 4, 3)), IMAGE, "is in training mode.* call model.eval"),
    "in part in training": (in_part_training, IMAGE, r"is in training mode \(its layer '0.1' is\)"),
    "no example": (plain_model, None, "does not say the shape of its inputs: give an example"),
    "wrong channels": (plain_model, (None, 3, 8, 9), "cannot be followed: .*input's channels is 3"),
    "wrong rank": (plain_model, (None, 4), "cannot be followed: .*should be a 4-D or 5-D Tensor"),
    "no tensor": (plain_model, "image", "an example input of type str is neither a tensor nor a shape"),
    "no batch": (plain_model, np.zeros((), "float32"), "holds no example: its first axis is the batch"),
    "too few inputs": (lambda: body(lambda m, x: x[0] + x[1]), [IMAGE], "cannot be followed"),
    "half": (half, IMAGE, "Paddle has no conv2d in float16 on this CPU; fold the model in float32"),
    "looks": (lambda: body(lambda m, x: x if x.max() > 0 else -x), IMAGE, "its forward looks at the values"),
    "chance": (lambda: body(lambda m, x: x + paddle.rand([4, 1, 1])), IMAGE, "cannot be followed"),
    "no result": (lambda: body(lambda m, x: x.shape[0]), IMAGE, "it returns no tensor"),
    "constant": (lambda: body(lambda m, x: paddle.ones([2])), IMAGE, "does not depend on its inputs"),
    "writes its input": (lambda: body(writes_by_value), IMAGE, "its forward writes into a tensor"),
}


@pytest.mark.parametrize("name", MODELS)
def test_one_sentence(name: str) -> None:
    build, example, sentence = MODELS[name]
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for verb in (refold.inspect, refold.fold):
        with pytest.raises(refold.InputError, match=sentence) as caught:
            verb(model, example)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
    for key, value in model.state_dict().items():
        assert bool(paddle.equal_all(value.astype("float64"), before[key].astype("float64")))


@pytest.mark.parametrize(("statistic", "value"), [("_mean", np.nan), ("_mean", np.inf), ("_variance", -1.0)])
def test_statistics_that_make_no_number_are_kept_apart(statistic: str, value: float) -> None:
    model = plain_model()
    getattr(model[0][1], statistic).set_value(paddle.full([4], value))
    (kept,) = refold.inspect(model, IMAGE).kept
    assert "a variance plus epsilon is not positive, or a statistic is not finite" in kept.reason
    plain, x = refold.fold(model, IMAGE), paddle.ones([1, 4, 8, 9])
    np.testing.assert_array_equal(plain(x).numpy(), model(x).numpy())


# ---- blocks ------------------------------------------------------------------------------------------


def normalized(block: Any) -> None:
    layers = [layer for layer in block.sublayers() if isinstance(layer, nn.Conv2D)]
    weight_normalization(layers[0])


def large(block: Any) -> None:
    """Weights that float16 has, and a sum that it has not."""
    for layer in block.sublayers():
        if isinstance(layer, nn.Conv2D):
            layer.weight.set_value(paddle.full(layer.weight.shape, 5e4))
    block.to(dtype="float16")


def deep_training(block: Any) -> None:
    next(layer for layer in block.sublayers() if isinstance(layer, nn.BatchNorm2D)).train()


BLOCKS: dict[str, tuple[Callable[[Any], None], str]] = {
    "training": (lambda block: block.train(), "in training mode.*call eval"),
    "in part in training": (deep_training, "in training mode.*call eval"),
    "a computed weight": (normalized, "is computed from other parameters.*refold.fold"),
    "too large for its type": (large, "a weight would not be finite in float16"),
}


@pytest.mark.parametrize("kind", [RepVggBlock, RepVGGBlock])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_that_cannot_be_converted_stay_as_they_are(name: str, kind: Any) -> None:
    spoil, sentence = BLOCKS[name]
    block = randomize(kind(3, 4))
    spoil(block)
    before = list(block.state_dict())
    with pytest.raises(ValueError, match=sentence):
        block.convert_to_deploy()
    assert list(block.state_dict()) == before


# ---- the command line ----------------------------------------------------------------------------------

NETS = """
import numpy as np
import paddle
from refold.paddle import RepVggBlock

class Trap(paddle.nn.Layer):
    def forward(self, x):
        return x if float(x.sum()) > 0 else -x

def make():
    return RepVggBlock(4, 4)

def breaks():
    raise RuntimeError("no network today")

def number():
    return 7

trap = Trap()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"nets_{tmp_path.name}.py").write_text(NETS)
    files.save(plain_model(), tmp_path / "good.json", example=IMAGE)
    for name in ("truncated", "alone", "mixed", "short"):
        shutil.copyfile("good.json", f"{name}.json")
    text = Path("good.json").read_text()
    Path("truncated.json").write_text(text[: len(text) // 2])
    weights = Path("good.pdiparams").read_bytes()
    Path("short.pdiparams").write_bytes(weights[: len(weights) // 2])
    files.save(randomize(conv_bn(4, 6, 3)), tmp_path / "other.json", example=IMAGE)
    shutil.copyfile("other.pdiparams", "mixed.pdiparams")
    Path("taken.json").write_text("mine")
    return tmp_path


SHAPE = ["--shape", "N,4,8,9"]
COMMANDS: list[tuple[list[str], str]] = [
    (["fold", "nothing.json", "-o", "out.json"], "there is no such file"),
    (["fold", "truncated.json", "-o", "out.json"], "it is not JSON"),
    (["fold", "alone.json", "-o", "out.json"], "alone.pdiparams: there is no such file"),
    (["fold", "short.json", "-o", "out.json"], "are announced where"),
    (["fold", "mixed.json", "-o", "out.json"], "the two files do not belong together"),
    (["fold", "good.json", "-o", "taken.json"], "taken.json exists; choose another name"),
    (["fold", "good.json", "-o", "no/such/folder/out.json"], "folder"),
    (["fold", "good.json", "-o", "out.pt"], "out.pt"),
    (["prove", "good.json", "truncated.json"], "it is not JSON"),
    (["bench", "good.json", "short.json"], "are announced where"),
    (["fold", "NETS:make", "-o", "out.json"], "does not say the shape of its inputs"),
    (["fold", "NETS:make", "--shape", "N,3,8,9", "-o", "out.json"], "input's channels is 3"),
    (["fold", "NETS:make", "--weights", "none.safetensors", *SHAPE, "-o", "out.json"], "there is no such file"),
    (["fold", "NETS:none", *SHAPE, "-o", "out.json"], "there is no 'none' in it"),
    (["fold", "NETS:breaks", *SHAPE, "-o", "out.json"], "no network today"),
    (["fold", "NETS:number", *SHAPE, "-o", "out.json"], "is not a model that refold reads"),
    (["inspect", "NETS:trap", *SHAPE], "its forward looks at the values of a tensor"),
]


@pytest.mark.parametrize(("command", "sentence"), COMMANDS, ids=[" ".join(command) for command, _ in COMMANDS])
def test_the_commands_say_it_in_one_line(
    command: list[str], sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    own = [word.replace("NETS", f"nets_{folder.name}") for word in command]
    capsys.readouterr()
    assert main(own) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert len(said.err.strip().splitlines()) == 1, said.err
    assert "Traceback" not in said.out + said.err
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert {path: when for path, when in after.items() if "__pycache__" not in str(path)} == before
