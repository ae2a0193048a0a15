"""The Keras tests run on one backend per process; ``KERAS_BACKEND`` says which, as always in Keras."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def fixed_seed(request: pytest.FixtureRequest) -> Iterator[None]:
    import keras

    keras.utils.set_random_seed(0)
    yield
    # Clearing collects garbage, for longer than a test of one small layer runs.
    if not getattr(request.module, "SMALL_MODELS", False):
        keras.backend.clear_session()
