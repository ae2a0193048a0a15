"""From a plan back to a Paddle Layer of plain layers.

What the plan leaves alone stays the user's own: whole custom layers, and layers of Paddle, as copies under
their own names. What it folds becomes convolutions and dense layers. In between stand the functions that the
user's forward called.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import paddle

from refold.algebra.refusal import Refusal
from refold.errors import InputError
from refold.graph.forms import FormBuilder, form_builder
from refold.graph.graph import Affine, AffineForm, Concat, Graph, Node, Pad, Sum
from refold.graph.plan import Plan
from refold.graph.region import Part
from refold.paddle import express, source
from refold.paddle.lift import Record, computed, parameters_of
from refold.paddle.linear import CONVOLUTIONS, DENSE
from refold.paddle.patches import SET_ITEM
from refold.paddle.perform import parameter, twin
from refold.paddle.places import beside
from refold.paddle.source import Code
from refold.paddle.trace import Step
from refold.recording.places import free
from refold.recording.sizes import OPERATIONS, Size, formula_of
from refold.recording.steps import Scope
from refold.recording.symbols import Constant, Symbol, mapped, symbols

Layer = paddle.nn.Layer


def lower_plan(graph: Graph, record: Record, plan: Plan, model: Any, names: Any) -> Any:
    """A new Layer that follows ``plan``. ``names`` are the names of the forward's arguments."""
    lowering = _Lowering(graph, record, plan, form_builder(graph), model)
    apart = any(lowering.must_be_taken_apart(scope) for scope in record.trace.scopes)
    if not plan.regions and not apart and not record.evaluating:
        return copy.deepcopy(model)
    lowering.decide()
    with beside(model.parameters()):
        return lowering.build(names)


