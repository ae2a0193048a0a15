"""Headers of safetensors files, well-formed and hostile."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save
from tensor_files import entry, weights, with_header, write

import refold
from refold.checkpoints.dtypes import BITS, Spec, rounded, widened
from refold.checkpoints.header import layout, read_header
from refold.errors import InputError

SOURCE = str(Path(refold.__file__).parents[1])


def read(data: bytes) -> Any:
    return read_header(io.BytesIO(data), len(data), "file")


def test_reads_what_the_library_writes() -> None:
    arrays = {"a": np.arange(6, dtype="float32").reshape(2, 3), "b": np.array(True), "c": np.zeros((0, 4), "int64")}
    data = save(arrays, {"format": "pt"})
    header = read(data)
    assert header.metadata == {"format": "pt"}
    for name, array in arrays.items():
        found = header.entries[name]
        assert found.spec.shape == array.shape
        assert data[found.start : found.start + found.spec.size] == array.tobytes()


def test_the_library_reads_what_is_laid_out_here() -> None:
    arrays = {"half": np.ones(3, "float16"), "double": np.ones((2, 2)), "none": np.zeros((0,), "float32")}
    specs = {"half": Spec("F16", (3,)), "double": Spec("F64", (2, 2)), "none": Spec("F32", (0,))}
    beginning, entries, size = layout(specs, {"by": "test"})
    file = bytearray(size)
    file[: len(beginning)] = beginning
    for name, found in entries.items():
        file[found.start : found.start + found.spec.size] = arrays[name].tobytes()
        assert found.start % (BITS[found.spec.dtype] // 8) == 0
    for name, array in load(bytes(file)).items():
        assert np.array_equal(array, arrays[name])
    assert read(bytes(file)).entries == entries


GOOD = {"a": entry([2], 0, 8), "b": entry([1], 8, 12)}
DATA = bytes(12)
FAULTS = {
    "empty": (b"\0" * 9, "this is no safetensors file"),
    "a header that is longer than the file": (with_header(GOOD, DATA, length=10_000), "cut off"),
    "a header of 2**63 bytes": (with_header(GOOD, DATA, length=2**63), "cut off"),
    "not UTF-8": (with_header(b'{"\xff":1}'), "not JSON"),
    "not JSON": (with_header(b'{"a":'), "not JSON"),
    "a list": (with_header(b"[1,2,3]"), "does not begin with"),
    "spaces first": (with_header(b" " + json.dumps(GOOD).encode(), DATA), "does not begin with"),
    "a name twice": (with_header(b'{"a":1,"a":1}'), "'a' twice"),
    "a key of a tensor twice": (
        with_header(b'{"a":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4)),
        "'dtype' twice",
    ),
    "deep": (with_header(b'{"a":' + b"[" * 100_000), "not JSON"),
    "very deep": (with_header(b'{"a":' + b"[" * 3_000_000), "or nests them"),
    "too many": (with_header(b'{"a":' + b"{" * 1_000_003), "more than 1000000 tensors"),
    "overlap": (with_header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, DATA), "overlaps"),
    "the same place": (with_header({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)), "overlaps"),
    "a hole": (with_header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, DATA), "belong to no tensor"),
    "a hole in front": (with_header({"b": entry([1], 8, 12)}, DATA), "belong to no tensor"),
    "more behind": (with_header(GOOD, DATA + b"x"), "1 bytes behind its last tensor"),
    "less": (with_header(GOOD, DATA[:-1]), "outside the file"),
    "backwards": (with_header({"a": entry([2], 8, 0)}, DATA), "outside the file"),
    "negative offset": (with_header({"a": entry([2], -8, 0)}, DATA), "outside the file"),
    "negative shape": (with_header({"a": entry([-2, -1], 0, 8)}, bytes(8)), "a shape that is none"),
    "overflow": (with_header({"a": entry([2**62, 4, 2], 0, 0)}), "not what its type and shape need"),
    "huge numbers": (with_header({"a": entry([2**64], 0, 0)}), "a shape that is none"),
    "endless digits": (with_header(b'{"a":' + b"1" * 5000 + b"}"), "not JSON"),
    "shape of floats": (with_header({"a": {**entry([], 0, 8), "shape": [2.0]}}, bytes(8)), "a shape that is none"),
    "shape of truths": (with_header({"a": {**entry([], 0, 4), "shape": [True]}}, bytes(4)), "a shape that is none"),
    "another size": (with_header({"a": entry([3], 0, 8)}, bytes(8)), "has 8 bytes"),
    "unknown type": (with_header({"a": entry([2], 0, 8, "F99")}, bytes(8)), "unknown type F99"),
    "half a byte": (with_header({"a": entry([1], 0, 1, "F4")}, bytes(1)), "has 1 bytes"),
    "more keys": (with_header({"a": {**entry([2], 0, 8), "x": 1}}, bytes(8)), "not described by"),
    "no dict": (with_header({"a": [1]}), "not described by"),
    "metadata of numbers": (with_header({"__metadata__": {"a": 1}}), "metadata"),
    "metadata of nothing": (with_header({"__metadata__": None}), "metadata"),
    "a name for a terminal": (with_header({"\x1b[2J": entry([3], 0, 8)}, bytes(8)), r"\\x1b"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused_in_a_sentence(fault: str) -> None:
    data, sentence = FAULTS[fault]
    with pytest.raises(InputError, match=sentence) as caught:
        read(data)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_what_the_faults_are_made_from_is_read() -> None:
    assert list(read(with_header(GOOD, DATA)).entries) == ["a", "b"]


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.safetensors", {"v": weights(0, 3, 5)[0]}).read_bytes()
    for end in range(len(whole)):
        with pytest.raises(InputError):
            read(whole[:end])


def test_a_hostile_header_costs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(with_header(b'{"a":' + b"[" * 30_000_000))
    code = (
        "import sys, resource\nfrom refold import convert\nfrom refold.errors import InputError\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({2**30}, {2**30}))\n"
        "try:\n    convert(sys.argv[1], sys.argv[2])\nexcept InputError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "plain.safetensors")],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": SOURCE, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "or nests them" in done.stdout


def test_bfloat16_is_rounded_once_to_the_nearest_even() -> None:
    """Against exact fractions: all neighbors of a number that has 8 bits, and what lies in the middle of them."""
    rng = np.random.default_rng(0)
    some = (rng.integers(128, 256, 400) * 2.0 ** rng.integers(-140, 120, 400)) * rng.choice([-1.0, 1.0], 400)
    step = np.exp2(np.maximum(np.frexp(some)[1] - 8, -133).astype("float64"))
    for fraction, expected in ((0.0, 0.0), (0.25, 0.0), (0.5 + 1e-9, 1.0), (0.5 - 1e-9, 0.0), (0.75, 1.0)):
        base = np.trunc(some / step) * step  # of the numbers that bfloat16 has
        got = widened(rounded(base + np.sign(some) * fraction * step, "BF16").tobytes(), "BF16")
        assert np.array_equal(got, base + np.sign(some) * expected * step), fraction
    ties = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-134, 3 * 2.0**-134])
    wanted = np.array([1.0, 1 + 2 * 2.0**-7, 0.0, 2 * 2.0**-133])
    assert np.array_equal(widened(rounded(ties, "BF16").tobytes(), "BF16"), wanted)
    assert np.isinf(widened(rounded(np.array([3.4e38, -1e300]), "BF16").tobytes(), "BF16")).all()
