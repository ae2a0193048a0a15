"""The size of the model that a configuration describes, counted without making it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, final

import keras
from keras.src.backend.common import global_state
from keras.src.saving.serialization_lib import ObjectSharingScope, SafeModeScope

from refold.keras.files.archive import MIB, Archive
from refold.keras.files.refused import RefusedError, not_loaded

# Some layers keep part of their variables out of the file, or pack them.
UNSTORED = MIB


@final
class _Budget(list[Any]):
    """Keras' list of the variables that were declared and not made yet, with a limit to their size."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.total = 0

    @property
    def is_exceeded(self) -> bool:
        return self.total > self.limit

    def append(self, variable: Any) -> None:
        self.total += math.prod(map(int, variable.shape))
        if self.is_exceeded:  # before anything else can ask for a value of it
            raise RefusedError("too many parameters")
        super().append(variable)


def screen_size(archive: Archive, customs: Mapping[str, Any], stored: int, uses_customs: bool) -> None:
    """Refuse a configuration that asks for far more parameters than the file stores.

    Keras would make them all, with random numbers, before it looks at the stored ones. So the model is made
    once without values: in a stateless scope, variables are only declared.
    """
    key = "uninitialized_variables"
    before = global_state.get_global_attribute(key)
    budget = _Budget(4 * stored + UNSTORED)
    failure: Exception | None = None
    global_state.set_global_attribute(key, budget)
    try:
        with keras.StatelessScope(initialize_variables=False), SafeModeScope(True), ObjectSharingScope():
            # Keras consumes what it is given.
            config = json.loads(json.dumps(archive.config))
            keras.saving.deserialize_keras_object(config, custom_objects=dict(customs), safe_mode=True)
    except Exception as error:  # whatever Keras raises on a configuration that is none
        failure = error
    finally:
        global_state.set_global_attribute(key, before)
    if budget.is_exceeded:
        raise RefusedError(
            f"its layers ask for at least {budget.total:,} parameters, but its weights hold {stored:,} numbers"
        )
    # A custom layer may need values to be built, and is known not to be hostile.
    if failure is not None and not uses_customs:
        raise RefusedError(not_loaded(failure, archive.written_by)) from failure
