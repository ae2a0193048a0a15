"""The Keras tests run on one backend per process; ``KERAS_BACKEND`` says which, as always in Keras."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="module")
def forgotten_programs() -> Iterator[None]:
    """JAX keeps every program that it compiled: gigabytes, by the end of all modules."""
    yield
    if os.environ.get("KERAS_BACKEND") == "jax":
        import jax

        jax.clear_caches()


@pytest.fixture(autouse=True)
def fixed_seed(request: pytest.FixtureRequest) -> Iterator[None]:
    import keras

    keras.utils.set_random_seed(0)
    yield
    # Clearing collects garbage, for longer than a test of one small layer runs.
    if not getattr(request.module, "SMALL_MODELS", False):
        keras.backend.clear_session()


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What is in a good Keras archive."""
    from archives import small_model

    from refold.keras.files import save

    path = tmp_path_factory.mktemp("good") / "small.keras"
    save(small_model(), path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
