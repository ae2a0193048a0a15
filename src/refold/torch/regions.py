"""What a plan folds, as plain modules in an ``fx`` graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch

from refold.graph.forms import FormBuilder
from refold.graph.graph import Affine, AffineForm, Graph
from refold.graph.region import Part
from refold.recording.places import free
from refold.recording.steps import Scope
from refold.recording.symbols import Symbol, symbols
from refold.torch import express
from refold.torch.lift import evaluated, parameters_of
from refold.torch.linear import CONVOLUTIONS, DENSE
from refold.torch.perform import sources
from refold.torch.places import Places
from refold.torch.record import Record
from refold.torch.staying import Staying
from refold.torch.trace import Step


@final
@dataclass(eq=False)
class Regions:
    """Writes regions into ``fx``; ``made`` holds the new node for each old value."""

    graph: Graph
    record: Record
    forms: FormBuilder
    staying: Staying
    places: Places
    fx: Any
    made: Mapping[str, Any]

    def part_of_computed(self, step: Step) -> Part | None:
        """What a step is, if its weights are computed and it can be written as a module with plain ones."""
        node = self.graph.producer.get(step.gives[0].name)
        if node is None or not isinstance(node.op, Affine) or not evaluated(self.graph, step):
            return None
        leaves = [self.forms.leaf(name) for name in node.inputs]
        form = self.forms.combine(node, [leaf for leaf in leaves if isinstance(leaf, AffineForm)])
        return Part(form, node.op.biased, (node.name,)) if isinstance(form, AffineForm) else None

    def express(self, symbol: Symbol, parts: tuple[Part, ...]) -> Any:
        """Write the parts of a value, one behind the other; the node that gives it."""
        made = [self._part(symbol, part) for part in parts]
        axis = self.forms.axes[symbol.name]
        total = made[0] if len(made) == 1 else self.fx.call_function(torch.cat, (made, axis))
        if symbol.dense and total.op == "call_function" and total.target is torch.movedim:
            total = self.fx.call_method("contiguous", (total,))
        return total

    def _part(self, symbol: Symbol, part: Part) -> Any:
        """Write ``sum_i conv_i(leaf_i) + bias`` as plain modules."""
        form = part.form
        steps = [self.record.owners[self._output_of(node)] for node in part.nodes]
        wanted = self._region_path(symbol, steps)
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
                results.append(self._on_axis(self.made[leaf], rank, own, axis))
                continue
            offset = bias if leaf == convolved[0] else None
            if term.is_scale:
                tensor = self._on_axis(self.made[leaf], rank, own, axis)
                results.append(self._scaled(tensor, term.scale, offset, axis, rank, wanted, like, trainable))
                continue
            # What was a convolution stays one, unless all around has its channels last.
            last = express.is_dense(term, channel_axis=rank - 1, dense=dense or own == axis == rank - 1)
            inner = rank - 1 if last and (own == rank - 1 or rank > 5 or rank == 2) else 1
            tensor = self._on_axis(self.made[leaf], rank, own, inner)
            widths = express.borders(term)
            if widths is not None:
                tensor = self.fx.call_function(torch.nn.functional.pad, (tensor, widths))
            module = express.module_for(
                term, offset, channel_axis=inner, dense=last, like=like, trainable=trainable
            )
            place = self.places.put(wanted, module)
            results.append(self._on_axis(self.fx.call_module(place, (tensor,)), rank, inner, axis))
        total = results[0]
        for result in results[1:]:
            total = self.fx.call_function(operator.add, (total, result))
        if not convolved and np.any(form.bias):
            total = self._scaled(total, np.ones_like(form.bias), form.bias, axis, rank, wanted, like, trainable)
        return total

    def _scaled(
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
        place = free(wanted, self.places.parts)
        weight = bias = None
        if not np.all(scale == 1.0):
            array = express.per_channel(scale, axis, rank)
            self.places.parts[f"{place}.weight"] = express.parameter(array, like, trainable)
            weight = self.fx.get_attr(f"{place}.weight")
        if shift is not None:
            array = express.per_channel(shift, axis, rank)
            self.places.parts[f"{place}.bias"] = express.parameter(array, like, trainable)
            bias = self.fx.get_attr(f"{place}.bias")
        if weight is None:
            return tensor if bias is None else self.fx.call_function(operator.add, (tensor, bias))
        if bias is None:
            return self.fx.call_function(operator.mul, (tensor, weight))
        return self.fx.call_function(torch.addcmul, (bias, tensor, weight))

    def _output_of(self, node: str) -> str:
        return self.graph.node[node].outputs[0]

    def _on_axis(self, tensor: Any, rank: int, own: int, wanted: int) -> Any:
        """A tensor with its channels moved from one axis to another."""
        return tensor if own == wanted else self.fx.call_function(torch.movedim, (tensor, own, wanted))

    def _region_path(self, symbol: Symbol, steps: list[Step]) -> str:
        """Where what takes the place of ``steps`` goes: at the one module with a kernel among them; else at the
        innermost module around them, if this is all that it computes, or inside of that."""
        kernels = [s for s in steps if s.what in CONVOLUTIONS or s.what in DENSE]
        named = list(dict.fromkeys(s.scope.path for s in kernels if s.scope and self._is_leaf(s.scope)))
        if len(named) == 1 and len(kernels) == 1:
            return named[0]
        kind = "linear" if all(s.what in DENSE for s in kernels) else "conv"
        if not kernels:
            kind = "scale"
        chains = [s.scope.chain if s.scope else [] for s in steps]
        common = [scope for scope in chains[0] if all(scope in chain for chain in chains)]
        if not common or not common[-1].path:
            return kind
        alone = symbols(common[-1].outputs) == [symbol]
        return common[-1].path if alone else f"{common[-1].path}.{kind}"

    def _is_leaf(self, scope: Scope) -> bool:
        """Whether a module calls functions only, and so has a name that its one kernel can take."""
        return bool(scope.path) and all(step.scope is scope for step in self.staying.inside[id(scope)])
