"""The PyTorch front end: lift, lower, run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, final

import torch

from refold.algebra.affine import AffineConv
from refold.algebra.refusal import Refusal
from refold.blocks.unfold import Choose
from refold.errors import InputError
from refold.frontend import AnyArray, Identity, Lifted, Rich
from refold.graph.graph import Graph
from refold.graph.plan import Plan
from refold.recording.arguments import argument_names, input_names
from refold.recording.steps import UntraceableError
from refold.recording.symbols import leaves
from refold.recording.twice import BoundError
from refold.torch import checks, examples, execute, express, inside, wrappers
from refold.torch.examples import to_numpy
from refold.torch.lift import evaluated, lift_record, parameters_of, used
from refold.torch.lower import lower_plan
from refold.torch.record import Made, Record, record_twice
from refold.torch.trace import Step, dtype_name


def owns(model: Any) -> bool:
    """Whether this front end reads ``model``."""
    return isinstance(model, torch.nn.Module)


@final
@dataclass(frozen=True, eq=False)
class Session:
    """What the front end remembers of a lifted model: the record, its arguments with their names, the sizes at
    which the model could not be recorded, and what is inside of modules that cannot be followed."""

    record: Record
    specs: tuple[Any, ...]
    names: tuple[str, ...]
    failed: tuple[examples.Attempt, ...]
    parts: tuple[inside.Part, ...] = ()


@final
class TorchFrontend:
    """See :class:`refold.frontend.Frontend`."""

    name = "torch"

    def lift(self, model: Any, example: Any = None) -> Lifted:
        """The neutral graph of a torch module in eval mode."""
        given = wrappers.unwrapped(model)
        checks.check(given)
        whole = wrappers.unwrapped(wrappers.as_one(model))
        specs = examples.specs_of(whole, example)
        notes = _notes(whole)
        if whole is not model and any(map(wrappers.is_in_pieces, given.parameters())):
            wrappers.check_same(model, whole, examples.feeds(specs, 0, *examples.attempts(specs)[-1]))
            notes += ("its weights were gathered from the pieces that several processes have",)
        lifted = _lifted(whole, specs)
        return replace(lifted, notes=(*notes, *lifted.notes))

    def helpers(self, conv: AffineConv, space: tuple[int | None, ...]) -> int | Refusal:
        """See :func:`refold.torch.express.helpers`."""
        return express.helpers(conv, space)

    def lower(self, lifted: Lifted, plan: Plan) -> Any:
        """A module of plain modules, in eval mode, that follows the plan."""
        plain = _lowered(lifted, plan, {})
        if isinstance(plain, torch.fx.GraphModule):
            # Known from now on, so that the plain model needs no example.
            plain.meta["refold.example"] = examples.plain_example(lifted.record.specs)
        return plain

    def unfold(self, model: Any, choose: Choose, example: Any = None) -> Rich:
        """See :func:`refold.torch.unfold.unfold`."""
        from refold.torch.unfold import unfold

        return unfold(wrappers.unwrapped(wrappers.as_one(model)), choose, example)

    def evaluate(self, lifted: Lifted, feeds: Mapping[str, AnyArray], wanted: Sequence[str]) -> dict[str, AnyArray]:
        """Float64 values, by torch's own functions."""
        return inside.evaluate(lifted.record.record, lifted.record.parts, feeds, wanted)

    def run(self, lifted: Lifted, inputs: Sequence[AnyArray], *, optimized: bool = False) -> list[AnyArray]:
        """The model's outputs, eagerly."""
        return execute.run(lifted.record.record, lifted.model, inputs)

    def arrays(self, example: Any) -> list[AnyArray] | None:
        """The arrays of an example, flat and in order; None if it is a shape (or nothing)."""
        return examples.arrays_of(example)

    def versions(self) -> dict[str, str]:
        """The version of torch."""
        return {"torch": str(torch.__version__)}

    def identity(self, lifted: Lifted, node: str) -> Identity:
        """The function or class of a step with its settings, and its weights."""
        record, step, part = _home(lifted, node)
        parts = [p for p in _parts_of(lifted, record) if step in p.steps]
        tensors: list[Any] = []
        if step.module is not None:
            settings = _settings(inside.own_modules(step, parts))
            kind = f"{type(step.module).__module__}.{type(step.module).__qualname__} {settings}"
            tensors += inside.own_tensors(step, parts)
        else:
            kind = step.what
        if part is not None:
            kind = f"what {kind} gives to {part.path}"
        plain = [record.text_of(leaf) for leaf in leaves((step.args, step.kwargs))]
        # Weights that are computed count as what they are shipped as.
        tensors += [used(constant, record.doubles) for constant in step.constants]
        unseen = UNSEEN if parts and part is None else ""
        return Identity(f"{kind} {[text for text in plain if text]}", tuple(map(to_numpy, tensors)), unseen)

    def storage(self, lifted: Lifted, node: str) -> str:
        """The type of the largest tensor of a step."""
        tensors = sorted(parameters_of(_home(lifted, node)[1]), key=lambda tensor: -prod(tensor.shape))
        return next(iter([dtype_name(tensor) for tensor in tensors]), "float32")

    def load(self, path: Path, *, imports: Sequence[str] = (), trust: bool = False) -> Any:
        """See :func:`refold.torch.files.load`."""
        from refold.torch import files

        return files.load(path, imports=imports, trust=trust)

    def save(self, model: Any, path: Path, *, overwrite: bool = False, example: Any = None) -> None:
        """See :func:`refold.torch.files.save`."""
        from refold.torch import files

        files.save(model, path, overwrite=overwrite, example=example)

    def restore(self, model: Any, weights: Path | None) -> Any:
        """See :func:`refold.torch.files.restore`."""
        from refold.torch import files

        return files.restore(model, weights)


