"""What an operator is, apart from its inputs."""

from __future__ import annotations

import onnx_ir as ir

from refold.frontend import Identity
from refold.onnx.lift import Record
from refold.onnx.subgraphs import Body, captured_values


def identify(record: Record, node: str) -> Identity:
    """An operator with its settings, and its constants. Of one that runs bodies that were looked into, what is in
    them is told node by node, and what it is beside that here; of a call, what it calls belongs to it."""
    if node in record.entries:
        body, captured = record.entries[node]
        return (
            Identity("captured") if captured is not None else _of(record, body.owner, f"inputs of {body.attribute}")
        )
    step = record.nodes[node]
    bodies = record.survey.opened.get(id(step), ())
    return _of(record, step, "", bodies)


def _of(record: Record, step: ir.Node, what: str, bodies: tuple[Body, ...] = ()) -> Identity:
    inside = {body.attribute for body in bodies} if not what else {"body", "then_branch", "else_branch"}
    settings = sorted(str(a) for a in ir.to_proto(step).attribute if a.name not in inside)
    read = list(step.inputs)
    if not what and not bodies:
        read += captured_values(step)
    ends = [value for body in bodies for value in body.graph.outputs]
    places = []
    parameters = []
    for place, value in enumerate([*read, *ends]):
        if value is not None and record.survey.of(value).is_constant:
            places.append(place)
            parameters.append(record.survey.of(value).as_stored())
    left_out = [place for place, value in enumerate(step.inputs) if value is None]
    shape = [(len(body.graph.inputs), len(body.graph.outputs)) for body in bodies]
    kind = f"{step.domain}:{step.op_type}:{step.overload} {settings} {places} {left_out} {shape} {what}"
    return Identity(kind + _called(record.model, step, frozenset()), tuple(parameters))


def _called(model: ir.Model, step: ir.Node, around: frozenset[ir.OperatorIdentifier]) -> str:
    """What a call of a local function does, without the names in it; nothing for other operators."""
    key = step.op_identifier()
    function = model.functions.get(key)
    if function is None or key in around:
        return ""
    numbers: dict[str, int] = {}

    def number(value: ir.Value | None) -> int:
        return -1 if value is None else numbers.setdefault(str(value.name), len(numbers))

    lines = [f"{[number(value) for value in function.inputs]} {sorted(function.opset_imports.items())}"]
    lines.append(str(sorted(str(ir.to_proto(attribute)) for attribute in function.attributes.values())))
    for node in function:
        wiring = [number(value) for value in node.inputs], [number(value) for value in node.outputs]
        settings = sorted(str(attribute) for attribute in ir.to_proto(node).attribute)
        inner = _called(model, node, around | {key})
        lines.append(f"{node.domain}:{node.op_type}:{node.overload} {settings} {wiring} {inner}")
    lines.append(str([number(value) for value in function.outputs]))
    return " calls {" + "; ".join(lines) + "}"
