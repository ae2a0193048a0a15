"""From a plan back to a Keras model of plain layers.

What the plan leaves alone is rebuilt as it was: whole custom layers, and layers with their activations,
cloned with their names and weights. What it folds becomes convolutions and dense layers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, final

import keras
import numpy as np
from keras.src import backend
from keras.src.ops import core as core_ops

from refold.algebra.refusal import Refusal
from refold.errors import InputError
from refold.graph.forms import FormBuilder, form_builder
from refold.graph.graph import Affine, AffineForm, Gain, Graph, Node, Sum
from refold.graph.plan import Plan
from refold.graph.region import Part
from refold.keras import express
from refold.keras.lift import Record
from refold.keras.trace import WITH_ACTIVATION, AnyArray, Call, Constant, Scope, symbolic_tensors

layers = keras.layers

# Steps after which a pointwise map is written as a Dense layer, as the user wrote it.
_DENSE = (layers.Dense, layers.EinsumDense, keras.src.ops.numpy.Matmul, keras.src.ops.numpy.Einsum)


def lower_plan(graph: Graph, record: Record, plan: Plan, name: str) -> Any:
    """A new Keras model, called ``name``, that follows ``plan``. Raises InputError, naming the layer,
    where a layer that stays cannot be cloned."""
    lowering = _Lowering(graph, record, plan, form_builder(graph))
    lowering.decide()
    inputs = keras.tree.map_structure(lowering.make_input, record.trace.inputs)
    for call in record.trace.calls:
        lowering.step(call)
    outputs = keras.tree.map_structure(lowering.new, record.trace.outputs)
    return keras.Model(inputs, outputs, name=name)


@final
@dataclass
class _Lowering:
    """The new model while it grows: ``tensors`` holds the new tensor for each old one, by identity."""

    graph: Graph
    record: Record
    plan: Plan
    forms: FormBuilder
    tensors: dict[int, Any] = field(default_factory=dict)
    clones: dict[int, list[tuple[tuple[AnyArray, ...], Any]]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    whole: dict[int, Scope] = field(default_factory=dict)
    needed: set[int] = field(default_factory=set)

    def name_of(self, tensor: Any) -> str:
        return self.record.names[id(tensor)]

    def new(self, tensor: Any) -> Any:
        """The new tensor for an old one."""
        return self.tensors[id(self.record.canonical(tensor))]

    # ---- what is rebuilt as what -----------------------------------------------------------------

    def decide(self) -> None:
        """Find the custom layers that stay whole, and the tensors that are needed then."""
        changed = {region.value for region in self.plan.regions} | self.plan.removed
        steps: dict[int, list[Call]] = {}
        for call in self.record.trace.calls:
            for scope in call.scope.chain if call.scope else []:
                steps.setdefault(id(scope), []).append(call)
        refused = {id(s) for s in self.record.trace.scopes if self.must_be_taken_apart(s)}
        for scope in self.record.trace.scopes:
            inside = steps.get(id(scope), [])
            if id(scope) in self.whole or not inside:
                continue
            inner = [s for call in inside if call.scope for s in call.scope.chain[len(scope.chain) - 1 :]]
            if any(id(s) in refused for s in inner) or not self.is_untouched(scope, inside, changed):
                continue
            if self.cloned(scope.layer, stored_weights(scope.layer)) is None:
                continue
            for s in inner:
                self.whole.setdefault(id(s), scope)
        waiting = [self.record.canonical(tensor) for tensor in symbolic_tensors(self.record.trace.outputs)]
        while waiting:
            tensor = waiting.pop()
            if id(tensor) not in self.needed:
                self.needed.add(id(tensor))
                waiting += [self.record.canonical(source) for source in self.sources(tensor)]

    def must_be_taken_apart(self, scope: Scope) -> bool:
        """Layers whose weights are computed become plain ones, and refold's own never stay."""
        return id(scope) in self.record.evaluating or type(scope.layer).__module__.startswith("refold.")

    def is_untouched(self, scope: Scope, inside: list[Call], changed: set[str] | frozenset[str]) -> bool:
        results = {self.name_of(tensor) for tensor in symbolic_tensors(scope.outputs)}
        values = {self.name_of(output) for call in inside for output in call.outputs}
        read_outside = {leaf for region in self.plan.regions for leaf in region.leaves}
        return not values & changed and not (values - results) & read_outside

    def sources(self, tensor: Any) -> list[Any]:
        region = self.plan.chosen.get(self.name_of(tensor))
        if region is not None:
            return [self.record.tensors[leaf] for leaf in region.leaves]
        producer = self.record.producers.get(id(tensor))
        if producer is None:
            return []
        scope = self.whole_scope(producer[0])
        return symbolic_tensors((scope.args, scope.kwargs)) if scope else producer[0].tensors

    def whole_scope(self, call: Call) -> Scope | None:
        """The outermost layer around a step that stays whole, if one does."""
        return self.whole.get(id(call.scope)) if call.scope else None

    # ---- one step --------------------------------------------------------------------------------

    def make_input(self, tensor: Any) -> Any:
        name = self.unique(self.name_of(tensor))
        made = keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=name)
        self.tensors[id(tensor)] = made
        return made

    def step(self, call: Call) -> None:
        """Add what takes the place of one recorded step, if anything does."""
        if not self.missing(call):
            return
        scope = self.whole_scope(call)
        if scope is not None:
            clone = self.cloned(scope.layer, stored_weights(scope.layer))
            self.keep(scope.outputs, self.apply(clone, scope.args, scope.kwargs))
            self.finish(clone, stored_weights(scope.layer), scope.layer, scope)
            return
        rest = []
        for output in self.missing(call):
            region = self.plan.chosen.get(self.name_of(output))
            if region is None:
                rest.append(output)
            else:
                self.express(call, output, region.parts)
        if not rest:
            return
        node = self.graph.producer.get(self.name_of(call.outputs[0]))
        if self.is_activation(call):
            self.activate(call)
        elif node is not None and self.is_expressed(call, node):
            self.express_node(call, node)
        elif isinstance(call.operation, keras.Layer):
            clone = self.cloned(call.operation, call.weights)
            if clone is None:
                raise InputError(
                    f"the layer '{call.name}' cannot be cloned: give its class {type(call.operation).__name__} "
                    "a get_config() with which from_config() can build it again"
                )
            self.keep(call.outputs, self.apply(clone, call.args, call.kwargs))
            self.finish(clone, call.weights, call.operation, call.scope)
        else:
            self.repeat(call)

    def missing(self, call: Call) -> list[Any]:
        """The results of a step that are needed and not there yet."""
        return [output for output in call.outputs if id(output) in self.needed and id(output) not in self.tensors]

    def keep(self, old: Any, made: Any) -> None:
        for before, after in zip(symbolic_tensors(old), symbolic_tensors(made), strict=True):
            self.tensors.setdefault(id(self.record.canonical(before)), after)

    # ---- layers that stay ------------------------------------------------------------------------

    def cloned(self, layer: Any, weights: tuple[AnyArray, ...]) -> Any:
        """A clone of ``layer`` that will hold ``weights``; None if it cannot be cloned. A shared layer
        has one clone, as long as it runs with the same weights."""
        for known, clone in self.clones.setdefault(id(layer), []):
            if len(known) == len(weights) and all(map(np.array_equal, known, weights)):
                return clone
        clone = clone_layer(layer)
        if clone is not None:
            clone.name = self.unique(layer.name)
            self.clones[id(layer)].append((weights, clone))
        return clone

    def finish(self, clone: Any, weights: tuple[AnyArray, ...], layer: Any, scope: Scope | None) -> None:
        """Give a clone of ``layer``, built by now, its weights; ``scope`` is what called it."""
        clone.set_weights(list(weights))
        around = self.evaluating(scope)
        if around:  # which trained these weights, perhaps of a layer that was frozen
            clone.trainable = not _are_frozen([layer, *around])
        if hasattr(clone, "finalize_state"):
            clone.finalize_state()

    def apply(self, layer: Any, args: Any, kwargs: Any) -> Any:
        """Call ``layer`` on the new tensors for the old arguments."""
        casts_to = layer.compute_dtype if layer.autocast else None

        def new(leaf: Any) -> Any:
            return self.uncast(leaf, casts_to) if isinstance(leaf, keras.KerasTensor) else _constant(leaf)

        kept = {key: value for key, value in kwargs.items() if not _goes_without_saying(key, value, args)}
        args, kept = keras.tree.map_structure(new, (args, kept))
        return layer(*args, **kept)

    def uncast(self, tensor: Any, casts_to: str | None) -> Any:
        """The new tensor for ``tensor``, or from before its cast if the reading layer does that itself."""
        tensor = self.record.canonical(tensor)
        producer = self.record.producers.get(id(tensor))
        if producer is not None and isinstance(producer[0].operation, core_ops.Cast) and tensor.dtype == casts_to:
            source = self.record.canonical(producer[0].tensors[0])
            if id(source) in self.tensors:
                return self.tensors[id(source)]
        return self.new(tensor)

    def repeat(self, call: Call) -> None:
        """Do an operation again, with an operation of the new model's own."""
        operation = copy.copy(call.operation)
        operation._inbound_nodes, operation._outbound_nodes = [], []
        operation.name = self.unique(call.name)

        def new(leaf: Any) -> Any:
            return self.new(leaf) if isinstance(leaf, keras.KerasTensor) else _constant(leaf)

        args, kwargs = keras.tree.map_structure(new, (call.args, call.kwargs))
        self.keep(call.outputs, operation.symbolic_call(*args, **kwargs))

    # ---- what is expressed anew ------------------------------------------------------------------

    def is_expressed(self, call: Call, node: Node) -> bool:
        """A linear step that stays, but was part of a layer or an operation with constants."""
        if isinstance(call.operation, keras.Layer):
            return bool(call.part)
        return isinstance(node.op, Affine | Gain | Sum)

    def express_node(self, call: Call, node: Node) -> None:
        if isinstance(node.op, Sum) and node.op.factors == (1.0, -1.0):
            minuend, subtrahend = (self.new(self.record.tensors[name]) for name in node.inputs)
            name = self.unique(call.name)
            self.keep(call.outputs, layers.Subtract(name=name, dtype=call.outputs[0].dtype)([minuend, subtrahend]))
            return
        leaves = [self.forms.leaf(name) for name in node.inputs]
        form = self.forms.combine(node, [leaf for leaf in leaves if isinstance(leaf, AffineForm)])
        if isinstance(form, Refusal):
            if isinstance(call.operation, keras.Layer):
                raise InputError(f"the layer '{call.name}' cannot be rebuilt: {form.reason}")
            self.repeat(call)
            return
        biased = isinstance(node.op, Affine) and node.op.biased
        self.express(call, call.outputs[0], (Part(form, biased, (node.name,)),))

    def express(self, call: Call, output: Any, parts: tuple[Part, ...]) -> None:
        """Add the parts of one result of a step, one behind the other, in its place, and the activation if it
        follows and the last layer has it."""
        if len(parts) == 1:
            terms = tuple(parts[0].form.terms.values())
            fused = self.fused_scope(call) if len(terms) == 1 and not terms[0].is_identity else None
            self.keep(fused.outputs if fused else output, self.part(output, parts[0], fused))
            return
        made = [self.part(output, part) for part in parts]
        axis = self.forms.axes[self.name_of(output)]
        join = layers.Concatenate(axis, name=self.unique(f"{call.name}_join"), dtype=output.dtype)
        self.keep(output, join(made))

    def part(self, output: Any, part: Part, fused: Scope | None = None) -> Any:
        """``sum_i conv_i(leaf_i) + bias`` as plain layers, with the activation of the layer ``fused``."""
        form = part.form
        value = self.name_of(output)
        steps = [self.record.step(node) for node in part.nodes]
        policy = _policy(steps, output.dtype)
        name = self.region_name(steps)
        dense = any(isinstance(step.operation, _DENSE) for step in steps)
        frozen = _are_frozen([layer for step in steps for layer in (step.layer, *self.evaluating(step.scope))])
        rank, axis = len(output.shape), self.forms.axes[value]
        convolved = [leaf for leaf, term in form.terms.items() if not term.is_identity]
        bias = form.bias if part.biased or np.any(form.bias) else None
        results: list[Any] = []
        for leaf, term in form.terms.items():
            tensor = self.on_axis(leaf, axis, name, policy.compute_dtype if leaf in convolved else None)
            if leaf in convolved:
                own_bias = bias if leaf == convolved[0] else None
                made = express.layers_for(
                    term,
                    own_bias,
                    self.forms.space(leaf),
                    channel_axis=axis,
                    rank=rank,
                    dense=dense,
                    name=self.unique(name if len(form.terms) == 1 else f"{name}_{len(results)}"),
                    dtype=policy,
                    activation=_copied(fused.layer.activation) if fused else None,
                )
                for layer in made:
                    tensor = layer(tensor)
                    layer.trainable = not frozen
                express.set_weights(made, term, own_bias)
            results.append(tensor)
        total = results[0]
        if len(results) > 1:
            total = layers.Add(name=self.unique(f"{name}_sum"), dtype=policy)(results)
        if not convolved and np.any(form.bias):
            shape = [-1 if place == axis else 1 for place in range(1, rank)]
            stored = "float64" if policy.variable_dtype == "float64" else "float32"
            shift = layers.Rescaling(1.0, form.bias.astype(stored).reshape(shape), dtype=policy)
            shift.name = self.unique(f"{name}_shift")
            total = shift(total)
        return total

    def evaluating(self, scope: Scope | None) -> list[Any]:
        """The layers around that compute weights of others."""
        return [s.layer for s in (scope.chain if scope else []) if id(s) in self.record.evaluating]

    def on_axis(self, leaf: str, axis: int, name: str, cast: str | None) -> Any:
        """The new tensor of ``leaf`` with its channels on ``axis``, for a layer that casts to ``cast``."""
        tensor = self.uncast(self.record.tensors[leaf], cast)
        own = self.forms.axes[leaf]
        if own == axis:
            return tensor
        order = [place for place in range(1, len(tensor.shape)) if place != own]
        order.insert(axis - 1, own)
        return layers.Permute(order, name=self.unique(f"{name}_permute"), dtype=tensor.dtype)(tensor)

    # ---- activations of layers that are taken apart --------------------------------------------------

    def is_activation(self, call: Call) -> bool:
        """Whether a step belongs to the activation of a layer that did not stay whole."""
        return call.scope is not None and type(call.scope.layer) in WITH_ACTIVATION and not call.part

    def linear_result(self, scope: Scope) -> Any:
        """What the activation of the layer of ``scope`` reads."""
        parts = [call for call in self.record.trace.calls if call.scope is scope and call.part]
        return parts[-1].outputs[0]

    def fused_scope(self, call: Call) -> Scope | None:
        """The layer whose activation can go into what takes the place of ``call``: it reads that and
        nobody else does."""
        scope = call.scope
        if not call.part or scope is None or symbolic_tensors(scope.outputs)[0] is call.outputs[0]:
            return None
        value = self.name_of(call.outputs[0])
        if self.linear_result(scope) is not call.outputs[0] or value in self.graph.outputs:
            return None
        if any(value in region.leaves for region in self.plan.regions):
            return None
        readers = [self.record.step(node.outputs[0]) for node in self.graph.consumers[value]]
        return scope if all(reader.scope is scope for reader in readers) else None

    def activate(self, call: Call) -> None:
        """The whole activation of a layer, where it could not go into the layer before it."""
        scope = call.scope
        assert scope is not None
        layer = layers.Activation(
            _copied(scope.layer.activation), name=self.unique(f"{scope.path}_act"), dtype=scope.layer.dtype_policy
        )
        self.keep(scope.outputs, layer(self.new(self.linear_result(scope))))
        for other in self.record.trace.calls:  # the steps inside it need not be repeated
            if other.scope is scope:
                self.needed.difference_update(id(output) for output in other.outputs)

    # ---- names -----------------------------------------------------------------------------------

    def unique(self, wanted: str) -> str:
        base = wanted.replace("/", "_").replace("#", "_").replace(":", "_")
        name, count = base, 1
        while name in self.names:
            count += 1
            name = f"{base}_{count}"
        self.names.add(name)
        return name

    def region_name(self, steps: list[Call]) -> str:
        """The innermost layer around all steps; else the last one with a kernel."""
        chains = [step.scope.chain if step.scope else [] for step in steps]
        common = [scope for scope in chains[0] if all(any(s is scope for s in chain) for chain in chains)]
        if common:
            return self.free(common[-1].layer.name, common[-1].path)
        kernels = [step for step in steps if step.part or isinstance(step.operation, _DENSE)]
        last = (kernels or steps)[-1]
        return self.free(last.operation.name if isinstance(last.operation, keras.Layer) else last.name, last.name)

    def free(self, name: str, path: str) -> str:
        """The short name if no layer has it yet, else the whole path."""
        return path if name in self.names else name