FRONTEND = TorchFrontend()

UNSEEN = (
    "its own code was not followed: it is the same in both models, and what it calls is looked at by itself, but "
    "where it decides by numbers it may decide otherwise on rounded ones"
)


def _home(lifted: Lifted, node: str) -> tuple[Record, Step, inside.Part | None]:
    """The record that a node comes from, with its step; if the node stands for what a module gives to a part, that
    module's step, and the part."""
    output = lifted.graph.node[node].outputs[0]
    for record, parts in inside.everything(lifted.record.record, lifted.record.parts):
        if output in record.owners:
            return record, record.owners[output], None
        for part in parts:
            if output in part.lifted.graph.inputs:
                return record, part.steps[0], part
    raise AssertionError(f"no step gives {output}")


def _parts_of(lifted: Lifted, record: Record) -> Sequence[inside.Part]:
    """The parts of one of the records."""
    found = inside.everything(lifted.record.record, lifted.record.parts)
    return next(parts for other, parts in found if other is record)


def _lifted(model: Any, specs: tuple[Any, ...], prefix: str = "") -> Lifted:
    """A model, or a part of one, on what ``specs`` say. Raises InputError."""
    names = argument_names(model, specs)
    record, failed, found = _recorded(model, specs, input_names(names, specs), prefix)
    record = replace(record, parted=inside.tensors_in(found.parts))
    graph = inside.joined(lift_record(model, record), found.parts)
    inner = [part.lifted for part in found.parts]
    computed = (*_evaluated(graph, record), *(name for part in inner for name in part.evaluated))
    notes = (*found.notes, *(note for part in inner for note in part.notes))
    return Lifted(graph, model, Session(record, specs, names, failed, found.parts), computed, notes)


