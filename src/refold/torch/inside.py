"""What folds inside of modules that cannot be followed.

A ``forward`` that looks at the numbers in its tensors may go another way for other inputs, so it stays the user's
own code. The modules that it calls are lifted one by one, as the models that they are, on what flowed into them,
and the copy of the module around them gets them folded. This is right as long as the code around them does nothing
with them but call them; whether it does is tried out with stand-ins that can do nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
import torch

from refold.errors import InputError
from refold.frontend import AnyArray, Lifted
from refold.graph.graph import Affine, Graph, Node, Opaque
from refold.recording.symbols import Symbol, leaves, mapped, symbols
from refold.torch import examples, execute
from refold.torch.examples import Spec, to_numpy
from refold.torch.perform import perform
from refold.torch.record import Record
from refold.torch.trace import Step, calls_of_modules, first_line, stored

Tensor = torch.Tensor

# Lifts a module by itself: (module, its arguments as specs, what to put in front of its names).
Lift = Callable[[Any, tuple[Any, ...], str], Lifted]


@final
@dataclass(frozen=True, eq=False)
class Part:
    """A module that is lifted by itself. ``steps`` are the steps of the record around it inside of which it is,
    ``path`` is its path in the whole model."""

    steps: tuple[Step, ...]
    path: str
    module: Any
    lifted: Lifted


@final
@dataclass(frozen=True, eq=False)
class Found:
    """The parts of a record, and sentences on what is none."""

    parts: tuple[Part, ...] = ()
    notes: tuple[str, ...] = ()


def find(model: Any, record: Record, specs: tuple[Any, ...], prefix: str, lift: Lift) -> Found:
    """The parts inside of the steps of ``record`` that were taken whole. ``specs`` are the model's arguments."""
    steps = [step for step in record.trace.steps if step.module is not None]
    if not any(next(step.module.children(), None) is not None for step in steps):
        return Found()
    return _Search(model, record, specs, prefix, lift, steps).found()


# ---- what flows into what ----------------------------------------------------------------------------


