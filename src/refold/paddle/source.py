"""A Layer whose forward is Python source: the steps of a folded model, one line each.

That is what Paddle itself can read again: ``paddle.jit.save`` and ``to_static`` translate the source of a
forward, and people can read it too (``print(layer.code)``).
"""

from __future__ import annotations

import itertools
import keyword
import linecache
import math
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, final

import paddle
import paddle.nn.functional

Layer = paddle.nn.Layer

_COUNT = itertools.count(1)

# How the arithmetic of tensors is written.
_OPERATIONS = {
    "__add__": "{0} + {1}",
    "__radd__": "{1} + {0}",
    "__sub__": "{0} - {1}",
    "__rsub__": "{1} - {0}",
    "__mul__": "{0} * {1}",
    "__rmul__": "{1} * {0}",
    "__div__": "{0} / {1}",
    "__truediv__": "{0} / {1}",
    "__rdiv__": "{1} / {0}",
    "__rtruediv__": "{1} / {0}",
    "__matmul__": "{0} @ {1}",
    "__pow__": "{0} ** {1}",
    "__rpow__": "{1} ** {0}",
    "__mod__": "{0} % {1}",
    "__floordiv__": "{0} // {1}",
    "__neg__": "-{0}",
    "__eq__": "{0} == {1}",
    "__ne__": "{0} != {1}",
    "__lt__": "{0} < {1}",
    "__le__": "{0} <= {1}",
    "__gt__": "{0} > {1}",
    "__ge__": "{0} >= {1}",
}


@final
@dataclass(frozen=True)
class Code:
    """A piece of source."""

    text: str


@final
@dataclass
class Writer:
    """The source while it grows, and the objects that it mentions by a global name."""

    lines: list[str] = field(default_factory=list)
    objects: dict[str, Any] = field(default_factory=dict)
    taken: set[str] = field(default_factory=lambda: {"self", "paddle", "F"})

    def name(self, wanted: str) -> str:
        """A variable name like ``wanted`` that is not in use."""
        base = "".join(c if c.isalnum() and c.isascii() else "_" for c in wanted).strip("_") or "value"
        base = f"v{base}" if base[0].isdigit() or keyword.iskeyword(base) else base
        found, count = base, 1
        while found in self.taken:
            count += 1
            found = f"{base}_{count}"
        self.taken.add(found)
        return found

    def add(self, line: str) -> None:
        """One more line of the forward."""
        self.lines.append(line)

    def text(self, entry: Any) -> str:
        """An argument as source."""
        match entry:
            case Code(text):
                return text
            case list():
                return "[" + ", ".join(self.text(part) for part in entry) + "]"
            case tuple():
                inner = ", ".join(self.text(part) for part in entry)
                return f"({inner},)" if len(entry) == 1 else f"({inner})"
            case dict():
                return "{" + ", ".join(f"{key!r}: {self.text(value)}" for key, value in entry.items()) + "}"
            case slice():
                return f"slice({self.text(entry.start)}, {self.text(entry.stop)}, {self.text(entry.step)})"
            case bool() | None | str() | bytes():
                return repr(entry)
            case int():
                return repr(int(entry))
            case float() if math.isfinite(entry):
                return repr(float(entry))
            case _ if entry is Ellipsis:
                return "..."
            case paddle.dtype():
                return str(entry)
            case _:
                name = self.name(f"object_{len(self.objects)}")
                self.objects[name] = entry
                return name

    def call(self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """The call of a function by its public name, arithmetic as it is written."""
        owner, _, short = function.rpartition(".")
        if owner == "paddle.Tensor" and short in _OPERATIONS:
            return _OPERATIONS[short].format(*(self.text(arg) for arg in args))
        if owner == "paddle.Tensor" and short == "__getitem__":
            return f"{self.text(args[0])}[{self.index(args[1])}]"
        if owner == "paddle.Tensor":
            return f"{self.text(args[0])}.{short}({self.arguments(args[1:], kwargs)})"
        if owner in ("paddle._C_ops", "paddle._legacy_C_ops"):
            module = owner.removeprefix("paddle.")
            self.objects[module] = _Module(owner)
            return f"{module}.{short}({self.arguments(args, kwargs)})"
        shown = function.replace("paddle.nn.functional.", "F.")
        return f"{shown}({self.arguments(args, kwargs)})"

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """The inside of the parentheses of a call."""
        return ", ".join([*(self.text(arg) for arg in args), *(f"{k}={self.text(v)}" for k, v in kwargs.items())])

    def index(self, index: Any) -> str:
        """The inside of the brackets of a subscript."""
        parts = index if isinstance(index, tuple) else (index,)
        texts = []
        for part in parts:
            if isinstance(part, slice):
                ends = ["" if end is None else self.text(end) for end in (part.start, part.stop, part.step)]
                texts.append(":".join(ends if part.step is not None else ends[:2]))
            else:
                texts.append(self.text(part))
        return ", ".join(texts) + ("," if len(texts) == 1 and isinstance(index, tuple) else "")


def make(name: str, signature: list[str], writer: Writer, result: str) -> Any:
    """A Layer of a class called ``name`` with this forward, still without any parts."""
    lines = [f"def forward({', '.join(['self', *signature])}):", *writer.lines, f"return {result}"]
    return _Source(name, "\n    ".join(lines) + "\n", writer.objects).kind()


@final
class _Source:
    """What the class of a Layer was made of, so that it can be made again where a pickle of one is read."""

    def __init__(self, name: str, code: str, objects: dict[str, Any]) -> None:
        self.name, self.code, self.objects = name, code, objects
        file = f"<refold.paddle {name} {next(_COUNT)}>"
        # Whoever wants to read the source of the function (to_static does) looks it up here.
        linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
        modules = {name: import_module(found.name) for name, found in objects.items() if isinstance(found, _Module)}
        space: dict[str, Any] = {"paddle": paddle, "F": paddle.nn.functional, **objects, **modules}
        exec(compile(code, file, "exec"), space)
        own = {"forward": space["forward"], "code": code, "source": self, "__reduce_ex__": _reduced}
        self.kind: Any = type(name, (Layer,), {**own, "__module__": __name__})

    def __deepcopy__(self, memo: Any) -> _Source:
        return self

    def __reduce__(self) -> Any:
        return _Source, (self.name, self.code, self.objects)


@final
@dataclass(frozen=True)
class _Module:
    """A module that source mentions; modules themselves have no pickles."""

    name: str


def _reduced(layer: Any, protocol: Any) -> Any:
    return _restored, (type(layer).source,), layer.__getstate__()


def _restored(source: _Source) -> Any:
    return source.kind.__new__(source.kind)


def place(root: Any, path: str, part: Any) -> None:
    """Put a layer, parameter or buffer at a dotted path below ``root``, making plain layers on the way."""
    *around, last = path.split(".")
    holder = root
    for segment in around:
        inner = holder._sub_layers.get(segment)
        if inner is None:
            inner = Layer()
            inner.eval()
            holder.add_sublayer(segment, inner)
        holder = inner
    if isinstance(part, Layer):
        holder.add_sublayer(last, part)
    elif isinstance(part, paddle.base.framework.EagerParamBase):
        if holder._parameters.get(last) is not part:
            holder.add_parameter(last, part)
    elif holder._buffers.get(last) is not part:
        holder.register_buffer(last, part)


def reference(path: str) -> str:
    """The source that gets what is at a dotted path below ``self``."""
    text = "self"
    for segment in path.split("."):
        text = f"{text}.{segment}" if segment.isidentifier() else f"getattr({text}, {segment!r})"
    return text
