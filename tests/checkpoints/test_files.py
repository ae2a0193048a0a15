"""Checkpoints on the disk: streamed, in shards, written together or not at all."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tensor_files import literal, weights, with_header, write

import refold
from documents import RUN_ON, run_examples
from refold.checkpoints import run
from refold.cli import main
from refold.errors import InputError

SOURCE = str(Path(refold.__file__).parents[1])


def legacy(seed: int = 0, units: int = 5, fan_in: int = 7) -> tuple[dict[str, Any], Any]:
    v, g = weights(seed, units, fan_in)
    return {"a.weight_g": g, "a.bias": np.arange(5.0), "a.weight_v": v}, literal(v, g).astype("float32")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file(tmp_path: Path) -> None:
    state, plain = legacy()
    source = write(tmp_path / "a.safetensors", state, {"format": "pt"})
    before = source.read_bytes()
    done = refold.convert(source, tmp_path / "b.safetensors")
    assert source.read_bytes() == before
    assert done.to_json() == {
        "to": "plain", "converted": [{"name": "a.weight", "from": "torch-legacy", "to": "plain", "units": 5}],
        "kept": 1, "dropped": ["a.weight_g"],
    }  # fmt: skip
    result = load_file(tmp_path / "b.safetensors")
    assert set(result) == {"a.bias", "a.weight"}
    assert np.array_equal(result["a.weight"], plain)
    assert b'"format":"pt"' in (tmp_path / "b.safetensors").read_bytes()
    assert names(tmp_path) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(("axis", "rows"), [(0, 5), (0, 1), (1, 5), (1, 1)])
def test_blocks_give_what_the_whole_gives(axis: int, rows: int, tmp_path: Path, monkeypatch: Any) -> None:
    """Whatever is read at once, along whichever axis, the numbers are the same."""
    monkeypatch.setattr(run, "BLOCK", rows * 12)
    monkeypatch.setattr(run, "PIECE", 17)
    rng = np.random.default_rng(0)
    v = rng.normal(size=(7, 6, 2)).astype("float32")
    g = rng.normal(size=(7, 1, 1) if axis == 0 else (1, 6, 1)).astype("float32")
    source = write(tmp_path / "a.safetensors", {"x": rng.normal(size=(9, 9)), "weight_v": v, "weight_g": g})
    refold.convert(source, tmp_path / "b.safetensors")
    refold.convert(source, tmp_path / "c.safetensors", "refold", axes=[f"weight={axis}"], method="layer")
    monkeypatch.undo()
    state = load_file(source)
    for file, options in (("b", {}), ("c", {"to": "refold", "axes": [f"weight={axis}"], "method": "layer"})):
        result = load_file(tmp_path / f"{file}.safetensors")
        for name, array in refold.convert_state(state, **options).items():
            assert np.array_equal(result[name], array), name


def test_memory_stays_small_however_large_the_tensors_are(tmp_path: Path) -> None:
    """240 MB of weights, sparse on the disk, in less than 150 MB, numpy and Python included."""
    shape = [15_000, 4_000]
    size = 4 * shape[0] * shape[1]
    entries = {
        "weight_g": {"dtype": "F32", "shape": [shape[0], 1], "data_offsets": [0, 4 * shape[0]]},
        "weight_v": {"dtype": "F32", "shape": shape, "data_offsets": [4 * shape[0], 4 * shape[0] + size]},
    }
    source = tmp_path / "a.safetensors"
    beginning = with_header(entries)
    source.write_bytes(beginning)
    os.truncate(source, len(beginning) + 4 * shape[0] + size)
    code = (
        "import sys, refold\n"
        "refold.convert(sys.argv[1], sys.argv[2])\n"
        # Not getrusage, whose peak a process takes over from the one that started it.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "b.safetensors")],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": SOURCE, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert int(done.stdout) < 150_000  # KiB
    assert (tmp_path / "b.safetensors").stat().st_size > size


# ---- shards ------------------------------------------------------------------------------------------


def sharded(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A weight whose gain lies in another file than its direction, and a file of nothing but gains."""
    folder.mkdir()
    one, plain = legacy(0)
    two, other = legacy(1)
    two = {name.replace("a.", "b."): array for name, array in two.items()}
    files = {
        "model-1.safetensors": {"a.weight_v": one["a.weight_v"], "b.weight_v": two["b.weight_v"]},
        "model-2.safetensors": {"a.bias": one["a.bias"], "b.bias": two["b.bias"]},
        "model-3.safetensors": {"a.weight_g": one["a.weight_g"], "b.weight_g": two["b.weight_g"]},
    }
    places = {}
    for name, arrays in files.items():
        write(folder / name, arrays)
        places |= dict.fromkeys(arrays, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1, "who": "me"}, "weight_map": places}))
    return index, {"a.weight": plain, "b.weight": other, "a.bias": one["a.bias"], "b.bias": two["b.bias"]}