@final
@dataclass
class _Lowering:
    """The new model while it grows: ``variables`` holds the source name of every new tensor, ``parts`` what
    goes where below the new layer."""

    graph: Graph
    record: Record
    plan: Plan
    forms: FormBuilder
    model: Any
    writer: source.Writer = field(default_factory=source.Writer)
    variables: dict[str, str] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    memo: dict[int, Any] = field(default_factory=dict)
    twins: dict[int, list[tuple[dict[str, Any] | None, str]]] = field(default_factory=dict)
    whole: dict[Scope, Scope] = field(default_factory=dict)
    needed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        self.paths = {id(tensor): path for path, tensor in named}

    # ---- what is rebuilt as what -----------------------------------------------------------------

    def decide(self) -> None:
        """Find the custom layers that stay whole, and the values that are needed then."""
        trace = self.record.trace
        changed = {region.value for region in self.plan.regions} | self.plan.removed
        # What writes into what it is given would write over what a folded region reads later.
        refused = {scope for scope in trace.scopes if scope in trace.outward or self.must_be_taken_apart(scope)}
        for scope in trace.scopes:
            inside = [s for s in trace.scopes if scope in s.chain]
            if scope in self.whole or refused.intersection(inside) or not self.is_untouched(scope, changed):
                continue
            for inner in inside:
                self.whole.setdefault(inner, scope)
        waiting = [symbol.name for symbol in symbols(trace.outputs)]
        while waiting:
            value = waiting.pop()
            if value not in self.needed:
                self.needed.add(value)
                waiting += self.sources(value)

    def must_be_taken_apart(self, scope: Scope) -> bool:
        """Layers whose weights are computed become plain ones, and refold's own never stay."""
        return id(scope) in self.record.evaluating or type(scope.module).__module__.startswith("refold.")

    def is_untouched(self, scope: Scope, changed: set[str]) -> bool:
        inside = [s for s in self.record.trace.steps if s.scope is not None and scope in s.scope.chain]
        if scope.module is self.model or not inside or not _is_plain_nest(scope.outputs):
            return False
        results = {symbol.name for symbol in symbols(scope.outputs)}
        values = {symbol.name for step in inside for symbol in step.gives}
        read_outside = {leaf for region in self.plan.regions for leaf in region.leaves}
        sizes = {
            symbol.name
            for step in self.record.trace.steps
            if step not in inside
            for symbol in (*self.record.open_sizes(step), *step.reads)
        }
        sizes |= {symbol.name for symbol in symbols(self.record.trace.outputs)}
        return not values & changed and not (values - results) & (read_outside | sizes)

    def sources(self, value: str) -> list[str]:
        region = self.plan.chosen.get(value)
        if region is not None:
            return list(region.leaves)
        if value not in self.record.owners:
            return []
        step = self.record.owners[value]
        scope = self.whole_scope(step)
        if scope is not None:
            return [symbol.name for symbol in symbols((scope.args, scope.kwargs))]
        return [symbol.name for symbol in (*step.reads, *self.record.open_sizes(step))]

    def whole_scope(self, step: Step) -> Scope | None:
        """The outermost layer around a step that stays whole, if one does."""
        return self.whole.get(step.scope) if step.scope else None

    # ---- the new layer ---------------------------------------------------------------------------

    def build(self, names: Any) -> Any:
        """The new layer."""
        signature = [self.writer.name(str(name)) for name in names]
        for variable, nest in zip(signature, self.record.trace.inputs, strict=True):
            for text, symbol in _places(variable, nest):
                self.variables[symbol.name] = text
        for step in self.record.trace.steps:
            if any(s.name in self.needed and s.name not in self.variables for s in step.gives):
                self.add(step)
        result = self.writer.text(self.encoded(self.record.trace.outputs))
        made = source.make(type(self.model).__name__, signature, self.writer, result)
        # Layers first: a parameter may be one of theirs.
        for path, part in sorted(self.parts.items(), key=lambda item: not isinstance(item[1], Layer)):
            source.place(made, path, part)
        made.eval()
        return made

    def add(self, step: Step) -> None:
        """Write what takes the place of one recorded step."""
        scope = self.whole_scope(step)
        if scope is not None:
            path = self.layer_at(scope.path, scope.module, None)
            self.call(f"{source.reference(path)}", scope.args, scope.kwargs, scope.outputs, path)
            return
        value = step.gives[0].name
        node = self.graph.producer.get(value)
        region = self.plan.chosen.get(value)
        if region is not None:
            self.express(step, region.parts)
        elif step.layer is not None:
            path = self.layer_at(step.path or step.name, step.layer, computed(step))
            self.call(source.reference(path), step.args, step.kwargs, step.outputs, path)
        elif node is not None and isinstance(node.op, Affine) and self.is_evaluated(step):
            self.express_node(step, node)
        elif step.function == SET_ITEM:
            tensor, index, value = self.encoded(step.args)
            if self.is_free(step.args[0]):
                self.variables[step.outputs.name] = tensor.text
            else:
                self.assign(f"{tensor.text}.clone()", step.outputs, step.name)
            written = self.variables[step.outputs.name]
            self.writer.add(f"{written}[{self.writer.index(index)}] = {self.writer.text(value)}")
        else:
            args, kwargs = self.encoded((step.args, step.kwargs))
            self.assign(self.writer.call(step.function, args, kwargs), step.outputs, step.name)

    def is_free(self, symbol: Symbol) -> bool:
        """Whether a tensor may be written into: it is new, no view of another one, and nobody else reads it."""
        nests = [self.record.trace.outputs, *((step.args, step.kwargs) for step in self.record.trace.steps)]
        node = self.graph.producer.get(symbol.name)
        made = node is not None and isinstance(node.op, Affine | Sum | Pad | Concat)
        written = symbol.name in self.record.owners and self.record.owners[symbol.name].function == SET_ITEM
        return (made or written) and sum(entry is symbol for nest in nests for entry in symbols(nest)) == 1

    def is_evaluated(self, step: Step) -> bool:
        """Whether the weights that a function is called with are not stored as they are used."""
        constants = [constant for constant in step.constants if id(constant.tensor) not in self.paths]
        apart = step.scope is not None and id(step.scope) in self.record.evaluating
        return apart and any(constant.tensor.size > 1 for constant in constants)

    def call(self, function: str, args: Any, kwargs: Any, outputs: Any, wanted: str) -> None:
        arguments = self.writer.arguments(*self.encoded((args, kwargs)))
        self.assign(f"{function}({arguments})", outputs, wanted)

    def assign(self, text: str, outputs: Any, wanted: str) -> None:
        """One line, and where its outputs are found afterwards."""
        variable = self.writer.name(wanted.rpartition(".")[2] if len(wanted) > 40 else wanted)
        self.writer.add(f"{variable} = {text}")
        for place, symbol in _places(variable, outputs):
            self.variables.setdefault(symbol.name, place)

    def encoded(self, nest: Any) -> Any:
        def leaf(entry: Any) -> Any:
            if isinstance(entry, Symbol):
                return Code(self.variables[entry.name])
            if isinstance(entry, Constant):
                return Code(source.reference(self.tensor_at(entry.tensor)))
            return Code(self.size(formula_of(entry))) if isinstance(entry, Size) else entry

        return mapped(leaf, nest)

    def size(self, formula: Any) -> str:
        """A size in terms of what the new forward has."""
        if not isinstance(formula, tuple):
            return repr(int(formula))
        if formula[0] != "size":
            first, second = (self.size(operand) for operand in formula[1:])
            if first.isdigit() and second.isdigit():
                return repr(OPERATIONS[formula[0]](int(first), int(second)))
            return f"({first} {formula[0]} {second})"
        symbol, axis = formula[1:]
        known = self.record.shapes[symbol.name][axis]
        if known is not None:
            return repr(known)
        if self.record.is_batch(symbol, axis):
            symbol = symbols(self.record.trace.inputs)[0]
        return f"{self.variables[symbol.name]}.shape[{axis}]"

    # ---- parts that stay -------------------------------------------------------------------------

    def layer_at(self, path: str, layer: Any, weights: dict[str, Any] | None) -> str:
        """Where the copy of a layer is: with its hooks if ``weights`` is None, else without, and with the
        computed ones in ``weights``. A shared layer has one copy, as long as it runs with the same weights."""
        for known, place in self.twins.setdefault(id(layer), []):
            if (known is None) == (weights is None) and _equal(known or {}, weights or {}):
                return place
        place = free(path, self.parts)
        made = _copied(layer, weights, self.memo)
        self.twins[id(layer)].append((weights, place))
        self.parts[place] = made
        return place

    def tensor_at(self, tensor: Any) -> str:
        """Where the copy of a parameter, a buffer or any other constant is."""
        if id(tensor) in self.memo:
            for path, part in self.parts.items():
                if part is self.memo[id(tensor)]:
                    return path
        path = self.paths.get(id(tensor)) or free("constant", self.parts)
        made = self.memo.get(id(tensor))
        if made is None:
            made = self.memo[id(tensor)] = copy.deepcopy(tensor, self.memo)
        self.parts[path] = made
        return path

    # ---- what is expressed anew ------------------------------------------------------------------

    def express_node(self, step: Step, node: Node) -> None:
        leaves = [self.forms.leaf(name) for name in node.inputs]
        form = self.forms.combine(node, [leaf for leaf in leaves if isinstance(leaf, AffineForm)])
        if isinstance(form, Refusal):
            raise InputError(f"the layer '{step.name}' cannot be rebuilt: {form.reason}")
        assert isinstance(node.op, Affine)
        self.express(step, (Part(form, node.op.biased, (node.name,)),))

    def express(self, step: Step, parts: tuple[Part, ...]) -> None:
        """Write the parts of what a step gives, one behind the other."""
        symbol = step.gives[0]
        texts, paths = zip(*(self.part(symbol, part) for part in parts), strict=True)
        axis = self.forms.axes[symbol.name]
        text = texts[0] if len(parts) == 1 else f"paddle.concat([{', '.join(texts)}], {axis})"
        self.assign(text, symbol, paths[0] or symbol.name)

    def part(self, symbol: Symbol, part: Part) -> tuple[str, str]:
        """``sum_i conv_i(leaf_i) + bias`` as plain layers: the source that computes it, and where they are."""
        form = part.form
        steps = [self.record.owners[self.output_of(node)] for node in part.nodes]
        wanted = self.region_path(symbol, steps)
        rank, axis = len(symbol.shape), self.forms.axes[symbol.name]
        tensors = [tensor for s in steps for tensor in parameters_of(s)]
        trainable = not tensors or any(not tensor.stop_gradient for tensor in tensors)
        # After these a pointwise map is written as a Linear, as the user wrote it.
        dense = any(primitive.name in DENSE for s in steps for primitive in s.inside)
        inner = axis if axis in (1, rank - 1) else 1  # Paddle's layers have channels first or last
        convolved = [leaf for leaf, term in form.terms.items() if not term.is_identity]
        bias = form.bias if part.biased or np.any(form.bias) else None
        results = []
        for leaf, term in form.terms.items():
            if leaf not in convolved:
                results.append(self.on_axis(self.variables[leaf], rank, self.forms.axes[leaf], axis))
                continue
            tensor = self.on_axis(self.variables[leaf], rank, self.forms.axes[leaf], inner)
            tensor = self.cropped(tensor, express.crops(term), inner)
            layer = express.layer_for(
                term,
                bias if leaf == convolved[0] else None,
                channel_axis=inner,
                dense=dense,
                dtype=symbol.dtype,
                trainable=trainable,
            )
            path = free(wanted, self.parts)
            self.parts[path] = layer
            results.append(self.on_axis(f"{source.reference(path)}({tensor})", rank, inner, axis))
        text = " + ".join(results)
        if not convolved and np.any(form.bias):
            path = free(f"{wanted}.shift" if wanted else "shift", self.parts)
            shape = express.shift_shape(form.bias.size, axis, rank)
            self.parts[path] = parameter(form.bias.reshape(shape), symbol.dtype, trainable)
            text = f"{text} + {source.reference(path)}"
        return text, wanted

    def output_of(self, node: str) -> str:
        return self.graph.node[node].outputs[0]

    def on_axis(self, text: str, rank: int, own: int, wanted: int) -> str:
        """A tensor with its channels moved from one axis to another."""
        if own == wanted:
            return text
        order = [place for place in range(rank) if place != own]
        order.insert(wanted, own)
        return f"paddle.transpose({text}, {order})"

    def cropped(self, text: str, crops: tuple[tuple[int, int], ...], channel_axis: int) -> str:
        if not any(any(pair) for pair in crops):
            return text
        cuts = [f"{before or ''}:{-after or ''}" for before, after in crops]
        cuts.insert(channel_axis - 1, ":")
        return f"{text}[:, {', '.join(cuts)}]"

    # ---- names -----------------------------------------------------------------------------------

    def region_path(self, symbol: Symbol, steps: list[Step]) -> str:
        """Where what takes the place of ``steps`` goes: at the one layer with a kernel among them; else at the
        innermost layer around them, if this is all that it computes, or inside of that."""
        kernels = [s for s in steps if any(p.name in CONVOLUTIONS or p.name in DENSE for p in s.inside)]
        paths = list(dict.fromkeys(s.path for s in kernels if s.path))
        if len(paths) == 1 and len(kernels) == 1:
            return paths[0]
        chains = [s.scope.chain if s.scope else [] for s in steps]
        common = [scope for scope in chains[0] if all(scope in chain for chain in chains)]
        kind = "linear" if len(symbol.shape) == 2 else "conv"
        if not kernels:
            kind = "scale"
        if not common or not common[-1].path:
            return kind
        scope = common[-1]
        alone = symbols(scope.outputs) == [symbol]
        return scope.path if alone else f"{scope.path}.{kind}"


