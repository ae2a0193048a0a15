"""The PyTorch front end: lift, lower, run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, final

import torch

from refold.algebra.affine import AffineConv
from refold.algebra.refusal import Refusal
from refold.errors import InputError
from refold.frontend import AnyArray, Identity, Lifted
from refold.graph.graph import Graph
from refold.graph.plan import Plan
from refold.recording.arguments import argument_names, input_names
from refold.recording.sizes import Size, formula_of
from refold.recording.symbols import Constant, Symbol, leaves
from refold.torch import examples, execute, express
from refold.torch.examples import to_numpy
from refold.torch.lift import evaluated, lift_record, parameters_of, used
from refold.torch.lower import lower_plan
from refold.torch.record import BoundError, Record, record_twice
from refold.torch.trace import Step, UntraceableError, dtype_name, stored


def owns(model: Any) -> bool:
    """Whether this front end reads ``model``."""
    return isinstance(model, torch.nn.Module)


@final
@dataclass(frozen=True, eq=False)
class Session:
    """What the front end remembers of a lifted model: the record, its arguments with their names, and the sizes
    at which the model could not be recorded."""

    record: Record
    specs: tuple[Any, ...]
    names: tuple[str, ...]
    failed: tuple[examples.Attempt, ...]


@final
class TorchFrontend:
    """See :class:`refold.frontend.Frontend`."""

    name = "torch"

    def lift(self, model: Any, example: Any = None) -> Lifted:
        """The neutral graph of a torch module in eval mode."""
        model = unwrapped(model)
        _check(model)
        specs = examples.specs_of(model, example)
        names = argument_names(model, specs)
        record, failed = _recorded(model, specs, input_names(names, specs))
        graph = lift_record(model, record)
        return Lifted(
            graph, model, Session(record, specs, names, failed), _evaluated(graph, record), _notes(model, record)
        )

    def helpers(self, conv: AffineConv, space: tuple[int | None, ...]) -> int | Refusal:
        """See :func:`refold.torch.express.helpers`."""
        return express.helpers(conv, space)

    def lower(self, lifted: Lifted, plan: Plan) -> Any:
        """A module of plain modules, in eval mode, that follows the plan."""
        session = lifted.record
        record = session.record
        plain = lower_plan(lifted.graph, record, plan, lifted.model, session.names)
        if not isinstance(plain, torch.fx.GraphModule):
            return plain
        if not record.bound and any(_runs(plain, session.specs, attempt) for attempt in session.failed):
            # What bound the original to its sizes is gone, so that has to be said.
            plain = lower_plan(lifted.graph, replace(record, bound=True), plan, lifted.model, session.names)
        # Known from now on, so that the plain model needs no example.
        plain.meta["refold.example"] = examples.plain_example(session.specs)
        return plain

    def evaluate(self, lifted: Lifted, feeds: Mapping[str, AnyArray], wanted: Sequence[str]) -> dict[str, AnyArray]:
        """Float64 values, by torch's own functions."""
        return execute.evaluate(lifted.record.record, feeds, wanted)

    def run(self, lifted: Lifted, inputs: Sequence[AnyArray], *, optimized: bool = False) -> list[AnyArray]:
        """The model's outputs, eagerly."""
        return execute.run(lifted.record.record, lifted.model, inputs)

    def arrays(self, example: Any) -> list[AnyArray] | None:
        """The arrays of an example, flat and in order; None if it is a shape (or nothing)."""
        return examples.arrays_of(example)

    def versions(self) -> dict[str, str]:
        """The version of torch."""
        return {"torch": str(torch.__version__)}

    def identity(self, lifted: Lifted, node: str) -> Identity:
        """The function or class of a step with its settings, and its weights."""
        record = lifted.record.record
        step = _step(lifted, node)
        if step.module is not None:
            kind = f"{type(step.module).__module__}.{type(step.module).__qualname__} {_settings(step.module)}"
        else:
            kind = step.what
        plain = [_plain(record, leaf) for leaf in leaves((step.args, step.kwargs))]
        # Weights that are computed count as what they are shipped as.
        tensors = stored(step.module) if step.module is not None else []
        tensors += [used(constant, record.doubles) for constant in step.constants]
        return Identity(f"{kind} {[text for text in plain if text]}", tuple(map(to_numpy, tensors)))

    def storage(self, lifted: Lifted, node: str) -> str:
        """The type of the largest tensor of a step."""
        tensors = sorted(parameters_of(_step(lifted, node)), key=lambda tensor: -prod(tensor.shape))
        return next(iter([dtype_name(tensor) for tensor in tensors]), "float32")

    def load(self, path: Path, *, imports: Sequence[str] = (), trust: bool = False) -> Any:
        """See :func:`refold.torch.files.load`."""
        from refold.torch import files

        return files.load(path, imports=imports, trust=trust)

    def save(self, model: Any, path: Path, *, overwrite: bool = False, example: Any = None) -> None:
        """See :func:`refold.torch.files.save`."""
        from refold.torch import files

        files.save(model, path, overwrite=overwrite, example=example)

    def restore(self, model: Any, weights: Path | None) -> Any:
        """See :func:`refold.torch.files.restore`."""
        from refold.torch import files

        return files.restore(model, weights)


FRONTEND = TorchFrontend()


def _step(lifted: Lifted, node: str) -> Step:
    output = next(n.outputs[0] for n in lifted.graph.nodes if n.name == node)
    step: Step = lifted.record.record.owners[output]
    return step


