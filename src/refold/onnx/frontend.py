"""The ONNX front end: lift, lower, run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import numpy as np
import onnx
import onnx_ir as ir

from refold.algebra.affine import AffineConv
from refold.algebra.refusal import Refusal
from refold.blocks.unfold import Choose
from refold.errors import InputError
from refold.frontend import AnyArray, Identity, Lifted, Rich
from refold.graph.plan import Plan
from refold.onnx import evaluate, execute, express, identity
from refold.onnx.functions import inlined
from refold.onnx.lift import lift_model
from refold.onnx.lower import lower_plan
from refold.onnx.reference import FLOATS
from refold.onnx.session import Session


def owns(model: Any) -> bool:
    """Whether this front end reads ``model``."""
    return isinstance(model, onnx.ModelProto | ir.Model)


@final
class OnnxFrontend:
    """See :class:`refold.frontend.Frontend`. Models are onnx.ModelProto or onnx_ir.Model."""

    name = "onnx"

    def lift(self, model: Any, example: Any = None) -> Lifted:
        """The neutral graph of a model. An ONNX model says its inputs itself, so ``example`` may be left
        out; a shape in it fixes nothing."""
        gives_proto = isinstance(model, onnx.ModelProto)
        read = _read(model) if gives_proto else model
        graph, record, notes = lift_model(inlined(read))
        defaults = {
            str(value.name): partial(execute.stored, value.const_value)
            for value in record.inputs
            if value.const_value is not None
        }
        return Lifted(graph, read, Session(record, gives_proto), tuple(record.computed), notes, defaults)

    def helpers(self, conv: AffineConv, space: tuple[int | None, ...]) -> int | Refusal:
        """See :func:`refold.onnx.express.helpers`."""
        return express.helpers(conv, space)

    def lower(self, lifted: Lifted, plan: Plan) -> Any:
        """A new model of the kind that was given, which follows the plan."""
        if plan.changes_something:
            model = lower_plan(lifted.graph, lifted.record.record, plan)
        else:  # the model as it was given, with the calls of its functions
            model = lifted.model.clone()
            model.meta.update(lifted.model.meta)
        return ir.to_proto(model) if lifted.record.gives_proto else model

    def unfold(self, model: Any, choose: Choose, example: Any = None) -> Rich:
        """An ONNX file is not trained, so this raises InputError."""
        raise InputError("an ONNX file is not what one trains: unfold the model that it was exported from")

    def evaluate(self, lifted: Lifted, feeds: Mapping[str, AnyArray], wanted: Sequence[str]) -> dict[str, AnyArray]:
        """Float64 values, by ONNX's reference operators."""
        return evaluate.evaluate(lifted.record, feeds, wanted)

    def run(self, lifted: Lifted, inputs: Sequence[AnyArray], *, optimized: bool = False) -> list[AnyArray]:
        """The model's outputs in ONNX Runtime on the CPU, with its graph optimizations only if ``optimized``."""
        return execute.run(lifted.record, inputs, optimized)

    def arrays(self, example: Any) -> list[AnyArray] | None:
        """The arrays of an example: one, a sequence in the order of the inputs, or by name in a mapping of
        that order; None if it is a shape (or nothing)."""
        if example is None:
            return None
        leaves = list(example.values()) if isinstance(example, Mapping) else example
        leaves = list(leaves) if isinstance(leaves, tuple | list) else [leaves]
        if not leaves or not all(hasattr(leaf, "shape") for leaf in leaves):
            return None
        return [np.asarray(leaf) for leaf in leaves]

    def versions(self) -> dict[str, str]:
        """The versions of ONNX, of its IR and of the runtime."""
        found = {"onnx": str(onnx.__version__), "onnx-ir": str(ir.__version__)}
        if find_spec("onnxruntime") is not None:
            found["onnxruntime"] = str(import_module("onnxruntime").__version__)
        return found

    def identity(self, lifted: Lifted, node: str) -> Identity:
        """The operator with its attributes, and its constants."""
        return identity.identify(lifted.record.record, node)

    def storage(self, lifted: Lifted, node: str) -> str:
        """The type of the largest real constant that a node reads, else of what it gives."""
        record = lifted.record.record
        step = record.nodes[node]
        read = [record.survey.of(value) for value in step.inputs if value is not None]
        types = [facts for facts in read if facts.is_constant and facts.dtype in FLOATS]
        types.sort(key=lambda facts: -int(np.prod(facts.shapes[0] or ())))
        types += [record.survey.of(value) for value in step.outputs]
        return next((facts.dtype for facts in types if facts.dtype in FLOATS), "float32")

    def load(self, path: Path, *, imports: Sequence[str] = (), trust: bool = False) -> Any:
        """See :func:`refold.onnx.files.load`."""
        from refold.onnx import files

        return files.load(path)

    def save(self, model: Any, path: Path, *, overwrite: bool = False, example: Any = None) -> None:
        """See :func:`refold.onnx.files.save`."""
        from refold.onnx import files

        files.save(model, path, overwrite=overwrite)

    def restore(self, model: Any, weights: Path | None) -> Any:
        """The model as it is; its weights are in it."""
        if weights is not None:
            raise InputError(f"{weights}: an ONNX model holds its weights itself")
        return model


FRONTEND = OnnxFrontend()


def _read(model: onnx.ModelProto) -> ir.Model:
    try:
        return ir.from_proto(model)
    except Exception as error:  # whatever is wrong with a model that was put together by hand
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"this is no valid ONNX model: {reason[:300]}") from error
