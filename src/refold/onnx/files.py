"""Reading and writing ``.onnx`` files.

A file is taken for hostile: nothing in it is executed, its size claims are checked before anything is
allocated for them, and data beside it is read only from its own folder. Weights that lie beside the file
stay there until they are needed.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from refold.errors import InputError
from refold.files import open_regular, size_in_words, write_atomically
from refold.shown import printable

# A protobuf cannot be larger; beyond, weights lie in files of their own.
MOST_BYTES = 2**31 - 1
MOST_INLINE = 2**31 - 2**24
# Bytes of a tensor that stays in the model's own file, whatever lies beside it: runtimes want to see shapes.
MOST_AMONG_NODES = 256
# Says of a model that it was read with weights beside it; what is folded of them is no file any more.
_BESIDE = "refold.weights_beside"


def load(path: Path) -> ir.Model:
    """The model in a file, its external weights not yet read.

    Raises InputError if the file is no valid ONNX model, or if weights outside of it are not where they
    may be: in regular files in its own folder, large enough for what is said to be in them. (Where the
    model itself is a link, as in the Hugging Face cache, they may lie beside what it points to.)
    """
    shown = printable(path)
    with open_regular(path, MOST_BYTES) as file:
        data = file.read()
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, whichever implementation is installed
        raise InputError(f"{shown}: this is no ONNX model, or a damaged one ({_line(error)})") from error
    if not proto.ir_version or not proto.opset_import or not proto.HasField("graph"):
        raise InputError(f"{shown}: this is no ONNX model, or a damaged one (it has no graph, or no versions)")
    length = len(data)
    del data
    try:
        _check_texts(proto)
    except UnicodeDecodeError as error:
        raise InputError(f"{shown}: this is a damaged ONNX model (a name or a setting in it is no text)") from error
    places: dict[tuple[str, str], tuple[str, str]] = {}
    for tensor, is_initializer in _tensors(proto.graph, proto.functions):
        _check_size(shown, tensor, length)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            if not is_initializer:
                raise InputError(f"{shown}: a constant inside the graph points to another file; that is not read")
            folder, name = _check_external(shown, path, tensor)
            location = next(entry.value for entry in tensor.external_data if entry.key == "location")
            places[tensor.name, location] = folder, name
    _check_model(shown, proto, bool(places))
    try:
        with _without_remarks():
            model = ir.from_proto(proto)
    except Exception as error:  # whatever the checker lets through
        raise InputError(f"{shown}: this is no valid ONNX model ({_line(error)})") from error
    for graph in model.graphs():
        for value in graph.initializers.values():
            stored = value.const_value
            if isinstance(stored, ir.ExternalTensor):
                model.meta[_BESIDE] = True
                folder, name = places[str(value.name), str(stored.location)]
                value.const_value = ir.ExternalTensor(
                    name,
                    stored.offset,
                    stored.length,
                    stored.dtype,
                    shape=stored.shape,
                    name=stored.name,
                    base_dir=folder,
                )
    return model


def save(model: Any, path: Path, *, overwrite: bool = False) -> None:
    """Write a model, whole or not at all. Raises InputError.

    If its weights lie in files beside it, or are too many for one file, they go to a new file beside ``path``,
    one after the other, which is complete before the model appears. What was beside a model that is replaced,
    and was written here, is removed after that.
    """
    if isinstance(model, onnx.ModelProto):
        model = ir.from_proto(model)
    was_beside = _BESIDE in model.meta
    model = model.clone()
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    tensors = [value.const_value for value in values if value.const_value is not None]
    large = sum(tensor.nbytes for tensor in tensors) >= MOST_INLINE
    lies_beside = was_beside or any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors)
    for value in values:
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= MOST_AMONG_NODES:
            value.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)

    def write(target: Path) -> None:
        target.write_bytes(ir.to_proto(model).SerializeToString())

    if not (large or lies_beside) or all(tensor.nbytes <= MOST_AMONG_NODES for tensor in tensors):
        write_atomically(path, write, overwrite=overwrite)
        return
    if os.path.lexists(path) and not overwrite:
        raise InputError(
            f"{printable(path)}: the file exists already; choose another name, or overwrite it with --force"
        )
    folder = path.parent.resolve()
    old = _written_beside(path)
    old -= {os.path.realpath(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    beside = f"{path.stem}-{secrets.token_hex(4)}.data"
    try:
        ir.external_data.unload_from_model(model, folder, beside, size_threshold_bytes=MOST_AMONG_NODES)
        with open(folder / beside, "rb+") as written:
            os.fsync(written.fileno())
        write_atomically(path, write, overwrite=overwrite)
    except BaseException as error:
        (folder / beside).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"{printable(path)}: it cannot be written ({_line(error)})") from error
        raise
    for name in old:
        with suppress(OSError):
            os.unlink(name)


def _written_beside(path: Path) -> set[str]:
    """The files with weights of the model at ``path`` that :func:`save` named."""
    proto = onnx.ModelProto()
    try:
        with open_regular(path, MOST_BYTES) as file:
            proto.ParseFromString(file.read())
        entries = {entry.value for tensor in proto.graph.initializer for entry in tensor.external_data}
    except Exception:  # nothing is there, or no model
        return set()
    pattern = re.escape(path.stem) + r"-[0-9a-f]{8}\.data"
    return {os.path.realpath(path.parent / name) for name in entries if re.fullmatch(pattern, name)}


# ---- what is checked before anything is made of it ---------------------------------------------------


@contextmanager
def _without_remarks() -> Iterator[None]:
    """What the library below has to say of a file (attributes that are no text, keys that it does not know) would
    stand beside the one sentence, or in it."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check_texts(message: Any) -> None:
    """Raise UnicodeDecodeError for names that are no text: protobuf hands them out as they are. Texts among the
    settings of ONNX's own operators are bytes in the file, and must be text too."""
    if isinstance(message, onnx.NodeProto) and message.domain in ("", "ai.onnx"):
        for attribute in message.attribute:
            for text in (attribute.s, *attribute.strings):
                text.decode("utf-8")
    for field, value in message.ListFields():
        several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        if field.message_type is not None:
            for inner in value if several else [value]:
                _check_texts(inner)
        elif field.cpp_type == field.CPPTYPE_STRING and field.type == field.TYPE_STRING:
            for text in value if several else [value]:
                if isinstance(text, bytes):
                    text.decode("utf-8")


