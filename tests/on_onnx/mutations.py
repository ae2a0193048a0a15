"""Damages of ONNX files: bytes that are flipped, cut and moved, and graphs that are edited."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Edit = Callable[[onnx.ModelProto, random.Random], None]

NUMBERS = [-(2**40), -1, 0, 1, 2, 3, 5, 7, 2**31, 2**62]
REALS = [0.0, -1.0, 1e-30, 3e38, float("nan"), float("inf")]
OPERATORS = (
    *("Add", "Sub", "Mul", "Div", "Neg", "Relu", "Identity", "Conv", "ConvTranspose", "MatMul", "Gemm", "Concat"),
    *("Split", "Slice", "Gather", "Pad", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Tile", "Where"),
    *("AveragePool", "GlobalAveragePool", "MaxPool", "BatchNormalization", "Cast", "Shape", "ConstantOfShape"),
    *("Sum", "Mean", "ReduceMean", "Dropout", "ScatterND", "Sigmoid", "Range", "Loop", "If", "Flatten"),
)
ATTRIBUTES = (
    "group",
    "axis",
    "training_mode",
    "epsilon",
    "perm",
    "pads",
    "strides",
    "dilations",
    "kernel_shape",
    "to",
)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The file with a damage, of its bytes or of its graph."""
    if rng.random() < 0.35:
        return _bytes(data, rng)
    model = onnx.ModelProto.FromString(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        rng.choice(EDITS)(model, rng)
    return bytes(model.SerializeToString())


def _bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(len(changed) or 1)
        size = rng.choice([1, 2, 8, 64])
        match rng.randrange(6):
            case 0 | 1 if changed:
                changed[place] ^= 1 << rng.randrange(8)
            case 2 if changed:
                changed[place] = rng.randrange(256)
            case 3:
                del changed[place:]
            case 4:
                del changed[place : place + size]
            case _:
                changed[place:place] = changed[max(place - size, 0) : place] or rng.randbytes(size)
    return bytes(changed)


# ---- edits ---------------------------------------------------------------------------------------


def _graphs(model: onnx.ModelProto) -> list[Any]:
    """The graph, and those of subgraphs and functions that have nodes."""
    found: list[Any] = [model.graph, *model.functions]
    for holder in found:
        for node in holder.node:
            found += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return [holder for holder in found if holder.node]


def _node(model: onnx.ModelProto, rng: random.Random) -> Any:
    graphs = _graphs(model)
    return rng.choice(rng.choice(graphs).node) if graphs else None


def _names(model: onnx.ModelProto) -> list[str]:
    found = [value.name for value in model.graph.input] + [tensor.name for tensor in model.graph.initializer]
    found += [name for node in model.graph.node for name in node.output]
    return found or ["x"]


def _tensor(model: onnx.ModelProto, rng: random.Random) -> Any:
    constants = [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
    found: Sequence[Any] = [*model.graph.initializer, *constants]
    return rng.choice(found) if found else None


def rewire(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node is not None and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice([*_names(model), ""])


def swap_inputs(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node is not None and len(node.input) > 1:
        one, two = rng.sample(range(len(node.input)), 2)
        node.input[one], node.input[two] = node.input[two], node.input[one]


def more_or_fewer_inputs(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node is not None and node.input and rng.random() < 0.5:
        del node.input[-1]
    elif node is not None:
        node.input.append(rng.choice(_names(model)))


def change_attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node is None or not node.attribute:
        return
    attribute = rng.choice(node.attribute)
    if attribute.ints:
        what = rng.randrange(3)
        if what == 0:
            del attribute.ints[-1]
        elif what == 1:
            attribute.ints.append(rng.choice(NUMBERS))
        else:
            attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(NUMBERS)
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = rng.choice(NUMBERS)
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = rng.choice(REALS)
    elif attribute.type == onnx.AttributeProto.STRING:
        attribute.s = rng.choice([b"", b"SAME_UPPER", b"reflect", b"\xff\xfe"])


def drop_attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node is not None and node.attribute:
        del node.attribute[rng.randrange(len(node.attribute))]


def add_attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node is not None:
        number: Any = rng.choice([rng.choice(NUMBERS), [rng.choice(NUMBERS) for _ in range(rng.randrange(1, 5))]])
        node.attribute.append(helper.make_attribute(rng.choice(ATTRIBUTES), number))


def change_operator(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node is not None:
        node.op_type = rng.choice([other.op_type for other in model.graph.node] + list(OPERATORS))
        if rng.random() < 0.1:
            node.domain = rng.choice(["", "com.microsoft", "own"])


def insert_operator(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node is None or not node.input:
        return
    place, name = rng.randrange(len(node.input)), f"inserted{rng.randrange(10**6)}"
    read = [node.input[place], *rng.choices(_names(model), k=rng.choice([0, 0, 1]))]
    added = helper.make_node(rng.choice(OPERATORS), read, [name], name=name)
    node.input[place] = name
    model.graph.node.insert(rng.randrange(len(model.graph.node) + 1), added)


def drop_node(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = rng.choice(_graphs(model) or [model.graph]).node
    if nodes:
        del nodes[rng.randrange(len(nodes))]


def double_node(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node is not None:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        if rng.random() < 0.7:
            copied.output[:] = [f"{name}_again" for name in copied.output]
        model.graph.node.append(copied)


def reorder_nodes(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    rng.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def same_name(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node is not None and node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice([*_names(model), ""])


def change_dims(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    if tensor is None:
        return
    dims = list(tensor.dims)
    rng.shuffle(dims)
    what = rng.randrange(4)
    if what == 0:
        dims.append(1)
    elif what == 1 and dims:
        dims[rng.randrange(len(dims))] = rng.choice(NUMBERS)
    elif what == 2 and dims:
        del dims[-1]
    tensor.dims[:] = dims


def change_tensor_type(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    if tensor is None:
        return
    if rng.random() < 0.3:
        tensor.data_type = rng.randrange(0, 30)
        return
    kind = rng.choice(["float16", "float64", "int64", "int32", "bool"])
    array = _array(tensor)
    if array is not None:
        with np.errstate(all="ignore"):
            tensor.CopyFrom(numpy_helper.from_array(array.astype(kind), tensor.name))


def change_number(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    array = None if tensor is None else _array(tensor)
    if array is None or not array.size:
        return
    array = array.copy()
    place = rng.randrange(array.size)
    if array.dtype.kind == "f":
        with np.errstate(all="ignore"):
            array.flat[place] = rng.choice([*REALS, 1e-45, float(array.flat[place]) * 1.01])
    elif array.dtype == np.int64:
        array.flat[place] = rng.choice(NUMBERS)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _array(tensor: Any) -> Any:
    try:
        return numpy_helper.to_array(tensor)
    except Exception:  # a tensor that an edit before this one broke
        return None


def drop_initializer(model: onnx.ModelProto, rng: random.Random) -> None:
    if model.graph.initializer:
        del model.graph.initializer[rng.randrange(len(model.graph.initializer))]


def initializer_as_input(model: onnx.ModelProto, rng: random.Random) -> None:
    if model.graph.initializer:
        tensor = rng.choice(model.graph.initializer)
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))


def change_value(model: onnx.ModelProto, rng: random.Random) -> None:
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    if not values:
        return
    tensor = rng.choice(values).type.tensor_type
    what = rng.randrange(5)
    if what == 0:
        tensor.elem_type = rng.randrange(0, 24)
    elif what == 1:
        tensor.ClearField("shape")
    elif what == 2 and tensor.shape.dim:
        del tensor.shape.dim[rng.randrange(len(tensor.shape.dim))]
    elif what == 3 and tensor.shape.dim:
        rng.choice(tensor.shape.dim).dim_value = rng.choice(NUMBERS)
    elif tensor.shape.dim:
        rng.choice(tensor.shape.dim).dim_param = rng.choice(["", "N", "somewhere"])


def change_outputs(model: onnx.ModelProto, rng: random.Random) -> None:
    what = rng.randrange(3)
    if what == 0 and model.graph.output:
        del model.graph.output[rng.randrange(len(model.graph.output))]
    elif what == 1 and model.graph.output:
        model.graph.output.append(rng.choice(model.graph.output))
    else:
        model.graph.output.append(helper.make_tensor_value_info(rng.choice(_names(model)), TensorProto.FLOAT, None))


def change_versions(model: onnx.ModelProto, rng: random.Random) -> None:
    if rng.random() < 0.2:
        model.ir_version = rng.randrange(0, 14)
    elif model.opset_import:
        rng.choice(model.opset_import).version = rng.randrange(0, 30)


EDITS: Sequence[Edit] = (
    rewire,
    rewire,
    swap_inputs,
    more_or_fewer_inputs,
    change_attribute,
    change_attribute,
    drop_attribute,
    add_attribute,
    change_operator,
    insert_operator,
    insert_operator,
    drop_node,
    double_node,
    reorder_nodes,
    same_name,
    change_dims,
    change_tensor_type,
    change_number,
    change_number,
    drop_initializer,
    initializer_as_input,
    change_value,
    change_outputs,
    change_versions,
)
