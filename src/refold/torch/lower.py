"""From a plan back to a torch module: a ``torch.fx.GraphModule`` of plain modules.

What the plan leaves alone stays the user's own: whole modules, as copies under their own names. What it folds
becomes ``nn.Conv*d`` and ``nn.Linear``. In between stand the functions that the user's forward called.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import fx

from refold.errors import InputError
from refold.graph.forms import FormBuilder, form_builder
from refold.graph.graph import Affine, AffineForm, Graph
from refold.graph.plan import Plan
from refold.graph.region import Part
from refold.recording.sizes import Size, formula_of
from refold.recording.symbols import Constant, Symbol, leaves, mapped, symbols
from refold.torch import express, functions
from refold.torch.examples import to_numpy
from refold.torch.lift import evaluated, is_computed, parameters_of
from refold.torch.linear import CONVOLUTIONS, DENSE
from refold.torch.perform import in_double, sources
from refold.torch.record import Record
from refold.torch.trace import Scope, Step

Module = torch.nn.Module

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
    lowering = _Lowering(graph, record, plan, form_builder(graph), model, memo)
    if not plan.regions and not any(map(lowering.must_be_taken_apart, record.trace.scopes)):
        return lowering.copied(model)
    lowering.decide()
    return lowering.build(names)


@final
@dataclass
class _Lowering:
    """The new model while it grows: ``made`` holds the new node for each old value, ``parts`` what goes where
    below the new module."""

    graph: Graph
    record: Record
    plan: Plan
    forms: FormBuilder
    model: Any
    memo: dict[int, Any]
    fx: Any = field(default_factory=fx.Graph)
    made: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    places: dict[int, str] = field(default_factory=dict)
    computed: dict[Any, str] = field(default_factory=dict)
    whole: dict[int, Scope] = field(default_factory=dict)
    needed: set[str] = field(default_factory=set)
    sizes: dict[Any, Any] = field(default_factory=dict)
    cut: dict[int, Any] = field(default_factory=dict)
    writers: list[tuple[Any, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        named = [*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers()]
        self.paths: dict[int, str] = {}
        for path, tensor in named:
            self.paths.setdefault(id(tensor), path)
        self.inside: dict[int, list[Step]] = {}
        self.readers: dict[str, set[int]] = {}
        for step in self.record.trace.steps:
            for scope in step.scope.chain if step.scope else []:
                self.inside.setdefault(id(scope), []).append(step)
            for symbol in (*step.reads, *self.record.open_sizes(step)):
                self.readers.setdefault(symbol.name, set()).add(id(step))
        # What is read by whatever happens to the steps.
        self.kept = {leaf for region in self.plan.regions for leaf in region.leaves}
        self.kept |= {symbol.name for symbol in symbols(self.record.trace.outputs)}

    # ---- what is rebuilt as what -----------------------------------------------------------------

    def decide(self) -> None:
        """Find the modules that stay whole, and the values that are needed then."""
        trace = self.record.trace
        changed = {region.value for region in self.plan.regions} | self.plan.removed
        refused = {
            id(around) for scope in trace.scopes if self.must_be_taken_apart(scope) for around in scope.chain
        }
        for scope in trace.scopes:
            if scope.parent is not None and id(scope.parent) in self.whole:
                self.whole[id(scope)] = self.whole[id(scope.parent)]
            elif id(scope) not in refused and self.is_untouched(scope, changed):
                self.whole[id(scope)] = scope
        waiting = [symbol.name for symbol in symbols(trace.outputs)]
        while waiting:
            value = waiting.pop()
            if value not in self.needed:
                self.needed.add(value)
                waiting += self.sources(value)

    def must_be_taken_apart(self, scope: Scope) -> bool:
        """Modules whose weights are computed become plain ones, and refold's own never stay."""
        if type(scope.module).__module__.startswith("refold."):
            return True
        own = [step for step in self.inside.get(id(scope), []) if step.scope is scope]
        return any(evaluated(self.graph, step) for step in own)

    def is_untouched(self, scope: Scope, changed: set[str]) -> bool:
        inside = self.inside.get(id(scope), [])
        if scope.module is self.model or not inside or not _is_plain_nest(scope.outputs):
            return False
        results = {symbol.name for symbol in symbols(scope.outputs)}
        values = {symbol.name for step in inside for symbol in step.gives}
        if values & changed:
            return False
        numbers = {id(step) for step in inside}
        hidden = values - results
        if hidden & self.kept or any(self.readers.get(value, set()) - numbers for value in hidden):
            return False
        given = {symbol.name for symbol in symbols((scope.args, scope.kwargs))}
        written = {step.reads[0].name for step in inside if step.writes and step.reads}
        return written <= values | given

    def sources(self, value: str) -> list[str]:
        region = self.plan.chosen.get(value)
        if region is not None:
            return list(region.leaves)
        step = self.record.owners.get(value)
        if step is None:
            return []
        scope = self.whole_scope(step)
        if scope is not None:
            return [symbol.name for symbol in symbols((scope.args, scope.kwargs))]
        return [symbol.name for symbol in (*step.reads, *self.record.open_sizes(step))]

    def whole_scope(self, step: Step) -> Scope | None:
        """The outermost module around a step that stays whole, if one does."""
        return self.whole.get(id(step.scope)) if step.scope else None

    # ---- the new module --------------------------------------------------------------------------

    def build(self, names: tuple[str, ...]) -> Any:
        """The new module."""
        for name, nest in zip(names, self.record.trace.inputs, strict=True):
            given = self.fx.placeholder(name)
            self.keep(nest, given)
            self.hold(name, nest, given)
        if self.record.bound:
            self.bind()
        for step in self.record.trace.steps:
            if any(s.name in self.needed and s.name not in self.made for s in step.gives):
                self.add(step)
        self.fx.output(self.encoded(self.record.trace.outputs))
        self.protect()
        root = Module()
        # In the order in which they are used; modules first, since a parameter may be one of theirs.
        for place in sorted(self.parts, key=lambda place: not isinstance(self.parts[place], Module)):
            _put(root, place, self.parts[place])
        try:
            module = fx.GraphModule(root, self.fx, class_name=type(self.model).__name__)
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
        scope = self.whole_scope(step)
        if scope is not None:
            self.call_module(scope.path, scope.module, scope.args, scope.kwargs, scope.outputs)
            inside = self.inside[id(scope)]
            written = {s.reads[0].name for s in inside if s.writes and s.reads}
            for symbol in symbols((scope.args, scope.kwargs)):
                if symbol.name in written:
                    self.writers.append((self.last, self.made[symbol.name]))
            return
        for symbol in step.gives:
            region = self.plan.chosen.get(symbol.name)
            if region is not None and symbol.name in self.needed:
                self.express(symbol, region.parts)
        if all(symbol.name in self.made or symbol.name not in self.needed for symbol in step.gives):
            return
        computed = self.part_of_computed(step)
        if computed is not None:
            self.express(step.gives[0], (computed,))
        elif step.module is not None:
            self.call_module(
                step.name.removeprefix(self.record.prefix), step.module, step.args, step.kwargs, step.outputs
            )
        else:
            self.call(step)

    def call_module(self, path: str, module: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        place = self.places.get(id(module))
        if place is None:
            place = self.places[id(module)] = self.free(path)
            self.parts[place] = self.copied(module)
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
        if entry.origin is None or bake or not sources_are_stored(entry, self.paths):
            return self.fx.get_attr(self.tensor_at(entry, wanted))
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
            source = self.parts.get(str(read.target)) if read.op == "call_module" else None
            if isinstance(source, _FRESH) and len(read.users) == 1:
                continue
            module = self.parts[node.target]
            if getattr(module, "inplace", False) is True and not list(module.children()):
                module.inplace = False
                continue
            with self.fx.inserting_before(node):
                node.replace_input_with(read, self.fx.call_method("clone", (read,)))

    # ---- parts that stay -------------------------------------------------------------------------

    def copied(self, module: Any) -> Any:
        """A copy of a module; what modules share, their copies share."""
        try:
            return copy.deepcopy(module, self.memo)
        except Exception as error:  # whatever a user's attributes may raise
            raise InputError(
                f"the module of class {type(module).__name__} cannot be copied ({str(error)[:120]}); "
                "give it a __deepcopy__, or keep what cannot be copied out of it"
            ) from error

    def tensor_at(self, constant: Constant, wanted: str) -> str:
        """Where the copy of a parameter, a buffer or any other constant is."""
        key = id(constant.tensor) if constant.origin is None else id(constant)
        if key in self.places:
            return self.places[key]
        tensor, same = constant.tensor, None
        path = self.paths.get(id(tensor)) if constant.origin is None else None
        if is_computed(constant):
            found = sources(constant)
            array = to_numpy(in_double(constant, self.record.doubles))
            # A weight that is used often (by a cell in a loop) is computed anew each time.
            same = (frozenset(map(id, found)), array.shape, array.tobytes())
            if same in self.computed:
                return self.places.setdefault(key, self.computed[same])
            made = express.parameter(array, tensor, any(source.requires_grad for source in found))
        else:
            made = copy.deepcopy(tensor if path else tensor.detach(), self.memo)
        place = path if path is not None and self.is_open(path, tensor) else self.free(path or wanted)
        held = self.held(place)
        if held is None:
            self.parts[place] = made
        self.places[key] = place
        if same is not None:
            self.computed[same] = place
        return place

    def is_open(self, path: str, tensor: Any) -> bool:
        """Whether a path is free, or a copied module has the copy of this very tensor there."""
        return self.free(path) == path or self.held(path) is self.memo.get(id(tensor), self)

    def held(self, path: str) -> Any:
        """What is at a path inside the parts there are."""
        for place, part in self.parts.items():
            if path.startswith(f"{place}.") and isinstance(part, Module):
                found: Any = part
                for segment in path[len(place) + 1 :].split("."):
                    found = getattr(found, segment, None)
                return found
        return None

    # ---- what is expressed anew ------------------------------------------------------------------

    def part_of_computed(self, step: Step) -> Part | None:
        """What a step is, if its weights are computed and it can be written as a module with plain ones."""
        node = self.graph.producer.get(step.gives[0].name)
        if node is None or not isinstance(node.op, Affine) or not evaluated(self.graph, step):
            return None
        leaves = [self.forms.leaf(name) for name in node.inputs]
        form = self.forms.combine(node, [leaf for leaf in leaves if isinstance(leaf, AffineForm)])
        return Part(form, node.op.biased, (node.name,)) if isinstance(form, AffineForm) else None

    def express(self, symbol: Symbol, parts: tuple[Part, ...]) -> None:
        """Write the parts of a value, one behind the other."""
        made = [self.part(symbol, part) for part in parts]
        axis = self.forms.axes[symbol.name]
        total = made[0] if len(made) == 1 else self.fx.call_function(torch.cat, (made, axis))
        if symbol.dense and total.op == "call_function" and total.target is torch.movedim:
            total = self.fx.call_method("contiguous", (total,))
        self.made[symbol.name] = total

    def part(self, symbol: Symbol, part: Part) -> Any:
        """Write ``sum_i conv_i(leaf_i) + bias`` as plain modules."""
        form = part.form
        steps = [self.record.owners[self.output_of(node)] for node in part.nodes]
        wanted = self.region_path(symbol, steps)
        rank, axis = len(symbol.shape), self.forms.axes[symbol.name]
        tensors = [tensor for s in steps for tensor in parameters_of(s)]
        origins = [source for s in steps for constant in s.constants for source in sources(constant)]
        trainable = any(source.requires_grad for source in origins) or not origins
        reference = torch.empty(0, dtype=getattr(torch, symbol.dtype), device=self.record.trace.tensors[0].device)
        like = next((t for t in tensors if t.ndim == rank and t.dtype == reference.dtype), reference)
        # After these a pointwise map is written as a Linear, as the user wrote it.
        dense = any(s.what in DENSE for s in steps)
        convolved = [leaf for leaf, term in form.terms.items() if not term.is_identity]
        bias = form.bias if part.biased or np.any(form.bias) else None
        results = []
        for leaf, term in form.terms.items():
            own = self.forms.axes[leaf]
            if leaf not in convolved:
                results.append(self.on_axis(self.made[leaf], rank, own, axis))
                continue
            offset = bias if leaf == convolved[0] else None
            if term.is_scale:
                tensor = self.on_axis(self.made[leaf], rank, own, axis)
                results.append(self.scaled(tensor, term.scale, offset, axis, rank, wanted, like, trainable))
                continue
            # What was a convolution stays one, unless all around has its channels last.
            last = express.is_dense(term, channel_axis=rank - 1, dense=dense or own == axis == rank - 1)
            inner = rank - 1 if last and (own == rank - 1 or rank > 5 or rank == 2) else 1
            tensor = self.on_axis(self.made[leaf], rank, own, inner)
            widths = express.borders(term)
            if widths is not None:
                tensor = self.fx.call_function(torch.nn.functional.pad, (tensor, widths))
            place = self.free(wanted)
            self.parts[place] = express.module_for(
                term, offset, channel_axis=inner, dense=last, like=like, trainable=trainable
            )
            results.append(self.on_axis(self.fx.call_module(place, (tensor,)), rank, inner, axis))
        total = results[0]
        for result in results[1:]:
            total = self.fx.call_function(operator.add, (total, result))
        if not convolved and np.any(form.bias):
            total = self.scaled(total, np.ones_like(form.bias), form.bias, axis, rank, wanted, like, trainable)
        return total

    def scaled(
        self,
        tensor: Any,
        scale: Any,
        shift: Any,
        axis: int,
        rank: int,
        wanted: str,
        like: Any,
        trainable: bool,
    ) -> Any:
        """A factor and a shift per channel."""
        place = self.free(wanted)
        weight = bias = None
        if not np.all(scale == 1.0):
            array = express.per_channel(scale, axis, rank)
            self.parts[f"{place}.weight"] = express.parameter(array, like, trainable)
            weight = self.fx.get_attr(f"{place}.weight")
        if shift is not None:
            array = express.per_channel(shift, axis, rank)
            self.parts[f"{place}.bias"] = express.parameter(array, like, trainable)
            bias = self.fx.get_attr(f"{place}.bias")
        if weight is None:
            return tensor if bias is None else self.fx.call_function(operator.add, (tensor, bias))
        if bias is None:
            return self.fx.call_function(operator.mul, (tensor, weight))
        return self.fx.call_function(torch.addcmul, (bias, tensor, weight))

    def output_of(self, node: str) -> str:
        return next(n.outputs[0] for n in self.graph.nodes if n.name == node)

    def on_axis(self, tensor: Any, rank: int, own: int, wanted: int) -> Any:
        """A tensor with its channels moved from one axis to another."""
        return tensor if own == wanted else self.fx.call_function(torch.movedim, (tensor, own, wanted))

    # ---- names -----------------------------------------------------------------------------------

    def region_path(self, symbol: Symbol, steps: list[Step]) -> str:
        """Where what takes the place of ``steps`` goes: at the one module with a kernel among them; else at the
        innermost module around them, if this is all that it computes, or inside of that."""
        kernels = [s for s in steps if s.what in CONVOLUTIONS or s.what in DENSE]
        named = list(dict.fromkeys(s.scope.path for s in kernels if s.scope and self.is_leaf(s.scope)))
        if len(named) == 1 and len(kernels) == 1:
            return named[0]
        kind = "linear" if len(symbol.shape) == 2 else "conv"
        if not kernels:
            kind = "scale"
        chains = [s.scope.chain if s.scope else [] for s in steps]
        common = [scope for scope in chains[0] if all(scope in chain for chain in chains)]
        if not common or not common[-1].path:
            return kind
        alone = symbols(common[-1].outputs) == [symbol]
        return common[-1].path if alone else f"{common[-1].path}.{kind}"

    def is_leaf(self, scope: Scope) -> bool:
        """Whether a module calls functions only, and so has a name that its one kernel can take."""
        return bool(scope.path) and all(step.scope is scope for step in self.inside[id(scope)])

    def free(self, wanted: str) -> str:
        """A path at which, and below and above which, there is nothing yet."""
        path, count = wanted.replace("#", "_").replace(":", "_"), 1
        base = path
        while any(path == p or path.startswith(f"{p}.") or p.startswith(f"{path}.") for p in self.parts):
            count += 1
            path = f"{base}_{count}"
        return path


def sources_are_stored(constant: Constant, paths: Mapping[int, str]) -> bool:
    """Whether a constant is computed from parameters and buffers of the model alone."""
    return all(id(tensor) in paths for tensor in sources(constant))


def _put(root: Any, path: str, part: Any) -> None:
    """Put a module, parameter or buffer at a dotted path below ``root``, making empty modules on the way."""
    *around, last = path.split(".")
    holder = root
    for segment in around:
        if not hasattr(holder, segment):
            holder.add_module(segment, Module().eval())
        holder = getattr(holder, segment)
    if isinstance(part, Module):
        holder.add_module(last, part)
    elif isinstance(part, torch.nn.Parameter):
        holder.register_parameter(last, part)
    else:
        holder.register_buffer(last, part)


def _is_plain_nest(nest: Any) -> bool:
    """Whether everything in a nest is a tensor or a simple value."""
    return all(isinstance(leaf, Symbol | int | float | str | None) for leaf in leaves(nest))
