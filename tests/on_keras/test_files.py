"""Keras archives as an enemy, a bad disk or an older version would make them."""

from __future__ import annotations

import io
import json
import os
import random
import stat
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras.src.saving.serialization_lib import SafeModeScope

import refold
from refold.errors import InputError
from refold.keras.files import load, save
from refold.keras.normalization import WeightNormalization

SOURCE = str(Path(refold.__file__).parents[1])
MIB = 2**20
WEIGHTS = "model.weights.h5"
Members = dict[str, bytes]


def small_model() -> Any:
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(4, 3, activation="relu", name="conv")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.ops.add(x, keras.ops.relu(x)) * 2.0
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x), name="small")
    model.compile("sgd", "mse")
    return model


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    """What is in a good archive."""
    path = tmp_path_factory.mktemp("good") / "small.keras"
    save(small_model(), path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archived(path: Path, members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def with_config(members: Members, change: Callable[[Any], Any]) -> Members:
    config = json.loads(members["config.json"])
    changed = change(config)
    return members | {"config.json": json.dumps(config if changed is None else changed).encode()}


def with_weights(members: Members, change: Callable[[Any], Any]) -> Members:
    content = io.BytesIO(members[WEIGHTS])
    with h5py.File(content, "r+") as file:
        change(file)
    return members | {WEIGHTS: content.getvalue()}


def layer(config: Any, name: str = "conv") -> Any:
    return next(found for found in config["config"]["layers"] if found["name"] == name)


@contextmanager
def refused(*fragments: str) -> Iterator[None]:
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    for fragment in fragments:
        assert fragment in message


def refuses(path: Path, *fragments: str, **options: Any) -> None:
    """``path`` is refused in a sentence that names it, and nothing beside it changes."""
    before = sorted(path.parent.iterdir())
    with refused(path.name, *fragments):
        load(path, **options)
    assert sorted(path.parent.iterdir()) == before


def same_weights(left: Any, right: Any) -> bool:
    pairs = zip(left.get_weights(), right.get_weights(), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


# ---- what must load ----------------------------------------------------------------------------------


def mixed() -> Any:
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype="mixed_bfloat16")])


def half() -> Any:
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype="bfloat16")])


def nested() -> Any:
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, kernel_regularizer="l2")], name="inner")
    inner.compile("adam", "mse")
    inputs = keras.Input((4,))
    return keras.Model(inputs, [inner(inputs), inner(inputs * 2.0)])


def recurrent() -> Any:
    layers = [
        keras.layers.Bidirectional(keras.layers.LSTM(3, return_sequences=True)),
        keras.layers.TimeDistributed(keras.layers.Dense(2)),
    ]
    return keras.Sequential([keras.Input((5, 2)), *layers])


def attention() -> Any:
    inputs = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(11, 4)(inputs)
    return keras.Model(inputs, keras.layers.MultiHeadAttention(2, 2)(x, x))


def preprocessing() -> Any:
    layers = [
        keras.layers.RandomFlip(),
        keras.layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 1.0, 1.0]),
        keras.layers.SpectralNormalization(keras.layers.Conv2D(3, 2)),
        keras.layers.Activation(keras.activations.swish),
    ]
    return keras.Sequential([keras.Input((8, 8, 3)), *layers])


def ours() -> Any:
    layers = [
        WeightNormalization(keras.layers.Conv2D(4, 3, padding="same")),
        keras.layers.Flatten(),
        WeightNormalization(keras.layers.Dense(2), normalizer=keras.layers.LayerNormalization()),
    ]
    return keras.Sequential([keras.Input((4, 4, 2)), *layers])


def weightless() -> Any:
    return keras.Sequential([keras.Input((4,)), keras.layers.ReLU()])


