"""Recording what a Paddle Layer computes, layer by layer and inside custom layers.

The model runs on real tensors, eagerly, and whatever is made of its inputs is written down: the layers that
Paddle ships as steps of their own, and what a user's own ``forward`` calls (``paddle.concat``,
``F.interpolate``, ``x + y``). Tensors that do not depend on the inputs are constants. Nothing is guessed from
the numbers: a ``forward`` that looks at the values of a tensor, or writes into one, is recorded whole, with the
reason; and what was recorded is checked against a second run on other inputs (see :mod:`refold.paddle.lift`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import paddle

from refold.paddle import patches
from refold.paddle.patches import ALIASING, ARITHMETIC, LOOKING, SET_ITEM, WRITING
from refold.paddle.recurrent import is_packed
from refold.paddle.sentences import first_line
from refold.paddle.tensors import current_weights, stored
from refold.recording import steps
from refold.recording.sizes import Size
from refold.recording.steps import CannotFollowError, RetryError, Scope, UntraceableError
from refold.recording.symbols import Constant, Symbol, leaves, mapped, symbols

Layer = paddle.nn.Layer
Tensor = paddle.Tensor


@final
@dataclass(eq=False)
class Primitive:
    """One operator of Paddle, with the arguments in Paddle's own order."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Symbol]

    @property
    def reads(self) -> list[Symbol]:
        """The symbols that it reads."""
        return symbols((self.args, self.kwargs))


@final
@dataclass(eq=False)
class Step(steps.Step):
    """One recorded step: a layer (``layer``, at ``path``) or a function (``function``, by its public name).

    ``inside`` are the operators that it consists of, and ``result`` is what the last of them gave, as far as
    they are known. ``weights`` are the tensors under the layer's names at that moment.
    """

    function: str = ""
    layer: Any = None
    path: str = ""
    inside: list[Primitive] = field(default_factory=list)
    result: Symbol | None = None
    weights: dict[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True, eq=False)
class Origin:
    """How a forward computed a constant from others: what ``function`` gave, as which of its tensors."""

    tensor: Any
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int


@final
@dataclass(eq=False)
class Trace(steps.Trace[Step]):
    """A recorded model. ``origins`` says, by identity, of constants how they were computed; ``outward`` are the
    calls of layers that wrote into a tensor that was there before them."""

    origins: dict[int, Origin] = field(default_factory=dict)
    outward: set[Scope] = field(default_factory=set)


def record(model: Any, args: tuple[Any, ...], names: Any, whole: Mapping[int, str]) -> Trace:
    """Run ``model`` on the tensors in ``args`` and write down what happens.

    ``names`` is the nest of the inputs' names. ``whole`` says of which layers (by identity) no more than
    that they were called is to be recorded, and why. Raises :class:`UntraceableError`; the model's buffers are
    afterwards what they were before.
    """
    recorder = _Recorder(model, dict(whole))
    return recorder.run(args, names)


