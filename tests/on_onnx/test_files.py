"""ONNX files: taken for hostile when read, whole or not at all when written."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import Builder, assert_same_function, operators
from models import repvgg
from onnx import TensorProto, helper

import refold
from refold.cli import main
from refold.errors import InputError
from refold.onnx import files


@pytest.fixture
def model() -> onnx.ModelProto:
    return repvgg()


def saved(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which the command line refuses a file; nothing is written."""
    before = sorted(path.parent.rglob("*"))
    assert main(["fold", str(path), "-o", str(path.parent / "plain.onnx")]) == 2
    out, err = capsys.readouterr()
    assert sorted(path.parent.rglob("*")) == before
    assert not out
    assert err.startswith("refold: ")
    assert err.count("\n") == 1
    assert "fault of refold" not in err
    return err


# ---- what folds ----------------------------------------------------------------------------------


def test_command_line_from_file_to_file(
    model: onnx.ModelProto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rich, plain = saved(model, tmp_path / "rich.onnx"), tmp_path / "plain.onnx"
    before = rich.read_bytes()
    assert main(["inspect", str(rich)]) == 0
    assert main(["inspect", str(rich), "--fail-if-foldable", "--json"]) == 1
    assert "still holds 1 foldable region: -1 convolution, " in capsys.readouterr().err
    assert main(["fold", str(rich), "-o", str(plain)]) == 0
    assert rich.read_bytes() == before
    assert main(["inspect", str(plain), "--fail-if-foldable"]) == 0
    assert main(["prove", str(rich), str(plain)]) == 0
    folded = onnx.load(plain)
    onnx.checker.check_model(folded, full_check=True)
    assert operators(folded) == {"Conv": 1, "Relu": 1}
    assert_same_function(model, folded)
    assert main(["fold", str(rich), "-o", str(plain)]) == 2
    assert main(["fold", str(rich), "-o", str(plain), "--force"]) == 0
    assert main(["fold", str(rich), "-o", str(rich)]) == 2
    assert rich.read_bytes() == before


def test_a_wrong_fold_is_told(model: onnx.ModelProto, tmp_path: Path) -> None:
    wrong = refold.fold(model)
    (weight,) = [t for t in wrong.graph.initializer if len(t.dims) == 4]
    array = onnx.numpy_helper.to_array(weight).copy()
    array[1, 2, 0, 0] *= np.float32(1 + 1e-5)
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    rich, plain = saved(model, tmp_path / "rich.onnx"), saved(wrong, tmp_path / "plain.onnx")
    assert main(["prove", str(rich), str(plain)]) == 1
    assert not refold.prove(model, wrong).ok


# ---- weights beside the file ---------------------------------------------------------------------


def external(model: onnx.ModelProto, folder: Path, edit: Callable[[Any], None] | None = None) -> Path:
    """The model with all weights in ``weights.bin``; ``edit`` changes what is said of the first of them."""
    folder.mkdir(exist_ok=True)
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    data = b""
    for tensor in copied.graph.initializer:
        raw = onnx.numpy_helper.to_array(tensor).tobytes()
        onnx.external_data_helper.set_external_data(tensor, "weights.bin", len(data), len(raw))
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        data += raw
    (folder / "weights.bin").write_bytes(data)
    if edit is not None:
        edit(copied.graph.initializer[0])
    return saved(copied, folder / "model.onnx")


def test_weights_beside_the_file(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = external(model, tmp_path / "model")
    loaded = files.load(path)
    assert all(isinstance(v.const_value, ir.ExternalTensor) for v in loaded.graph.initializers.values())
    plain = tmp_path / "plain.onnx"
    assert main(["fold", str(path), "-o", str(plain)]) == 0
    assert_same_function(model, onnx.load(plain))


def test_weights_as_the_hugging_face_cache_links_them(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = external(model, tmp_path / "blobs")
    os.rename(path, tmp_path / "blobs" / "0a1b")
    os.rename(tmp_path / "blobs" / "weights.bin", tmp_path / "blobs" / "2c3d")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "model.onnx").symlink_to("../../blobs/0a1b")
    (snapshot / "weights.bin").symlink_to("../../blobs/2c3d")
    loaded = files.load(snapshot / "model.onnx")
    assert_same_function(model, refold.fold(model))
    arrays = {v.name: v.const_value.numpy() for v in loaded.graph.initializers.values() if v.const_value}
    for tensor in model.graph.initializer:
        np.testing.assert_array_equal(arrays[tensor.name], onnx.numpy_helper.to_array(tensor))


def test_models_too_large_for_one_file(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST_INLINE", 64)
    files.save(model, tmp_path / "plain.onnx")
    assert len(list(tmp_path.iterdir())) == 2
    assert_same_function(model, onnx.load(tmp_path / "plain.onnx"))
    with pytest.raises(InputError, match="exists"):
        files.save(model, tmp_path / "plain.onnx")
    assert len(list(tmp_path.iterdir())) == 2


def said(**entries: str) -> Callable[[Any], None]:
    def edit(tensor: Any) -> None:
        for entry in tensor.external_data:
            entry.value = entries.get(entry.key, entry.value)

    return edit


OUTSIDE = {
    "absolute": said(location="/etc/passwd"),
    "up": said(location="../weights.bin"),
    "up in the middle": said(location="a/../../weights.bin"),
    "process": said(location="/proc/self/environ"),
    "windows": said(location="..\\weights.bin"),
    "no name": said(location=""),
    "missing": said(location="other.bin"),
    "folder": said(location="folder"),
    "link out": said(location="link"),
    "pipe": said(location="pipe"),
    "hard link": said(location="hard"),
    "negative length": said(length="-1"),
    "huge length": said(length=str(2**50)),
    "huge offset": said(offset=str(2**62)),
    "negative offset": said(offset="-4"),
    "short": said(length="8"),
    "no number": said(offset="zero"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_hostile_places_of_weights(
    name: str, model: onnx.ModelProto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "weights.bin"
    secret.write_bytes(b"the secret" * 1000)
    path = external(model, tmp_path / "model", OUTSIDE[name])
    (path.parent / "folder").mkdir()
    (path.parent / "link").symlink_to("../weights.bin")
    os.mkfifo(path.parent / "pipe")
    os.link(secret, path.parent / "hard")
    assert "secret" not in refused(path, capsys)


# ---- files that are no models --------------------------------------------------------------------


def cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def double_output(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = model.graph.node[0].output[0]


def undefined(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "nobody"


def missing_initializer(model: onnx.ModelProto) -> None:
    del model.graph.initializer[0]


def wrong_rank(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [4, 4, 9]


def huge_dims(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [2**31, 2**31, 2**31, 2**31]


def negative_dims(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [4, 4, -3, -3]


def huge_dims_of_a_list(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.dims[:] = [2**40]
    tensor.float_data.append(1.0)


def unknown_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 99


def short_data(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = b"1234"


def old_operators(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 6


def future_operators(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99


def future_format(model: onnx.ModelProto) -> None:
    model.ir_version = 99


def unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "Covn"


def recursive_function(model: onnx.ModelProto) -> None:
    body = helper.make_node("Loopy", ["a"], ["b"], domain="own")
    function = helper.make_function("own", "Loopy", ["a"], ["b"], [body], [helper.make_opsetid("own", 1)])
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node.append(helper.make_node("Loopy", [model.graph.output[0].name], ["z"], domain="own"))


def nothing(model: onnx.ModelProto) -> None:
    model.ClearField("graph")


def trap(model: onnx.ModelProto) -> None:
    shape = onnx.numpy_helper.from_array(np.asarray([2**17, 2**17], dtype=np.int64), "shape_of_trap")
    model.graph.initializer.append(shape)
    model.graph.node.append(helper.make_node("ConstantOfShape", ["shape_of_trap"], ["trap"]))
    model.graph.node.append(helper.make_node("ReduceMax", ["trap"], ["peak"]))
    model.graph.output.append(helper.make_tensor_value_info("peak", TensorProto.FLOAT, [1, 1]))


EDITS = [
    cycle,
    double_output,
    undefined,
    missing_initializer,
    wrong_rank,
    huge_dims,
    negative_dims,
    huge_dims_of_a_list,
    unknown_type,
    short_data,
    old_operators,
    future_operators,
    future_format,
    unknown_operator,
    recursive_function,
    nothing,
    trap,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_models_against_the_rules(
    edit: Callable[[onnx.ModelProto], None], model: onnx.ModelProto, tmp_path: Path, capsys: Any
) -> None:
    edit(model)
    refused(saved(model, tmp_path / "bad.onnx"), capsys)


@pytest.mark.parametrize("part", range(16))
def test_truncated_files(part: int, model: onnx.ModelProto, tmp_path: Path, capsys: Any) -> None:
    data = model.SerializeToString()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: len(data) * part // 16])
    refused(path, capsys)


@pytest.mark.parametrize("data", [b"\x00\x01", b'{"model": 1}', b"PK\x03\x04", bytes(range(256)) * 4])
def test_files_of_another_kind(data: bytes, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(data)
    refused(path, capsys)


def test_folders_and_pipes(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "folder.onnx").mkdir()
    refused(tmp_path / "folder.onnx", capsys)
    os.mkfifo(tmp_path / "pipe.onnx")
    refused(tmp_path / "pipe.onnx", capsys)
    refused(tmp_path / "none.onnx", capsys)


def test_deep_nesting(model: onnx.ModelProto, tmp_path: Path, capsys: Any) -> None:
    def message(field: int, data: bytes) -> bytes:
        size, rest = b"", len(data)
        while True:
            size += bytes([rest & 127 | (128 if rest > 127 else 0)])
            rest >>= 7
            if not rest:
                return bytes([field << 3 | 2]) + size + data

    graph = model.graph.SerializeToString()
    for _ in range(80):
        graph = message(1, message(4, b"If") + message(5, message(6, graph)))  # node, attribute, graph
    model.ClearField("graph")
    path = tmp_path / "deep.onnx"
    path.write_bytes(model.SerializeToString() + message(7, graph))
    refused(path, capsys)


def test_names_that_paint_terminals(model: onnx.ModelProto, tmp_path: Path, capsys: Any) -> None:
    model.graph.node[0].name = "\x1b[31m<script>\u202e../../evil"
    path = saved(model, tmp_path / "named.onnx")
    assert main(["fold", str(path), "-o", str(tmp_path / "plain.onnx")]) == 0
    out, err = capsys.readouterr()
    assert "\x1b[31m" not in out + err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["named.onnx", "plain.onnx"]


def test_a_full_disk_leaves_the_old_file(model: onnx.ModelProto, tmp_path: Path, monkeypatch: Any) -> None:
    path = saved(model, tmp_path / "old.onnx")
    os.chmod(path, 0o640)
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    plain = refold.fold(model)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(InputError, match="no space left"):
            files.save(plain, path, overwrite=True)
    assert path.read_bytes() == before
    files.save(refold.fold(model), path, overwrite=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.read_bytes() != before


def test_models_in_memory_are_checked_too() -> None:
    b = Builder()
    x = b.input("N", 3, 8, 8)
    model = b.model(b.conv(x, 3, 4))
    model.graph.node[0].input[1] = "nobody"
    with pytest.raises(InputError):
        refold.fold(model)
