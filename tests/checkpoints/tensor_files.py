"""Safetensors files written byte by byte: not by the code under test, and faults that no library would write."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

CODES = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL", "int64": "I64"}


def with_header(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write(path: Path, arrays: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = entry(list(array.shape), len(data), len(data) + len(raw), CODES[array.dtype.name])
        data += raw
    path.write_bytes(with_header(header, data))
    return path


def weights(seed: int, units: int, fan_in: int) -> tuple[Any, Any]:
    """A direction ``(units, fan_in)`` and a gain ``(units, 1)`` in float32."""
    rng = np.random.default_rng(seed)
    v = rng.normal(size=(units, fan_in)).astype("float32")
    return v, rng.uniform(0.5, 2.0, size=(units, 1)).astype("float32")


def literal(v: Any, g: Any) -> Any:
    """``g v / |v|`` row by row, in float64."""
    wide = v.astype("float64")
    rows = [float(g[i].item()) * wide[i] / np.sqrt((wide[i] ** 2).sum()) for i in range(len(wide))]
    return np.stack(rows)
