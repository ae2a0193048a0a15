"""The verbs, the same for every framework."""

from __future__ import annotations

from typing import Any

from refold.frontend import Frontend, Lifted, frontend_of
from refold.graph import Plan, make_plan


def plan_of(frontend: Frontend, lifted: Lifted) -> Plan:
    """The plan for a lifted model."""
    return make_plan(lifted.graph, frontend.helpers, lifted.evaluated)


def inspect(model: Any, example: Any = None) -> Plan:
    """What would fold in ``model``, what not and why, and what it saves.

    ``example`` is an input of the model (an array, or a nest of arrays), or a shape with None for sizes
    that may change; only needed where the model does not say its inputs. Raises
    :class:`refold.InputError` if the model cannot be read.
    """
    frontend = frontend_of(model)
    return plan_of(frontend, frontend.lift(model, example))


def fold(model: Any, example: Any = None) -> Any:
    """A new, plain model of the same framework that computes the same function.

    The given model stays as it is. Nothing is folded that is not exact or that would cost more (see
    :func:`inspect`, which takes the same arguments).
    """
    frontend = frontend_of(model)
    lifted = frontend.lift(model, example)
    return frontend.lower(lifted, plan_of(frontend, lifted))
