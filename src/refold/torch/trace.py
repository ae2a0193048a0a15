"""Following what a torch module computes, function by function.

The module runs on real tensors, eagerly, and every torch function that is called on something made of its
inputs is written down, with the modules around it. Functions that write in place are written down as the ones
that do not. Tensors that do not depend on the inputs are constants, which know how they were computed.
Nothing is guessed from the numbers: a ``forward`` that looks at the values of a tensor is recorded whole, with
the reason; and what was recorded is checked against a second run on other inputs (:mod:`refold.torch.record`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch.overrides import TorchFunctionMode

from refold.recording import steps
from refold.recording.sizes import Size
from refold.recording.steps import CannotFollowError, RetryError, Scope, UntraceableError
from refold.recording.symbols import Constant, Symbol, leaves, mapped, symbols
from refold.torch import functions, hollow

Module = torch.nn.Module
Tensor = torch.Tensor


@final
@dataclass(eq=False)
class Step(steps.Step):
    """One recorded call: of ``function``, or of a ``module`` that was taken whole, for ``reason``. ``writes`` says
    that in truth its first argument was written into, ``views`` that what it gives lies where what it reads does:
    nothing was computed."""

    function: functions.Function | None = None
    module: Any = None
    writes: bool = False
    views: bool = False

    @property
    def what(self) -> str:
        """The function's name, or the module's class."""
        return type(self.module).__name__ if self.function is None else functions.short_name(self.function)


Trace = steps.Trace[Step]


def record(
    model: Any,
    args: tuple[Any, ...],
    names: Any,
    whole: Mapping[int, str],
    prefix: str = "",
    *,
    is_hollow: bool = False,
) -> Trace:
    """Run ``model`` on the tensors in ``args`` and write down what happens.

    ``names`` is the nest of the inputs' names; ``prefix`` goes in front of all names. ``whole`` says of which
    modules (by identity) no more than that they were called is to be recorded, and why. ``is_hollow`` leaves out
    what takes long (see :mod:`refold.torch.hollow`), where no module is taken whole. Raises
    :class:`UntraceableError`; the model's buffers are afterwards what they were before.
    """
    recorder = _Recorder(model, dict(whole), prefix, is_hollow=is_hollow)
    return recorder.run(args, names)


@final
class _Recorder(TorchFunctionMode):
    def __init__(self, model: Any, whole: dict[int, str], prefix: str, *, is_hollow: bool) -> None:
        super().__init__()
        self.is_hollow = is_hollow
        self.model = model
        self.prefix = prefix
        self.whole = whole
        self.trace = Trace()
        self.scope: Scope | None = None
        self.listening = False
        self.symbols: dict[int, Symbol] = {}
        self.constants: dict[int, Constant] = {}
        self.alive: dict[int, Any] = {}  # an id is worth nothing once its object is gone
        self.sharing: dict[int, set[int]] = {}  # the tensors over one storage, by its address
        self.stale: set[int] = set()
        self.paths = {id(module): path for path, module in model.named_modules()}

    def run(self, args: tuple[Any, ...], names: Any) -> Trace:
        with torch.no_grad():
            # A forward may write into its inputs.
            self.trace.tensors = [leaf.clone() for leaf in leaves(args) if isinstance(leaf, Tensor)]
        for leaf, name in zip(leaves(args), leaves(names), strict=True):
            if isinstance(leaf, Tensor):
                self.keep(leaf)
                self.symbols[id(leaf)] = _symbol(leaf, f"{self.prefix}{name}")
        self.trace.inputs = self.encoded(args)
        written = [(leaf, leaf._version) for leaf in leaves(args) if isinstance(leaf, Tensor)]
        with untouched(self.model), calls_of_modules(self.module_call), torch.no_grad(), self:
            try:
                self.listening = True
                outputs = Module.__call__(self.model, *args)  # not fx's own, which prints what went wrong
            except CannotFollowError as error:
                raise UntraceableError(f"its forward {error}") from error
            except Exception as error:  # whatever a user's forward may raise
                raise UntraceableError(first_line(error)) from error
            finally:
                self.listening = False
        if any(tensor._version != version for tensor, version in written):
            raise UntraceableError("its forward writes into its input")
        self.trace.outputs = self.encoded_result(outputs)
        self.trace.results = [tensor.detach() for tensor in leaves(outputs) if isinstance(tensor, Tensor)]
        self._name()
        return self.trace

    def encoded_result(self, outputs: Any) -> Any:
        tensors = [leaf for leaf in leaves(outputs) if isinstance(leaf, Tensor)]
        if not tensors:
            raise UntraceableError("it returns no tensor")
        try:
            encoded = self.encoded(outputs)
        except CannotFollowError as error:
            raise UntraceableError(f"its forward {error}") from error
        if any(isinstance(leaf, Constant) for leaf in leaves(encoded)):
            raise UntraceableError("it returns something that does not depend on its inputs")
        if any(not isinstance(leaf, Symbol | int | float | str | None) for leaf in leaves(encoded)):
            raise UntraceableError("it returns something that is neither a tensor nor a list or dict of them")
        return encoded

    # ---- functions -----------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.listening:
            return func(*args, **kwargs)
        if functions.is_getter(func):
            return self.attribute(func, args[0])
        name = getattr(func, "__name__", "")
        followed = self.is_followed((args, kwargs))
        if name in functions.LOOKING and followed:
            raise CannotFollowError("looks at the values of a tensor")
        if name in functions.ALIASING:
            return self.aliased(func(*args, **kwargs), args[0])
        if name == "__iter__":
            return iter(self.call(Tensor.unbind, (args[0], 0), {}))
        if name == "size" and followed:
            shape = self.shape_of(args[0])
            place = args[1] if len(args) > 1 else kwargs.get("dim")
            return shape if place is None else shape[place]
        if func is Tensor.view and not any(isinstance(size, torch.dtype) for size in args[1:]):
            func = Tensor.reshape  # the same, and does not ask how what it reads lies in memory
        return self.call(func, args, kwargs)

    def attribute(self, getter: Any, tensor: Any) -> Any:
        name = getter.__self__.__name__
        if name == "shape" and id(tensor) in self.symbols:
            return self.shape_of(tensor)
        found = getter(tensor)
        if isinstance(found, Tensor) and name in functions.ALIASING:
            return self.aliased(found, tensor)
        if isinstance(found, Tensor) and name != "grad":
            return self.call(getattr, (tensor, name), {})
        return found

    def shape_of(self, tensor: Any) -> Any:
        symbol = self.symbols[id(tensor)]
        return torch.Size([Size(size, ("size", symbol, axis)) for axis, size in enumerate(symbol.shape)])

    def aliased(self, made: Any, tensor: Any) -> Any:
        if isinstance(made, Tensor) and made is not tensor:
            encoded = self.encode(tensor)
            self.keep(made)
            table: dict[int, Any] = self.symbols if isinstance(encoded, Symbol) else self.constants
            table[id(made)] = encoded
        return made

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do one call and write it down, if it makes or changes a tensor."""
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = self.encoded(args), self.encoded(kwargs)
        versions = [tensor._version for tensor in tensors]
        before = {id(t): t for t in tensors}
        copies = self.copies(func, tensors)
        followed = self.is_hollow and any(id(tensor) in self.symbols for tensor in tensors)
        result = hollow.call(func, args, kwargs) if followed else func(*args, **kwargs)
        written = [t for t, version in zip(tensors, versions, strict=True) if t._version != version]
        if written:
            self.write(func, given, written, copies)
            return result
        made = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        if not made or all(id(tensor) in before for tensor in made):
            return result
        step = self.write_down(func, given[0], given[1], result)
        step.views = {_address(tensor) for tensor in made} <= {_address(tensor) for tensor in tensors}
        return result

    def write_down(self, func: Any, args: Any, kwargs: Any, result: Any) -> Step:
        """A step, if it depends on the inputs; else what it made are constants that know their origin."""
        step = Step(args, kwargs, self.scope, function=func)
        made = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            self.keep(tensor)
        if any(isinstance(leaf, Symbol | Size) for leaf in leaves((args, kwargs))):
            for tensor in made:
                self.symbols[id(tensor)] = _symbol(tensor)
            self.trace.steps.append(step)
        elif any(isinstance(leaf, Constant) for leaf in leaves((args, kwargs))):
            for place, tensor in enumerate(made):
                self.constants[id(tensor)] = Constant(tensor, step, place)
        step.outputs = self.encoded(result)
        return step

    # ---- writing in place ----------------------------------------------------------------------------

    def copies(self, func: Any, tensors: list[Any]) -> dict[int, Any]:
        """Copies of the constants that a function may write into, as they were."""
        name = getattr(func, "__name__", "")
        writes = name.partition(".")[0].endswith("_") or name == "__setitem__"
        own = [tensor for tensor in tensors[:1] if writes and id(tensor) not in self.symbols]
        return {id(tensor): tensor.clone() for tensor in own}

    def write(self, func: Any, given: Any, written: list[Any], copies: Mapping[int, Any]) -> None:
        """What an in-place function did, as the function that gives it: from now on its first argument, and what
        that is a view of, are other symbols."""
        pure = functions.out_of_place(func)
        (args, kwargs), target = given, written[0]
        first = next(leaves((args, kwargs)), None)
        # Views of what was written into count as written too.
        apart = [tensor for tensor in written if _address(tensor) != _address(target)]
        if apart or first is not self.lookup(target):
            raise CannotFollowError(f"writes into a tensor ({functions.short_name(func)})")
        if isinstance(first, Constant):
            if id(target) not in copies or id(target) in self.stored:
                raise CannotFollowError("writes into a parameter or buffer")
            first.tensor = copies[id(target)]
            if pure is None and not symbols(given):
                self.constants[id(target)] = Constant(target)
                return
        if pure is None:
            raise CannotFollowError(f"writes into a tensor ({functions.short_name(func)})")
        if pure is functions.set_item and self.stands_there(*args[:3]):
            return
        args, kwargs = functions.without_inplace(pure, args, kwargs)
        self.symbols.pop(id(target), None)
        self.constants.pop(id(target), None)
        step = self.write_down(pure, args, kwargs, target)
        step.writes = True
        if any(not isinstance(leaf, Symbol | Constant) for leaf in leaves(step.outputs)):
            raise CannotFollowError(f"writes into a tensor ({functions.short_name(func)})")
        self.stale |= self.sharing[_address(target)] - {id(target)}
        self.stale.discard(id(target))
        self.write_back(target, step)

    def stands_there(self, symbol: Any, index: Any, value: Any) -> bool:
        """Whether ``value`` was just written at ``index``: ``x[i] += y`` writes a view and then itself."""
        last = next((step for step in reversed(self.trace.steps) if step.outputs is symbol), None)
        return last is not None and last.function is functions.set_item and last.args[1:] == (index, value)

    def write_back(self, view: Any, step: Step) -> None:
        """If ``view`` was cut out of another tensor, that one has changed there too."""
        cuts = [s for s in self.trace.steps if s.function in (Tensor.__getitem__,)]
        old = step.reads[0] if step.reads else None
        source = next((s for s in reversed(cuts) if s.outputs is old), None)
        if source is None or old is None:
            return
        for identity, symbol in list(self.symbols.items()):
            if identity in self.stale and symbol is source.args[0]:
                whole = self.alive[identity]
                self.stale.discard(identity)
                new = self.symbols[id(view)]
                self.symbols.pop(identity)
                args = (symbol, source.args[1], new)
                self.write_down(functions.set_item, args, {}, whole).writes = True
                return

    # ---- modules -------------------------------------------------------------------------------------

    def module_call(self, original: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
        if not self.listening or not self.is_followed((args, kwargs)):
            return original(module, *args, **kwargs)
        path = self.paths.get(id(module), type(module).__name__.lower())
        reason = self.whole.get(id(module), "") or _opaque_reason(module)
        scope = Scope(module, self.encoded(args), self.encoded(kwargs), self.scope, path)
        if reason:
            return self.whole_module(original, scope, args, kwargs, reason)
        self.trace.scopes.append(scope)
        self.scope = scope
        try:
            outputs = original(module, *args, **kwargs)
            scope.outputs = self.encoded(outputs)
        except CannotFollowError as error:
            if module is not self.model:
                self.whole.setdefault(id(module), f"its forward {error}")
                raise RetryError(self.whole) from error
            raise
        finally:
            self.scope = scope.parent
        return outputs

    def whole_module(self, original: Any, scope: Scope, args: Any, kwargs: Any, reason: str) -> Any:
        if self.is_hollow:  # its code may go by numbers
            self.whole.setdefault(id(scope.module), reason)
            raise RetryError(self.whole)
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in tensors]
        self.listening = False
        try:
            result = original(scope.module, *args, **kwargs)
        finally:
            self.listening = True
        if any(tensor._version != version for tensor, version in zip(tensors, versions, strict=True)):
            raise CannotFollowError("has a part that writes into its input")
        made = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            if id(tensor) not in self.symbols:
                self.keep(tensor)
                self.symbols[id(tensor)] = _symbol(tensor)
        name = scope.path or type(scope.module).__name__
        step = Step(scope.args, scope.kwargs, self.scope, self.encoded(result), name, reason, module=scope.module)
        self.trace.steps.append(step)
        return result

    # ---- symbols and names ---------------------------------------------------------------------------

    @property
    def stored(self) -> set[int]:
        """The identities of the model's parameters and buffers."""
        return {id(tensor) for tensor in stored(self.model)}

    def keep(self, tensor: Any) -> None:
        if id(tensor) not in self.alive:
            self.alive[id(tensor)] = tensor
            self.sharing.setdefault(_address(tensor), set()).add(id(tensor))

    def lookup(self, tensor: Any) -> Symbol | Constant | None:
        return self.symbols.get(id(tensor)) or self.constants.get(id(tensor))

    def is_followed(self, nest: Any) -> bool:
        return any(id(leaf) in self.symbols or isinstance(leaf, Size) for leaf in leaves(nest))

    def encode(self, tensor: Any) -> Symbol | Constant:
        if id(tensor) in self.stale:
            raise CannotFollowError("reads a view of a tensor after that was written into")
        known = self.lookup(tensor)
        if known is None:
            self.keep(tensor)
            known = self.constants[id(tensor)] = Constant(tensor)
        return known

    def encoded(self, nest: Any) -> Any:
        return mapped(lambda leaf: self.encode(leaf) if isinstance(leaf, Tensor) else leaf, nest)

    def _name(self) -> None:
        """Name every step: a module that consists of one step gives it its name."""
        alone: dict[int, int] = {}
        for step in self.trace.steps:
            for scope in step.scope.chain if step.scope else []:
                alone[id(scope)] = alone.get(id(scope), 0) + 1
        taken: dict[str, int] = {s.name: 1 for s in symbols(self.trace.inputs)}
        for step in self.trace.steps:
            own = step.scope.path if step.scope else ""
            if step.module is not None:
                wanted = step.name
            elif step.scope is not None and own and alone[id(step.scope)] == 1:
                wanted = own
            else:
                wanted = f"{own}.{step.what}" if own else step.what
            wanted = f"{self.prefix}{wanted}"
            seen = taken[wanted] = taken.get(wanted, 0) + 1
            step.name = wanted if seen == 1 else f"{wanted}#{seen}"
            for index, symbol in enumerate(step.gives):
                symbol.name = symbol.name or (step.name if index == 0 else f"{step.name}:{index}")


