"""Whether a model may be run at all: a loop in a file may claim to run for ever."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
import onnx_ir as ir

from refold.errors import CannotRunError, InputError
from refold.onnx import control, evaluate
from refold.onnx.reference import AnyArray
from refold.onnx.session import Session


def check(session: Session, feeds: Mapping[str, AnyArray]) -> None:
    """Raise CannotRunError if the loops of a model run too often on some inputs, or if that is not known. Where the
    file does not say how often they run, they are run in float64, which stops."""
    if session.is_bounded is None:
        session.is_bounded = _is_bounded(session)
    if session.is_bounded:
        return
    outputs = [name for name, (_, value) in session.record.values.items() if value.is_graph_output()]
    try:
        evaluate.evaluate(session, feeds, outputs)
    except control.TooMuchError as error:
        raise CannotRunError(str(error)) from error
    except InputError as error:
        raise CannotRunError(f"how often its loops run is not known: {error}") from error


def _is_bounded(session: Session) -> bool:
    """Whether constants in the model say that its loops run seldom enough."""
    survey = session.record.survey
    runs, stacked = 0, 0.0
    times = {id(session.record.scopes[0]): 1}
    for scope in session.record.scopes[1:]:
        assert scope.body is not None
        assert scope.parent is not None
        owner, times[id(scope)] = scope.body.owner, times[id(scope.parent)]
        if owner.op_type != "Loop":
            continue
        most = owner.inputs[0]
        if most is None or not survey.of(most).is_constant:
            return False
        times[id(scope)] *= max(int(np.ravel(survey.of(most).array())[0]), 0)
        runs += times[id(scope)]
        for end in scope.graph.outputs[1 + len(scope.body.states) :]:  # what is stacked
            shape = survey.of(end).shapes[0]
            stacked += np.inf if shape is None else 8 * times[id(scope)] * prod(shape)
    model = session.record.model
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    inside = (node for graph in graphs for node in ir.traversal.RecursiveGraphIterator(graph))
    loops = [node for node in inside if node.op_type == "Loop"]
    few = runs <= control.MOST_RUNS and stacked <= control.MOST_STACKED
    return few and all(id(node) in survey.opened for node in loops)