# ---- reading a model -------------------------------------------------------------------------------


def unwrapped(model: Any) -> Any:
    """The module inside of the wrappers that torch puts around one: ``torch.compile``, DataParallel, DDP,
    AveragedModel."""
    wrappers = {
        "OptimizedModule": "_orig_mod",
        "DataParallel": "module",
        "DistributedDataParallel": "module",
        "AveragedModel": "module",
    }
    while type(model).__module__.startswith("torch.") and type(model).__name__ in wrappers:
        model = getattr(model, wrappers[type(model).__name__])
    return model


def _check(model: Any) -> None:
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(f"'{name}' is scripted, which hides what it computes: fold the module before scripting it")
    training = [path for path, module in model.named_modules() if module.training and _differs(module)]
    if training or model.training:
        where = f" (its module '{training[0]}' is)" if training and training[0] and not model.training else ""
        raise InputError(
            f"the model '{name}' is in training mode{where}, in which it is another function: "
            "call model.eval() first"
        )
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise InputError(
                f"the model '{name}' has no numbers ('{path}' is on the meta device): load its weights first"
            )
        if hasattr(tensor, "full_tensor"):
            raise InputError(
                f"'{path}' of the model '{name}' is sharded over processes: gather the weights first "
                "(get_model_state_dict with full_state_dict=True) and load them into the unsharded model"
            )
        if tensor.is_complex():
            raise InputError(f"'{path}' of the model '{name}' holds complex numbers, which refold does not fold")


def _differs(module: Any) -> bool:
    """Whether a module may compute something else in training: all but the empty holders may."""
    return type(module).forward is not torch.nn.Module.forward or bool(list(module.children()))


def _recorded(model: Any, specs: tuple[Any, ...], names: Any) -> tuple[Record, tuple[examples.Attempt, ...]]:
    error: UntraceableError | None = None
    bound = False
    failed: list[examples.Attempt] = []
    for attempt in examples.attempts(specs):
        change, pair = attempt
        if change and bound:
            continue
        feeds = [examples.feeds(specs, which, change, pair) for which in (0, 1)]
        try:
            return record_twice(model, feeds, names, strict=bool(change), bound=bound), tuple(failed)
        except UntraceableError as found:
            error, bound = found, bound or isinstance(found, BoundError)
            failed.append(attempt)
    parts = [name for name, part in model.named_children() if list(part.parameters())]
    advice = f"; its parts may fold one by one ({', '.join(parts[:4])})" if parts and _is_its_own(error) else ""
    raise InputError(f"the model '{type(model).__name__}' cannot be followed: {error}{advice}") from error


def _is_its_own(error: UntraceableError | None) -> bool:
    """Whether it is the model's own forward that cannot be followed, and not the example that does not fit."""
    return error is not None and str(error).startswith("its forward")


def _runs(model: Any, specs: tuple[Any, ...], attempt: examples.Attempt) -> bool:
    """Whether a model runs at certain sizes."""
    try:
        with torch.no_grad():
            model.forward(*examples.feeds(specs, 1, *attempt))
    except Exception:  # whatever torch raises on sizes that do not fit
        return False
    return True


def _evaluated(graph: Graph, record: Record) -> tuple[str, ...]:
    """The modules whose weights are computed from other parameters."""
    found = [
        step.scope.path if step.scope and step.scope.path else step.name
        for step in record.trace.steps
        if evaluated(graph, step)
    ]
    return tuple(dict.fromkeys(found))


def _notes(model: Any, record: Record) -> tuple[str, ...]:
    hooked = [path or type(model).__name__ for path, module in model.named_modules() if _hooks(module)]
    if not hooked:
        return ()
    return (
        f"hooks act as they did while the model was recorded, and are gone where it folds: {', '.join(hooked)}",
    )


def _hooks(module: Any) -> list[Any]:
    """The hooks that a user put on a module; torch has some of its own, which compute weights or check inputs."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    modules = [getattr(hook, "__module__", None) or type(hook).__module__ for hook in hooks]
    return [hook for hook, name in zip(hooks, modules, strict=True) if not name.startswith("torch.")]


# ---- what a step is ------------------------------------------------------------------------------


def _settings(module: Any) -> list[tuple[str, str, str]]:
    """The simple attributes of a module and of those in it."""
    found = []
    for path, inner in module.named_modules():
        for name, value in sorted(vars(inner).items()):
            if name != "training" and not name.startswith("_") and _is_simple(value):
                found.append((path, name, repr(value)))
    return found


def _is_simple(value: Any) -> bool:
    return all(isinstance(leaf, int | float | str | type(None)) for leaf in leaves(value))


def _plain(record: Record, leaf: Any) -> str:
    if isinstance(leaf, Symbol | Constant) or leaf is None or leaf is False:
        return ""
    return _size_text(record, formula_of(leaf)) if isinstance(leaf, Size) else repr(leaf)


def _size_text(record: Record, formula: Any) -> str:
    if not isinstance(formula, tuple):
        return repr(int(formula))
    if formula[0] != "size":
        return f"({_size_text(record, formula[1])} {formula[0]} {_size_text(record, formula[2])})"
    symbol, axis = formula[1:]
    known = record.shapes[symbol.name][axis]
    return repr(known) if known is not None else f"axis {axis}"
