"""Affine forms: what a linear node makes of the forms of its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, final

import numpy as np

from refold.algebra import laws
from refold.algebra.affine import AffineConv, Array, identity, magnitude
from refold.algebra.geometry import Window
from refold.algebra.refusal import Refusal
from refold.graph.graph import (
    Affine,
    AffineForm,
    Concat,
    Gain,
    Graph,
    Node,
    Op,
    Opaque,
    Pad,
    Relayout,
    Select,
    Slice,
    Sum,
)
from refold.graph.layout import channel_axes, demanded_axis

T = TypeVar("T")

# A sum over more tensors than this is never one operator, and looking for it costs time.
MOST_LEAVES = 8

# A value as forms that stand one behind the other on its channel axis; mostly there is one.
Parts = tuple[AffineForm, ...]

NOT_FINITE = "a weight would not be finite"


@final
@dataclass(frozen=True)
class FormBuilder:
    """Builds affine forms over one graph."""

    graph: Graph
    axes: Mapping[str, int]

    def space(self, value: str) -> tuple[int | None, ...]:
        """The spatial sizes of a value."""
        return _space(self.graph.values[value].shape, self.axes[value])

    def channels(self, value: str) -> int | None:
        """The number of channels of a value."""
        return self.graph.values[value].shape[self.axes[value]]

    def leaf(self, value: str) -> AffineForm | Refusal:
        """The value seen from itself."""
        channels = self.channels(value)
        if channels is None:
            return Refusal(f"the number of channels of {value} is not known, or follows from the size of the input")
        axes = len(self.graph.values[value].shape) - 2
        return AffineForm({value: identity(channels, axes)}, np.zeros(channels))

    def combine(self, node: Node, forms: Sequence[AffineForm]) -> AffineForm | Refusal:
        """The form of ``node``'s output, given those of its inputs."""
        read, _ = demanded_axis(node)
        wanted = self.axes[node.output] if read is None else read
        if any(self.axes[name] != wanted for name in node.inputs):
            return Refusal("the operators disagree about which axis holds the channels")
        form: AffineForm | Refusal
        match node.op:
            case Affine(conv):
                form = self._through(conv, forms[0])
            case Gain(scale, shift):
                form = _scaled(forms[0], scale, shift)
            case Sum(factors):
                form = self._sum([_scaled(f, factor) for f, factor in zip(forms, factors, strict=True)])
            case Concat():
                form = self._concat(forms)
            case Select(channels):
                form = _selected(forms[0], channels)
            case Slice(cuts):
                form = self._slice(forms[0], cuts, wanted)
            case Pad(widths, value):
                if widths[wanted] != (0, 0):
                    return Refusal("it pads channels")
                form = self._pad(forms[0], _space(widths, wanted), np.asarray(value))
            case Relayout():
                form = forms[0]
            case Opaque(reason):
                return Refusal(reason)
        if isinstance(form, Refusal):
            return form
        if form.bias.size and not magnitude(form.bias) <= self.graph.largest:  # nor is NaN
            return Refusal(NOT_FINITE)
        nodes = (*dict.fromkeys(name for f in forms for name in f.nodes), node.name)
        return AffineForm(form.terms, form.bias, form.laws, nodes)

    def parts(self, node: Node, inputs: Sequence[Parts]) -> Iterator[Parts]:
        """All that ``node``'s output is, given its inputs: one form, and forms one behind the other."""
        if all(len(parts) == 1 for parts in inputs):
            form = self.combine(node, [parts[0] for parts in inputs])
            if isinstance(form, AffineForm):
                yield (form,)
        if isinstance(node.op, Concat):
            joined = tuple(replace(form, nodes=(*form.nodes, node.name)) for parts in inputs for form in parts)
            agree = {self.axes[name] for name in (*node.inputs, node.output)} == {node.op.axis}
            if agree and len(joined) <= MOST_LEAVES:
                yield joined
        elif len(inputs) == 1 and len(inputs[0]) > 1:
            yield from self._distributed(node, inputs[0])

    def _distributed(self, node: Node, parts: Parts) -> Iterator[Parts]:
        """``node`` on each of several parts of its input, if it leaves every channel in its place."""
        found = []
        start = 0
        for form in parts:
            stop = start + form.bias.size
            op = _on_channels(node.op, start, stop, self.axes[node.output])
            if op is None:
                return
            part = self.combine(replace(node, op=op), [form])
            if isinstance(part, Refusal):
                return
            found.append(replace(part, laws=(*part.laws, "distribute")))
            start = stop
        yield tuple(found)

    def seen_through(self, form: AffineForm, leaf: str, inner: AffineForm) -> AffineForm | Refusal:
        """``form`` with ``inner``, the form of ``leaf``, in the place of that."""
        if leaf not in form.terms:
            return form
        term = self._through(form.terms[leaf], inner)
        if isinstance(term, Refusal):
            return term
        others = {name: other for name, other in form.terms.items() if name != leaf}
        total = self._sum([replace(term, laws=()), AffineForm(others, form.bias)])
        if isinstance(total, Refusal):
            return total
        if not np.all(np.abs(total.bias) <= self.graph.largest):
            return Refusal(NOT_FINITE)
        nodes = tuple(dict.fromkeys((*inner.nodes, *form.nodes)))
        return replace(total, laws=(*inner.laws, *form.laws), nodes=nodes)

    def _through(self, conv: AffineConv, form: AffineForm) -> AffineForm | Refusal:
        # With several leaves each is a map of its own; the bias goes with the padding of all of them,
        # so one term carries it through the law that decides about borders.
        terms: dict[str, AffineConv] = {}
        bias = conv.bias
        for name, term in form.terms.items():
            composed = laws.compose(conv.linear(), term.with_bias(form.bias), self.space(name))
            if isinstance(composed, Refusal):
                return composed
            terms[name] = composed.linear()
            bias = conv.bias + composed.bias
        return AffineForm(terms, bias, (*form.laws, _law_of(conv)))

    def _sum(self, forms: Sequence[AffineForm]) -> AffineForm | Refusal:
        terms: dict[str, AffineConv] = {}
        by_leaf: dict[str, list[AffineConv]] = {}
        for form in forms:
            for name, term in form.terms.items():
                by_leaf.setdefault(name, []).append(term)
        if len(by_leaf) > MOST_LEAVES:
            return Refusal("it is a sum over too many tensors to be worth one operator")
        for name, parts in by_leaf.items():
            total = parts[0] if len(parts) == 1 else laws.add(parts, self.space(name))
            if isinstance(total, Refusal):
                return total
            terms[name] = total
        if len({form.bias.size for form in forms}) > 1:
            return Refusal("the branches have different numbers of channels")
        return AffineForm(terms, np.sum([form.bias for form in forms], axis=0), _joined(forms, "add"))

    def _concat(self, forms: Sequence[AffineForm]) -> AffineForm | Refusal:
        leaves = list(dict.fromkeys(name for form in forms for name in form.terms))
        if len(leaves) > MOST_LEAVES:
            return Refusal("it joins too many tensors to be worth one operator")
        terms: dict[str, AffineConv] = {}
        for name in leaves:
            channels = self.channels(name)
            if channels is None:
                return Refusal(f"the number of channels of {name} is not known")
            parts = [form.terms.get(name, form.bias.size) for form in forms]
            stacked = laws.stack(parts, channels, self.space(name))
            if isinstance(stacked, Refusal):
                return stacked
            terms[name] = stacked
        return AffineForm(terms, np.concatenate([form.bias for form in forms]), _joined(forms, "stack"))

    def _slice(
        self, form: AffineForm, cuts: Sequence[tuple[int, int, int]], channel_axis: int
    ) -> AffineForm | Refusal:
        start, trim, step = cuts[channel_axis]
        if (start, trim, step) != (0, 0, 1):
            form = _selected(form, range(start, form.bias.size - trim, step))
        windows = tuple(Window(1, step, 1, -start, -trim) for start, trim, step in _space(cuts, channel_axis))
        if all(window.is_unit for window in windows):
            return form
        channels = form.bias.size
        every = AffineConv(np.ones((channels, 1) + (1,) * len(windows)), np.zeros(channels), windows, channels)
        return self._through(every, form)

    def _pad(self, form: AffineForm, widths: Sequence[tuple[int, int]], value: Array) -> AffineForm | Refusal:
        terms: dict[str, AffineConv] = {}
        for name, term in form.terms.items():
            padded = laws.pad(term.with_bias(form.bias), widths, value, self.space(name))
            if isinstance(padded, Refusal):
                return padded
            terms[name] = padded.linear()
        return AffineForm(terms, form.bias, (*form.laws, "pad"))