@pytest.mark.parametrize(
    "make", [small_model, mixed, half, nested, recurrent, attention, preprocessing, ours, weightless]
)
def test_what_is_saved_loads_with_the_same_weights(tmp_path: Path, make: Callable[[], Any]) -> None:
    model = make()
    save(model, tmp_path / "model.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(tmp_path / "model.keras")
    assert same_weights(model, loaded)
    assert [path.name for path in tmp_path.iterdir()] == ["model.keras"]


def test_a_model_with_assets_loads(tmp_path: Path) -> None:
    if keras.backend.backend() != "tensorflow":
        pytest.skip("text layers need TensorFlow")
    words = keras.layers.StringLookup(vocabulary=["one", "two"])
    model = keras.Sequential([keras.Input((1,), dtype="string"), words, keras.layers.Embedding(4, 2)])
    save(model, tmp_path / "model.keras")
    assert load(tmp_path / "model.keras").layers[0].get_vocabulary() == words.get_vocabulary()


def test_a_recompressed_archive_and_nan_weights_load(tmp_path: Path, members: Members) -> None:
    def poison(file: Any) -> None:
        file["layers/conv2d/vars/0"][0, 0] = np.nan

    path = archived(tmp_path / "m.keras", with_weights(members, poison), zipfile.ZIP_DEFLATED)
    assert np.isnan(load(path).get_weights()[0]).any()


def test_loading_leaves_nothing_behind_in_keras(tmp_path: Path, members: Members) -> None:
    path = archived(tmp_path / "m.keras", members)

    def huge(config: Any) -> None:
        layer(config, "head")["config"]["units"] = 10**9

    refuses(archived(tmp_path / "huge.keras", with_config(members, huge)), "parameters")
    load(path)
    # A variable of the refused model would be made now, all of its gigabytes.
    with keras.StatelessScope():
        pass
    assert load(path).count_params() == small_model().count_params()


def test_strange_names_of_layers_load_and_make_no_path(tmp_path: Path, members: Members) -> None:
    strange = "<script>\x1b[2J\u202e" + "n" * 100_000

    def rename(config: Any) -> Any:
        return json.loads(json.dumps(config).replace('"conv"', json.dumps(strange)))

    load(archived(tmp_path / "m.keras", with_config(members, rename)))

    def climb(config: Any) -> Any:
        return json.loads(json.dumps(config).replace('"conv"', '"../../\\u001b[2J"'))

    refuses(archived(tmp_path / "c.keras", with_config(members, climb)), "\\x1b")


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


# ---- configurations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b"null", "no Keras 3 model"),
        (b"[]", "no Keras 3 model"),
        (b'"keras"', "no Keras 3 model"),
        (b"{}", "no Keras 3 model"),
        (b'{"class_name": "Sequential", "config": {}}', "no Keras 3 model"),
        (b'{"module": "keras", "class_name": "Sequential", "config": {}, "config": {}}', "'config' twice"),
        (b'{"module": "keras", "class_name": "Sequential", "config": {}}', "cannot load"),
        (b'{"module": "keras", "class_name": "Sequential", "config": []}', "cannot load"),
        (b'{"module": "keras", "class_name": 7, "config": {}}', "no name"),
        (b'{"module": 7, "class_name": "Sequential", "config": {}}', "Sequential"),
        (b"\xff\xfe{\x00}\x00", "no valid JSON"),
        (b'{"module": "keras", "class_name": "\\ud800", "config": {}}', "\\ud800"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "no Keras 3 model"),
    ],
)
def test_configurations_that_are_no_model(tmp_path: Path, members: Members, text: bytes, fragment: str) -> None:
    refuses(archived(tmp_path / "m.keras", members | {"config.json": text}), fragment)


def change_class(module: Any, name: str, **more: Any) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        layer(config).update({"module": module, "class_name": name} | more)

    return change


def change_setting(key: str, value: Any) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        layer(config)["config"][key] = value

    return change


def dead_call(module: str, name: str, *arguments: Any) -> Callable[[Any], None]:
    """A call that belongs to no tensor, of a function that would leave a file behind."""

    def change(config: Any) -> None:
        node = {"args": list(arguments), "kwargs": {}}
        call = {"module": module, "class_name": "function", "config": name, "registered_name": name}
        config["config"]["layers"].append(call | {"name": "call", "inbound_nodes": [node]})

    return change


def tensor_dtype(config: Any) -> None:
    node = layer(config)["inbound_nodes"][0]
    node["args"].append({"class_name": "__numpy__", "config": {"value": ["a"], "dtype": "S999999999"}})


def lambda_argument(config: Any) -> None:
    node = layer(config)["inbound_nodes"][0]
    node["kwargs"]["fn"] = {"class_name": "__lambda__", "config": {"value": ["4wAA", None, None]}}


def cyclic(config: Any) -> None:
    layer(config)["inbound_nodes"][0]["args"][0]["config"]["keras_history"] = ["head", 0, 0]


