"""On which device new tensors are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import paddle


@contextmanager
def beside(tensors: list[Any]) -> Iterator[None]:
    """Make new tensors where the first of ``tensors`` is, and not on Paddle's current device; anywhere for none."""
    before = paddle.device.get_device()
    wanted = _name(tensors[0].place) if tensors else before
    if wanted in (None, before):
        yield
        return
    paddle.device.set_device(wanted)
    try:
        yield
    finally:
        paddle.device.set_device(before)


def _name(place: Any) -> str | None:
    """What ``paddle.device.set_device`` calls a place; None for other accelerators."""
    if place.is_gpu_place():
        return f"gpu:{place.gpu_device_id()}"
    return "cpu" if place.is_cpu_place() else None
