"""The steps of a plan, done: tensors are read and written in pieces, so that no large one is whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from refold.checkpoints.dtypes import Spec, as_floats, raw_dtype, rounded, widened
from refold.checkpoints.formulas import Matrix
from refold.checkpoints.naming import Form
from refold.checkpoints.plan import Compose, Constant, Copy, Rebuild, Step, Unspectral
from refold.errors import InputError
from refold.shown import printable
from refold.weights import NUMPY, LowRank, Orthogonal, Rows, Spectral, SpectralState

PIECE = 2**23  # bytes that are copied at once
BLOCK = 2**18  # numbers that are computed with at once, unless one row has more


class Source(Protocol):
    """Tensors that are read from."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """What there is."""

    def read(self, name: str, start: int, size: int) -> bytes | memoryview:
        """So many bytes of a tensor, from the byte ``start`` of it."""


class Sink(Protocol):
    """Tensors that are written to."""

    def write(self, name: str, start: int, data: bytes | memoryview) -> None:
        """These bytes of a tensor, from the byte ``start`` of it."""


def run(steps: Iterable[Step], source: Source, sink: Sink, progress: Callable[[int], None] | None = None) -> None:
    """Do the steps of a plan. ``progress`` is told the number of bytes of the source whenever some are done.

    Raises:
        InputError: a weight holds numbers that are not finite, or its result has some, or its type cannot hold it.
    """
    tell = progress or (lambda size: None)
    for step in steps:
        match step:
            case Copy():
                _copy(step, source, sink, tell)
            case Constant():
                sink.write(step.target, 0, step.data)
            case Rebuild():
                _rebuild(step, source, sink, tell)
            case Unspectral():
                _unspectral(step, source, sink, tell)
            case Compose():
                _compose(step, source, sink, tell)


def _copy(step: Copy, source: Source, sink: Sink, tell: Callable[[int], None]) -> None:
    size = source.specs[step.source].size
    for start in range(0, size, PIECE):
        data = source.read(step.source, start, min(PIECE, size - start))
        sink.write(step.target, start, data)
        tell(len(data))


def _rebuild(step: Rebuild, source: Source, sink: Sink, tell: Callable[[int], None]) -> None:
    stored, targets = step.stored, step.targets
    shown = f"'{printable(stored.name)}'"
    direction = stored.parts["direction"]
    spec = source.specs[direction]
    if stored.form is Form.ADDONS:
        _check_initialized(source, stored.parts["initialized"], shown)
    gain, offset = (
        _column(source, stored.parts[role]) if role in stored.parts else None for role in ("gain", "offset")
    )
    gains: list[Matrix] = []
    offsets: list[Matrix] = []
    # Rows that are taken apart over other units than they were put together over are needed whole, in between.
    whole = step.goal is not None and step.goal_rows != step.source_rows and step.source is not None
    for block in blocks(step.source_rows, whole=whole):
        units = slice(*block.units)
        rows = block.read(source, direction, spec.dtype)
        own_gain, own_offset = (None if part is None else part[units] for part in (gain, offset))
        tell(rows.size * raw_dtype(spec.dtype).itemsize)
        _refuse_endless(rows, shown)
        if step.source is not None and "direction" not in targets:
            assert step.goal is not None
            assert own_gain is not None
            gains.append(step.goal.gain_from(step.source, rows, own_gain))
            continue
        weight = rows
        if step.source is not None:
            numbers = rounded(step.source.weight(rows, own_gain, own_offset), spec.dtype)
            _refuse_endless(as_floats(numbers, spec.dtype), shown)
            block.write(sink, targets["direction"], numbers)
        if step.goal is not None:
            if step.source is not None:  # what is stored is what is taken apart
                weight = as_floats(numbers, spec.dtype).astype(np.float64)
            if whole:
                stored_again = step.source_rows.from_matrix(NUMPY, weight).reshape(step.goal_rows.shape)
                weight = step.goal_rows.to_matrix(NUMPY, stored_again)
            new_gain, new_offset = step.goal.parts(weight)
            gains.append(new_gain)
            if new_offset is not None:
                offsets.append(new_offset)
    kept = (
        source.specs[stored.parts["gain"]].dtype if "gain" in stored.parts and "direction" not in targets else None
    )
    wide = kept or ("F64" if spec.dtype == "F64" else "F32")
    for role, parts in (("gain", gains), ("offset", offsets)):
        if role in targets:
            _write_vector(sink, targets[role], np.concatenate(parts), wide, shown)


def _check_initialized(source: Source, name: str, shown: str) -> None:
    if not any(source.read(name, 0, source.specs[name].size)):
        raise InputError(
            f"{shown}: TensorFlow Addons sets its gain at the first call, which this layer has not seen; call the "
            "model once, and save it again"
        )


def _column(source: Source, name: str) -> Matrix:
    return _whole(source, name).reshape(-1, 1)


def _refuse_endless(numbers: npt.NDArray[Any], shown: str) -> None:
    if not np.isfinite(numbers).all():
        raise InputError(
            f"{shown} has numbers that are not finite, or that its type cannot hold; leave it with --skip"
        )


def _write_vector(sink: Sink, name: str, numbers: Matrix, dtype: str, shown: str) -> None:
    stored = rounded(numbers.reshape(-1), dtype)
    _refuse_endless(as_floats(stored, dtype), shown)
    sink.write(name, 0, stored.tobytes())


def _unspectral(step: Unspectral, source: Source, sink: Sink, tell: Callable[[int], None]) -> None:
    parts = step.stored.parts
    spec = source.specs[parts["direction"]]
    shown = f"'{printable(step.stored.name)}'"
    left, right = _column(source, parts["left"]), _column(source, parts["right"])
    rows = Rows(spec.shape, (step.axis,))
    sigma = 0.0
    for block in blocks(rows):
        matrix = block.read(source, parts["direction"], spec.dtype)
        _refuse_endless(matrix, shown)
        sigma += float((left[slice(*block.units)].T @ (matrix @ right)).item())
    if sigma == 0.0 or not np.isfinite(sigma):
        raise InputError(f"{shown}: its singular vectors give it the singular value {sigma}, which divides nothing")
    for block in blocks(rows):
        matrix = block.read(source, parts["direction"], spec.dtype)
        numbers = rounded(matrix / sigma, spec.dtype)
        _refuse_endless(as_floats(numbers, spec.dtype), shown)
        block.write(sink, step.target, numbers)
        tell(numbers.nbytes)


def _compose(step: Compose, source: Source, sink: Sink, tell: Callable[[int], None]) -> None:
    spec = source.specs[step.stored.parts["direction"]]
    parts = {role: _whole(source, name) for role, name in step.stored.parts.items()}
    matrix = step.rows.to_matrix(NUMPY, parts["direction"].reshape(step.rows.shape))
    gain = parts["gain"].reshape(-1, 1) if "gain" in parts else None
    match step.method:
        case Spectral():
            state = SpectralState(parts["left"], parts["right"])
            weight = step.method.compose(NUMPY, matrix, state, gain)
        case Orthogonal():
            weight = step.method.compose(NUMPY, matrix, parts["base"], gain)
        case LowRank():
            weight = step.method.compose(NUMPY, matrix, parts["up"], parts["down"], gain)
    numbers = rounded(step.rows.from_matrix(NUMPY, weight), spec.dtype)
    _refuse_endless(as_floats(numbers, spec.dtype), f"'{printable(step.stored.name)}'")
    sink.write(step.target, 0, np.ascontiguousarray(numbers).tobytes())
    tell(numbers.nbytes)


def _whole(source: Source, name: str) -> Matrix:
    spec = source.specs[name]
    numbers = widened(source.read(name, 0, spec.size), spec.dtype)
    _refuse_endless(numbers, f"'{printable(name)}'")
    return numbers.reshape(spec.shape)


# ---- rows, block by block ----------------------------------------------------------------------------


class Block:
    """A few output units of a stored weight: a range of the first axis that numbers them.

    ``units`` are the first of them and the one behind the last, as rows of the matrix.
    """

    def __init__(self, rows: Rows, first: int, last: int) -> None:
        axis = rows.unit_axes[0]
        per_step = rows.units // max(1, rows.shape[axis])
        self.units = (first * per_step, last * per_step)
        around, inner = prod(rows.shape[:axis]), prod(rows.shape[axis + 1 :])
        self._runs = [
            ((place * rows.shape[axis] + first) * inner, (last - first) * inner) for place in range(around)
        ]
        self._rows = Rows((*rows.shape[:axis], last - first, *rows.shape[axis + 1 :]), rows.unit_axes)

    def read(self, source: Source, name: str, dtype: str) -> Matrix:
        """Its rows, in float64."""
        width = raw_dtype(dtype).itemsize
        data = b"".join(source.read(name, start * width, count * width) for start, count in self._runs)
        matrix: Matrix = self._rows.to_matrix(NUMPY, widened(data, dtype).reshape(self._rows.shape))
        return matrix

    def write(self, sink: Sink, name: str, numbers: npt.NDArray[Any]) -> None:
        """Its rows, as they are stored."""
        flat = np.ascontiguousarray(self._rows.from_matrix(NUMPY, numbers)).reshape(-1)
        at = 0
        for start, count in self._runs:
            sink.write(name, start * flat.itemsize, flat[at : at + count].tobytes())
            at += count


def blocks(rows: Rows, *, whole: bool = False) -> Iterator[Block]:
    """All rows of a weight, about :data:`BLOCK` numbers at a time; with ``whole`` at once."""
    length = rows.shape[rows.unit_axes[0]]
    per_step = rows.units * rows.fan_in // length
    step = length if whole else max(1, BLOCK // per_step)
    for first in range(0, length, step):
        yield Block(rows, first, min(length, first + step))
