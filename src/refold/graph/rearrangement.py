"""Telling what a chain of reshapes, transposes and index expressions does.

Such a chain moves elements and computes nothing, so sending the numbers ``0, 1, 2, ...`` through it
shows where every element goes. If that is a slice, a choice of channels or a moved axis, the chain is
that, however it is written (a channel shuffle is a reshape, a transpose and a reshape).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from refold.graph.graph import Gain, Op, Passage, Relayout, Select, Slice

Indices = npt.NDArray[Any]


def positions(shape: Sequence[int]) -> Indices:
    """An array of this shape that holds the place of each of its elements."""
    return np.arange(int(np.prod(shape)), dtype=np.int64).reshape(tuple(shape))


def classify(samples: Sequence[tuple[tuple[int, ...], Indices]]) -> Op | None:
    """What a rearrangement does, from what it made of :func:`positions` at one or more shapes.

    Each sample is the shape that went in and the array that came out; sizes that are not known must
    differ between samples. None if it is nothing that the engine has a word for.
    """
    # Contiguous: numpy's unravel_index (2.4) is wrong for large views.
    found = [_classify_one(shape, np.ascontiguousarray(result)) for shape, result in samples]
    first = found[0]
    if first is None or any(other != first for other in found):
        return None
    return first


def passages(samples: Sequence[tuple[tuple[int, ...], Indices]]) -> tuple[Passage, ...]:
    """The ways on which maps per channel pass through a rearrangement, from samples as for :func:`classify`: each
    number that it gives is one that it read."""
    found = [_passages_of_one(shape, np.asarray(result)) for shape, result in samples]
    return tuple(way for way in found[0] if all(way in others for others in found))


def _passages_of_one(shape: tuple[int, ...], result: Indices) -> list[Passage]:
    if result.size == 0 or result.ndim < 2 or len(shape) < 2:
        return []
    sources = np.unravel_index(np.ascontiguousarray(result), shape)
    if not np.array_equal(sources[0], np.broadcast_to(_along(result, 0), result.shape)):
        return []
    found = []
    for axis_in, axis_out in product(range(1, len(shape)), range(1, result.ndim)):
        size = result.shape[axis_out]
        pairs = np.unique(sources[axis_in] * size + _along(result, axis_out))
        ins, outs = pairs // size, pairs % size
        if len(pairs) not in (np.unique(ins).size, np.unique(outs).size):
            continue  # several are made of several: nothing but one number for all would pass
        if shape[axis_in] == size and np.array_equal(ins, np.arange(size)) and np.array_equal(outs, ins):
            found.append(Passage(axis_in, axis_out))
        else:
            found.append(Passage(axis_in, axis_out, tuple(ins.tolist()), tuple(outs.tolist())))
    return found


def _along(array: Indices, axis: int) -> Indices:
    """The index along one axis, in a shape that broadcasts to that of ``array``."""
    return np.arange(array.shape[axis]).reshape([-1 if place == axis else 1 for place in range(array.ndim)])


def _classify_one(shape: tuple[int, ...], result: Indices) -> Op | None:
    if result.ndim != len(shape) or result.size == 0:
        return None
    chosen = _per_axis(shape, result)
    if chosen is None:
        return _moved_axis(shape, result)
    if not np.array_equal(chosen[0], np.arange(shape[0])):
        return None
    changed = [
        axis
        for axis, (index, size) in enumerate(zip(chosen, shape, strict=True))
        if not np.array_equal(index, np.arange(size))
    ]
    if not changed:
        return Gain()
    cuts = [_cut(index, size) for index, size in zip(chosen, shape, strict=True)]
    known = [cut for cut in cuts if cut is not None]
    if len(known) == len(cuts):
        return Slice(tuple(known))
    if len(changed) == 1:
        return Select(tuple(int(i) for i in chosen[changed[0]]), changed[0])
    return None


def _per_axis(shape: tuple[int, ...], result: Indices) -> list[Indices] | None:
    """One index vector per axis such that ``result[i, j, ...]`` is the element ``[v0[i], v1[j], ...]``."""
    vectors = []
    for axis in range(result.ndim):
        lead = tuple(slice(None) if other == axis else 0 for other in range(result.ndim))
        vectors.append(np.unravel_index(np.ascontiguousarray(result[lead]), shape)[axis])
    if not np.array_equal(np.ravel_multi_index(np.ix_(*vectors), shape), result):
        return None
    return vectors


def _cut(index: Indices, size: int) -> tuple[int, int, int] | None:
    """The slice that picks ``index`` from ``size`` positions, counted from both ends."""
    start = int(index[0])
    step = int(index[1] - index[0]) if index.size > 1 else 1
    if step < 1 or not np.array_equal(index, start + step * np.arange(index.size)):
        return None
    if step > 1:
        # Positions behind the last one picked that a step would not reach count as not trimmed.
        return (start, 0, step) if start + step * index.size >= size else None
    return start, size - 1 - int(index[-1]), 1


def _moved_axis(shape: tuple[int, ...], result: Indices) -> Op | None:
    everything = positions(shape)
    for axis_in in range(1, len(shape)):
        for axis_out in range(1, len(shape)):
            if axis_in == axis_out:
                continue
            moved = np.moveaxis(everything, axis_in, axis_out)
            if moved.shape == result.shape and np.array_equal(moved, result):
                return Relayout(axis_in, axis_out)
    return None
