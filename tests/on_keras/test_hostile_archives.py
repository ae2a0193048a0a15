"""Keras archives that are none, or that are damaged, lie or explode."""

from __future__ import annotations

import os
import random
import stat
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
from archives import (
    MIB,
    SOURCE,
    WEIGHTS,
    Members,
    archived,
    layer,
    refused,
    refuses,
    with_config,
    with_weights,
)

from refold.errors import InputError
from refold.keras.files import load

# ---- what is no archive ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "empty"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b"\x80\x02}q\x00.", "pickle"),
        (struct.pack("<Q", 20) + b'{"a": 1}' + bytes(30), "safetensors"),
        (b"\x08\x07\x12\x07pytorch", "ONNX"),
        (b"\x1f\x8b\x08" + bytes(20), "gzip"),
        (b'{"config": {}}', "no Keras archive"),
        (b"P", "no Keras archive"),
        (b"PK", "damaged"),
        (b"PK\x03\x04" + bytes(100), "damaged"),
        (b"PK\x05\x06" + bytes(18), "config.json"),
        (b"PK\x05\x06" + b"\xff" * 18, "damaged"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, content: bytes, fragment: str) -> None:
    path = tmp_path / "model.keras"
    path.write_bytes(content)
    refuses(path, fragment)


def test_random_bytes_are_refused(tmp_path: Path) -> None:
    generator = random.Random(0)
    for i in range(50):
        path = tmp_path / f"{i}.keras"
        path.write_bytes((b"PK\x03\x04" if i % 2 else b"") + generator.randbytes(generator.randrange(1, 3000)))
        refuses(path)


def test_special_files_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.keras")
    before = time.monotonic()
    refuses(tmp_path / "pipe.keras", "a pipe")
    for path, fragment in (
        (tmp_path, "a folder"),
        (Path("/dev/zero"), "a device"),
        (tmp_path / "none.keras", "no such file"),
    ):
        with refused(str(path), fragment):
            load(path)
    assert time.monotonic() - before < 1


def test_a_file_that_is_too_large_is_refused(tmp_path: Path, members: Members) -> None:
    refuses(archived(tmp_path / "m.keras", members), "more than the 1000 bytes", max_size=1000)


def test_every_cut_is_refused(tmp_path: Path, members: Members) -> None:
    whole = archived(tmp_path / "whole.keras", members).read_bytes()
    path = tmp_path / "cut.keras"
    for part in range(16):
        path.write_bytes(whole[: len(whole) * part // 16])
        refuses(path)


def test_every_flipped_byte_loads_or_is_refused(tmp_path: Path, members: Members) -> None:
    whole = archived(tmp_path / "whole.keras", members).read_bytes()
    generator = random.Random(0)
    path = tmp_path / "flipped.keras"
    edges = [*range(200), *range(len(whole) - 400, len(whole))]
    for turn in range(200):
        content = bytearray(whole)
        place = generator.choice(edges) if turn % 2 else generator.randrange(len(whole))
        content[place] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        loads_or_refuses(path)


@pytest.mark.parametrize("member", ["config.json", WEIGHTS])
def test_every_flipped_byte_under_a_valid_checksum_loads_or_is_refused(
    tmp_path: Path, members: Members, member: str
) -> None:
    generator = random.Random(1)
    for _ in range(100):
        content = bytearray(members[member])
        content[generator.randrange(min(len(content), 6000))] = generator.randrange(256)
        loads_or_refuses(archived(tmp_path / "m.keras", members | {member: bytes(content)}))


def loads_or_refuses(path: Path) -> None:
    try:
        load(path)
        message = ""
    except InputError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 1000


# ---- archives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("../evil", "leave its folder"),
        ("assets/../../evil", "leave its folder"),
        ("/evil", "leave its folder"),
        ("assets\\..\\evil", "leave its folder"),
        ("assets/C:evil", "leave its folder"),
        ("assets//evil", "leave its folder"),
        ("assets/\x1b[2J", "\\x1b[2J"),
        ("evil.py", "nothing that Keras writes"),
        ("Config.json", "nothing that Keras writes"),
        ("model.weights.npz", "NumPy"),
        ("model.weights.json", "several files"),
        ("archive/data.pkl", "PyTorch"),
    ],
)
def test_members_that_do_not_belong_there(tmp_path: Path, members: Members, name: str, fragment: str) -> None:
    refuses(archived(tmp_path / "m.keras", members | {name: b"canary"}), fragment)
    assert sorted(path.name for path in tmp_path.parent.iterdir() if path.name == "evil") == []


@pytest.mark.parametrize("name", ["config.json", "metadata.json", WEIGHTS])
def test_a_missing_member(tmp_path: Path, members: Members, name: str) -> None:
    rest = {other: content for other, content in members.items() if other != name}
    refuses(archived(tmp_path / "m.keras", rest), f"no member '{name}'")


def test_duplicate_members(tmp_path: Path, members: Members) -> None:
    path = archived(tmp_path / "m.keras", members)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("config.json", b"{}")
    refuses(path, "'config.json' is there twice")


def test_a_member_that_is_a_symbolic_link(tmp_path: Path, members: Members) -> None:
    path = archived(tmp_path / "m.keras", members)
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("assets/passwd")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    refuses(path, "link")


def patched(path: Path, offset: int, local_offset: int, value: bytes) -> None:
    """Overwrite a field of every member's header, in the table of contents and in front of the member."""
    content = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x01\x02", offset), (b"PK\x03\x04", local_offset)):
        start = -1
        while (start := content.find(mark, start + 1)) >= 0:
            content[start + place : start + place + len(value)] = value
    path.write_bytes(content)


