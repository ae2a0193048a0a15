"""Training on after a fold, with the optimizer that there is."""

from __future__ import annotations

from typing import Any

import numpy as np

from refold.names import nearest


def continue_training(optimizer: Any, model: Any, plain: Any) -> list[str]:
    """Let ``optimizer``, which trained ``model``, train ``plain``, which :func:`refold.fold` made of it.

    The optimizer stays the same object, with its groups, learning rates and schedulers. In each group, the
    parameters of ``model`` give way to those of ``plain`` that train; each goes to the group of the parameter that
    it shares the longest name with, whose own learning rate, regularizer and clipping it takes. A parameter that
    was not folded (of the same name and the same numbers) keeps its state, such as moments. A folded one starts
    without: the moments were those of other numbers.

    Returns:
        The names of the parameters of ``plain`` that start without a state.

    Raises:
        ValueError: the optimizer trains none of the model's parameters.
    """
    lists = _lists(optimizer)
    groups = {id(parameter): group for group in lists for parameter in group}
    old = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in old.items() if id(parameter) in groups}
    if not trained:
        raise ValueError("the optimizer trains none of the model's parameters")
    gone = {id(parameter) for parameter in old.values()}
    for group in lists:
        group[:] = [parameter for parameter in group if id(parameter) not in gone]
    anew = []
    for name, parameter in plain.named_parameters():
        if parameter.stop_gradient:
            continue
        before = trained[nearest(name, trained)]
        groups[id(before)].append(parameter)
        for option in ("optimize_attr", "regularizer", "need_clip"):
            setattr(parameter, option, getattr(before, option))
        same = before is trained.get(name) and _are_equal(before, parameter)
        if not (same and _hand_over(optimizer, before, parameter)):
            anew.append(name)
    for parameter in trained.values():  # nobody asks for the states of what is gone
        _hand_over(optimizer, parameter, None)
    return anew


def _lists(optimizer: Any) -> list[list[Any]]:
    """The lists of parameters that an optimizer of Paddle goes through; it has no public way to change them."""
    groups = optimizer._param_groups
    return [group["params"] for group in groups] if isinstance(groups[0], dict) else [groups]


def _are_equal(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and np.array_equal(one.numpy(), other.numpy())


def _hand_over(optimizer: Any, before: Any, after: Any) -> bool:
    """Make what the optimizer stores of a parameter that of another one, or of none; says whether there was any."""
    stores = [*optimizer._accumulators.values(), optimizer._master_weights]
    found = [store for store in stores if before.name in store]
    for store in found:
        state = store.pop(before.name)
        if after is not None:
            store[after.name] = state
    made: set[str] = optimizer._already_create_accumulator
    if before.name in made:
        made.remove(before.name)
        if after is not None:
            made.add(after.name)
    return bool(found)
