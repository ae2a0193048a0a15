"""From a plan back to a torch module: a ``torch.fx.GraphModule`` of plain modules.

What the plan leaves alone stays the user's own: whole modules, as copies under their own names. What it folds
becomes ``nn.Conv*d`` and ``nn.Linear``. In between stand the functions that the user's forward called.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import fx

from refold.errors import InputError
from refold.graph.forms import form_builder
from refold.graph.graph import Graph
from refold.graph.plan import Plan
from refold.recording.sizes import Size, formula_of
from refold.recording.symbols import Constant, Symbol, leaves, mapped, symbols
from refold.torch import functions
from refold.torch.lift import evaluated
from refold.torch.places import Places
from refold.torch.record import Record
from refold.torch.regions import Regions
from refold.torch.staying import Staying
from refold.torch.trace import Step

# What the arguments of functions with weights are called, as far as they stand in their places.
_PLACES = {1: "weight", 2: "bias"}

# Modules that give a new tensor, into which whoever reads it last may write.
_FRESH = (
    torch.nn.Linear,
    torch.nn.modules.conv._ConvNd,
    torch.nn.modules.batchnorm._BatchNorm,
    torch.nn.GroupNorm,
    torch.nn.LayerNorm,
)

_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "%": operator.mod}


def lower_plan(
    graph: Graph, record: Record, plan: Plan, model: Any, names: tuple[str, ...], memo: dict[int, Any]
) -> Any:
    """A new module that follows ``plan``. ``names`` are the names of the forward's arguments; ``memo`` holds what
    was copied, as for ``copy.deepcopy``."""
    places = Places(record, model, memo)
    staying = Staying(graph, record, plan, model)
    if not plan.regions and not any(map(staying.must_be_taken_apart, record.trace.scopes)):
        return places.copied(model)
    staying.decide()
    return _Lowering(graph, record, plan, model, staying, places).build(names)


@final
@dataclass
class _Lowering:
    """The new module's graph while it grows: ``made`` holds the new node for each old value, ``cut`` that for each
    constant that is computed as before, ``writers`` the nodes that write into one that they read."""

    graph: Graph
    record: Record
    plan: Plan
    model: Any
    staying: Staying
    places: Places
    fx: Any = field(default_factory=fx.Graph)
    made: dict[str, Any] = field(default_factory=dict)
    sizes: dict[Any, Any] = field(default_factory=dict)
    cut: dict[int, Any] = field(default_factory=dict)
    writers: list[tuple[Any, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        forms = form_builder(self.graph)
        self.regions = Regions(self.graph, self.record, forms, self.staying, self.places, self.fx, self.made)

    def build(self, names: tuple[str, ...]) -> Any:
        """The new module."""
        for name, nest in zip(names, self.record.trace.inputs, strict=True):
            given = self.fx.placeholder(name)
            self.keep(nest, given)
            self.hold(name, nest, given)
        if self.record.bound:
            self.bind()
        for step in self.record.trace.steps:
            if any(s.name in self.staying.needed and s.name not in self.made for s in step.gives):
                self.add(step)
        self.fx.output(self.encoded(self.record.trace.outputs))
        self.protect()
        try:
            module = fx.GraphModule(self.places.root(), self.fx, class_name=type(self.model).__name__)
        except Exception as error:  # an argument that fx cannot write as source
            raise InputError(f"the folded '{type(self.model).__name__}' cannot be written down: {error}") from error
        return module.eval()

    def hold(self, name: str, nest: Any, node: Any) -> None:
        """Let the new module refuse other numbers and texts among its arguments than those it was folded for."""
        if isinstance(nest, list | tuple | dict):
            for key in nest if isinstance(nest, dict) else range(len(nest)):
                if not all(isinstance(leaf, Symbol) for leaf in leaves(nest[key])):
                    self.hold(f"{name}[{key!r}]", nest[key], self.fx.call_function(operator.getitem, (node, key)))
        elif not isinstance(nest, Symbol):
            same = operator.is_ if nest is None else operator.eq
            fits = self.fx.call_function(same, (node, nest))
            self.fx.call_function(
                torch._assert, (fits, f"{name} must be {nest!r}, for which this model was folded")
            )

    def bind(self) -> None:
        """Let the new module refuse other sizes than those at which it is the same function."""
        for symbol in symbols(self.record.trace.inputs):
            known = self.record.shapes[symbol.name]
            for axis in (axis for axis, size in enumerate(known) if size is not None and axis != 1):
                found = self.fx.call_method("size", (self.made[symbol.name], axis))
                fits = self.fx.call_function(operator.eq, (found, symbol.shape[axis]))
                sentence = (
                    f"axis {axis} of {symbol.name} must have the size {symbol.shape[axis]} at which this model was "
                    "folded: the original does not do the same at others"
                )
                self.fx.call_function(torch._assert, (fits, sentence))

    def add(self, step: Step) -> None:
        """Write what takes the place of one recorded step."""
        scope = self.staying.whole_scope(step)
        if scope is not None:
            self.call_module(scope.path, scope.module, scope.args, scope.kwargs, scope.outputs)
            inside = self.staying.inside[id(scope)]
            written = {s.reads[0].name for s in inside if s.writes and s.reads}
            for symbol in symbols((scope.args, scope.kwargs)):
                if symbol.name in written:
                    self.writers.append((self.last, self.made[symbol.name]))
            return
        for symbol in step.gives:
            region = self.plan.chosen.get(symbol.name)
            if region is not None and symbol.name in self.staying.needed:
                self.made[symbol.name] = self.regions.express(symbol, region.parts)
        if all(symbol.name in self.made or symbol.name not in self.staying.needed for symbol in step.gives):
            return
        computed = self.regions.part_of_computed(step)
        if computed is not None:
            self.made[step.gives[0].name] = self.regions.express(step.gives[0], (computed,))
        elif step.module is not None:
            self.call_module(
                step.name.removeprefix(self.record.prefix), step.module, step.args, step.kwargs, step.outputs
            )
        else:
            self.call(step)

    def call_module(self, path: str, module: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        place = self.places.module_at(module, path)
        args, kwargs = self.encoded((args, kwargs))
        self.last = self.fx.call_module(place, args, kwargs)
        self.keep(outputs, self.last)

    def call(self, step: Step) -> None:
        """The function of a step once more."""
        function = step.function
        args, kwargs = self.encoded((step.args, step.kwargs), step)
        self.keep(step.outputs, self.called(function, args, kwargs))

    def called(self, function: Any, args: Any, kwargs: Any) -> Any:
        if function is functions.set_item:
            made = self.fx.call_method("clone", (args[0],))
            self.fx.call_function(operator.setitem, (made, args[1], args[2]))
            return made
        method = functions.method_name(function)
        if method is not None:
            return self.fx.call_method(method, args, kwargs)
        return self.fx.call_function(function, args, kwargs)

    def keep(self, nest: Any, node: Any) -> None:
        """Remember where the symbols of a nest are found, given the node that gives the nest."""
        if isinstance(nest, Symbol):
            self.made.setdefault(nest.name, node)
        elif isinstance(nest, list | tuple | dict):
            for key in nest if isinstance(nest, dict) else range(len(nest)):
                if symbols(nest[key]):
                    self.keep(nest[key], self.fx.call_function(operator.getitem, (node, key)))

    def encoded(self, nest: Any, step: Step | None = None) -> Any:
        names = {id(leaf): _PLACES.get(place, "") for place, leaf in enumerate(step.args)} if step else {}
        baked = evaluated(self.graph, step) if step else []

        def leaf(entry: Any) -> Any:
            if isinstance(entry, Symbol):
                return self.made[entry.name]
            if isinstance(entry, Constant):
                scope = step.scope.path if step is not None and step.scope else ""
                name = names.get(id(entry)) or "constant"
                return self.constant(entry, f"{scope}.{name}" if scope else name, entry in baked)
            return self.size(formula_of(entry)) if isinstance(entry, Size) else entry

        return mapped(leaf, nest)

    def constant(self, entry: Constant, wanted: str, bake: bool = False) -> Any:
        """A constant: a parameter or buffer; what is computed from such is computed as before, or, with ``bake``,
        is a parameter of its own."""
        if entry.origin is None or bake or not self.places.are_stored(entry):
            return self.fx.get_attr(self.places.tensor_at(entry, wanted))
        if id(entry) not in self.cut:
            origin = entry.origin
            args, kwargs = mapped(
                lambda leaf: self.constant(leaf, wanted) if isinstance(leaf, Constant) else leaf,
                (origin.args, origin.kwargs),
            )
            made = self.called(origin.function, args, kwargs)
            if isinstance(origin.outputs, list | tuple):
                made = self.fx.call_function(operator.getitem, (made, entry.place))
            self.cut[id(entry)] = made
        return self.cut[id(entry)]

    def size(self, formula: Any) -> Any:
        """A size in terms of what the new module has."""
        if not isinstance(formula, tuple):
            return int(formula)
        if formula[0] != "size":
            first, second = (self.size(operand) for operand in formula[1:])
            if isinstance(first, int) and isinstance(second, int):
                return _OPERATORS[formula[0]](first, second)
            return self.fx.call_function(_OPERATORS[formula[0]], (first, second))
        symbol, axis = formula[1:]
        known = self.record.shapes[symbol.name][axis]
        if known is not None:
            return known
        if self.record.is_batch(symbol, axis):
            symbol = symbols(self.record.trace.inputs)[0]
        key = (symbol.name, axis)
        if key not in self.sizes:
            self.sizes[key] = self.fx.call_method("size", (self.made[symbol.name], axis))
        return self.sizes[key]

    def protect(self) -> None:
        """Where a module writes into what it reads, give it a tensor that nobody else reads."""
        for node, read in self.writers:
            source = self.places.parts.get(str(read.target)) if read.op == "call_module" else None
            if isinstance(source, _FRESH) and len(read.users) == 1:
                continue
            module = self.places.parts[node.target]
            if getattr(module, "inplace", False) is True and not list(module.children()):
                module.inplace = False
                continue
            with self.fx.inserting_before(node):
                node.replace_input_with(read, self.fx.call_method("clone", (read,)))
