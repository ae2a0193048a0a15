"""The verbs, the same for every framework."""

from __future__ import annotations

from typing import Any

from refold.errors import InputError
from refold.frontend import Frontend, Lifted, frontend_of
from refold.graph import Plan, make_plan
from refold.evidence.certificate import Certificate
from refold.evidence.prove import prove as prove_lifted


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


def prove(model: Any, plain: Any, example: Any = None, *, seed: int = 0) -> Certificate:
    """Are ``model`` and ``plain`` the same function? The certificate's ``ok`` says it, the rest is the
    evidence (``docs/certificate.md``).

    The two need not come from :func:`fold`; they must be models of one framework. If ``example`` holds
    arrays (and not a shape), the whole models are compared on them as well.
    """
    frontend = frontend_of(model)
    if frontend_of(plain) is not frontend:
        raise InputError("the two models are of different frameworks; prove compares models of one framework")
    before, after = frontend.lift(model, example), frontend.lift(plain, example)
    given = frontend.arrays(example)
    return prove_lifted(frontend, before, after, given, seed=seed, versions=frontend.versions())
