"""Local functions of a model, inlined where they hold what may fold.

A call hides what a function computes, so no form goes through it. A function that holds convolutions, matrix
products or batch norms is put in the place of its calls; every other one stays a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from refold.onnx.subgraphs import graphs_of

# Operators for whose sake a function is looked into: those that fold, and those that may run for ever, which is
# seen only where they are not hidden.
_KERNELS = frozenset({"BatchNormalization", "Conv", "ConvTranspose", "Gemm", "Loop", "MatMul"})

# Functions that call functions may stand for far more nodes than a file has: beyond these numbers all stay calls.
_MOST_FUNCTIONS = 1_000
_MOST_NODES = 100_000


def inlined(model: ir.Model) -> ir.Model:
    """``model``, or a copy of it in which calls of functions that hold what may fold are what they call."""
    wanted = _wanted(model)
    if not wanted:
        return model
    copied = model.clone()
    copied.meta.update(model.meta)
    try:
        InlinePass(criteria=lambda function: function.identifier() in wanted)(copied)
    except Exception:  # calls that do not fit their functions: no runtime takes such a model, and no law
        return model
    return copied


def _wanted(model: ir.Model) -> frozenset[ir.OperatorIdentifier]:
    functions = model.functions
    if not functions or len(functions) > _MOST_FUNCTIONS:
        return frozenset()
    sizes: dict[ir.OperatorIdentifier, int] = {}
    kernels: set[ir.OperatorIdentifier] = set()
    waiting = set(functions)
    while waiting:
        ready = [key for key in waiting if all(call in sizes for call in _calls(functions[key], functions))]
        if not ready:
            return frozenset()  # they call each other in a circle
        for key in ready:
            calls = list(_calls(functions[key], functions))
            own = list(ir.traversal.RecursiveGraphIterator(functions[key]))
            sizes[key] = len(own) + sum(sizes[call] for call in calls)
            if any(node.op_type in _KERNELS and not node.domain for node in own) or not kernels.isdisjoint(calls):
                kernels.add(key)
        waiting.difference_update(ready)
    if sum(sizes[call] for call in _calls(model.graph, functions)) > _MOST_NODES:
        return frozenset()
    return frozenset(key for key in kernels if _same_versions(functions[key], model))


def loops(model: ir.Model, call: ir.Node) -> bool:
    """Whether a function that is called, or a graph inside of a node, holds a loop, or calls what does."""
    waiting, seen = [call.op_identifier()], set()
    for graph in graphs_of(call):
        nodes = list(ir.traversal.RecursiveGraphIterator(graph))
        if any(node.op_type == "Loop" for node in nodes):
            return True
        waiting += [node.op_identifier() for node in nodes]
    while waiting:
        key = waiting.pop()
        if key not in model.functions or key in seen:
            continue
        seen.add(key)
        inside = list(ir.traversal.RecursiveGraphIterator(model.functions[key]))
        if any(node.op_type == "Loop" for node in inside):
            return True
        waiting += [node.op_identifier() for node in inside]
    return False


def _calls(
    graph: ir.Graph | ir.Function, functions: Mapping[ir.OperatorIdentifier, ir.Function]
) -> Iterator[ir.OperatorIdentifier]:
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.op_identifier() in functions:
            yield node.op_identifier()


def _same_versions(function: ir.Function, model: ir.Model) -> bool:
    """Whether the operators of a function mean in the model what they mean in it."""
    versions = model.opset_imports
    return all(versions.get(domain, version) == version for domain, version in function.opset_imports.items())