def _lowered(lifted: Lifted, plan: Plan, memo: dict[int, Any]) -> Any:
    """What a lifted model becomes. ``memo`` is that of all copies: whoever copies what is around a part gets what
    the part became."""
    session = lifted.record
    for part in session.parts:
        memo[id(part.module)] = _lowered(part.lifted, plan, memo)
    record = session.record
    mine = replace(plan, regions=tuple(region for region in plan.regions if region.value in record.symbols))
    plain = lower_plan(lifted.graph, record, mine, lifted.model, session.names, memo)
    if not isinstance(plain, torch.fx.GraphModule):
        return plain
    if not record.bound and any(examples.runs(plain, session.specs, attempt) for attempt in session.failed):
        # What bound the original to its sizes is gone, so that has to be said.
        bound = replace(record, bound=True)
        plain = lower_plan(lifted.graph, bound, mine, lifted.model, session.names, memo)
    return plain


# ---- reading a model -------------------------------------------------------------------------------


def _recorded(
    model: Any, specs: tuple[Any, ...], names: Any, prefix: str
) -> tuple[Record, tuple[examples.Attempt, ...], inside.Found]:
    """The record of a model, the sizes at which there is none, and what is inside of modules that cannot be
    followed. Raises InputError."""
    error: UntraceableError | None = None
    bound = False
    failed: list[examples.Attempt] = []
    made: Made = {}
    for attempt in examples.attempts(specs):
        change, pair = attempt
        if change and bound:
            continue
        feeds = [examples.feeds(specs, which, change, pair) for which in (0, 1)]
        try:
            record = record_twice(model, feeds, names, strict=bool(change), bound=bound, prefix=prefix, made=made)
            return record, tuple(failed), inside.find(model, record, specs, prefix, _lifted)
        except UntraceableError as found:
            error, bound = found, bound or isinstance(found, BoundError)
            failed.append(attempt)
    for attempt in examples.attempts(specs):
        feeds = [examples.feeds(specs, which, *attempt) for which in (0, 1)]
        with contextlib.suppress(UntraceableError):
            # As it is, with what folds inside of it.
            record = record_twice(model, feeds, names, whole={id(model): str(error)}, prefix=prefix)
            parts = inside.find(model, record, specs, prefix, _lifted)
            if parts.parts:
                return record, (), parts
    name = type(model).__name__
    reason = checks.why_it_does_not_run(model, examples.feeds(specs, 0, *examples.attempts(specs)[-1]))
    if reason:
        raise InputError(f"the model '{name}' does not run {reason}; give an example that it takes") from error
    raise InputError(f"the model '{name}' cannot be followed: {error}") from error


def _evaluated(graph: Graph, record: Record) -> tuple[str, ...]:
    """The modules whose weights are computed from other parameters."""
    found = [
        (f"{record.prefix}{step.scope.path}" if step.scope else "").removesuffix(".") or step.name
        for step in record.trace.steps
        if evaluated(graph, step)
    ]
    return tuple(dict.fromkeys(found))


def _notes(model: Any) -> tuple[str, ...]:
    hooked = [path or type(model).__name__ for path, module in model.named_modules() if _hooks(module)]
    if not hooked:
        return ()
    return (
        f"hooks act as they did while the model was recorded, and are gone where it folds: {', '.join(hooked)}",
    )


def _hooks(module: Any) -> list[Any]:
    """The hooks that a user put on a module; torch has some of its own, which compute weights or check inputs."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    modules = [getattr(hook, "__module__", None) or type(hook).__module__ for hook in hooks]
    return [hook for hook, name in zip(hooks, modules, strict=True) if not name.startswith("torch.")]


# ---- what a step is ------------------------------------------------------------------------------


def _settings(modules: Sequence[tuple[str, Any]]) -> list[tuple[str, str, str]]:
    """The simple attributes of modules with their paths."""
    found = []
    for path, inner in modules:
        for name, value in sorted(vars(inner).items()):
            if name != "training" and not name.startswith("_") and _is_simple(value):
                found.append((path, name, repr(value)))
    return found


def _is_simple(value: Any) -> bool:
    return all(isinstance(leaf, int | float | str | type(None)) for leaf in leaves(value))
