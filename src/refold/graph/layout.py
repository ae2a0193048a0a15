"""Which axis of each tensor holds the channels.

Convolutions, dense layers and the like say it; sums, scalars and paddings work on any axis and take it
from their neighbors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from refold.graph.graph import Affine, Concat, Gain, Graph, Node, Opaque, Pad, Relayout, Select, Shape, Slice, Sum


def demanded_axis(node: Node) -> tuple[int | None, int | None]:
    """The channel axes on which ``node`` reads and writes; None where any axis will do."""
    match node.op:
        case Affine(axis=axis) | Concat(axis=axis) | Select(axis=axis):
            return axis, axis
        case Relayout(axis_in, axis_out):
            return axis_in, axis_out
        case Pad(axis=int(axis)):
            return axis, axis
        case Pad(widths):
            padded = [axis for axis, pair in enumerate(widths) if pair != (0, 0)]
            # The usual axis is the last one; a tensor padded there has its channels first.
            return (1, 1) if len(widths) - 1 in padded else (None, None)
        case Gain() | Sum() | Slice() | Opaque():
            return None, None


def settled(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """``nodes``, in which choosing and joining along an axis that holds no channels is opaque.

    Picking some tokens of a sequence looks like picking channels; the convolutions and dense layers around tell
    which axis holds those.
    """
    root: dict[str, str] = {}

    def find(value: str) -> str:
        while root.get(value, value) != value:
            value = root[value]
        return value

    for node in nodes:
        if isinstance(node.op, Gain | Sum | Slice | Pad):
            for value in node.inputs:
                root[find(value)] = find(node.output)
    demanded: dict[str, set[int]] = {}
    for node in nodes:
        if isinstance(node.op, Affine):
            for value in (*node.inputs, node.output):
                demanded.setdefault(find(value), set()).add(node.op.axis)

    def contradicted(node: Node) -> bool:
        if not isinstance(node.op, Select | Concat):
            return False
        around = [demanded.get(find(value), set()) for value in (*node.inputs, node.output)]
        return any(axes and node.op.axis not in axes for axes in around)

    return tuple(replace(node, op=Opaque()) if contradicted(node) else node for node in nodes)


def channel_axes(graph: Graph) -> dict[str, int]:
    """The channel axis of every value; where nothing says otherwise the last axis, or the first behind the
    batch whose size is known."""
    axes: dict[str, int] = {}
    for node in graph.nodes:
        _, written = demanded_axis(node)
        if written is not None:
            axes[node.output] = written
        elif not isinstance(node.op, Opaque):
            known = [axes[name] for name in node.inputs if name in axes]
            if known:
                axes[node.output] = known[0]
    for node in reversed(graph.nodes):
        if isinstance(node.op, Opaque):
            continue
        read, _ = demanded_axis(node)
        wanted = read if read is not None else axes.get(node.output)
        if wanted is not None:
            for name in node.inputs:
                axes.setdefault(name, wanted)
    for node in graph.nodes:  # what the way back taught the inputs, their other readers may use
        if not isinstance(node.op, Opaque) and node.output not in axes:
            known = [axes[name] for name in node.inputs if name in axes]
            if known:
                axes[node.output] = known[0]
    return {name: axes.get(name, _usual(value.shape)) for name, value in graph.values.items()}


def _usual(shape: Shape) -> int:
    last = len(shape) - 1
    return next((axis for axis in (last, *range(1, last)) if last > 0 and shape[axis] is not None), last)