@final
@dataclass(eq=False)
class _Search:
    """What was seen of the modules inside of ``steps``, by identity: their calls, whom they call, which of them
    read what others gave (``behind``), and why they are not parts."""

    model: Any
    record: Record
    specs: tuple[Any, ...]
    prefix: str
    lift: Lift
    steps: list[Step]
    calls: dict[int, list[tuple[Any, ...]]] = field(default_factory=dict)
    callees: dict[int, dict[int, Any]] = field(default_factory=dict)
    given: list[tuple[Any, Any, Any]] = field(default_factory=list)
    behind: dict[int, set[int]] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    lifted: dict[int, Lifted] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.whole = {id(step.module): step.module for step in self.steps}
        self.paths = {id(module): path for path, module in self.model.named_modules()}

    def found(self) -> Found:
        for args in self.runs():
            with contextlib.suppress(Exception):  # the recordings ran, or there would be nothing to look into
                self.watch(args)
        while True:
            modules = self.frontier()
            refused = self.used_otherwise(modules)
            if not refused:
                refused = {id(m): why for m in modules if (why := self.why_not(m))}
            if not refused:
                return Found(tuple(self.part(module) for module in modules), tuple(self.notes(modules)))
            self.refused.update(refused)

    def runs(self) -> Iterator[tuple[Any, ...]]:
        """The arguments that the model was given, and those on which it was recorded."""
        if all(spec.sample is not None for spec in examples.tensor_specs(self.specs)):
            yield mapped(lambda leaf: leaf.sample.clone() if isinstance(leaf, Spec) else leaf, self.specs)
        for trace in (self.record.trace, self.record.other):
            tensors = iter(trace.tensors)
            yield mapped(
                lambda leaf, tensors=tensors: next(tensors).clone() if isinstance(leaf, Symbol) else leaf,  # type: ignore[misc]  # no type for it
                trace.inputs,
            )

    def watch(self, args: tuple[Any, ...]) -> None:
        """Run the model and write down the calls inside of what was taken whole."""
        around: list[Any] = []
        gave: list[tuple[Any, int, int]] = []  # what was given, by whom, called by whom

        def hear(original: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
            if around:
                self.callees.setdefault(id(around[-1]), {})[id(module)] = module
                calls = self.calls.setdefault(id(module), [])
                calls.append(_bound(module, args, kwargs, keep=not calls))
                before = {
                    by for tensor, by, caller in gave if args and args[0] is tensor and caller == id(around[-1])
                }
                self.behind.setdefault(id(module), set()).update(before)
            elif id(module) in self.whole:
                self.given.append((module, *mapped(_cloned, (args, kwargs))))
            if not around and id(module) not in self.whole:
                return original(module, *args, **kwargs)
            around.append(module)
            try:
                result = original(module, *args, **kwargs)
            finally:
                around.pop()
            if around:
                gave.append((result, id(module), id(around[-1])))
            return result

        with calls_of_modules(hear), torch.no_grad():
            self.model(*args)

    # ---- what is a part ------------------------------------------------------------------------------

    def frontier(self) -> list[Any]:
        """The outermost modules with weights that were called and are not refused."""
        found: dict[int, Any] = {}
        seen: set[int] = set()

        def go(identity: int) -> None:
            seen.add(identity)
            for inner, module in self.callees.get(identity, {}).items():
                if inner in self.refused or inner in self.whole:
                    if inner not in seen:
                        go(inner)
                elif stored(module):
                    found[inner] = module

        for identity in self.whole:
            go(identity)
        inside = {id(m) for module in found.values() for m in module.modules() if m is not module}
        return [module for identity, module in found.items() if identity not in inside]

    def used_otherwise(self, modules: Sequence[Any]) -> dict[int, str]:
        """The modules with which the code around them does more than call them."""
        misused: dict[int, str] = {}
        memo = {id(module): _StandIn(module, misused) for module in modules}
        twins: dict[int, Any] = {}
        for whole, args, kwargs in self.given if modules else ():
            try:
                twin = twins.setdefault(id(whole), copy.deepcopy(whole, memo))
                with torch.no_grad():
                    twin(*mapped(_cloned, args), **mapped(_cloned, kwargs))
            except Exception as error:  # whatever a user's code raises if it meets a stand-in
                if not misused:
                    return {id(module): f"it cannot be exchanged ({first_line(error)})" for module in modules}
        return misused

    def why_not(self, module: Any) -> str:
        """Why a module is no part; nothing if it is lifted now."""
        identity = id(module)
        if identity in self.lifted:
            return ""
        calls = self.calls[identity]
        reasons = [call[0] for call in calls if isinstance(call[0], str)]
        if reasons:
            return reasons[0]
        if any(_signature(call) != _signature(calls[0]) for call in calls):
            return "it is called with arguments of several kinds"
        try:
            lifted = self.lift(module, calls[0][1], f"{self.prefix}{self.paths[identity]}.")
        except InputError as error:
            return str(error)
        graph = lifted.graph
        for call in calls:
            for name, spec in zip(graph.inputs, examples.tensor_specs(call[1]), strict=True):
                known = graph.values[name].shape
                if any(size not in (None, n) for size, n in zip(known[1:], spec.shape[1:], strict=True)):
                    return "it is called at several sizes, and could be followed at one of them only"
        self.lifted[identity] = lifted
        return ""

    def would_take(self, part: Any, behind: Any) -> bool:
        """Whether a part is linear, and the one behind it a factor and a shift per channel, as batch norms are."""
        one, two = (self.lifted[id(module)].graph.nodes for module in (part, behind))
        scales = all(isinstance(node.op, Affine) and node.op.conv.is_scale for node in two)
        return scales and all(isinstance(node.op, Affine) for node in one)

    def part(self, module: Any) -> Part:
        around = tuple(step for step in self.steps if any(inner is module for inner in step.module.modules()))
        return Part(around, f"{self.prefix}{self.paths[id(module)]}", module, self.lifted[id(module)])

    def notes(self, modules: Sequence[Any]) -> Iterator[str]:
        """What is inside of what was taken whole, has weights, and is not looked into, and why."""
        for module in modules:
            for before in modules:
                if id(before) in self.behind[id(module)] and self.would_take(before, module):
                    first, second = (f"{self.prefix}{self.paths[id(part)]}" for part in (before, module))
                    yield (
                        f"'{second}' is not folded into '{first}', whose result it reads: code that was not "
                        "followed calls both, and may use them otherwise for other numbers; in one module "
                        "(nn.Sequential) they fold"
                    )
        covered = {id(inner) for module in modules for inner in module.modules()}
        seen = [module for module in self.model.modules() if id(module) in self.calls]
        called = {id(inner) for module in seen for inner in module.modules()}
        for whole in self.whole.values():
            for path, module in whole.named_modules():
                if not path or id(module) in covered or not stored(module):
                    continue
                shown = f"{self.prefix}{self.paths.get(id(module), path)}"
                inner = {id(m): self.refused.get(id(m), "") for m in module.modules()}
                if called.isdisjoint(inner):
                    yield f"'{shown}' stays as it is: it was not called on the example"
                    covered |= inner.keys()
                elif reason := self.refused.get(id(module)):
                    yield f"'{shown}' is not folded as a whole: {reason}"
                    covered |= {m for m, why in inner.items() if why == reason}


def _cloned(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _bound(module: Any, args: Any, kwargs: Any, *, keep: bool) -> tuple[Any, ...]:
    """A call as (names, specs of the arguments in the order of the forward's); or (why it cannot be said so,).
    ``keep`` keeps the tensors in the specs."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return ("its arguments are not those that its forward names",)
    if bound.kwargs:
        return ("it is called with arguments that have no place of their own",)
    simple = Tensor | int | float | str | None
    if not all(isinstance(leaf, simple) for leaf in leaves(bound.args)):
        return ("it is called with something else than tensors and numbers",)

    def spec(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        made = examples.spec_of(leaf)
        return replace(made, sample=made.sample.clone() if keep else None)

    try:
        return tuple(bound.arguments), mapped(spec, bound.args)
    except InputError as error:
        return (str(error),)


def _signature(call: tuple[Any, ...]) -> Any:
    """What must be the same for every call: the names, the structure, numbers, types and ranks."""

    def kind(leaf: Any) -> Any:
        return (leaf.dtype, len(leaf.shape)) if isinstance(leaf, Spec) else ("is", repr(leaf))

    return call[0], repr(mapped(kind, call[1]))


@final
class _StandIn:
    """Calls a module, and writes down that it was misused if anything else is asked of it."""

    def __init__(self, module: Any, misused: dict[int, str]) -> None:
        object.__setattr__(self, "_stands_for", (module, misused))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return object.__getattribute__(self, "_stands_for")[0](*args, **kwargs)

    def __getattribute__(self, name: str) -> Any:
        return getattr(_asked(self, f"reads its '{name}'"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        _asked(self, f"sets its '{name}'")

    def __iter__(self) -> Any:
        return iter(_asked(self, "goes through it"))

    def __len__(self) -> int:
        return len(_asked(self, "counts what is in it"))

    def __getitem__(self, place: Any) -> Any:
        return _asked(self, "picks something out of it")[place]

    def __bool__(self) -> bool:
        return True


def _asked(stand_in: _StandIn, what: str) -> Any:
    """Write down that something else than a call is asked of a stand-in; the module that it stands for."""
    module, misused = object.__getattribute__(stand_in, "_stands_for")
    misused[id(module)] = f"the code around it {what}, and does not only call it"
    return module


# ---- the graph ---------------------------------------------------------------------------------------


def tensors_in(parts: Sequence[Part]) -> frozenset[int]:
    """The identities of the parameters and buffers of the parts."""
    return frozenset(id(tensor) for part in parts for tensor in stored(part.module))


def joined(graph: Graph, parts: Sequence[Part]) -> Graph:
    """``graph`` with the graphs of the parts in it. What a module that cannot be followed does before it calls a
    part is an opaque node that gives the part's inputs; what it does in the end reads what its parts give."""
    if not parts:
        return graph
    values = dict(graph.values)
    for part in parts:
        values.update(part.lifted.graph.values)
    nodes: list[Node] = []
    placed: set[str] = set()
    for node in graph.nodes:
        inside = [part for part in parts if any(_gives(step, node) for step in part.steps)]
        given: tuple[str, ...] = ()
        for part in inside:
            inner = part.lifted.graph
            if part.path not in placed:
                placed.add(part.path)
                reads = tuple(dict.fromkeys((*node.inputs, *given)))
                nodes += [Node(inner.inputs[0], Opaque(), reads, inner.inputs), *inner.nodes]
            given += inner.outputs
        reads = tuple(dict.fromkeys((*node.inputs, *given)))
        nodes.append(replace(node, inputs=reads) if inside else node)
    return replace(graph, values=values, nodes=tuple(nodes))


def _gives(step: Step, node: Node) -> bool:
    return bool(step.gives) and step.gives[0].name in node.outputs


# ---- running in float64 ------------------------------------------------------------------------------


def evaluate(
    record: Record, parts: Sequence[Part], feeds: Mapping[str, AnyArray], wanted: Sequence[str]
) -> dict[str, AnyArray]:
    """The values ``wanted`` of a record and its parts in float64; see :func:`refold.torch.execute.evaluate`."""
    found = {name: np.asarray(feeds[name]) for name in wanted if name in feeds}
    found |= execute.evaluate(
        record, feeds, [name for name in wanted if name in record.symbols and name not in found]
    )
    for part in parts:
        graph = part.lifted.graph
        here = [name for name in wanted if name in graph.values and name not in found]
        if not here:
            continue
        known = {name: array for name, array in feeds.items() if name in graph.values}
        if _needs_inputs(graph, known, here):
            known = {**_flowing(record, part, feeds), **known}
        session = part.lifted.record
        found.update(evaluate(session.record, session.parts, known, here))
    return found


def _needs_inputs(graph: Graph, known: Mapping[str, AnyArray], wanted: Sequence[str]) -> bool:
    """Whether ``wanted`` depends on inputs of the graph that are not known."""
    waiting, seen = list(wanted), set(known)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in graph.inputs:
            return True
        waiting += graph.producer[name].inputs if name in graph.producer else ()
    return False


def _flowing(record: Record, part: Part, feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
    """What the module around a part gives to it at first, in float64. Raises InputError."""
    step = part.steps[0]
    around = execute.evaluate(record, feeds, [symbol.name for symbol in step.reads])
    double = execute.in_double_module(record, step)
    path = next(path for path, module in step.module.named_modules() if module is part.module)
    twin = double.get_submodule(path)
    seen: list[Any] = []

    def hear(original: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
        if module is twin and not seen:
            bound = inspect.signature(part.module.forward).bind(*args, **kwargs)
            seen.extend(to_numpy(leaf).copy() for leaf in leaves(bound.args) if isinstance(leaf, Tensor))
        return original(module, *args, **kwargs)

    device = record.trace.tensors[0].device
    try:
        with calls_of_modules(hear):
            perform(
                step,
                lambda symbol: execute.tensor_of(symbol, around[symbol.name]).to(device),
                module=double,
                double=True,
            )
    except Exception as error:  # whatever a user's code raises in float64
        raise InputError(f"'{step.name}' does not run in float64: {first_line(error)}") from error
    names = part.lifted.graph.inputs
    if len(seen) != len(names):
        raise InputError(f"'{part.path}' is not called on this input")
    return dict(zip(names, seen, strict=True))


def everything(record: Record, parts: Sequence[Part]) -> Iterator[tuple[Record, Sequence[Part]]]:
    """A record with its parts, and those of its parts, and so on."""
    yield record, parts
    for part in parts:
        yield from everything(part.lifted.record.record, part.lifted.record.parts)


def own_modules(step: Step, parts: Sequence[Part]) -> list[tuple[str, Any]]:
    """The modules of a step that was taken whole, with their paths, without those in its parts."""
    inside = {id(inner) for part in parts for inner in part.module.modules()}
    return [(path, module) for path, module in step.module.named_modules() if id(module) not in inside]


def own_tensors(step: Step, parts: Sequence[Part]) -> list[Any]:
    """The tensors of a step that was taken whole, without those of its parts."""
    inside = tensors_in(parts)
    return [tensor for tensor in stored(step.module) if id(tensor) not in inside]


def input_symbols(part: Part) -> list[Symbol]:
    """The symbols that flow into a part."""
    return symbols(part.lifted.record.record.trace.inputs)
