"""What a recording of a model consists of: the calls of its modules, the steps inside, and both in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, final

from refold.recording.sizes import Size
from refold.recording.symbols import Constant, Symbol, leaves, symbols


@final
@dataclass(eq=False)
class Scope:
    """One call of a module (or layer) that was called through; ``outputs`` is the nest that it returned."""

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parent: Scope | None
    path: str
    outputs: Any = None

    @property
    def chain(self) -> list[Scope]:
        """This scope and all around it, outermost first."""
        around = self.parent.chain if self.parent else []
        return [*around, self]


@dataclass(eq=False)
class Step:
    """One recorded step, with symbols, constants and sizes in the places of tensors and numbers that were followed.
    Each framework adds what it is a call of; ``reason`` says why a module was taken whole."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    scope: Scope | None
    outputs: Any = None
    name: str = ""
    reason: str = ""

    @property
    def reads(self) -> list[Symbol]:
        """The symbols that it reads, in the order of its arguments, as often as they stand there."""
        return symbols((self.args, self.kwargs))

    @property
    def gives(self) -> list[Symbol]:
        """The symbols that it gives."""
        return symbols(self.outputs)

    @property
    def constants(self) -> list[Constant]:
        """The constants among its arguments."""
        return [leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Constant)]

    @property
    def sizes(self) -> list[Size]:
        """The sizes among its arguments that are known by a formula."""
        return [leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Size)]


StepT = TypeVar("StepT", bound=Step)


@dataclass(eq=False)
class Trace(Generic[StepT]):
    """A recorded model: its steps in order, and the nests of its inputs and outputs. ``tensors`` are the
    inputs themselves, ``results`` what the model gave."""

    steps: list[StepT] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)
    inputs: Any = None
    outputs: Any = None
    tensors: list[Any] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)


class UntraceableError(Exception):
    """The model as a whole could not be recorded."""


# Not Exceptions: a forward that catches those must not go on as if nothing had been.
class CannotFollowError(BaseException):
    """Something happened to a tensor that cannot be written down."""


class RetryError(BaseException):
    """A module turned out not to be traceable: record again, with it whole."""

    def __init__(self, whole: dict[int, str]) -> None:
        super().__init__("record again")
        self.whole = whole


# Does a step again: (step, what a symbol is now, what a size is now) -> the tensors that it gives.
Perform = Callable[[StepT, Callable[[Symbol], Any], Callable[[Size], int]], list[Any]]