@pytest.mark.parametrize("by", ["index", "folder"])
def test_several_files(by: str, tmp_path: Path) -> None:
    index, wanted = sharded(tmp_path / "in")
    refold.convert(index if by == "index" else index.parent, tmp_path / "out")
    out = tmp_path / "out"
    assert names(out) == ["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
    written = json.loads((out / "model.safetensors.index.json").read_text())
    assert written["metadata"] == {"total_size": sum(array.nbytes for array in wanted.values()), "who": "me"}
    for name, file in written["weight_map"].items():
        assert np.array_equal(load_file(out / file)[name], wanted[name])
    assert set(written["weight_map"]) == set(wanted)
    # It is a checkpoint again: several files become one.
    refold.convert(out, tmp_path / "one.safetensors", "torch", axes=["*.weight=0"])
    back = refold.convert_state(load_file(tmp_path / "one.safetensors"))
    assert all(np.allclose(back[name], array, rtol=3e-7) for name, array in wanted.items())


def edited(index: Path, **places: Any) -> None:
    content = json.loads(index.read_text())
    content["weight_map"] |= places
    content["weight_map"] = {name: place for name, place in content["weight_map"].items() if place is not None}
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("places", "sentence"),
    [
        ({"a.bias": "../model-2.safetensors"}, "only .safetensors files in the index's own folder"),
        ({"a.bias": "/etc/passwd"}, "only .safetensors files"),
        ({"a.bias": "sub/model-2.safetensors"}, "only .safetensors files"),
        ({"a.bias": "sub\\model-2.safetensors"}, "only .safetensors files"),
        ({"a.bias": "C:model-2.safetensors"}, "only .safetensors files"),
        ({"a.bias": ".hidden.safetensors"}, "only .safetensors files"),
        ({"a.bias": "model.safetensors.index.json"}, "only .safetensors files"),
        ({"a.bias": 3}, "only .safetensors files"),
        ({"a.bias": "model-9.safetensors"}, "there is no such file"),
        ({"a.bias": "model-1.safetensors"}, "is in 'model-2.safetensors', which the index does not say"),
        ({"a.bias": None}, "which the index does not say"),
        ({"c.bias": "model-1.safetensors"}, "the tensor 'c.bias' is not in 'model-1.safetensors'"),
    ],
)
def test_an_index_that_does_not_say_what_is_there(places: Any, sentence: str, tmp_path: Path) -> None:
    index, _ = sharded(tmp_path / "in")
    edited(index, **places)
    with pytest.raises(InputError, match=sentence):
        refold.convert(index, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"weight_map": {"a": "b.safetensors", "a": "b.safetensors"}}', "'a' is there twice"),
        ('{"weight_map": {}}', "no 'weight_map'"),
        ("[]", "no 'weight_map'"),
        ("[" * 100_000, "not JSON"),
        ("\xff", "not JSON"),
    ],
)
def test_an_index_that_is_none(text: str, sentence: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=sentence):
        refold.convert(index, tmp_path / "out")


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    index, _ = sharded(tmp_path / "in")
    write(index.parent / "model-2.safetensors", {"a.weight_v": np.ones(3, "float32")})
    with pytest.raises(InputError, match=r"is in 'model-1\.safetensors' and in 'model-2\.safetensors'"):
        refold.convert(index, tmp_path / "out")


def test_links_as_in_a_model_cache_and_no_others(tmp_path: Path) -> None:
    index, wanted = sharded(tmp_path / "blobs")
    cache = tmp_path / "snapshot"
    cache.mkdir()
    for path in index.parent.iterdir():
        (cache / path.name).symlink_to(path)
    refold.convert(cache, tmp_path / "out")
    assert np.array_equal(load_file(tmp_path / "out" / "model-1.safetensors")["a.weight"], wanted["a.weight"])
    # A link to somewhere else than where the index is
    outside = write(tmp_path / "outside.safetensors", {"x": np.ones(3, "float32")})
    (cache / "model-2.safetensors").unlink()
    (cache / "model-2.safetensors").symlink_to(outside)
    with pytest.raises(InputError, match="is a link out of the checkpoint's folder"):
        refold.convert(cache, tmp_path / "again")


