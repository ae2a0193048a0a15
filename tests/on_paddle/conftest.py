"""Paddle's tests run in a process of their own: TensorFlow must never be imported beside Paddle."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    import paddle

    paddle.seed(0)
    yield
    assert "tensorflow" not in sys.modules