def stored_weights(layer: Any) -> tuple[AnyArray, ...]:
    """The weights of a layer as they are stored."""
    return tuple(np.asarray(weight) for weight in layer.get_weights())


def clone_layer(layer: Any) -> Any:
    """A new layer that computes what ``layer`` does, its weights aside; None if its class does not allow
    that."""
    try:
        if isinstance(layer, keras.Sequential) or type(layer) in _FUNCTIONAL:
            return keras.models.clone_model(layer)
        if isinstance(layer, keras.layers.Lambda):
            # Its configuration is the code as bytes, which Keras rightly does not run; the layer in memory
            # is the user's own, and has no weights.
            settings = {"output_shape": layer._output_shape, "mask": layer.mask, "arguments": layer.arguments}
            return keras.layers.Lambda(layer.function, **settings, name=layer.name, dtype=layer.dtype_policy)
        return type(layer).from_config(layer.get_config())
    except Exception:  # whatever a user's get_config or __init__ may raise
        return None


_FUNCTIONAL = (keras.Model, keras.src.models.functional.Functional)


def _are_frozen(used: list[Any]) -> bool:
    """Whether nothing trained of the layers that something is made of: then it shall not train either."""
    used = [layer for layer in used if layer is not None]
    return any(layer.variables for layer in used) and not any(layer.trainable_variables for layer in used)


def _copied(activation: Any) -> Any:
    """An activation for another layer; one that is a layer itself is cloned."""
    return clone_layer(activation) or activation if isinstance(activation, keras.Layer) else activation


def _constant(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, Constant) else leaf


def _goes_without_saying(key: str, value: Any, args: Any) -> bool:
    """Arguments that Keras passes to a layer by itself."""
    if key == "training":
        return not value
    if key == "mask" or key.endswith("_mask"):
        implicit = backend.get_keras_mask(args[0]) if args and isinstance(args[0], keras.KerasTensor) else None
        return value is None or value is implicit
    return False


def _policy(steps: list[Call], dtype: str) -> Any:
    """The precision of a folded layer: that of a layer with a kernel among ``steps``, if there is one."""
    ranked = sorted(steps, key=lambda step: not step.part)
    for step in ranked:
        if step.layer is not None and step.layer.compute_dtype == dtype:
            return step.layer.dtype_policy
    return keras.dtype_policies.get(dtype)
