"""The PaddlePaddle front end: lift, lower, run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, final

import paddle

from refold.algebra.affine import AffineConv
from refold.algebra.refusal import Refusal
from refold.blocks.unfold import Choose
from refold.errors import InputError
from refold.frontend import AnyArray, Identity, Lifted, Rich
from refold.graph.plan import Plan
from refold.paddle import examples, execute, express, files
from refold.paddle.lift import Record, lift_traces, parameters_of, record_twice
from refold.paddle.lower import lower_plan
from refold.paddle.trace import dtype_name
from refold.recording.arguments import argument_names, input_names
from refold.recording.steps import UntraceableError
from refold.recording.symbols import leaves, mapped


def owns(model: Any) -> bool:
    """Whether this front end reads ``model``."""
    return isinstance(model, paddle.nn.Layer)


@final
@dataclass(frozen=True, eq=False)
class Session:
    """What the front end remembers of a lifted model: the record, its arguments, and its layers in
    float64."""

    record: Record
    specs: tuple[Any, ...]
    names: tuple[str, ...]
    doubles: dict[int, Any] = field(default_factory=dict)


@final
class PaddleFrontend:
    """See :class:`refold.frontend.Frontend`."""

    name = "paddle"

    def lift(self, model: Any, example: Any = None) -> Lifted:
        """The neutral graph of a Paddle Layer in eval mode."""
        kind = type(model).__name__
        _check_mode(model)
        specs = examples.specs_of(model, example)
        names = argument_names(model, specs)
        first, second = _recorded(model, specs, input_names(names, specs), kind)
        graph, record = lift_traces(model, first, second)
        evaluated = _evaluated_names(record)
        return Lifted(graph, model, Session(record, specs, names), evaluated)

    def helpers(self, conv: AffineConv, space: tuple[int | None, ...]) -> int | Refusal:
        """See :func:`refold.paddle.express.helpers`."""
        return express.helpers(conv, space)

    def lower(self, lifted: Lifted, plan: Plan) -> Any:
        """A Layer of plain layers, in eval mode, that follows the plan."""
        session = lifted.record
        plain = lower_plan(lifted.graph, session.record, plan, lifted.model, session.names)
        # Known from now on, so that the plain model needs no example.
        plain.input_specs = tuple(
            mapped(lambda spec: examples.Spec(spec.shape, spec.dtype), spec) for spec in session.specs
        )
        return plain

    def unfold(self, model: Any, choose: Choose, example: Any = None) -> Rich:
        """See :func:`refold.paddle.unfold.unfold`."""
        from refold.paddle.unfold import unfold

        return unfold(model, choose, example)

    def evaluate(self, lifted: Lifted, feeds: Mapping[str, AnyArray], wanted: Sequence[str]) -> dict[str, AnyArray]:
        """Float64 values, by Paddle's own layers and functions."""
        return execute.evaluate(lifted.record.record, lifted.record.doubles, feeds, wanted)

    def run(self, lifted: Lifted, inputs: Sequence[AnyArray], *, optimized: bool = False) -> list[AnyArray]:
        """The model's outputs, eagerly."""
        flat = iter(inputs)
        session = lifted.record

        def tensor(spec: examples.Spec) -> Any:
            return execute.tensor_of(next(flat)).astype(spec.dtype)

        return execute.run(lifted.model, tuple(mapped(tensor, spec) for spec in session.specs))

    def arrays(self, example: Any) -> list[AnyArray] | None:
        """The arrays of an example, flat and in order; None if it is a shape (or nothing)."""
        return examples.arrays_of(example)

    def versions(self) -> dict[str, str]:
        """The version of Paddle."""
        return {"paddle": str(paddle.__version__)}

    def identity(self, lifted: Lifted, node: str) -> Identity:
        """The class and settings of a step, and its weights."""
        record = lifted.record.record
        step = record.owners[lifted.graph.node[node].outputs[0]]
        parameters = tuple(execute.to_numpy(tensor) for tensor in parameters_of(step))
        if step.layer is not None:
            kind = f"{type(step.layer).__module__}.{type(step.layer).__qualname__} {_settings(step.layer)}"
        else:
            kind = step.function
        plain = [record.text_of(leaf) for leaf in leaves((step.args, step.kwargs))]
        return Identity(f"{kind} {[text for text in plain if text]}", parameters)

    def storage(self, lifted: Lifted, node: str) -> str:
        """The type of the largest tensor of a step."""
        step = lifted.record.record.owners[lifted.graph.node[node].outputs[0]]
        tensors = sorted(parameters_of(step), key=lambda tensor: -prod(tensor.shape))
        return next(iter([dtype_name(tensor) for tensor in tensors]), "float32")

    def load(self, path: Path, *, imports: Sequence[str] = (), trust: bool = False) -> Any:
        """See :func:`refold.paddle.files.load`."""
        return files.load(path, imports=imports, trust=trust)

    def save(self, model: Any, path: Path, *, overwrite: bool = False, example: Any = None) -> None:
        """See :func:`refold.paddle.files.save`."""
        files.save(model, path, overwrite=overwrite, example=example)

    def restore(self, model: Any, weights: Path | None) -> Any:
        """See :func:`refold.paddle.files.restore`."""
        return files.restore(model, weights)


FRONTEND = PaddleFrontend()


# ---- reading a model -------------------------------------------------------------------------------


def _check_mode(model: Any) -> None:
    training = [path for path, layer in model.named_sublayers(include_self=True) if layer.training]
    if training:
        where = f" (its layer '{training[0]}' is)" if training[0] else ""
        raise InputError(
            f"the model '{type(model).__name__}' is in training mode{where}, in which it is another function: "
            "call model.eval() first"
        )


def _recorded(model: Any, specs: tuple[Any, ...], names: Any, kind: str) -> tuple[Any, Any]:
    is_open = any(None in spec.shape[1:] for spec in leaves(specs))
    error: UntraceableError | None = None
    for sizes in examples.SIZES if is_open else examples.SIZES[:1]:
        try:
            return record_twice(model, [examples.feeds(specs, which, sizes) for which in (0, 1)], names)
        except UntraceableError as first:
            error = error or first
    raise InputError(f"the model '{kind}' cannot be followed: {error}") from error


def _evaluated_names(record: Record) -> tuple[str, ...]:
    """The innermost layers whose weights are computed."""
    steps = [step.path for step in record.trace.steps if id(step) in record.evaluating]
    scopes = [scope for scope in record.trace.scopes if id(scope) in record.evaluating]
    around = {id(outer) for scope in scopes for outer in scope.chain[:-1]}
    around |= {
        id(scope)
        for step in record.trace.steps
        if id(step) in record.evaluating and step.scope
        for scope in step.scope.chain
    }
    inner = [scope.path or type(scope.module).__name__ for scope in scopes if id(scope) not in around]
    return tuple(dict.fromkeys([*steps, *inner]))


# ---- what a step is ------------------------------------------------------------------------------

# Attributes of a layer that do not change what it computes in inference.
_IMMATERIAL = ("training", "_full_name", "_built", "_dtype", "_init_in_dynamic_mode", "_device", "_op_recorder")


def _settings(layer: Any) -> list[tuple[str, str]]:
    """The simple attributes of a layer."""
    found = []
    for name, value in sorted(vars(layer).items()):
        simple = all(isinstance(leaf, int | float | str | type(None)) for leaf in leaves(value))
        if (
            simple
            and not isinstance(value, dict)
            and name not in _IMMATERIAL
            and not name.endswith(("_attr", "_hooks", "name"))
        ):
            found.append((name, repr(value)))
    return found
