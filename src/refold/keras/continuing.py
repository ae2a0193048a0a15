"""Training on after a fold, as the optimizer that there is would."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops


def continue_training(optimizer: Any, model: Any, plain: Any) -> tuple[Any, list[str]]:
    """An optimizer for ``plain``, which :func:`refold.fold` made of ``model``, that goes on where ``optimizer`` is.

    An optimizer of Keras belongs to the variables that it was built for, so this is a second one: with the same
    configuration, learning rate (or schedule) and count of steps. What it keeps of a variable that was not folded
    (of the same layer, with the same numbers), such as moments, goes on, too. Of a folded one it starts without:
    the moments were those of other numbers. Compile ``plain`` with it.

    Returns:
        The optimizer, and the paths of the variables of ``plain`` that start without a state.

    Raises:
        ValueError: the optimizer was not built for the trainable variables of ``model``.
    """
    old, new = model.trainable_variables, plain.trainable_variables
    if not optimizer.built or [id(v) for v in optimizer._trainable_variables] != [id(v) for v in old]:
        raise ValueError("the optimizer was not built for the trainable variables of this model")
    made = type(optimizer).from_config(optimizer.get_config())
    made.build(new)
    pairs: dict[int, int] = {}
    for index, variable in enumerate(new):
        same = (i for i, other in enumerate(old) if i not in pairs.values() and _is_kept(other, variable))
        if (known := next(same, None)) is not None:
            pairs[index] = known
    _go_on(optimizer, made, pairs, len(old))
    return made, [variable.path for index, variable in enumerate(new) if index not in pairs]


def _is_kept(before: Any, after: Any) -> bool:
    """Whether a variable is another one's copy: of the same layer, wherever that was, and with the same numbers."""
    if not f"/{before.path}".endswith(f"/{after.path}") or tuple(before.shape) != tuple(after.shape):
        return False
    return bool(np.array_equal(ops.convert_to_numpy(before), ops.convert_to_numpy(after)))


def _go_on(before: Any, after: Any, pairs: dict[int, int], count: int) -> None:
    """Copy what belongs to no variable, and what belongs to each of a pair: Keras has lists of the latter."""
    for name, value in vars(before).items():
        if isinstance(value, keras.optimizers.Optimizer):  # inside of one that scales the loss
            _go_on(value, getattr(after, name), pairs, count)
        elif isinstance(value, keras.Variable):
            getattr(after, name).assign(value)
        elif isinstance(value, list) and len(value) == count and not name.endswith("_variables"):
            for index, known in pairs.items():
                if isinstance(value[known], keras.Variable):
                    getattr(after, name)[index].assign(value[known])