@pytest.mark.parametrize("count", [0, 2])
def test_a_folder_that_does_not_say_which(count: int, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(count):
        write(folder / f"{number}.safetensors", legacy()[0])
    with pytest.raises(InputError, match="name the file"):
        refold.convert(folder, tmp_path / "out")


# ---- what is written, and what is not ----------------------------------------------------------------


def test_files_that_exist_are_replaced_only_when_asked_and_keep_their_mode(tmp_path: Path) -> None:
    state, plain = legacy()
    source = write(tmp_path / "a.safetensors", state)
    target = tmp_path / "b.safetensors"
    target.write_bytes(b"before")
    target.chmod(0o640)
    with pytest.raises(InputError, match="exists already"):
        refold.convert(source, target)
    assert target.read_bytes() == b"before"
    refold.convert(source, target, overwrite=True)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert np.array_equal(load_file(target)["a.weight"], plain)


@pytest.mark.parametrize("way", ["itself", "a link", "a hard link", "its folder"])
def test_a_file_of_the_source_is_never_the_result(way: str, tmp_path: Path) -> None:
    index, _ = sharded(tmp_path / "in")
    source: Path = tmp_path / "a.safetensors"
    write(source, legacy()[0])
    other = tmp_path / "b.safetensors"
    match way:
        case "itself":
            other = source
        case "a link":
            other.symlink_to(source)
        case "a hard link":
            other.hardlink_to(source)
        case _:
            source, other = index, index.parent
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="is being read"):
        refold.convert(source, other, overwrite=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_nothing_is_left_when_a_later_file_fails(tmp_path: Path) -> None:
    index, _ = sharded(tmp_path / "in")
    out = tmp_path / "out"
    refold.convert(index, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    bad = load_file(index.parent / "model-1.safetensors")
    bad["b.weight_v"][3, 3] = np.nan
    write(index.parent / "model-1.safetensors", bad)
    with pytest.raises(InputError, match=r"'b\.weight' has numbers that are not finite"):
        refold.convert(index, out, overwrite=True)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError):
        refold.convert(index, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    source = write(tmp_path / "a.safetensors", legacy()[0])
    monkeypatch.setattr("shutil.disk_usage", lambda path: Full)
    with pytest.raises(InputError, match="are free there"):
        refold.convert(source, tmp_path / "b.safetensors")
    assert names(tmp_path) == ["a.safetensors"]


class Full:
    free = 10


@pytest.mark.parametrize(
    ("source", "target", "sentence"),
    [
        ("a.safetensors", "b.onnx", "names that end in"),
        ("a.safetensors", "b.h5", "from .h5 only"),
        ("none.safetensors", "b.safetensors", "there is no such file"),
        ("a.onnx", "b.safetensors", "this is no checkpoint of"),
        ("a.safetensors", "no/b.safetensors", "does not exist; make it first"),
        ("a.safetensors", "no/folder", "make it first"),
        ("a.safetensors", "file", "choose another name"),
    ],
)
def test_names_that_do_not_fit(source: str, target: str, sentence: str, tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", legacy()[0])
    (tmp_path / "a.onnx").write_bytes(b"\x08\x09")
    (tmp_path / "file").write_bytes(b"x")
    before = names(tmp_path)
    with pytest.raises(InputError, match=sentence):
        refold.convert(tmp_path / source, tmp_path / target)
    assert names(tmp_path) == before


# ---- the command line --------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    state, plain = legacy()
    source = write(tmp_path / "a.safetensors", state)
    target = tmp_path / "b.safetensors"
    assert main(["convert", str(source), "-o", str(target)]) == 0
    assert "weights made plain: 1 from torch-legacy; 1 tensors stayed" in capsys.readouterr().out
    assert np.array_equal(load_file(target)["a.weight"], plain)
    again = tmp_path / "c.safetensors"
    arguments = ["convert", str(target), "-o", str(again), "--to", "refold", "--axis", "a.weight=0", "--json"]
    assert main([*arguments, "--method", "layer", "--epsilon", "1e-5"]) == 0
    assert json.loads(capsys.readouterr().out)["converted"][0]["units"] == 5
    assert len(load_file(again)) == 4


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: Any) -> None:
    v, g = weights(0, 4, 4)
    source = write(tmp_path / "a.safetensors", {"a.weight_v": v, "a.weight_g": g.reshape(-1)})
    assert main(["convert", str(source), "-o", str(tmp_path / "b.safetensors")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "a.safetensors: 'a.weight': its shape [4, 4] does not say which axis" in captured.err
    assert names(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("document", RUN_ON["checkpoints"])
def test_examples_run(document: str) -> None:
    run_examples(document)