@final
class _Recorder:
    def __init__(self, model: Any, whole: dict[int, str]) -> None:
        self.model = model
        self.whole = whole
        self.trace = Trace()
        self.scope: Scope | None = None
        self.step: Step | None = None
        self.listening = False
        self.symbols: dict[int, Symbol] = {}
        self.homes: dict[int, Scope | None] = {}  # in which scope a tensor was made
        self.alive: list[Any] = []  # an id is worth nothing once its object is gone
        self.names: dict[str, int] = {}
        self.paths = {id(layer): path for path, layer in model.named_sublayers(include_self=True)}
        self.shape = vars(Tensor)["shape"]

    def run(self, args: tuple[Any, ...], names: Any) -> Trace:
        flat = list(leaves(args))
        made = [self.symbol(tensor, self.unique(name)) for tensor, name in zip(flat, leaves(names), strict=True)]
        self.trace.inputs = self.encoded(args)
        assert len(made) == len(flat)
        self.trace.tensors = [tensor.clone() for tensor in flat]  # a forward may write into its inputs
        with _untouched(self.model), self.patched(), paddle.no_grad(), paddle.jit.api.sot_mode_guard(False):
            try:
                self.listening = True
                outputs = self.model(*args)
            except CannotFollowError as error:
                raise UntraceableError(f"its forward {error}") from error
            except Exception as error:  # whatever a user's forward may raise
                raise UntraceableError(first_line(error)) from error
            finally:
                self.listening = False
        self.trace.outputs = self.encoded(outputs)
        tensors = [leaf for leaf in leaves(outputs) if isinstance(leaf, Tensor)]
        if not tensors:
            raise UntraceableError("it returns no tensor")
        if any(not isinstance(leaf, Symbol | None) for leaf in leaves(self.trace.outputs)):
            raise UntraceableError("it returns something that does not depend on its inputs, or not in a way seen")
        self.trace.results = [np.asarray(tensor.numpy()) for tensor in tensors]
        return self.trace

    # ---- listening -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Hear of every call of a layer, of a public function and of an operator."""
        recorder = self
        original = Layer.__call__
        replacements: dict[int, Any] = {}
        for key, (name, function) in patches.functions().items():
            replacements[key] = self.on_function(name, function, patches.operator_name(function))
        on_tensor: dict[str, Any] = {"shape": property(self.shape_of)}
        for name, operator in ARITHMETIC.items():
            if name in vars(Tensor):
                on_tensor[name] = self.on_function(f"paddle.Tensor.{name}", vars(Tensor)[name], operator)
        for name in ALIASING:
            on_tensor[name] = self.on_alias(vars(Tensor)[name])
        for name in LOOKING:
            if name in vars(Tensor):
                on_tensor[name] = self.on_misuse(vars(Tensor)[name], "looks at the values of a tensor")
        for name in WRITING:
            if name in vars(Tensor):
                on_tensor[name] = self.on_misuse(vars(Tensor)[name], "writes into a tensor")
        on_tensor["__setitem__"] = self.on_set_item(vars(Tensor)["__setitem__"])

        def layer_call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            return recorder.layer_call(original, layer, args, kwargs)

        with patches.replaced(replacements, on_tensor):
            Layer.__call__ = layer_call
            try:
                yield
            finally:
                Layer.__call__ = original

    def shape_of(self, tensor: Any) -> Any:
        shape = self.shape.__get__(tensor)
        symbol = self.symbols.get(id(tensor)) if self.listening else None
        if symbol is None:
            return shape
        return type(shape)([Size(size, ("size", symbol, axis)) for axis, size in enumerate(shape)])

    def on_alias(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def aliased(tensor: Any, *args: Any) -> Any:
            result = original(tensor, *args)
            if self.listening and id(tensor) in self.symbols:
                self.symbols[id(result)] = self.symbols[id(tensor)]
                self.homes[id(result)] = self.homes[id(tensor)]
                self.alive.append(result)
            return result

        return aliased

    def on_misuse(self, original: Callable[..., Any], what: str) -> Callable[..., Any]:
        def misused(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if self.listening and self.is_followed((tensor, args, kwargs)):
                raise CannotFollowError(what)
            return original(tensor, *args, **kwargs)

        return misused

    def on_set_item(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def written(tensor: Any, index: Any, value: Any) -> None:
            if not self.listening or not self.is_followed((tensor, index, value)):
                original(tensor, index, value)
                return
            if self.step is not None or self.is_followed(index):
                raise CannotFollowError("writes into a tensor")
            self.note_writing(tensor)
            given = self.encoded((tensor, index, value))
            name = self.unique(self.within("setitem"))
            step = Step(given, {}, self.scope, name=name, function=SET_ITEM)
            self.listening = False
            try:
                original(tensor, index, value)
            finally:
                self.listening = True
            step.outputs = self.symbol(tensor, step.name)
            self.trace.steps.append(step)

        return written

    def on_function(self, name: str, function: Callable[..., Any], operator: str | None) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if not self.listening or not self.is_followed((args, kwargs)):
                result = function(*args, **kwargs)
                if self.listening and self.step is None:
                    self.remember(function, args, kwargs, result)
                return result
            if self.step is not None:
                if operator is None:
                    return function(*args, **kwargs)
                return self.primitive(operator, function, args, kwargs)
            plain = patches.out_of_place(name)
            if plain is None:
                raise CannotFollowError("writes into a tensor")
            call = function
            if operator is not None:

                def call(*args: Any, **kwargs: Any) -> Any:
                    return self.primitive(operator, function, args, kwargs)

            if plain != name:
                self.note_writing(args[0])
            short = name.rpartition(".")[2].strip("_")
            given = self.encoded(args), self.encoded(kwargs)
            step = Step(*given, self.scope, name=self.unique(self.within(short)), function=plain)
            result = self.take(step, call, args, kwargs, writes=plain != name)
            if plain != name and step.outputs is not None:  # from now on its first argument is what came out
                self.symbols[id(args[0])] = step.outputs
                self.alive.append(args[0])
            return result

        called.__wrapped__ = function  # type: ignore[attr-defined]  # as functools does
        return called

    def note_writing(self, tensor: Any) -> None:
        """Mark the layers that write into what was there before they were called."""
        home = self.homes.get(id(tensor))
        within = home.chain if home else []
        around = self.scope.chain if self.scope else []
        self.trace.outward.update(scope for scope in around if scope not in within)

    def remember(self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        """How constants come from others."""
        given = {id(leaf) for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        for place, tensor in enumerate(made):
            if given and id(tensor) not in given:
                self.trace.origins[id(tensor)] = Origin(tensor, function, args, kwargs, place)

    def primitive(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        assert self.step is not None
        positions, keywords = patches.positional(args, kwargs)
        encoded_args, encoded_kwargs = self.encoded(positions), self.encoded(keywords)
        self.listening = False  # some operators of the Tensor class are made of others
        try:
            result = function(*args, **kwargs)
        finally:
            self.listening = True
        outputs = [self.symbol(leaf, name) for leaf in leaves(result) if isinstance(leaf, Tensor)]
        self.step.inside.append(Primitive(name.rstrip("_"), encoded_args, encoded_kwargs, outputs))
        return result

    def take(self, step: Step, call: Callable[..., Any], args: Any, kwargs: Any, *, writes: bool = False) -> Any:
        """Do one step and write it down, if it does anything."""
        self.step = step
        try:
            result = call(*args, **kwargs)
        finally:
            self.step = None
        tensors = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        given = {id(leaf) for leaf in leaves((args, kwargs))}
        if not tensors or (not writes and all(id(tensor) in given for tensor in tensors)):
            return result
        step.result = self.symbols.get(id(tensors[0]))
        for index, tensor in enumerate(tensors):
            self.symbol(tensor, step.name if index == 0 else f"{step.name}:{index}")
        step.outputs = self.encoded(result)
        self.trace.steps.append(step)
        return result

    # ---- layers --------------------------------------------------------------------------------------

    def layer_call(self, original: Callable[..., Any], layer: Any, args: Any, kwargs: Any) -> Any:
        if not self.listening or self.step is not None or not self.is_followed((args, kwargs)):
            return original(layer, *args, **kwargs)
        path = self.paths.get(id(layer)) or ("" if layer is self.model else layer.full_name())
        reason = self.whole.get(id(layer), "")
        if reason or is_leaf(layer):
            return self.one_step(original, layer, path, args, kwargs, reason)
        scope = Scope(layer, self.encoded(args), self.encoded(kwargs), self.scope, path)
        self.trace.scopes.append(scope)
        self.scope = scope
        try:
            outputs = original(layer, *args, **kwargs)
        except CannotFollowError as error:
            if layer is not self.model:
                self.whole.setdefault(id(layer), f"its forward {error}")
                raise RetryError(self.whole) from error
            raise
        finally:
            self.scope = scope.parent
        scope.outputs = self.encoded(outputs)
        return outputs

    def one_step(
        self, original: Callable[..., Any], layer: Any, path: str, args: Any, kwargs: Any, reason: str
    ) -> Any:
        """A layer as one step; its hooks run outside of it, as always."""
        forward = layer.forward

        def recorded(*args: Any, **kwargs: Any) -> Any:
            step = Step(
                self.encoded(args),
                self.encoded(kwargs),
                self.scope,
                name=self.unique(path or type(layer).__name__.lower()),
                reason=reason,
                layer=layer,
                path=path,
                weights=current_weights(layer),
            )
            quiet = contextlib.ExitStack()
            if reason:
                self.listening = False
                quiet.callback(setattr, self, "listening", True)
            with quiet:
                return self.take(step, forward, args, kwargs)

        own = vars(layer).get("forward")
        vars(layer)["forward"] = recorded
        try:
            return original(layer, *args, **kwargs)
        finally:
            vars(layer).pop("forward")
            if own is not None:
                vars(layer)["forward"] = own

    # ---- symbols and names ---------------------------------------------------------------------------

    def symbol(self, tensor: Any, name: str) -> Symbol:
        shape = tuple(int(size) for size in self.shape.__get__(tensor))
        made = Symbol(name, shape, dtype_name(tensor))
        self.symbols[id(tensor)] = made
        self.homes[id(tensor)] = self.scope
        self.alive.append(tensor)
        return made

    def is_followed(self, nest: Any) -> bool:
        return any(id(leaf) in self.symbols or isinstance(leaf, Size) for leaf in leaves(nest))

    def encoded(self, nest: Any) -> Any:
        def leaf_of(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                known = self.symbols.get(id(leaf))
                if known is None:
                    self.alive.append(leaf)
                return known or Constant(leaf)
            return leaf

        return mapped(leaf_of, nest)

    def within(self, name: str) -> str:
        return f"{self.scope.path}.{name}" if self.scope and self.scope.path else name

    def unique(self, path: str) -> str:
        seen = self.names[path] = self.names.get(path, 0) + 1
        return path if seen == 1 else f"{path}#{seen}"


def is_leaf(layer: Any) -> bool:
    """Whether a layer is one step: Paddle ships it, it calls no others, and has no activation of its own (as
    ``nn.BatchNorm(act="relu")`` has)."""
    shipped = type(layer).__module__.startswith("paddle.nn.")
    alone = not layer._sub_layers or is_packed(layer)
    return shipped and alone and getattr(layer, "_act", None) is None


def dtype_name(tensor: Any) -> str:
    """The name of a tensor's type, such as ``"float32"``."""
    return str(tensor.dtype).removeprefix("paddle.")


@contextlib.contextmanager
def _untouched(model: Any) -> Iterator[None]:
    """Give parameters and buffers back the numbers that they had, whatever a forward writes into them."""
    before = [(tensor, tensor.inplace_version, tensor.clone()) for tensor in stored(model)]
    try:
        yield
    finally:
        for tensor, version, value in before:
            if tensor.inplace_version != version:
                tensor.copy_(value, True)
