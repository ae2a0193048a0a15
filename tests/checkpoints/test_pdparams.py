"""Paddle's pickles: read where they are state dicts, refused where they are anything else, executed never."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tensor_files import literal, weights

import refold
from refold.errors import InputError

V, G = weights(0, 4, 6)


class Calls:
    """Pickles to a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def saved(folder: Path, state: Any, protocol: int = 4) -> Path:
    path = folder / "a.pdparams"
    path.write_bytes(pickle.dumps(state, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_state_dicts_are_read(protocol: int, kind: Any, tmp_path: Path) -> None:
    state = kind(
        {
            "fc.weight_v": np.asfortranarray(V.T),
            "fc.weight_g": ("fc_0.w_1", G.reshape(-1)),
            "count": np.array(3),
            "big": np.arange(3, dtype=">f4"),
            "StructuredToParameterName@@": {"fc.weight_v": "linear_0.w_0"},
        }
    )
    refold.convert(saved(tmp_path, state, protocol), tmp_path / "b.safetensors")
    result = load_file(tmp_path / "b.safetensors")
    assert set(result) == {"fc.weight", "count", "big"}
    assert np.array_equal(result["fc.weight"].T, literal(V, G).astype("float32"))
    assert result["count"].tolist() == 3
    assert result["big"].tolist() == [0, 1, 2]


def test_what_is_written_is_read_and_bfloat16_stays(tmp_path: Path) -> None:
    half = (V.view(np.uint32) >> 16).astype("uint16")
    path = saved(tmp_path, {"fc.weight": half, "n": np.arange(3)})
    refold.convert(path, tmp_path / "b.pdparams", "paddle", axes=["fc.weight=0"])
    state = pickle.loads((tmp_path / "b.pdparams").read_bytes())
    assert np.array_equal(state["fc.weight_v"], half)
    assert state["fc.weight_g"].dtype == np.float32
    refold.convert(tmp_path / "b.pdparams", tmp_path / "c.pdparams")
    assert np.array_equal(pickle.loads((tmp_path / "c.pdparams").read_bytes())["fc.weight"], half)


def hostile(folder: Path) -> dict[str, bytes]:
    canary = str(folder / "canary")
    return {
        "os.system": pickle.dumps({"a": Calls(os.system, f"touch {canary}")}),
        "eval": pickle.dumps({"a": Calls(eval, f"open({canary!r}, 'w')")}),
        "exec": pickle.dumps(Calls(exec, f"open({canary!r}, 'w')"), protocol=0),
        "open": pickle.dumps({"a": Calls(open, canary, "w")}),
        "getattr": pickle.dumps({"a": Calls(getattr, "", "join")}),
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.tofile\x93.",
        "an attribute of a stand-in": b"\x80\x04\x8c\x05numpy\x8c\x14ndarray.__class__\x93.",
        "numpy.load": pickle.dumps({"a": Calls(np.load, canary)}),
        "an object array": pickle.dumps({"a": np.array([Calls(os.system, f"touch {canary}")], dtype=object)}),
        "another reducer": pickle.dumps({"a": Calls(subprocess.check_call, ["touch", canary])}),
        "something outside": b"\x80\x04\x8c\x01aQ.",
        "an extension": b"\x80\x04\x82\x01.",
    }


@pytest.mark.parametrize("kind", hostile(Path("/x")))
def test_hostile_pickles_are_refused_and_nothing_runs(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pdparams"
    path.write_bytes(hostile(tmp_path)[kind])
    with pytest.raises(InputError) as caught:
        refold.convert(path, tmp_path / "b.safetensors")
    assert str(caught.value).isprintable()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pdparams"]


def test_the_canary_sings_where_it_is_unpickled(tmp_path: Path) -> None:
    """Or the test above would pass whatever the reader did."""
    pickle.loads(hostile(tmp_path)["os.system"])
    assert (tmp_path / "canary").exists()


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = pickle.dumps({"fc.weight_v": V, "fc.weight_g": G.reshape(-1)}, protocol=4)
    path = tmp_path / "a.pdparams"
    for end in range(1, len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError):
            refold.convert(path, tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (pickle.dumps([V]), "holds no weights by name"),
        (pickle.dumps({"a": "text"}), "'a' is no array"),
        (pickle.dumps({3: V}), "'3' is no array"),
        (pickle.dumps({"a": {"moment": V}}), "'a' is no array"),
        (pickle.dumps({"a": V, "UnpackBigParamInfor@@": {}}), "protocol=4"),
        (pickle.dumps({"a": np.array(["x"])}), "array of the type"),
        (pickle.dumps({"a": np.zeros(2, "datetime64[s]")}), "array of the type"),
        # 2 GiB of notes, a string of 2**60 bytes, an array of them: claims that cost memory where they are believed
        (b"\x80\x04}r\xff\xff\xff\x7f.", ""),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**60), "cut off"),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**60), ""),
    ],
)
def test_what_is_no_state_dict(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pdparams"
    path.write_bytes(content)
    if not sentence:  # an empty dict, once the claim is not believed; or not enough memory
        try:
            refold.convert(path, tmp_path / "b.safetensors")
        except InputError:
            return
        assert load_file(tmp_path / "b.safetensors") == {}
        return
    with pytest.raises(InputError, match=sentence):
        refold.convert(path, tmp_path / "b.safetensors")


def test_needs_no_paddle() -> None:
    assert "paddle" not in sys.modules