def _symbol(tensor: Any, name: str = "") -> Symbol:
    return Symbol(
        name,
        tuple(tensor.shape),
        dtype_name(tensor),
        bool(tensor.layout != torch.strided or tensor.is_contiguous()),
    )


def _address(tensor: Any) -> int:
    try:
        return int(tensor.untyped_storage().data_ptr()) or id(tensor)
    except (RuntimeError, NotImplementedError):  # sparse and other tensors without a storage
        return id(tensor)


def _opaque_reason(module: Any) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "a scripted module does not show what it computes"
    return ""


@contextlib.contextmanager
def calls_of_modules(hear: Callable[..., Any]) -> Iterator[None]:
    """Hear of every call of a module; nothing is compiled meanwhile, nor anything that hears."""
    original = Module.__call__
    compiler = sys.modules.get("torch._dynamo")
    eager = torch.compiler.set_stance("force_eager") if compiler else contextlib.nullcontext()

    def called(module: Any, *args: Any, **kwargs: Any) -> Any:
        return hear(original, module, args, kwargs)

    Module.__call__ = called  # type: ignore[method-assign]  # that is how it listens
    try:
        with eager:
            yield
    finally:
        Module.__call__ = original  # type: ignore[method-assign]  # that is how it listens


@contextlib.contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Give buffers back the numbers that they had, whatever a forward writes into them."""
    before = [(tensor, tensor._version, tensor.clone()) for tensor in model.buffers()]
    try:
        yield
    finally:
        for tensor, version, value in before:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(value)


def stored(model: Any) -> list[Any]:
    """The parameters and buffers of a model, each once."""
    return list({id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values())


def dtype_name(tensor: Any) -> str:
    """The name of a tensor's type, such as ``"float32"``."""
    return str(tensor.dtype).removeprefix("torch.")


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, for a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".:")
