"""The verbs, the same for every framework."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from refold.algebra import AffineConv, Refusal
from refold.bench import Timing, summarize, time_in_turn
from refold.blocks import BLOCKS, BatchNorm
from refold.blocks.unfold import BlockFunction, Rounding, Unfolded, stand_in
from refold.blocks.unfold import unfold as start_at
from refold.errors import InputError
from refold.frontend import Frontend, Lifted, Rich, frontend_of
from refold.graph import Plan, make_plan
from refold.graph.formula import Formulas
from refold.proof.certificate import Certificate
from refold.proof.prove import prove as prove_lifted
from refold.proof.recheck import Recheck, compare

NOT_ASKED = "it is not among those that were asked for"


def plan_of(frontend: Frontend, lifted: Lifted) -> Plan:
    """The plan for a lifted model."""
    return make_plan(lifted.graph, frontend.helpers, lifted.evaluated, lifted.notes)


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


def unfold(
    model: Any,
    block: str | BlockFunction = "repvgg",
    example: Any = None,
    *,
    only: Sequence[str] = ("*",),
    seed: int = 0,
) -> Any:
    """A model of the same framework with train-time blocks in the places of the convolutions of ``model``, which
    computes the same function: the way back, to train a plain network on in a rich form, and fold it again.

    The given model stays as it is. ``block`` is a name of :data:`refold.blocks.BLOCKS`, or a function like those;
    ``only`` takes the convolutions whose path matches one of the patterns (``"stage1.*"``). If ``example`` holds
    arrays (some real data), the batch norms of the blocks start at their statistics, so that the model computes the
    same in training as well; without, they start at mean 0 and variance 1, and the first steps in training see
    another function than inference does. ``seed`` is that of the branches that are drawn.

    Raises :class:`refold.InputError` if no convolution can be unfolded, with the reason.
    """
    return rich_of(model, block, example, only=only, seed=seed).model


def rich_of(
    model: Any, block: str | BlockFunction, example: Any = None, *, only: Sequence[str] = ("*",), seed: int = 0
) -> Rich:
    """What :func:`unfold` gives, with what became of each convolution. Raises as that does."""
    function = _block(block)

    def is_asked(path: str) -> bool:
        return any(fnmatchcase(path, pattern) for pattern in only)

    def choose(path: str, target: AffineConv, norm: BatchNorm, rounding: Rounding) -> Unfolded | Refusal:
        expression = stand_in(function, target, norm) if is_asked(path) else Refusal(NOT_ASKED)
        if isinstance(expression, Refusal):
            return expression
        # Numbers of its own for every place, the same ones every time.
        return start_at(expression, target, seed=zlib.crc32(path.encode()) + seed, rounding=rounding)

    rich = frontend_of(model).unfold(model, choose, example)
    if not rich.unfolded:
        asked = [(path, reason) for path, reason in rich.kept if is_asked(path)]
        if rich.kept and not asked:
            raise InputError(f"no convolution has a path like {', '.join(only)}; the first is '{rich.kept[0][0]}'")
        path, reason = next(iter(asked), ("", "the model has no convolutions"))
        raise InputError(f"nothing was unfolded: {path + ': ' if path else ''}{reason}")
    return rich


def _block(block: str | BlockFunction) -> BlockFunction:
    if not isinstance(block, str):
        return block
    known: dict[str, BlockFunction] = {function.__name__: function for function in BLOCKS}
    if block not in known:
        raise InputError(f"there is no block '{block}'; there are {', '.join(known)}")
    return known[block]


def prove(model: Any, plain: Any, example: Any = None, *, seed: int = 0, end_to_end: bool = True) -> Certificate:
    """Are ``model`` and ``plain`` the same function? The certificate's ``ok`` says it, the rest is the
    evidence (``docs/certificate.md``).

    The two need not come from :func:`fold`; they must be models of one framework. If ``example`` holds
    arrays (and not a shape), the whole models are compared on them as well. ``end_to_end=False`` saves the time of
    running the whole models on a dozen inputs, where everything is proved without that.
    """
    frontend = frontend_of(model)
    if frontend_of(plain) is not frontend:
        raise InputError("the two models are of different frameworks; prove compares models of one framework")
    before, after = frontend.lift(model, example), frontend.lift(plain, example)
    given = frontend.arrays(example)
    return prove_lifted(
        frontend,
        before,
        after,
        given,
        seed=seed,
        versions=frontend.versions(),
        witness=Formulas(),
        end_to_end=end_to_end,
    )


def check(
    certificate: Certificate | Mapping[str, Any] | str, model: Any, plain: Any, example: Any = None
) -> Recheck:
    """Does a stored certificate hold for these two models? Their digests are compared with those in it, and the
    proof is done again with its seed.

    ``certificate`` is one, or what :meth:`Certificate.to_json` gave, as data or as text; the other arguments are
    those of :func:`prove`. Raises :class:`refold.InputError` for what is no certificate.
    """
    try:
        stored = certificate if isinstance(certificate, Certificate) else Certificate.from_json(certificate)
    except ValueError as error:
        raise InputError(f"this is no certificate that can be checked: {error}") from error
    return compare(stored, prove(model, plain, example, seed=stored.seed, end_to_end=bool(stored.end_to_end)))


def bench(
    model: Any,
    plain: Any,
    example: Any = None,
    *,
    repeats: int = 30,
    progress: Callable[[int], Any] | None = None,
) -> Timing:
    """How much faster ``plain`` is than ``model``: latency in turn on one input, and costs.

    ``example`` is as for :func:`inspect`; arrays are used as they are, else one random example is made.
    ``progress`` is called with the number of rounds done.
    """
    frontend = frontend_of(model)
    before, after = frontend.lift(model, example), frontend.lift(plain, example)
    inputs = frontend.arrays(example) or [
        np.random.default_rng(0).normal(size=before.graph.values[name].nominal).astype("float32")
        for name in before.graph.inputs
    ]
    first, second = time_in_turn(
        [
            lambda: frontend.run(before, inputs, optimized=True),
            lambda: frontend.run(after, inputs, optimized=True),
        ],
        repeats=repeats,
        progress=progress,
    )
    plans = [plan_of(frontend, lifted) for lifted in (before, after)]
    return summarize(
        first,
        second,
        batch=len(inputs[0]),
        costs=(plans[0].before, plans[1].before),
        parameters=(before.graph.parameters, after.graph.parameters),
    )
