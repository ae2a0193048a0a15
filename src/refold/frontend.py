"""The contract that every front end fulfils: one folder per framework, each with an object like this.

A front end holds no algebra. It turns a model into the neutral graph (lift), the plan's result back into
a model (lower), and runs models with the framework's own operators, so that a proof never depends on
the engine's arithmetic.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt

from refold.algebra.affine import AffineConv
from refold.algebra.refusal import Refusal
from refold.blocks.unfold import Choose
from refold.errors import InputError
from refold.graph import Graph, Plan

AnyArray = npt.NDArray[Any]


@final
@dataclass(frozen=True, eq=False)
class Lifted:
    """A model as the engine sees it. ``record`` is the front end's own memory of where each node came
    from; nobody else looks into it. ``evaluated`` names the layers whose weights were computed from
    other parameters; ``notes`` are sentences about the reading that belong into the plan and the certificate;
    ``defaults`` read what inputs hold that callers may leave out, by name."""

    graph: Graph
    model: Any
    record: Any
    evaluated: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    defaults: Mapping[str, Callable[[], AnyArray]] = field(default_factory=dict)


@final
@dataclass(frozen=True, eq=False)
class Identity:
    """What makes an opaque node the one it is, apart from its inputs: the kind of operator with all its
    settings, and its parameters. Two nodes with equal identities compute the same function; ``unseen`` says
    why that is not proved, where other things than the node's inputs and parameters are in it."""

    kind: str
    parameters: tuple[AnyArray, ...] = ()
    unseen: str = ""


@final
@dataclass(frozen=True, eq=False)
class Rich:
    """What unfolding made: the model, the paths of the convolutions that are blocks now, and of those that are
    not, each with the reason."""

    model: Any
    unfolded: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """What became of each convolution, as plain data."""
        kept = [{"where": path, "reason": reason} for path, reason in self.kept]
        return {"schema": "refold.unfolding/1", "unfolded": list(self.unfolded), "kept": kept}

    def __str__(self) -> str:
        kept = f"; {len(self.kept)} stay as they are" if self.kept else ""
        return f"{len(self.unfolded)} convolutions are blocks now{kept}"


class Reference(Protocol):
    """What a proof asks of a front end. Its methods are those of :class:`Frontend`."""

    def evaluate(self, lifted: Lifted, feeds: Mapping[str, AnyArray], wanted: Sequence[str]) -> dict[str, AnyArray]:
        """Values by the original model's own operators in float64."""
        ...

    def identity(self, lifted: Lifted, node: str) -> Identity:
        """What an opaque node is."""
        ...

    def storage(self, lifted: Lifted, node: str) -> str:
        """The type in which the parameters of a linear node are stored."""
        ...