def _places(text: str, nest: Any) -> Iterator[tuple[str, Symbol]]:
    """The symbols in a nest, and the source that gets each of them from a variable."""
    if isinstance(nest, Symbol):
        yield text, nest
    elif isinstance(nest, list | tuple):
        for place, entry in enumerate(nest):
            yield from _places(f"{text}[{place}]", entry)
    elif isinstance(nest, dict):
        for key, entry in nest.items():
            yield from _places(f"{text}[{key!r}]", entry)


def _is_plain_nest(nest: Any) -> bool:
    """Whether everything in a nest is a tensor or a simple value."""
    kinds = (Symbol, int, float, str, type(None))
    if isinstance(nest, list | tuple):
        return all(_is_plain_nest(entry) for entry in nest)
    if isinstance(nest, dict):
        return all(_is_plain_nest(entry) for entry in nest.values())
    return isinstance(nest, kinds)


def _copied(layer: Any, weights: dict[str, Any] | None, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(layer, memo) if weights is None else twin(layer, weights, memo)
    except Exception as error:  # whatever a user's attributes may raise
        raise InputError(
            f"the layer of class {type(layer).__name__} cannot be copied ({str(error)[:120]}); "
            "give it a __deepcopy__, or keep what cannot be copied out of it"
        ) from error


def _equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return list(one) == list(two) and all(np.array_equal(one[name].numpy(), two[name].numpy()) for name in one)