def test_encrypted_members(tmp_path: Path, members: Members) -> None:
    path = archived(tmp_path / "m.keras", members)
    patched(path, 8, 6, b"\x01\x00")
    refuses(path, "encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_unusual_compression(tmp_path: Path, members: Members, method: int) -> None:
    refuses(archived(tmp_path / "m.keras", members, method), "compressed")


def test_members_that_lie_about_their_size(tmp_path: Path, members: Members) -> None:
    path = archived(tmp_path / "m.keras", members, zipfile.ZIP_DEFLATED)
    patched(path, 24, 22, struct.pack("<I", 10))
    refuses(path, "damaged")
    patched(path, 24, 22, struct.pack("<I", 15 * MIB // 10))
    refuses(path)


# ---- bombs -------------------------------------------------------------------------------------------


def test_bombs_cost_neither_memory_nor_time(tmp_path: Path, members: Members) -> None:
    spaces, deep = b" " * (100 * MIB), b"[" * (15 * MIB)
    bombs = {
        "spaces": members | {"config.json": spaces + members["config.json"]},
        "config": members | {"config.json": b" " * (15 * MIB) + members["config.json"]},
        "lists": members | {"config.json": b"[" + b"[]," * (5 * MIB) + b"[]]"},
        "deep": members | {"config.json": deep},
        "digits": members | {"config.json": b"9" * MIB},
        "metadata": members | {"metadata.json": spaces},
        "zeros": members | {WEIGHTS: bytes(100 * MIB)},
        "contents": members | {f"assets/{'x' * 30}{i}": b"" for i in range(20_000)},
    }

    def fill(file: Any) -> None:
        del file["layers/conv2d/vars/0"]
        file.create_dataset(
            "layers/conv2d/vars/0", (30_000, 30_000), "float32", chunks=(1000, 1000), compression="gzip"
        )

    def chunk(file: Any) -> None:
        file.create_dataset("chunk", (1,), "int8", maxshape=(None,), chunks=(2**30,), compression="gzip")

    def many(file: Any) -> None:
        for i in range(300):
            file.create_dataset(f"many/{i}", (15, MIB), "int8", chunks=(15, MIB), compression="gzip")

    bombs |= {change.__name__: with_weights(members, change) for change in (fill, chunk, many)}
    for name, content in bombs.items():
        archived(tmp_path / f"{name}.keras", content, zipfile.ZIP_DEFLATED)

    def units(config: Any) -> None:
        layer(config, "head")["config"]["units"] = 10**9

    def chain(config: Any) -> Any:
        dense = layer(config, "head")
        layers = [{"module": "keras.layers", "class_name": "InputLayer", "config": {"batch_shape": [None, 10**5]}}]
        for i in range(2):
            inner = dense["config"] | {"units": 10**5, "name": f"d{i}"}
            layers.append({"module": "keras.layers", "class_name": "Dense", "config": inner})
        return {"module": "keras", "class_name": "Sequential", "config": {"name": "chain", "layers": layers}}

    def wrapped(config: Any) -> Any:
        chained = chain(config)
        for found in chained["config"]["layers"][1:]:
            inner = dict(found)
            found["config"] = {"layer": inner, "normalizer": "unit"}
            found |= {"module": "refold.keras.normalization", "class_name": "WeightNormalization"}
            found["registered_name"] = "refold>WeightNormalization"
        return chained

    def parts(config: Any) -> None:
        add = next(found for found in config["config"]["layers"] if found["class_name"] == "Add")
        split = {"module": "keras.src.ops.numpy", "class_name": "Split", "registered_name": "Split"}
        add |= split | {"config": {"indices_or_sections": 10**9, "axis": 0}}

    def dead(config: Any) -> None:
        add = next(found for found in config["config"]["layers"] if found["class_name"] == "Add")
        add |= {"class_name": "Repeat", "registered_name": "Repeat", "config": {"repeats": 10**10}}
        add["inbound_nodes"] = [{"args": [[1.0]], "kwargs": {}}]

    for change in (units, chain, wrapped, parts, dead):
        archived(tmp_path / f"{change.__name__}.keras", with_config(members, change))
        bombs[change.__name__] = {}

    code = f"""
import resource, sys, time
sys.path.insert(0, {SOURCE!r})
from refold.errors import InputError
from refold.keras.files import load
load(sys.argv[1] + "/config.keras")
for name in sys.argv[2:]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        load(f"{{sys.argv[1]}}/{{name}}.keras")
        message = "loaded"
    except InputError as error:
        message = str(error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"RESULT|{{name}}|{{grown // 1024}}|{{time.monotonic() - start}}|{{message}}")
"""
    command = [sys.executable, "-c", code, str(tmp_path), *bombs]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    lines = [line.split("|") for line in ran.stdout.splitlines() if line.startswith("RESULT|")]
    results = {name: (int(grown), float(seconds), message) for _, name, grown, seconds, message in lines}
    assert results.keys() == bombs.keys(), ran.stderr[-2000:]
    assert results.pop("config")[2] == "loaded"
    for name, (grown, seconds, message) in results.items():
        assert f"{name}.keras: " in message
        assert grown < 300, (name, grown, message)
        assert seconds < 10, (name, seconds, message)
    for name in ("spaces", "zeros", "fill", "chunk"):
        assert "bomb" in results[name][2]
    assert "table of contents" in results["contents"][2]
    for name in ("units", "chain", "wrapped"):
        assert "parameters" in results[name][2]