def form_builder(graph: Graph) -> FormBuilder:
    """The builder for ``graph``."""
    return FormBuilder(graph, channel_axes(graph))


def _space(per_axis: Sequence[T], channel_axis: int) -> tuple[T, ...]:
    """What ``per_axis`` says of the spatial axes: all but batch and channels."""
    return tuple(entry for axis, entry in enumerate(per_axis) if axis not in (0, channel_axis))


def _law_of(conv: AffineConv) -> str:
    if conv.is_identity:
        return "identity"
    return "scale and shift" if conv.is_scale else "compose"


def _on_channels(op: Op, start: int, stop: int, axis: int) -> Op | None:
    """What ``op`` does to some of its channels, if each output channel reads only the one in its place."""
    match op:
        case Affine(conv) if conv.is_channelwise:
            part = AffineConv(conv.kernel[start:stop], conv.bias[start:stop], conv.windows, stop - start)
            return replace(op, conv=part)
        case Gain() | Relayout():
            return op
        case Slice(cuts) if cuts[axis] == (0, 0, 1):
            return op
        case Pad(widths, value) if widths[axis] == (0, 0):
            return replace(op, value=value[start:stop]) if isinstance(value, tuple) else op
        case _:
            return None


def _selected(form: AffineForm, channels: Sequence[int]) -> AffineForm:
    picked = {name: laws.select(term, channels) for name, term in form.terms.items()}
    return AffineForm(picked, form.bias[list(channels)], (*form.laws, "select"))


def _scaled(form: AffineForm, scale: float, shift: float = 0.0) -> AffineForm:
    if scale == 1.0 and shift == 0.0:
        return form
    terms = {name: term.scaled(scale) for name, term in form.terms.items()}
    return AffineForm(terms, form.bias * scale + shift, (*form.laws, "scale and shift"))


def _joined(forms: Sequence[AffineForm], law: str) -> tuple[str, ...]:
    return (*(name for form in forms for name in form.laws), law)


def can_be_stored(parts: Parts, largest: float) -> bool:
    """Whether every weight is finite, and stays so in the type that the model stores."""
    return all(
        magnitude(form.bias) <= largest and all(_is_within(term, largest) for term in form.terms.values())
        for form in parts
    )


def _is_within(term: AffineConv, largest: float) -> bool:
    # Mostly what it is computed from says so, and it is computed once, when it is written; a NaN is not.
    return term.most <= largest or magnitude(term.kernel) <= largest
