"""Configurations in Keras archives that want more than a model, and the user's own classes."""

from __future__ import annotations

import json
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest
from archives import (
    Members,
    archived,
    layer,
    refused,
    refuses,
    same_weights,
    with_config,
)
from keras.src.saving.serialization_lib import SafeModeScope

from refold.keras.files import load, save

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