CANARY = "canary.txt"
FUNCTION = {"class_name": "function"}
TENSOR = {
    "class_name": "__keras_tensor__",
    "config": {"shape": [None, 6, 6, 3], "dtype": "float32", "keras_history": ["input_layer", 0, 0]},
}


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (change_class("keras.layers", "Lambda"), "'Lambda' carries code"),
        (change_class("keras.layers", "TFSMLayer", config={"filepath": CANARY}), "'TFSMLayer' carries code"),
        (change_class("keras.layers", "TorchModuleWrapper"), "'TorchModuleWrapper' carries code"),
        (change_class("keras.layers", "JaxLayer"), "'JaxLayer' carries code"),
        (change_class("keras.layers", "FlaxLayer"), "'FlaxLayer' carries code"),
        (change_class("keras.src.layers.core.lambda_layer", "Lambda"), "'Lambda' carries code"),
        (change_class("os", "system"), "custom class 'system' (from 'os')"),
        (change_class("my_package", "MyBlock", registered_name="my>MyBlock"), "--import MODULE"),
        (change_class(None, "MyBlock", registered_name="MyBlock"), "custom class 'MyBlock', whose code"),
        (change_class("keras.evil", "MyBlock"), "does not have"),
        (change_class("keras.src.utils.file_utils", "get_file"), "does not have"),
        (change_class("keras.src.ops.function", "Function"), "does not have"),
        (change_class("keras.src.ops.numpy", "np"), "does not have"),
        (change_class("keras.src.ops.numpy", "keras_export"), "does not have"),
        (change_class("keras.callbacks", "ModelCheckpoint"), "no part of a model"),
        (change_class("keras.optimizers", "Adam"), "no part of a model"),
        (change_class("keras.utils", "get_file"), "no part of a model"),
        (change_class("keras.utils", "FeatureSpace"), ""),
        (change_class("keras.layers", "__typespec__"), "no model needs"),
        (change_class("keras.layers", "Conv2D", registered_name="keras>os"), "cannot load"),
        (change_class("keras.layers", "Dense\x1b[2J"), "Dense\\x1b[2J"),
        (change_class("keras.layers", "D" * 10**6), "more characters"),
        (change_class("keras.layers", "StringLookup", config={"vocabulary": "/etc/passwd"}), "'/etc/passwd'"),
        (change_setting("activation", FUNCTION | {"module": "os", "config": "system"}), "'os.system'"),
        (change_setting("activation", FUNCTION | {"module": "builtins", "config": "eval"}), "'builtins.eval'"),
        (change_setting("activation", FUNCTION | {"module": "keras.utils", "config": "get_file"}), "get_file"),
        (change_setting("activation", {"class_name": "__lambda__", "config": {}}), "lambda"),
        (change_setting("activation", "eval"), "cannot load"),
        (change_setting("kernel_size", [10**6, 10**6]), ""),
        (change_setting("filters", -3), "cannot load"),
        (change_setting("filters", "many"), "cannot load"),
        (change_setting("unheard_of", 1), "cannot load"),
        (dead_call("keras.utils", "get_file", CANARY, "file:///etc/passwd"), "called on no tensor"),
        (dead_call("keras.ops", "save", CANARY), "called on no tensor"),
        (dead_call("keras.utils", "get_file", TENSOR, "file:///etc/passwd"), "'keras.utils.get_file'"),
        (dead_call("keras.utils", "get_file", [{"a": [TENSOR]}]), "'keras.utils.get_file'"),
        (dead_call("keras.utils", "get_file", {"class_name": "Zeros", "config": {"a": TENSOR}}), "on no tensor"),
        (tensor_dtype, "unknown type"),
        (lambda_argument, "lambda"),
        (cyclic, "cannot load"),
    ],
)
def test_configurations_that_want_more_than_a_model(
    tmp_path: Path,
    members: Members,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any], None],
    fragment: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    refuses(archived(tmp_path / "m.keras", with_config(members, change)), fragment)
    assert not (tmp_path / CANARY).exists()


def test_calls_as_old_keras_wrote_them_are_refused(tmp_path: Path, members: Members) -> None:
    def old(config: Any) -> None:
        layer(config)["inbound_nodes"] = [[["input_layer", 0, 0, {}]]]

    refuses(archived(tmp_path / "m.keras", with_config(members, old)), "older Keras")


