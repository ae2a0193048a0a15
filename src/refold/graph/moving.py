"""Whether a factor and a shift per channel that folded into nothing where they stand fold on the other side of an
operator through which they pass.

They are moved only if they then cost nothing: the new value must vanish into regions that take them in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from refold.algebra.cost import Cost
from refold.algebra.refusal import Refusal
from refold.graph.components import components
from refold.graph.forms import form_builder
from refold.graph.graph import AffineForm, Gain, Graph, Node, Opaque
from refold.graph.passing import Moved, is_map_per_channel, is_obstacle, journey
from refold.graph.plan import Kept, Plan
from refold.graph.region import Part, Region

Planner = Callable[[Graph], Plan]


def with_maps_moved(plan: Plan, planned: Planner) -> Plan:
    """``plan``, or the one of ``planned`` for a graph in which some maps per channel stand on the other side of
    operators, if that is better. What could pass and folds into nothing there either gets a sentence."""
    graph = plan.graph
    moves: dict[str, Moved] = {}
    why: dict[str, list[Kept]] = {}
    names = _left_over(plan)
    for ahead, order in ((False, names[::-1]), (True, names)):
        trial: list[Moved] = []  # maps that are of no use beyond the operator without those next to them
        for name in (name for name in order if name not in moves):
            whole = trial[-1].graph if trial and _is_next(trial[-1], name, ahead) else graph
            trial = trial if whole is not graph else []
            node = next(node for node in whole.nodes if node.name == name and is_map_per_channel(node.op))
            best, reasons = _best(whole, node, planned, ahead=ahead)
            why.setdefault(name, []).extend(reasons)
            if best is None:
                continue
            moved, is_better = best
            trial.append(moved)
            if is_better:
                graph = moved.graph
                moves.update({own.node.name: own for own in trial})
                trial = []
    kept = [kept for name in names if name not in moves for kept in dict.fromkeys(why[name])]
    if moves:
        better = planned(graph)
        if not any(_is_made(moved, better) for moved in moves.values()):
            plan = replace(better, regions=tuple(_with_stand_ins(better, moves)))
    return replace(plan, kept=(*plan.kept, *kept))


def _is_next(moved: Moved, name: str, ahead: bool) -> bool:
    """Whether the map ``name`` stands next to where a map stood that was moved."""
    graph = moved.graph
    place = next((node for node in graph.nodes if node.name == moved.node.name and node.op == Gain()), None)
    while place is not None and place.op == Gain():
        readers = graph.consumers[place.output]
        if not ahead:
            place = graph.producer.get(place.inputs[0])
        else:
            place = readers[0] if len(readers) == 1 else None
    return place is not None and place.name == name


def _left_over(plan: Plan) -> list[str]:
    """The maps per channel that are still operators of their own, or with others of their kind."""
    inside = {node.name for region in plan.regions if not _scales(region) for node in region.cone}
    return [node.name for node in plan.graph.nodes if is_map_per_channel(node.op) and node.name not in inside]


def _scales(region: Region) -> bool:
    """Whether a region still multiplies or adds per channel, apart from its convolutions."""
    terms = [term for _, term in region.terms]
    plain = all(is_map_per_channel(node.op) or is_obstacle(node.op) or node.op == Gain() for node in region.cone)
    return plain or any(term.is_scale and not term.is_identity for term in terms)


def _best(
    graph: Graph, node: Node, planned: Planner, *, ahead: bool
) -> tuple[tuple[Moved, bool] | None, list[Kept]]:
    """The place for the map of ``node`` that leaves the fewest operators, with whether these are fewer than now;
    none if it would still be an operator of its own everywhere, and the reasons."""
    best: tuple[tuple[int, float], Moved, bool] | None = None
    why: list[Kept] = []
    for moved in journey(graph, node, ahead=ahead):
        if isinstance(moved, Refusal):
            why.append(Kept(node.name, moved.reason))
            continue
        if not is_obstacle(moved.past.op):
            continue
        names = _around(graph, moved)
        before, after = (planned(_part(whole, names)) for whole in (graph, moved.graph))
        if _is_made(moved, after):
            own = f" and {node.name}" if ahead else f"{node.name} and "
            why += [k for k in after.kept if (k.where.endswith if ahead else k.where.startswith)(own)]
            continue
        order, now = ((plan.after.operators, plan.after.estimate) for plan in (after, before))
        # At the same cost a mean stays one, instead of becoming a convolution.
        cones = [region.cone for region in before.regions if node.name in region.nodes]
        is_in_mean = any(is_obstacle(other.op) for cone in cones for other in cone)
        is_better = order < now or (order == now and is_in_mean)
        if not after.after.is_dearer_than(before.after) and (best is None or order < best[0]):
            best = order, moved, is_better
    return (None if best is None else best[1:]), why


def _is_made(moved: Moved, plan: Plan) -> bool:
    """Whether a plan has the new value itself, which is in no model."""
    return isinstance(moved.graph.producer[moved.new].op, Opaque) or moved.new in plan.computed


def _around(graph: Graph, moved: Moved) -> frozenset[str]:
    """The names of the nodes for which it may make a difference where the map stands."""
    found: set[str] = set()
    for whole in (graph, moved.graph):
        touched = {n.name for n in whole.nodes if n.name in (moved.node.name, moved.past.name)}
        touched |= {r.name for n in whole.nodes if n.name in touched for o in n.outputs for r in whole.consumers[o]}
        outputs = {n.outputs[0] for n in whole.nodes if n.name in touched}
        outputs |= {name for n in whole.nodes if n.name in touched for name in n.inputs}
        together = {v for component in components(whole) if not outputs.isdisjoint(component) for v in component}
        found |= touched | {n.name for n in whole.nodes if n.outputs and n.outputs[0] in together}
    return frozenset(found)


def _part(graph: Graph, names: frozenset[str]) -> Graph:
    """These nodes of a graph, as a graph."""
    nodes = tuple(node for node in graph.nodes if node.name in names)
    given = {name for node in nodes for name in node.outputs}
    elsewhere = {name for node in graph.nodes if node.name not in names for name in node.inputs}
    outputs = tuple(name for name in given if name in elsewhere or name in graph.outputs)
    used = given | {name for node in nodes for name in node.inputs}
    values = {name: value for name, value in graph.values.items() if name in used}
    return replace(graph, nodes=nodes, values=values, inputs=(), outputs=outputs)


def _with_stand_ins(plan: Plan, moves: dict[str, Moved]) -> list[Region]:
    """The regions, in the order of the graph, and for each map that was moved one that says so where it stood."""
    regions = dict(plan.chosen)
    builder = form_builder(plan.graph)
    for node in plan.graph.nodes:
        if node.name not in moves or node.op != Gain() or node.output not in plan.computed:
            continue
        moved = moves[node.name]
        where = f"{'ahead of' if moved.ahead else 'behind'} {moved.past.name}"
        region = regions.get(node.output)
        if region is None:
            leaf = builder.leaf(node.inputs[0])
            assert isinstance(leaf, AffineForm)
            part = Part(leaf, False, (node.name,))
            regions[node.output] = Region(node.output, (part,), (node,), Cost(), Cost(), where)
        elif all(term.is_identity for _, term in region.terms):
            regions[node.output] = replace(region, moved=where)
    order = {node.outputs[0]: place for place, node in enumerate(plan.graph.nodes) if node.outputs}
    return sorted(regions.values(), key=lambda region: order[region.value])
