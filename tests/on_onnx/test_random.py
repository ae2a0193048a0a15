"""Graphs and damages that nobody thought of: what folds is the same function, what does not is said."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder, assert_same_function, feeds_of, operators, outputs_of, run
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from models import ENTRIES
from onnx import helper

import refold
from refold.errors import InputError
from refold.onnx import files

Shape = tuple[int, int, int]

# The methods of Growing, the likelier ones more than once.
KINDS = (
    *("conv", "conv", "conv", "bn", "bn", "add", "add", "sub", "scale", "shift", "neg", "relu"),
    *("pad", "crop", "pool", "concat", "split", "turn", "gather", "transposed"),
)


class Growing:
    """A graph that grows by random steps; ``values`` are the tensors so far with their shapes."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.b = Builder(dtype="float64", seed=draw(st.integers(0, 99)))
        size = draw(st.sampled_from([7, 8]))
        name = self.b.input(*draw(st.sampled_from([("N", 4, size, size), ("N", 4, "H", "W"), (2, 4, size, size)])))
        self.values: list[tuple[str, Shape]] = [(name, (4, size, size))]

    def pick(self) -> tuple[str, Shape]:
        return self.draw(st.sampled_from(self.values[-3:]))

    def pair(self) -> tuple[str, str, Shape]:
        one, shape = self.pick()
        others = [name for name, other in self.values if other == shape]
        return one, self.draw(st.sampled_from(others)), shape

    def made(self, name: str, shape: Shape) -> None:
        self.values.append((name, shape))

    def step(self) -> None:
        getattr(self, self.draw(st.sampled_from(KINDS)))(*self.pick())

    def conv(self, x: str, shape: Shape) -> None:
        draw, (c, h, w) = self.draw, shape
        k, s, d = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 1, 1, 2])), draw(st.integers(1, 2))
        pads = [draw(st.integers(0, 1)) * (k // 2) for _ in range(4)]
        group = draw(st.sampled_from([g for g in (1, 1, 2, c) if c % g == 0]))
        out = group * draw(st.integers(1, max(1, 6 // group)))
        sizes = [(n + pads[i] + pads[i + 2] - d * (k - 1) - 1) // s + 1 for i, n in enumerate((h, w))]
        if min(sizes) < 2:
            return
        bias = draw(st.booleans())
        y = self.b.conv(x, c, out, k, bias=bias, pads=pads, strides=[s, s], dilations=[d, d], group=group)
        self.made(y, (out, sizes[0], sizes[1]))

    def transposed(self, x: str, shape: Shape) -> None:
        draw, (c, h, w) = self.draw, shape
        k, s, d = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 2, 3])), draw(st.integers(1, 2))
        pads = [draw(st.integers(0, 1)) * (k // 2) for _ in range(4)]
        extra = [draw(st.integers(0, s - 1)) for _ in range(2)]
        out = draw(st.integers(1, 6))  # without groups, with which the reference evaluator falls over
        sizes = [s * (n - 1) + d * (k - 1) + 1 - pads[i] - pads[i + 2] + extra[i] for i, n in enumerate((h, w))]
        if min(sizes) < 2 or max(sizes) > 24:
            return
        inputs = [x, self.b.random(c, out, k, k)] + ([self.b.random(out)] if draw(st.booleans()) else [])
        settings = {"strides": [s, s], "dilations": [d, d], "pads": pads, "output_padding": extra}
        self.made(self.b.op("ConvTranspose", *inputs, **settings), (out, sizes[0], sizes[1]))

    def bn(self, x: str, shape: Shape) -> None:
        self.made(self.b.bn(x, shape[0]), shape)

    def two(self, kind: str) -> None:
        one, other, shape = self.pair()
        self.made(self.b.op(kind, one, other), shape)

    def add(self, x: str, shape: Shape) -> None:
        self.two("Add")

    def sub(self, x: str, shape: Shape) -> None:
        one, other, shape = self.pair()
        if one != other:
            self.made(self.b.op("Sub", one, other), shape)

    def _constant(self, shape: Shape) -> str:
        kind = self.draw(st.sampled_from([(), (1,), (shape[0], 1, 1), (1, shape[0], 1, 1)]))
        return self.b.constant(self.b.rng.uniform(0.5, 1.5, kind))

    def _with(self, kind: str, x: str, shape: Shape) -> None:
        inputs = [x, self._constant(shape)]
        if self.draw(st.booleans()):
            inputs.reverse()
        self.made(self.b.op(kind, *inputs), shape)

    def scale(self, x: str, shape: Shape) -> None:
        self._with("Mul", x, shape)

    def shift(self, x: str, shape: Shape) -> None:
        self._with(self.draw(st.sampled_from(["Add", "Sub"])), x, shape)

    def neg(self, x: str, shape: Shape) -> None:
        self.made(self.b.op("Neg", x), shape)

    def relu(self, x: str, shape: Shape) -> None:
        self.made(self.b.op("Relu", x), shape)

    def pad(self, x: str, shape: Shape) -> None:
        widths = [self.draw(st.integers(0, 1)) for _ in range(4)]
        value = self.b.constant(np.float64(self.draw(st.sampled_from([0.0, 0.0, 0.5]))))
        y = self.b.op("Pad", x, self.b.ints(0, 0, widths[0], widths[1], 0, 0, widths[2], widths[3]), value)
        self.made(y, (shape[0], shape[1] + widths[0] + widths[2], shape[2] + widths[1] + widths[3]))

    def crop(self, x: str, shape: Shape) -> None:
        if shape[1] > 4:
            y = self.b.op("Slice", x, self.b.ints(1), self.b.ints(-1), self.b.ints(2))
            self.made(y, (shape[0], shape[1] - 2, shape[2]))

    def pool(self, x: str, shape: Shape) -> None:
        border = self.draw(st.integers(0, 1))
        y = self.b.op(
            "AveragePool",
            x,
            kernel_shape=[3, 3],
            pads=[border] * 4,
            count_include_pad=self.draw(st.integers(0, 1)),
        )
        if shape[1] + 2 * border > 4 and shape[2] + 2 * border > 4:
            self.made(y, (shape[0], shape[1] + 2 * border - 2, shape[2] + 2 * border - 2))
        else:
            self.b.nodes.pop()

    def concat(self, x: str, shape: Shape) -> None:
        one, other, shape = self.pair()
        if shape[0] <= 8:
            self.made(self.b.op("Concat", one, other, axis=1), (2 * shape[0], *shape[1:]))

    def split(self, x: str, shape: Shape) -> None:
        if shape[0] > 1:
            sizes = (1, shape[0] - 1)
            names = self.b.op("Split", x, self.b.ints(*sizes), outputs=2, axis=1)
            for name, size in zip(names, sizes, strict=True):
                self.made(name, (size, *shape[1:]))

    def turn(self, x: str, shape: Shape) -> None:
        y = self.b.op("Transpose", x, perm=[0, 2, 3, 1])
        y = self.b.op("Mul", y, self.b.random(shape[0]))
        self.made(self.b.op("Transpose", y, perm=[0, 3, 1, 2]), shape)

    def gather(self, x: str, shape: Shape) -> None:
        order = self.draw(st.permutations(range(shape[0])))
        self.made(self.b.op("Gather", x, self.b.ints(*order), axis=1), shape)


@given(st.data())
@settings(max_examples=15, phases=[Phase.explicit, Phase.generate])  # some seconds each; shrinking takes minutes
def test_random_graphs(data: Any) -> None:
    growing = Growing(data.draw)
    for _ in range(data.draw(st.integers(2, 9))):
        growing.step()
    names = list(dict.fromkeys([growing.values[-1][0], data.draw(st.sampled_from(growing.values))[0]]))
    names = [name for name in names if name != "x"]
    if not names:
        return
    model = growing.b.model(*names)
    onnx.checker.check_model(model, full_check=True)
    plain = refold.fold(model)
    onnx.checker.check_model(plain, full_check=True)
    assert sum(operators(plain).values()) <= sum(operators(model).values()), onnx.printer.to_text(model.graph)
    size = growing.values[0][1][1]
    assert_same_function(model, plain, size, u=2.0**-50)
    assert not refold.inspect(plain).changes_something, onnx.printer.to_text(model.graph)
    certificate = refold.prove(model, plain)
    assert certificate.ok, str(certificate)


# ---- damages -------------------------------------------------------------------------------------

SEEDS = [
    entry for entry in ENTRIES if entry.name in ("repvgg", "shuffle_by_reshapes", "values_that_subgraphs_read")
]


def fold_or_refuse(path: Path, u: float = 2.0**-24) -> None:
    """Read and fold a damaged file: an InputError, or what it says is what it was."""
    try:
        model = files.load(path)
        plain = refold.fold(model)
    except InputError:
        return
    original = onnx.load(path)
    feeds = feeds_of(original, 8)
    try:
        compute = run if original.opset_import[0].version < 15 else outputs_of
        expected = compute(original, feeds)
    except Exception:  # a model that does not run says nothing about its fold
        return
    found = compute(onnx.ModelProto.FromString(_serialized(plain)), feeds)
    for one, two in zip(expected, found, strict=True):
        assert one.shape == two.shape
        # Brain floats are no floats to NumPy: in float64 their NaNs show.
        one, two = one.astype("float64"), two.astype("float64")
        scale = float(np.abs(one[np.isfinite(one)]).max(initial=0.0))
        both = np.isfinite(one) & np.isfinite(two)
        error = np.abs(one[both] - two[both])
        assert float(error.max(initial=0.0)) <= 128 * u * scale + 1e-30


def _serialized(model: Any) -> bytes:
    import onnx_ir as ir

    return bytes(ir.to_proto(model).SerializeToString())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", SEEDS, ids=lambda entry: entry.name)
def test_flipped_bytes(entry: Any, tmp_path: Path) -> None:
    data = entry.build().SerializeToString()
    rng = random.Random(0)
    path = tmp_path / "flipped.onnx"
    for _ in range(120):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 4])):
            place = rng.randrange(len(damaged))
            damaged[place] = rng.choice([damaged[place] ^ (1 << rng.randrange(8)), rng.randrange(256)])
        path.write_bytes(bytes(damaged))
        fold_or_refuse(path)


def _edited(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(model.graph.node)
    names = [name for other in model.graph.node for name in other.output] + [
        t.name for t in model.graph.initializer
    ]
    what = rng.randrange(7)
    if what == 0 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif what == 1 and node.attribute:
        attribute = rng.choice(node.attribute)
        if attribute.ints:
            attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice([-1, 0, 1, 2, 5, 2**31, -(2**40)])
        attribute.i = rng.choice([-1, 0, 1, 2, 3, 7])
        attribute.f = rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e-30])
    elif what == 2:
        node.op_type = rng.choice([other.op_type for other in model.graph.node])
    elif what == 3 and model.graph.initializer:
        tensor = rng.choice(model.graph.initializer)
        dims = list(tensor.dims)
        rng.shuffle(dims)
        tensor.dims[:] = [*dims, 1] if rng.random() < 0.3 else dims
    elif what == 4 and model.graph.initializer:
        tensor = rng.choice(model.graph.initializer)
        array = onnx.numpy_helper.to_array(tensor).copy()
        if array.size and array.dtype.kind == "f":
            array.flat[rng.randrange(array.size)] = rng.choice([np.nan, np.inf, 3e38, 1e-45, 0.0])
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    elif what == 5:
        del node.attribute[:]
    else:
        node.attribute.append(
            helper.make_attribute(rng.choice(["group", "axis", "training_mode"]), rng.randrange(-2, 5))
        )


@pytest.mark.filterwarnings("ignore")
def test_edited_graphs(tmp_path: Path) -> None:
    rng = random.Random(1)
    path = tmp_path / "edited.onnx"
    small = [entry for entry in ENTRIES if not entry.name.startswith("constants")]
    for _ in range(250):
        entry = rng.choice(small)
        model = entry.build()
        for _ in range(rng.choice([1, 1, 2])):
            _edited(model, rng)
        path.write_bytes(model.SerializeToString())
        fold_or_refuse(path, entry.u)