def _tensors(graph: onnx.GraphProto, functions: Any) -> Iterator[tuple[onnx.TensorProto, bool]]:
    """Every tensor of a model, and whether it is an initializer."""
    waiting: list[Any] = [graph, *functions]
    while waiting:
        holder = waiting.pop()
        if isinstance(holder, onnx.GraphProto):
            for tensor in holder.initializer:
                yield tensor, True
            for sparse in holder.sparse_initializer:
                yield sparse.values, False
                yield sparse.indices, False
        for node in holder.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t, False
                for tensor in attribute.tensors:
                    yield tensor, False
                if attribute.HasField("g"):
                    waiting.append(attribute.g)
                waiting += attribute.graphs


def _check_size(shown: str, tensor: onnx.TensorProto, length: int) -> None:
    """Refuse a tensor that claims other numbers than it brings."""
    name = printable(tensor.name)
    try:
        kind = ir.DataType(tensor.data_type)
        bits = 8 if kind is ir.DataType.STRING else kind.bitwidth
    except (ValueError, TypeError) as error:
        raise InputError(f"{shown}: the tensor '{name}' has a type that is not known") from error
    if any(size < 0 for size in tensor.dims):
        raise InputError(f"{shown}: the tensor '{name}' has a negative size")
    needed = -(-prod(tensor.dims) * bits // 8)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    if tensor.HasField("raw_data"):
        if len(tensor.raw_data) != needed:
            raise InputError(
                f"{shown}: the tensor '{name}' claims {size_in_words(needed)} and brings "
                f"{size_in_words(len(tensor.raw_data))}"
            )
    elif prod(tensor.dims) > 8 * length:
        raise InputError(f"{shown}: the tensor '{name}' claims more numbers than the file has room for")


def _check_external(shown: str, path: Path, tensor: onnx.TensorProto) -> tuple[str, str]:
    """The folder and the name of the file that holds a tensor, if it may be read."""
    name = printable(tensor.name)
    entries: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    parts = Path(location).parts
    if not location or "\0" in location or "\\" in location or os.path.isabs(location) or ".." in parts:
        raise InputError(
            f"{shown}: the weights '{name}' are said to be in '{printable(location)}'; only files in the model's "
            "own folder are read"
        )
    file = os.path.realpath(path.parent / location)
    roots = {os.path.realpath(path.parent), os.path.dirname(os.path.realpath(path))}
    if not any(file.startswith(root.rstrip(os.sep) + os.sep) for root in roots):
        raise InputError(f"{shown}: the weights '{name}' lie behind a link out of the model's folder")
    try:
        status = os.stat(file)
    except OSError as error:
        raise InputError(
            f"{shown}: the weights '{name}' should be in '{printable(location)}', which is not there"
        ) from error
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        kind = "a hard link" if stat.S_ISREG(status.st_mode) else "no regular file"
        raise InputError(f"{shown}: the weights '{name}' are in '{printable(location)}', which is {kind}")
    bits = ir.DataType(tensor.data_type).bitwidth
    needed = -(-prod(tensor.dims) * bits // 8)
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or needed)
    except ValueError as error:
        raise InputError(f"{shown}: the place of the weights '{name}' is no number") from error
    if offset < 0 or length != needed or offset + needed > status.st_size:
        raise InputError(
            f"{shown}: the weights '{name}' ({size_in_words(needed)}) are not where the model says: "
            f"{length} bytes at {offset} of '{printable(location)}', which has {status.st_size}"
        )
    return os.path.dirname(file), os.path.basename(file)


def _check_model(shown: str, proto: onnx.ModelProto, external: bool) -> None:
    """Refuse what is against ONNX's rules: cycles, values that nobody gives or two do, unknown operators...

    Weights in other files stand as inputs here, for the checker would look for the files.
    """
    checked = proto
    unsized = [v for v in (*proto.graph.input, *proto.graph.output) if not v.type.tensor_type.HasField("shape")]
    if external or unsized:
        checked = onnx.ModelProto()
        checked.CopyFrom(proto)
        _without_files(checked.graph)
        for value in (*checked.graph.input, *checked.graph.output):
            if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
                value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(checked)
    except Exception as error:  # ValidationError, and what the C++ code raises besides
        raise InputError(f"{shown}: this is no valid ONNX model ({_line(error)})") from error


def _without_files(graph: onnx.GraphProto) -> None:
    """Weights in other files, those of inner graphs too, become inputs of the whole."""
    listed = {value.name for value in graph.input}
    waiting = [graph]
    while waiting:
        inner = waiting.pop()
        kept = []
        for tensor in inner.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                copy = onnx.TensorProto()
                copy.CopyFrom(tensor)
                kept.append(copy)
            elif tensor.name not in listed:
                listed.add(tensor.name)
                info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
                graph.input.append(info)
        del inner.initializer[:]
        inner.initializer.extend(kept)
        for attribute in (attribute for node in inner.node for attribute in node.attribute):
            waiting += [attribute.g] if attribute.HasField("g") else []
            waiting += attribute.graphs


def _line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return printable(text.splitlines()[0], 300)
