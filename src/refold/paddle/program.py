"""Saved inference programs as Layers: one line of source per operator.

``paddle.jit.save`` writes a program as JSON. It is read here as data and not by Paddle's own loader; operators
that are not in :data:`ARGUMENTS` are refused. The Layer that comes out calls the same operators of
``paddle._C_ops``, and its parameters have the program's names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, final

import paddle

from refold.errors import InputError
from refold.frontend import AnyArray
from refold.paddle import source
from refold.paddle.compounds import Compound, compounds
from refold.paddle.examples import Spec
from refold.paddle.perform import parameter, rounded
from refold.paddle.pir import Stored, attributes_of, stored_in, type_of
from refold.paddle.source import Code
from refold.shown import printable

# What an operator's argument is: the next operand as a tensor, as a list of tensors, or as numbers (Paddle
# writes such arguments as tensors into a program); or, by name, an attribute.
TENSOR, TENSORS, NUMBERS = "<tensor>", "<tensors>", "<numbers>"

_CONV_TAIL = ("groups", "dilations", "data_format")
_TRANSPOSED = (TENSOR, TENSOR, "strides", "paddings", "output_padding")
_NORM = ("is_test", "momentum", "epsilon", "data_format", "use_global_stats", "trainable_statistics")
_POOL = (
    *("strides", "paddings", "ceil_mode", "exclusive", "data_format"),
    *("pooling_type", "global_pooling", "adaptive", "padding_algorithm"),
)
_INTERPOLATION = (
    *("data_format", "out_d", "out_h", "out_w", "scale"),
    *("interp_method", "align_corners", "align_mode"),
)
_UNARY = (
    *("relu", "relu6", "sigmoid", "tanh", "silu", "hardswish", "exp", "log", "sqrt", "rsqrt", "abs", "square"),
    *("erf", "floor", "ceil", "assign", "softsign", "logsigmoid", "sin", "cos", "log2"),
)
_BINARY = ("add", "subtract", "multiply", "divide", "maximum", "minimum", "elementwise_pow")
_COMPARISONS = ("equal", "not_equal", "less_than", "less_equal", "greater_than", "greater_equal")

# The arguments of the operators of ``paddle._C_ops``, in their order there.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "conv2d": (TENSOR, TENSOR, "strides", "paddings", "padding_algorithm", "dilations", "groups", "data_format"),
    "depthwise_conv2d": (TENSOR, TENSOR, "strides", "paddings", "padding_algorithm", *_CONV_TAIL),
    "conv3d": (TENSOR, TENSOR, "strides", "paddings", "padding_algorithm", *_CONV_TAIL),
    "conv2d_transpose": (*_TRANSPOSED, NUMBERS, "padding_algorithm", *_CONV_TAIL),
    "depthwise_conv2d_transpose": (*_TRANSPOSED, NUMBERS, "padding_algorithm", *_CONV_TAIL),
    "conv3d_transpose": (*_TRANSPOSED, "output_size", "padding_algorithm", *_CONV_TAIL),
    "batch_norm_": (TENSOR,) * 5 + _NORM,
    "batch_norm": (TENSOR,) * 5 + _NORM,
    "layer_norm": (TENSOR, TENSOR, TENSOR, "epsilon", "begin_norm_axis"),
    "linear": (TENSOR, TENSOR, TENSOR),
    "matmul": (TENSOR, TENSOR, "transpose_x", "transpose_y"),
    "scale": (TENSOR, NUMBERS, "bias", "bias_after_scale"),
    "add_n": (TENSORS,),
    "dropout": (TENSOR, TENSOR, NUMBERS, "is_test", "mode", "seed", "fix_seed"),
    "pool2d": (TENSOR, NUMBERS, *_POOL),
    "pool3d": (TENSOR, NUMBERS, *_POOL),
    "pad3d": (TENSOR, NUMBERS, "mode", "pad_value", "data_format"),
    "pad": (TENSOR, "paddings", NUMBERS),
    "reshape": (TENSOR, NUMBERS),
    "transpose": (TENSOR, "perm"),
    "flatten": (TENSOR, "start_axis", "stop_axis"),
    "squeeze": (TENSOR, NUMBERS),
    "unsqueeze": (TENSOR, NUMBERS),
    "slice": (TENSOR, "axes", NUMBERS, NUMBERS, "infer_flags", "decrease_axis"),
    "split": (TENSOR, NUMBERS, NUMBERS),
    "split_with_num": (TENSOR, "num", NUMBERS),
    "concat": (TENSORS, NUMBERS),
    "stack": (TENSORS, "axis"),
    "channel_shuffle": (TENSOR, "groups", "data_format"),
    "pixel_shuffle": (TENSOR, "upscale_factor", "data_format"),
    "pixel_unshuffle": (TENSOR, "downscale_factor", "data_format"),
    "strided_slice": (TENSOR, "axes", NUMBERS, NUMBERS, NUMBERS),
    "unbind": (TENSOR, "axis"),
    "tile": (TENSOR, NUMBERS),
    "nearest_interp": (TENSOR, TENSOR, TENSORS, TENSOR, *_INTERPOLATION),
    "bilinear_interp": (TENSOR, TENSOR, TENSORS, TENSOR, *_INTERPOLATION),
    "group_norm": (TENSOR, TENSOR, TENSOR, "epsilon", "groups", "data_format"),
    "sum": (TENSOR, NUMBERS, "dtype", "keepdim"),
    "mean": (TENSOR, NUMBERS, "keepdim"),
    "max": (TENSOR, NUMBERS, "keepdim"),
    "min": (TENSOR, NUMBERS, "keepdim"),
    "softmax": (TENSOR, "axis"),
    "gelu": (TENSOR, "approximate"),
    "leaky_relu": (TENSOR, "negative_slope"),
    "elu": (TENSOR, "alpha"),
    "hardsigmoid": (TENSOR, "slope", "offset"),
    "softplus": (TENSOR, "beta", "threshold"),
    "swish": (TENSOR,),
    "mish": (TENSOR, "lambda"),
    "pow": (TENSOR, "y"),
    "clip": (TENSOR, NUMBERS, NUMBERS),
    "prelu": (TENSOR, TENSOR, "data_format", "mode"),
    **dict.fromkeys(_UNARY, (TENSOR,)),
    "where": (TENSOR, TENSOR, TENSOR),
    **dict.fromkeys((*_BINARY, *_COMPARISONS), (TENSOR, TENSOR)),
}

# Constants larger than this are not made: a line of a program can ask for any amount of memory.
MOST_NUMBERS = 2**24

# Arithmetic of sizes, which is done in Python; by the operator's name, its sign.
_ARITHMETIC = {"add": "+", "subtract": "-", "multiply": "*", "floor_divide": "//"}


@final
@dataclass(frozen=True)
class _Numbers:
    """A value that Python knows while the source is written: numbers, or sources of sizes. ``single`` says that
    where an operator takes it for numbers, it is one and not a list of one."""

    entries: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: str
    single: bool = False

    @property
    def value(self) -> Any:
        """A number, or a list of them."""
        return list(self.entries) if self.shape else self.entries[0]


def layer_of(ops: Sequence[Mapping[str, Any]], arrays: Mapping[str, AnyArray]) -> Any:
    """The Layer, in eval mode, that computes a program with the parameters in ``arrays``. Raises InputError."""
    reading = _Reading(arrays)
    op: Mapping[str, Any] = {}
    try:
        found = compounds(ops)
        inside = {place for compound in found.values() for place in compound.inside}
        for place, op in enumerate(ops):
            if place in found:
                reading.add_compound(op, found[place])
            elif place not in inside:
                reading.add(op)
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        kind = printable(op.get("#"))
        raise InputError(f"the operator '{kind}' of the program is not written as Paddle does it") from error
    return reading.finished()


@final
@dataclass
class _Reading:
    """The Layer while it grows; ``values`` says what stands for each value of the program."""

    arrays: Mapping[str, AnyArray]
    writer: source.Writer = field(default_factory=source.Writer)
    values: dict[int, Any] = field(default_factory=dict)
    inputs: list[tuple[str, Spec]] = field(default_factory=list)
    outputs: dict[int, Code] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.writer.taken.update(dir(paddle.nn.Layer()), ("code", "input_specs"))

    def add(self, op: Mapping[str, Any]) -> None:
        kind = op["#"]
        results = op["O"] if isinstance(op["O"], list) else [op["O"]]
        ids = [int(result["%"]) for result in results]
        if kind == "p":
            self.values[ids[0]] = self.stored(stored_in([op])[0])
            return
        attributes = attributes_of(op)
        operands = [self.operand(entry) for entry in op["I"]]
        dialect, _, name = kind.partition(".")
        match dialect, name:
            case "1", "data":
                self.values[ids[0]] = self.input(attributes)
            case "1", "fetch":
                self.outputs[attributes["col"]] = self.tensor(operands[0])
            case "0", "shadow_output":
                self.outputs[len(self.outputs)] = self.tensor(operands[0])
            case "1", "full":
                shape = tuple(attributes["shape"])
                if prod(shape) > MOST_NUMBERS:
                    raise InputError(f"the program makes a constant of {prod(shape)} numbers")
                number = _number(attributes["value"], attributes["dtype"])
                if prod(shape) == 1 and len(shape) < 2:
                    self.values[ids[0]] = _Numbers((number,), shape, attributes["dtype"], single=True)
                else:
                    text = self.writer.text(number)
                    self.call(f"paddle.full({list(shape)!r}, {text}, {attributes['dtype']!r})", ids)
            case "1", "assign_value_" | "assign_value":
                dims, dtype = list(attributes["shape"]), attributes["dtype"]
                constants = [_number(value, dtype) for value in attributes["values"]]
                text = f"paddle.to_tensor({self.writer.text(constants)}, {dtype!r})"
                self.call(f"paddle.reshape({text}, {dims!r})", ids)
            case "1", "full_int_array":
                whole = tuple(int(entry) for entry in attributes["value"])
                self.values[ids[0]] = _Numbers(whole, (len(whole),), attributes["dtype"])
            case "1", "shape64" | "shape":
                ((rank,), _) = type_of(results[0])
                text = self.tensor(operands[0]).text
                sizes = tuple(Code(f"{text}.shape[{axis}]") for axis in range(rank))
                self.values[ids[0]] = _Numbers(sizes, (rank,), "int64")
            case "0", "combine":
                self.values[ids[0]] = operands
            case "0", "split" if isinstance(operands[0], list):
                self.values.update(zip(ids, operands[0], strict=True))
            case "0", "split":
                parts = [Code(f"{self.tensor(operands[0]).text}[{place}]") for place in range(len(ids))]
                self.values.update(zip(ids, parts, strict=True))
            case "1", _:
                numbers = self.on_numbers(name, operands, attributes)
                if numbers is not None:
                    self.values[ids[0]] = numbers
                else:
                    self.operator(name, operands, attributes, ids)
            case _:
                raise InputError(_unread(kind))

    def add_compound(self, op: Mapping[str, Any], compound: Compound) -> None:
        """One call of the function of which Paddle has made several operators."""
        tensors = [self.tensor(self.operand({"%": value})) for value in compound.operands]
        text = self.writer.call(f"paddle.nn.functional.{compound.function}", tuple(tensors), compound.settings)
        self.call(text, [int(op["O"][0]["%"])])

    def operand(self, entry: Mapping[str, Any]) -> Any:
        place = int(entry["%"])
        return None if place == 0 else self.values[place]

    # ---- what a value is -------------------------------------------------------------------------

    def stored(self, entry: Stored) -> Code:
        path = self.writer.name(re.sub(r"\W", "_", entry.name))
        array = self.arrays[entry.name]
        self.parts[path] = parameter(array, entry.dtype) if entry.trainable else rounded(array, entry.dtype)
        return Code(f"self.{path}")

    def input(self, attributes: Mapping[str, Any]) -> Code:
        variable = self.writer.name(str(attributes["name"]))
        sizes = tuple(None if size < 0 else int(size) for size in attributes["shape"])
        if not sizes:
            raise InputError(f"the input '{printable(attributes['name'])}' of the program has no axes")
        self.inputs.append((variable, Spec((None, *sizes[1:]), attributes["dtype"])))
        return Code(variable)

    def tensor(self, value: Any) -> Code:
        """A value as the source of a tensor."""
        if isinstance(value, _Numbers):
            return Code(f"paddle.to_tensor({self.writer.text(value.value)}, {value.dtype!r})")
        if not isinstance(value, Code):
            raise ValueError("a list stands where a tensor is expected")
        return value

    def on_numbers(self, name: str, operands: list[Any], attributes: Mapping[str, Any]) -> _Numbers | None:
        """What an operator gives on sizes and other numbers that Python computes; None if it is not on such."""
        flat = [entry for operand in operands for entry in (operand if isinstance(operand, list) else [operand])]
        if not flat or not all(isinstance(entry, _Numbers) and "int" in entry.dtype for entry in flat):
            return None
        first: _Numbers = flat[0]
        match name:
            case "slice" if attributes["axes"] == [0]:
                start, stop = (int(entry.value[0]) for entry in flat[1:])
                entries = first.entries[start:stop]
                return _Numbers(entries, () if attributes["decrease_axis"] else (len(entries),), first.dtype)
            case "stack" | "concat" if all(len(entry.shape) < 2 for entry in flat):
                parts = operands[0]
                entries = tuple(number for part in parts for number in part.entries)
                return _Numbers(entries, (len(entries),), first.dtype)
            case "add" | "subtract" | "multiply" | "floor_divide" if len(first.entries) == len(flat[1].entries):
                sign = _ARITHMETIC[name]
                pairs = zip(first.entries, flat[1].entries, strict=True)
                entries = tuple(Code(f"({self.writer.text(a)} {sign} {self.writer.text(b)})") for a, b in pairs)
                return _Numbers(entries, first.shape or flat[1].shape, first.dtype)
            case "cast" | "assign":
                return first
            case _:
                return None

    # ---- operators -------------------------------------------------------------------------------

    def operator(
        self,
        name: str,
        operands: list[Any],
        attributes: Mapping[str, Any],
        ids: Sequence[int],
    ) -> None:
        if name == "cast":
            self.call(f"{self.tensor(operands[0]).text}.astype({attributes['dtype']!r})", ids)
            return
        if name == "full_like":
            value = self.writer.text(_numbers(operands[1]).entries[0])
            self.call(f"paddle.full_like({self.tensor(operands[0]).text}, {value}, {attributes['dtype']!r})", ids)
            return
        if name == "share_data_":  # another name for the same tensor
            self.values[ids[0]] = self.tensor(operands[0])
            return
        if name not in ARGUMENTS:
            raise InputError(_unread(f"pd_op.{name}"))
        if name.startswith("batch_norm") and not (attributes["is_test"] or attributes["use_global_stats"]):
            raise InputError("a batch norm of the program is in training mode; save the model after model.eval()")
        waiting = iter(operands)
        arguments = tuple(self.argument(kind, waiting, attributes) for kind in ARGUMENTS[name])
        if next(waiting, None) is not None:
            raise ValueError(f"{name} has more operands than it takes")
        text = self.writer.call(f"paddle._C_ops.{name.rstrip('_')}", arguments, {})
        self.call(f"{text}[0]" if name.startswith("batch_norm") else text, ids)

    def argument(self, kind: str, operands: Iterator[Any], attributes: Mapping[str, Any]) -> Any:
        if kind not in (TENSOR, TENSORS, NUMBERS):
            value = attributes[kind]
            return None if kind == "dtype" and value.startswith("Undefined") else value
        value = next(operands)
        if value is None:
            return None
        if kind == TENSOR:
            return self.tensor(value)
        if kind == TENSORS:
            return [self.tensor(entry) for entry in value]
        if isinstance(value, list):
            return [_numbers(entry).entries[0] for entry in value]
        found = _numbers(value)
        return found.entries[0] if found.single else list(found.entries)

    def call(self, text: str, ids: Sequence[int]) -> None:
        """One operator. A program says intermediate results too, which Python does not get: nobody reads them."""
        name = self.writer.name(f"v{ids[0]}")
        self.values[ids[0]] = Code(name)
        self.writer.add(f"{name} = {text}")

    # ---- the Layer -------------------------------------------------------------------------------

    def finished(self) -> Any:
        if not self.inputs or not self.outputs:
            raise InputError("the program has no inputs, or no outputs")
        found = [self.outputs[place] for place in sorted(self.outputs)]
        result = self.writer.text(found[0] if len(found) == 1 else tuple(found))
        made = source.make("Program", [variable for variable, _ in self.inputs], self.writer, result)
        for path, part in self.parts.items():
            source.place(made, path, part)
        made.input_specs = tuple(spec for _, spec in self.inputs)
        made.eval()
        return made


def _numbers(value: Any) -> _Numbers:
    if not isinstance(value, _Numbers):
        raise InputError("the program computes a size or an axis from the numbers in a tensor")
    return value


def _number(value: float, dtype: str) -> int | float | bool:
    if dtype == "bool":
        return bool(value)
    return int(value) if "int" in dtype else float(value)


def _unread(kind: str) -> str:
    return (
        f"the program uses the operator '{printable(kind)}', which refold does not read from files; "
        "fold the Layer in Python, before it is saved"
    )
