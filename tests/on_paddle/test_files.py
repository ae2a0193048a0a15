"""Saved programs: what Paddle wrote is read, folded, proved and written again; what is broken is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.nn import functional as F
from safetensors.numpy import save_file
from test_fold import operators
from zoo import Body, conv, conv_bn, randomize

import refold
from refold.cli import main
from refold.paddle import RepVggBlock, files
from refold.paddle.program import ARGUMENTS


def saved(model: Any, folder: Path, *shape: int | None, name: str = "rich") -> Path:
    paddle.jit.save(model, str(folder / name), input_spec=[paddle.static.InputSpec(list(shape), "float32", "x")])
    return folder / f"{name}.json"


def outputs(model: Any, x: Any) -> list[Any]:
    given = model(x)
    return [tensor.numpy() for tensor in (given if isinstance(given, list | tuple) else [given])]


def csp_like() -> Any:
    return nn.Sequential(conv(4, 8, 3, stride=2), RepVggBlock(8, 8, alpha=True), RepVggBlock(8, 4, act="swish"))


def many_operators() -> Any:
    """A forward with operators of many kinds, some of them between what folds."""

    def body(m: Any, x: Any) -> Any:
        y = m.bn(m.a(x)) * paddle.to_tensor([1.0, 2.0, 0.5, -1.0]).reshape([1, 4, 1, 1]) + 0.25
        y = F.interpolate(y, scale_factor=2) + F.interpolate(x, scale_factor=2, mode="bilinear")
        z = F.max_pool2d(y, 3, 2, 1)[:, ::2]
        left, right = paddle.split(y, 2, axis=1)
        joined = m.c(paddle.concat([right, left], axis=1) - paddle.stack([left, right], axis=1).flatten(1, 2))
        dense = m.d(F.adaptive_avg_pool2d(F.gelu(joined), 1).flatten(1))
        acts = F.hardswish(z) + F.mish(z) + F.softplus(z) + F.leaky_relu(z) + F.elu(z) + F.hardsigmoid(z) + z**2
        return F.softmax(m.n(dense)), acts.clip(0.0, 5.0), joined.max(axis=1), F.silu(y).sum(axis=[2, 3])

    return Body(body, a=conv(4, 4, 3), bn=nn.BatchNorm2D(4), c=conv(4, 4, 1), d=nn.Linear(4, 5), n=nn.LayerNorm(5))


PROGRAMS: dict[str, tuple[Callable[[], Any], tuple[int | None, ...], int]] = {
    "repvgg": (csp_like, (None, 4, None, None), 5),
    "branches": (
        lambda: Body(lambda m, x: F.relu(m.a(x) + m.b(x)), a=conv_bn(4, 4, 3), b=conv_bn(4, 4, 1)),
        (None, 4, 8, 8),
        2,
    ),
    "dense": (lambda: nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.Linear(9, 3)), (None, 6), 1),
    "channels_last": (
        lambda: nn.Sequential(
            nn.Conv2D(4, 4, 3, data_format="NHWC"),
            nn.BatchNorm2D(4, data_format="NHWC"),
            nn.AvgPool2D(2, data_format="NHWC"),
        ),
        (None, 9, 9, 4),
        1,
    ),
    "three_axes": (lambda: nn.Sequential(nn.Conv3D(2, 3, 3), nn.BatchNorm3D(3)), (None, 2, 5, 5, 5), 1),
    "depthwise": (lambda: nn.Sequential(nn.Conv2D(4, 8, 3, groups=4), nn.BatchNorm2D(8)), (None, 4, 8, 8), 1),
    "transposed": (lambda: nn.Sequential(nn.Conv2DTranspose(4, 3, 2, stride=2), nn.ReLU()), (None, 4, 5, 5), 2),
    "transposed_to_a_size": (
        lambda: Body(lambda m, x: F.relu(m.a(x, output_size=[11, 11])), a=nn.Conv2DTranspose(4, 3, 3, stride=2)),
        (None, 4, 5, 5),
        2,
    ),
    "transposed_depthwise": (
        lambda: nn.Sequential(nn.Conv2DTranspose(4, 4, 3, stride=2, output_padding=1, groups=4), nn.ReLU()),
        (None, 4, 5, 5),
        2,
    ),
    "transposed_three_axes": (
        lambda: nn.Sequential(nn.Conv3DTranspose(2, 3, 3), nn.ReLU()),
        (None, 2, 5, 5, 5),
        2,
    ),
    "one_axis": (
        lambda: nn.Sequential(nn.Conv1D(4, 6, 3, padding=1), nn.BatchNorm1D(6), nn.AvgPool1D(2), nn.ReLU()),
        (None, 4, 9),
        2,
    ),
    "one_axis_channels_last": (
        lambda: nn.Sequential(
            nn.Conv1D(4, 6, 3, stride=2, padding="SAME", dilation=1, data_format="NLC"),
            nn.BatchNorm1D(6, data_format="NLC"),
            nn.ReLU(),
        ),
        (None, 9, 4),
        2,
    ),
    "one_axis_transposed": (
        lambda: nn.Sequential(
            nn.Conv1DTranspose(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.BatchNorm1D(6),
            nn.ReLU(),
        ),
        (None, 4, 9),
        2,
    ),
    "one_axis_unbiased": (
        lambda: nn.Sequential(nn.Conv1D(4, 6, 3, padding=[2, 1], dilation=2, bias_attr=False), nn.ReLU()),
        (None, 4, 9),
        2,
    ),
    "pools_of_one_axis": (
        lambda: Body(
            lambda m, x: F.relu(
                m.a(F.avg_pool1d(x, 4, 2, padding=1, exclusive=False)) + m.b(F.adaptive_avg_pool1d(x, 6))
            ),
            a=nn.Conv1D(4, 1, 1),
            b=nn.Conv1D(4, 1, 1),
        ),
        (None, 4, 12),
        2,
    ),
    "padded_on_one_axis": (
        lambda: nn.Sequential(nn.Pad1D([2, 1]), nn.Conv1D(4, 6, 3), nn.BatchNorm1D(6), nn.ReLU()),
        (None, 4, 9),
        2,
    ),
    "padded": (
        lambda: nn.Sequential(
            nn.ZeroPad2D([1, 0, 2, 1]), nn.Conv2D(4, 6, 3, stride=2), nn.BatchNorm2D(6), nn.ReLU()
        ),
        (None, 4, 9, 8),
        2,
    ),
    "padded_channels_last": (
        lambda: nn.Sequential(nn.Pad2D([1, 0, 2, 1], data_format="NHWC"), nn.Conv2D(4, 6, 3, data_format="NHWC")),
        (None, 9, 8, 4),
        1,
    ),
    "padded_on_three_axes": (
        lambda: nn.Sequential(nn.Pad3D([1, 0, 2, 1, 0, 1]), nn.Conv3D(2, 3, 3)),
        (None, 2, 5, 5, 5),
        1,
    ),
    "shuffle": (lambda: nn.Sequential(conv(4, 4, 1), nn.ChannelShuffle(2), conv(4, 4, 1)), (None, 4, 8, 8), 1),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_fold_as_layers_do(name: str, tmp_path: Path) -> None:
    build, shape, count = PROGRAMS[name]
    path = saved(randomize(build()), tmp_path, *shape)
    program, original = files.load(path), paddle.jit.load(str(path.with_suffix("")))
    x = paddle.to_tensor(np.random.default_rng(0).normal(size=[n or 7 for n in (3, *shape[1:])]).astype("float32"))
    for ours, theirs in zip(outputs(program, x), outputs(original, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    plain = refold.fold(program)
    assert operators(plain, None) == count
    certificate = refold.prove(program, plain)
    assert certificate.verdict.value == "proved", certificate
    written = tmp_path / "plain.json"
    files.save(plain, written)
    assert not refold.inspect(files.load(written)).changes_something
    assert refold.prove(program, files.load(written)).ok
    for ours, theirs in zip(outputs(plain, x), outputs(paddle.jit.load(str(tmp_path / "plain")), x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_every_operator_that_is_read_gives_what_paddle_gives(tmp_path: Path) -> None:
    path = saved(randomize(many_operators()), tmp_path, None, 4, 8, 8)
    program, original = files.load(path), paddle.jit.load(str(tmp_path / "rich"))
    x = paddle.to_tensor(np.random.default_rng(0).uniform(size=(2, 4, 8, 8)).astype("float32"))
    for ours, theirs in zip(outputs(program, x), outputs(original, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    plain = refold.fold(program)
    assert refold.prove(program, plain).ok


def test_the_vocabulary_is_paddles() -> None:
    missing = [name for name in ARGUMENTS if not hasattr(paddle._C_ops, name.rstrip("_"))]
    assert not missing


def test_types_are_kept(tmp_path: Path) -> None:
    for dtype in ("float64", "bfloat16"):
        model = randomize(nn.Linear(4, 3))
        model.to(dtype=dtype)
        path = tmp_path / f"{dtype}.json"
        paddle.jit.save(model, str(tmp_path / dtype), input_spec=[paddle.static.InputSpec([None, 4], dtype, "x")])
        program = files.load(path)
        weights = {tuple(p.shape): p for p in program.parameters()}
        np.testing.assert_array_equal(
            weights[4, 3].astype("float64").numpy(), model.weight.astype("float64").numpy()
        )
        assert str(weights[3,].dtype) == f"paddle.{dtype}"


# ---- the command line --------------------------------------------------------------------------------


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plain = saved(randomize(csp_like()), tmp_path, None, 4, 16, 16), tmp_path / "plain.json"
    assert main(["inspect", str(path), "--fail-if-foldable"]) == 1
    assert main(["fold", str(path), "-o", str(plain)]) == 0
    assert "PROVED" in capsys.readouterr().out.upper()
    assert plain.exists()
    assert plain.with_suffix(".pdiparams").exists()
    assert main(["inspect", str(plain), "--fail-if-foldable"]) == 0
    assert main(["prove", str(path), str(plain)]) == 0
    assert main(["bench", str(path), str(plain), "--repeats", "2"]) == 0
    before = plain.read_bytes()
    assert main(["fold", str(path), "-o", str(plain)]) == 2
    assert plain.read_bytes() == before
    assert main(["fold", str(path), "-o", str(plain), "--force"]) == 0
    other = saved(randomize(csp_like(), 1), tmp_path, None, 4, 16, 16, name="other")
    assert main(["prove", str(path), str(other)]) == 1


def test_a_model_that_code_makes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paddle_nets.py").write_text(
        "from refold.paddle import RepVggBlock\n\n\ndef make():\n    return RepVggBlock(2, 3, alpha=True)\n"
    )
    trained = randomize(RepVggBlock(2, 3, alpha=True))
    arrays = {name: value.numpy() for name, value in trained.state_dict().items()}
    save_file(arrays, "last.safetensors")
    shape = ("--shape", "N,2,8,8")
    assert main(["fold", "paddle_nets:make", "--weights", "last.safetensors", *shape, "-o", "plain.json"]) == 0
    x = paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 2, 8, 8)).astype("float32"))
    np.testing.assert_allclose(files.load(Path("plain.json"))(x).numpy(), trained(x).numpy(), rtol=1e-5, atol=1e-5)
    assert main(["prove", "paddle_nets:make", "plain.json", "--weights", "last.safetensors", *shape]) == 0

    capsys.readouterr()
    paddle.save(trained.state_dict(), "last.pdparams")
    Path("broken.safetensors").write_bytes(b"no" * 20)
    save_file({name: array for name, array in arrays.items() if name != "alpha"}, "less.safetensors")
    save_file(arrays | {"alpha": np.ones(2, "float32")}, "wrong.safetensors")
    for name, sentence in (
        ("last.pdparams", "pickled Python objects"),
        ("broken.safetensors", "these are no safetensors"),
        ("less.safetensors", "there is no 'alpha' in the file"),
        ("wrong.safetensors", "'alpha' is [2] there and [1] in the model"),
    ):
        assert main(["inspect", "paddle_nets:make", "--weights", name, *shape]) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert len(said.strip().splitlines()) == 1


# ---- files of strangers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(randomize(csp_like()), tmp_path_factory.mktemp("good"), None, 4, 16, 16)


def refused(path: Path, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(refold.InputError, match=sentence):
        files.load(path)
    assert main(["inspect", str(path)]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1, said


def edited(good: Path, folder: Path, edit: Callable[[Any], Any]) -> Path:
    path = folder / "edited.json"
    program = json.loads(good.read_text())
    ops = program["program"]["regions"][0]["blocks"][0]["ops"]
    edit(ops)
    path.write_text(json.dumps(program))
    shutil.copyfile(good.with_suffix(".pdiparams"), path.with_suffix(".pdiparams"))
    return path


def op_called(ops: Any, kind: str) -> Any:
    return next(op for op in ops if op["#"] == kind)


EDITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "unknown_operator": (
        lambda ops: op_called(ops, "1.conv2d").update({"#": "1.py_func"}),
        "uses the operator 'pd_op.py_func'",
    ),
    "unknown_dialect": (lambda ops: op_called(ops, "1.conv2d").update({"#": "7.run"}), "uses the operator '7.run'"),
    "missing_attributes": (
        lambda ops: op_called(ops, "1.conv2d").update({"A": []}),
        "is not written as Paddle does it",
    ),
    "reads_what_is_not_there": (
        lambda ops: op_called(ops, "1.conv2d")["I"][0].update({"%": 10**6}),
        "is not written as Paddle does it",
    ),
    "no_outputs": (lambda ops: [ops.remove(op) for op in list(ops) if op["#"] == "1.fetch"], "no outputs"),
    "training": (
        lambda ops: [
            entry["AT"].update({"D": False})
            for entry in op_called(ops, "1.batch_norm_")["A"]
            if entry["N"] in ("is_test", "use_global_stats")
        ],
        "in training mode",
    ),
    "no_groups": (
        lambda ops: [
            entry["AT"].update({"D": 0}) for entry in op_called(ops, "1.conv2d")["A"] if entry["N"] == "groups"
        ],
        "the 'groups' of the program's operator '1.conv2d' are 0 or less",
    ),
    "another_shape": (
        lambda ops: op_called(ops, "p")["O"]["TT"]["D"].__setitem__(1, [3]),
        "do not belong together",
    ),
    "two_of_one_name": (
        lambda ops: [op["A"].__setitem__(3, "same") for op in ops if op["#"] == "p"],
        "two parameters of the program have one name",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_broken_programs_are_refused(
    name: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, sentence = EDITS[name]
    refused(edited(good, tmp_path, edit), sentence, capsys)


def test_names_in_a_program_are_no_code(tmp_path: Path) -> None:
    path = saved(randomize(nn.Linear(4, 3)), tmp_path, None, 4)
    program = json.loads(path.read_text())
    ops = program["program"]["regions"][0]["blocks"][0]["ops"]
    hostile = "forward", "x); raise SystemExit  #"
    for name, op in zip(hostile, sorted((o for o in ops if o["#"] == "p"), key=lambda o: o["A"][3]), strict=True):
        op["A"][3] = name
    op_called(ops, "1.data")["A"][0]["AT"]["D"] = "x): import os\nself"
    path.write_text(json.dumps(program))
    model = files.load(path)
    assert sorted(model.state_dict()) == ["forward_2", "x___raise_SystemExit"]
    assert model(paddle.ones([2, 4])).shape == [2, 3]


@pytest.mark.parametrize(
    "content", [b"{}", b"[1, 2]", b"no json", b"\xff\xfe", b'{"base_code": {"magic": "pir"}}', b"[" * 10**5]
)
def test_other_files_are_refused(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    refused(path, "this is no inference program of Paddle 3", capsys)


def test_broken_weights_are_refused(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = edited(good, tmp_path, lambda ops: None)
    weights = path.with_suffix(".pdiparams")
    whole = weights.read_bytes()
    for content, sentence in (
        (whole[:-1], "are announced where"),
        (whole + b"\0", "holds more than the program's weights"),
        (b"\x01" + whole[1:], "no weights that Paddle 3 saved"),
        (whole[:16] + b"\xff\xff\xff\x7f" + whole[20:], "no weights that Paddle 3 saved"),
        (b"\x80\x02}" * 40, "no weights that Paddle 3 saved"),
    ):
        weights.write_bytes(content)
        refused(path, sentence, capsys)
    weights.unlink()
    refused(path, "there is no such file", capsys)