def test_code_in_a_file_runs_only_on_trust(tmp_path: Path) -> None:
    canary = str(tmp_path / CANARY)
    code = keras.layers.Lambda(lambda x: (open(canary, "w").close(), x)[1], output_shape=(2,))
    model = keras.Sequential([keras.Input((2,)), code])
    Path(canary).unlink(missing_ok=True)
    path = tmp_path / "m.keras"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(model, path)
    with SafeModeScope(False):  # for the process' own files, not for this one
        refuses(path, "carries code")
    assert not Path(canary).exists()
    load(path, trust=True)


def test_a_newer_keras_is_named(tmp_path: Path, members: Members) -> None:
    newer = with_config(members, change_setting("unheard_of", 1))
    newer["metadata.json"] = json.dumps({"keras_version": "99.1.0"}).encode()
    refuses(archived(tmp_path / "m.keras", newer), "written by Keras 99.1.0")


# ---- the user's own classes --------------------------------------------------------------------------

MODULE = """
import keras
from keras.layers import Lambda
from os import system


class MyBlock(keras.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], self.units))

    def call(self, x):
        return keras.ops.matmul(x, self.kernel)

    def get_config(self):
        return {**super().get_config(), "units": self.units}
"""


def test_custom_classes_come_from_the_modules_that_the_user_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_blocks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    import my_blocks

    model = keras.Sequential([keras.Input((4,)), my_blocks.MyBlock(3)])
    path = tmp_path / "m.keras"
    save(model, path)
    monkeypatch.delitem(sys.modules, "my_blocks")
    refuses(path, "'MyBlock' (from 'my_blocks')", "--import MODULE")
    assert "my_blocks" not in sys.modules  # the file says where its code is, and is not believed
    assert same_weights(model, load(path, imports=["my_blocks"]))

    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def bigger(config: Any) -> None:
        config["config"]["layers"][1]["config"]["units"] = 10**9

    large = archived(tmp_path / "large.keras", with_config(members, bigger))
    refuses(large, "parameters", imports=["my_blocks"])

    def gadget(config: Any) -> None:
        config["config"]["layers"][1] |= {"class_name": "system", "registered_name": "system"}

    refuses(archived(tmp_path / "g.keras", with_config(members, gadget)), "'system'", imports=["my_blocks"])


EAGER = """
import keras
import numpy as np


@keras.saving.register_keras_serializable("eager")
class Eager(keras.Layer):
    def build(self, shape):
        self.kernel = keras.Variable(np.eye(shape[-1], dtype="float32"))

    def call(self, x):
        return x @ self.kernel
"""


def test_a_custom_layer_that_needs_values_to_be_built_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "eager_blocks.py").write_text(EAGER)
    monkeypatch.syspath_prepend(tmp_path)
    import eager_blocks

    model = keras.Sequential([keras.Input((4,)), eager_blocks.Eager()])
    save(model, tmp_path / "m.keras")
    assert same_weights(model, load(tmp_path / "m.keras", imports=["eager_blocks"]))


@pytest.mark.parametrize(
    ("name", "text", "fragment"),
    [
        ("no_such_module", None, "no module 'no_such_module'"),
        ("broken_module", "import no_such_module_either", "no module 'no_such_module_either'"),
        ("broken_module", "this is no Python", "SyntaxError"),
        ("broken_module", "1 / 0", "division by zero"),
        ("..broken_module", None, "not the name of a Python module"),
        ("code/broken_module.py", None, "not the name of a Python module"),
        ("", None, "not the name of a Python module"),
    ],
)
def test_modules_that_cannot_be_imported(
    tmp_path: Path, members: Members, monkeypatch: pytest.MonkeyPatch, name: str, text: str | None, fragment: str
) -> None:
    path = archived(tmp_path / "m.keras", members)
    (tmp_path / "code").mkdir()
    if text is not None:
        (tmp_path / "code" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "code")
    with refused("--import", fragment):
        load(path, imports=[name])


# ---- weights -----------------------------------------------------------------------------------------

KERNEL = "layers/conv2d/vars/0"


def external_link(file: Any) -> None:
    del file[KERNEL]
    file[KERNEL] = h5py.ExternalLink("/etc/passwd", "/")


def external_group(file: Any) -> None:
    del file["layers/conv2d"]
    file["layers/conv2d"] = h5py.ExternalLink("other.h5", "/layers/conv2d")