class Frontend(Protocol):
    """One framework."""

    name: str

    def lift(self, model: Any, example: Any = None) -> Lifted:
        """The neutral graph of ``model`` in inference. ``example`` is an input, a nest of them, or a
        shape; needed only where the model does not say its input shapes. Raises InputError."""
        ...

    def helpers(self, conv: AffineConv, space: tuple[int | None, ...]) -> int | Refusal:
        """How many operators beside the convolution itself the framework needs to say ``conv``, or why
        it cannot say it."""
        ...

    def lower(self, lifted: Lifted, plan: Plan) -> Any:
        """A new model of the same framework that follows the plan; the original stays untouched."""
        ...

    def unfold(self, model: Any, choose: Choose, example: Any = None) -> Rich:
        """A copy of ``model`` with the blocks that ``choose`` gives in the places of its convolutions. If
        ``example`` holds arrays, the batch norms of the blocks start at their statistics. Raises InputError."""
        ...

    def evaluate(self, lifted: Lifted, feeds: Mapping[str, AnyArray], wanted: Sequence[str]) -> dict[str, AnyArray]:
        """The values ``wanted``, computed in float64 from ``feeds`` (any values of the graph that cut
        the wanted ones off from the inputs) by the original model's own operators.

        Arrays have the framework's axis order and may have other batch and spatial sizes than the graph
        says, where the operators allow it. Raises InputError where an operator cannot run in float64 or
        at that size, naming it.
        """
        ...

    def run(self, lifted: Lifted, inputs: Sequence[AnyArray], *, optimized: bool = False) -> list[AnyArray]:
        """The outputs of the model, in inference, as it ships: in its own precision and runtime. Inputs
        and outputs are in the order of the lifted graph's. ``optimized`` lets the runtime change the graph,
        where it does so by default: that is what is timed, not what is compared."""
        ...

    def arrays(self, example: Any) -> list[AnyArray] | None:
        """The arrays of an example, flat and in order; None if it is a shape (or nothing)."""
        ...

    def versions(self) -> dict[str, str]:
        """The versions of the framework and what is below it, by name."""
        ...

    def identity(self, lifted: Lifted, node: str) -> Identity:
        """What an opaque node is."""
        ...

    def storage(self, lifted: Lifted, node: str) -> str:
        """The type in which the parameters of a linear node are stored: ``"float32"``, ``"bfloat16"``..."""
        ...

    def load(self, path: Path, *, imports: Sequence[str] = (), trust: bool = False) -> Any:
        """The model in a file, which is taken for hostile. Raises InputError."""
        ...

    def save(self, model: Any, path: Path, *, overwrite: bool = False, example: Any = None) -> None:
        """Write the model to a file, whole or not at all. ``example`` is as for :meth:`lift`, for formats that
        need it. Raises InputError."""
        ...

    def restore(self, model: Any, weights: Path | None) -> Any:
        """A model that a user's function made, ready for inference, with the weights in a file if one is
        given. Raises InputError."""
        ...


# Which module's classes mean which front end. A framework is never imported to find out: a model of it
# can only exist if it was imported already.
FRONTENDS = {
    "keras": "refold.keras.frontend",
    "onnx": "refold.onnx.frontend",
    "paddle": "refold.paddle.frontend",
    "torch": "refold.torch.frontend",
}
SUFFIXES = {".keras": "keras", ".onnx": "onnx", ".pt2": "torch", ".json": "paddle"}
# Files that hold weights and no model.
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt")
# What must be installed for it, where that is not just the framework of that name.
MODULES = {"onnx": ("onnx", "onnx_ir")}


def frontend_of(model: Any) -> Frontend:
    """The front end for a model. Raises InputError if there is none."""
    for framework, module in FRONTENDS.items():
        if framework not in sys.modules:
            continue
        if not is_installed(framework):
            # Others that have part of it loaded shall not stumble over what is missing.
            if type(model).__module__.split(".")[0] == framework:
                raise InputError(f"this model needs {_install(framework)}")
        else:
            frontend: Frontend = import_module(module).FRONTEND
            if import_module(module).owns(model):
                return frontend
    known = ", ".join(FRONTENDS)
    raise InputError(
        f"a {type(model).__module__}.{type(model).__qualname__} is not a model that refold reads; "
        f"it reads models of: {known}"
    )


def is_installed(framework: str) -> bool:
    """Whether all that a front end needs is installed."""
    needed = MODULES.get(framework, (framework,))
    return all(module in sys.modules or find_spec(module) is not None for module in needed)


def _install(framework: str) -> str:
    return f"{framework}; install it with: pip install 'refold[{framework}]'"


def frontend_for(path: Path) -> Frontend:
    """The front end for a file, by its ending. Raises InputError if there is none or it is not
    installed."""
    framework = SUFFIXES.get(path.suffix)
    if framework is None:
        known = ", ".join(SUFFIXES)
        raise InputError(f"{path}: refold does not read files that end in '{path.suffix}'; it reads {known}")
    if not is_installed(framework):
        raise InputError(f"{path}: reading it needs {_install(framework)}")
    frontend: Frontend = import_module(FRONTENDS[framework]).FRONTEND
    return frontend


def unit_roundoff(dtype: str) -> float:
    """Half the distance from 1 to the next number of a floating type (Higham 2002, section 2.1).

    >>> unit_roundoff("float32") == 2.0**-24
    True
    """
    mantissa = {"float64": 53, "float32": 24, "bfloat16": 8, "float16": 11}
    if dtype not in mantissa:
        raise ValueError(f"no unit roundoff is known for the type {dtype}")
    return float(np.ldexp(1.0, -mantissa[dtype]))