def soft_link(file: Any) -> None:
    del file[KERNEL]
    file[KERNEL] = h5py.SoftLink("/layers/dense/vars/0")


def external_storage(file: Any) -> None:
    shape = file[KERNEL].shape
    del file[KERNEL]
    file.create_dataset(KERNEL, shape, "float32", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def virtual(file: Any) -> None:
    shape = file[KERNEL].shape
    del file[KERNEL]
    layout = h5py.VirtualLayout(shape, "float32")
    layout[:] = h5py.VirtualSource("other.h5", "x", shape=shape)
    file.create_virtual_dataset(KERNEL, layout)


def strings(file: Any) -> None:
    del file[KERNEL]
    file.create_dataset(KERNEL, (3,), h5py.string_dtype())


def compound(file: Any) -> None:
    file.create_dataset("layers/more", (3,), np.dtype([("a", "f4"), ("b", "i4")]))


def named_type(file: Any) -> None:
    file["layers/more"] = np.dtype("float32")


def scale_offset(file: Any) -> None:
    file.create_dataset("layers/more", (30,), "int32", scaleoffset=True)


def null(file: Any) -> None:
    file["layers/more"] = h5py.Empty("float32")


def wrong_shape(file: Any) -> None:
    del file[KERNEL]
    file[KERNEL] = np.zeros((3, 3, 3, 5), "float32")


def missing(file: Any) -> None:
    del file[KERNEL]


def missing_layer(file: Any) -> None:
    del file["layers/conv2d"]


def escapes(file: Any) -> None:
    file["layers/\x1b[2J"] = h5py.SoftLink("/layers")


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (external_link, "a link to another file"),
        (external_group, "a link to another file"),
        (soft_link, "a soft link"),
        (external_storage, "in another file"),
        (virtual, "in another file"),
        (strings, "no numbers"),
        (compound, "no numbers"),
        (null, "no numbers"),
        (named_type, "no array"),
        (scale_offset, "compressed in a way"),
        (wrong_shape, "conv"),
        (missing, "conv"),
        (missing_layer, "conv"),
        (escapes, "\\x1b[2J"),
    ],
)
def test_weights_that_are_no_weights(
    tmp_path: Path, members: Members, change: Callable[[Any], None], fragment: str
) -> None:
    refuses(archived(tmp_path / "m.keras", with_weights(members, change)), fragment)


def test_weights_that_contain_themselves(tmp_path: Path, members: Members) -> None:
    def loop(file: Any) -> None:
        file["layers/conv2d/again"] = file["layers"]

    load(archived(tmp_path / "m.keras", with_weights(members, loop)))


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x89HDF\r\n\x1a\n", b"PK\x05\x06" + bytes(18)])
def test_weights_that_are_no_hdf5(tmp_path: Path, members: Members, content: bytes) -> None:
    refuses(archived(tmp_path / "m.keras", members | {WEIGHTS: content}), "weights are damaged")


# ---- saving ------------------------------------------------------------------------------------------


def test_saving_replaces_only_on_request(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "m.keras"
    save(model, path)
    before = path.read_bytes()
    with refused("m.keras", "exists already"):
        save(model, path)
    assert path.read_bytes() == before
    path.chmod(0o640)
    save(model, path, overwrite=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [found.name for found in tmp_path.iterdir()] == ["m.keras"]


@pytest.mark.parametrize("name", ["model", "model.h5", "model.keras.zip", ".keras"])
def test_saving_needs_the_right_ending(tmp_path: Path, name: str) -> None:
    with refused(name, ".keras"):
        save(small_model(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_saved_leaves_the_old_file(tmp_path: Path) -> None:
    class Unsaved(keras.Layer):
        def call(self, x: Any) -> Any:
            return x

        def get_config(self) -> Any:
            raise NotImplementedError("not written\nyet")

    path = tmp_path / "m.keras"
    path.write_bytes(b"old")
    with refused("m.keras", "cannot save", "not written"):
        save(keras.Sequential([keras.Input((2,)), Unsaved()]), path, overwrite=True)
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["m.keras"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    save(small_model(), path)
    before = path.read_bytes()
    code = f"""
import resource, sys
sys.path.insert(0, {SOURCE!r})
import keras
from refold.errors import InputError
from refold.keras.files import save
model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(100)])
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    save(model, sys.argv[1], overwrite=True)
except InputError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "cannot be written" in ran.stdout
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["m.keras"]
