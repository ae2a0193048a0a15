"""What is measured: on which inputs, at which sizes, and what counts as a fault there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from proof.models import check, fused, normal, stack
from proof.numpy_frontend import FRONTEND, Model, batch_norm, conv, step
from refold.errors import InputError
from refold.graph.graph import Graph
from refold.proof import Verdict
from refold.proof.endtoend import Inputs, input_sets, left_out, measure, random_input, together

Array = Any


def sets_of(graph: Graph, given: list[Array] | None = None) -> list[Inputs]:
    rng = np.random.default_rng(0)
    real = [random_input(graph.values[name], rng, 1) for name in graph.inputs]
    return input_sets(graph, given, real, real, rng)


def graph_of(inputs: dict[str, tuple[int | None, ...]]) -> Graph:
    graph = FRONTEND.lift(Model(inputs, (step("y", "relu", "x"),), ("y",))).graph
    # The stand-in leaves every batch free.
    values = {n: replace(v, shape=(inputs["x"][:1] or v.shape[:1]) + v.shape[1:]) for n, v in graph.values.items()}
    return replace(graph, values=values)


def sets(inputs: dict[str, tuple[int | None, ...]], given: list[Array] | None = None) -> dict[str, list[Array]]:
    return {s.name: list(s.arrays) for s in sets_of(graph_of(inputs), given)}


def test_all_kinds_of_inputs_are_there() -> None:
    found = sets({"x": (None, 3, None, None)}, [np.full((7, 3, 4, 4), 2.0, "float32")])
    assert list(found) == [
        "given",
        "normal",
        "uniform",
        "zeros",
        "ones",
        "large",
        "subnormal",
        "one in a corner",
        "one in the middle",
        "odd sizes",
        "sizes of 1",
    ]
    shapes = {name: arrays[0].shape for name, arrays in found.items()}
    assert shapes["normal"] == (1, 3, 12, 12)
    assert shapes["zeros"] == (1, 3, 12, 12)
    assert shapes["odd sizes"] == (3, 3, 15, 15)
    assert shapes["sizes of 1"] == (1, 3, 1, 1)
    assert all(arrays[0].dtype == np.float32 for arrays in found.values())
    small = np.abs(found["subnormal"][0])
    assert 0 < np.max(small) < np.finfo(np.float32).tiny
    assert np.max(np.abs(found["large"][0])) > 1000
    assert np.min(found["uniform"][0]) >= 0
    assert np.max(found["uniform"][0]) <= 1
    assert np.argwhere(found["one in a corner"][0]).tolist() == [[0, 0, 0, 0]]
    assert np.argwhere(found["one in the middle"][0]).tolist() == [[0, 1, 6, 6]]


def test_sizes_that_are_fixed_stay() -> None:
    found = sets({"x": (None, 3, 8, 8)})
    assert "odd sizes" not in found
    assert {arrays[0].shape[1:] for arrays in found.values()} == {(3, 8, 8)}
    assert {len(arrays[0]) for arrays in found.values()} == {1}


def test_inputs_that_no_memory_holds_are_refused() -> None:
    graph = graph_of({"x": (2**31, 2, 3)})
    with pytest.raises(InputError, match=r"'x' of shape .* is too large to be tried"):
        random_input(graph.values["x"], np.random.default_rng(0), 1)


def test_where_sizes_are_free_small_ones_do_but_for_one() -> None:
    graph = graph_of({"x": (None, 3, None, None)})
    normal, small = np.ones((1, 3, 12, 12), "float32"), np.ones((1, 3, 8, 8), "float32")
    made = {s.name: s for s in input_sets(graph, None, [normal], [small], np.random.default_rng(0))}
    shapes = {name: inputs.arrays[0].shape[-1] for name, inputs in made.items()}
    assert (shapes.pop("normal"), shapes.pop("odd sizes"), shapes.pop("sizes of 1")) == (12, 11, 1)
    assert set(shapes.values()) == {8}
    # Whether the runtime takes such a size as well is not known.
    assert not made["zeros"].must_run


def test_single_examples_are_run_together_where_batches_are_free() -> None:
    def groups(shape: tuple[int | None, ...]) -> list[list[str]]:
        graph = graph_of({"x": shape})
        return [[inputs.name for inputs in group] for group in together(graph, sets_of(graph))]

    names = ["uniform", "zeros", "ones", "large", "subnormal", "one in a corner", "one in the middle"]
    assert groups((None, 3, 8, 8)) == [["normal"], names]
    assert groups((None, 3, None, None)) == [["normal"], names, ["odd sizes"], ["sizes of 1"]]
    assert groups((1, 3, 8, 8)) == [["normal"], *([name] for name in names)]
    # No more of them than fit into some memory.
    assert groups((None, 1000, 200, 200)) == [["normal"], *(names[i : i + 2] for i in (0, 2, 4, 6))]


def test_what_is_found_together_is_what_is_found_of_each_alone() -> None:
    inputs = {"x": (None, 2, 8)}
    before = Model(inputs, (conv("y", "x", np.eye(2, dtype="float32")[:, :, None]),), ("y",))
    after = before.edited("y", w=before.steps[0].weights["w"] * np.float32(1.5))
    one, two = FRONTEND.lift(before), FRONTEND.lift(after)
    group = next(group for group in together(one.graph, sets_of(one.graph)) if len(group) > 1)
    joint = measure(FRONTEND, one, two, group, proved=True)
    alone = [found for inputs in group for found in measure(FRONTEND, one, two, [inputs], proved=True)]
    assert [found.inputs for found in joint] == [inputs.name for inputs in group]
    for a, b in zip(joint, alone, strict=True):
        assert [r.output for r in a.results] == [r.output for r in b.results]
        for x, y in zip(a.results, b.results, strict=True):
            assert x.inputs == y.inputs == a.inputs
            assert x.max_error == pytest.approx(y.max_error, rel=1e-5)
    errors = [found.results[0].max_error for found in joint]
    assert len(set(errors)) == 5  # one is as far off in a corner as in the middle, and as ones


def test_a_fault_on_one_kind_of_input_is_found_there_and_only_there() -> None:
    """As what a runtime makes of large numbers: infinity in one model only."""
    inputs = {"x": (None, 2, 8)}
    before = Model(inputs, (conv("y", "x", np.eye(2, dtype="float32")[:, :, None]),), ("y",))

    class Overflows(type(FRONTEND)):  # type: ignore[misc]
        def run(self, lifted: Any, arrays: Any, **options: Any) -> Any:
            found = super().run(lifted, arrays, **options)
            return found if lifted is one else [np.where(np.abs(found[0]) > 100, np.inf, found[0])]

    one, two = FRONTEND.lift(before), FRONTEND.lift(before)
    group = next(group for group in together(one.graph, sets_of(one.graph)) if len(group) > 1)
    found = measure(Overflows(), one, two, group, proved=True)
    wrong = {measurement.inputs for measurement in found if measurement.results[0].verdict is Verdict.REFUTED}
    assert wrong == {"large"}


def test_examples_that_do_not_run_together_are_run_one_by_one() -> None:
    case = stack(np.random.default_rng(3), blocks=1)
    one, two = FRONTEND.lift(case.before), FRONTEND.lift(case.after)

    class OneByOne(type(FRONTEND)):  # type: ignore[misc]
        def run(self, lifted: Any, arrays: Any, **options: Any) -> Any:
            if len(arrays[0]) > 1:
                raise ValueError("one at a time")
            return super().run(lifted, arrays, **options)

    group = next(group for group in together(one.graph, sets_of(one.graph)) if len(group) > 1)
    found = measure(OneByOne(), one, two, group, proved=True)
    assert [measurement.inputs for measurement in found] == [inputs.name for inputs in group]
    assert all(measurement.results[0].verdict is Verdict.MEASURED for measurement in found)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((None, 3, None), []),
        ((None, 3, 8), ["odd sizes, sizes of 1: the model takes one size only"]),
        ((4, 3, None), ["other batch sizes: the model takes batches of 4 only"]),
        (
            (1,),
            [
                "other batch sizes: the model takes batches of 1 only",
                "odd sizes, sizes of 1: the model takes one size only",
            ],
        ),
    ],
)
def test_what_cannot_be_measured_is_said(shape: tuple[int | None, ...], expected: list[str]) -> None:
    assert list(left_out(graph_of({"x": shape}))) == expected
    if shape[0] is None:
        model = Model({"x": shape}, (step("y", "relu", "x"),), ("y",))
        notes = [note for note in check(model, model).notes if note.startswith("not measured on")]
        assert notes == [f"not measured on {sentence}" for sentence in expected]


def measured(before: Model, after: Model, name: str = "normal", **options: Any) -> Any:
    one, two = FRONTEND.lift(before), FRONTEND.lift(after)
    chosen = next(s for s in sets_of(one.graph) if s.name == name)
    (found,) = measure(FRONTEND, one, two, [chosen], proved=False, **options)
    return found


def test_an_error_beyond_the_original_is_refuted_on_zeros_too() -> None:
    rng = np.random.default_rng(0)
    bn = batch_norm("bn", "c", rng, 4)
    w = normal(rng, 4, 4, 3, 3)
    kernel, bias = (array.astype("float32") for array in fused(w, np.zeros(4), bn))
    inputs = {"x": (None, 4, 8, 8)}
    before = Model(inputs, (conv("c", "x", w), bn), ("bn",))
    after = Model(inputs, (conv("c", "x", kernel, bias),), ("c",))
    for name in ("normal", "zeros", "ones", "subnormal", "one in a corner"):
        assert measured(before, after, name).results[0].verdict is Verdict.MEASURED, name
        (wrong,) = measured(before, after.edited("c", b=bias * np.float32(1.0001)), name).results
        assert wrong.verdict is Verdict.REFUTED, name
        assert wrong.ratio > 4


def test_without_a_reference_only_large_differences_are_refuted() -> None:
    """Behind an operator that the framework has in single precision only."""
    bias = np.ones(4, "float32")
    steps = (conv("c", "x", normal(np.random.default_rng(0), 4, 4, 3, 3), bias), step("t", "single", "c"))
    before = Model({"x": (None, 4, 8, 8)}, steps, ("t",))
    found = measured(before, before)
    assert "has no float64" in found.why_no_reference
    assert found.results[0].original_max_error is None
    assert found.results[0].verdict is Verdict.MEASURED
    wrong = before.edited("c", b=bias * np.float32(1.01))
    assert measured(before, wrong).results[0].verdict is Verdict.REFUTED


def test_subnormal_results_may_be_flushed_to_zero() -> None:
    """Some processors and runtimes do."""
    inputs = {"x": (None, 4, 8, 8)}
    before = Model(inputs, (conv("c", "x", np.ones((4, 4, 1, 1), "float32")),), ("c",))
    after = before.edited("c", w=np.zeros((4, 4, 1, 1), "float32"))
    assert measured(before, after, "subnormal").results[0].verdict is Verdict.MEASURED
    assert measured(before, after, "ones").results[0].verdict is Verdict.REFUTED


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_places_that_are_not_finite_must_be_alike(value: float) -> None:
    inputs = {"x": (None, 2, 3)}
    before = Model(inputs, (conv("y", "x", np.eye(2, dtype="float32")[:, :, None]),), ("y",))
    after = before.edited("y", w=before.steps[0].weights["w"] * value)
    (found,) = measured(before, after).results
    assert found.verdict is Verdict.REFUTED
    assert not found.finite_alike
    assert measured(after, after).results[0].finite_alike


def test_a_model_that_does_not_run_where_the_original_does_is_refuted() -> None:
    """At another size, which the graph says is free."""
    inputs = {"x": (None, 2, None)}
    before = Model(inputs, (conv("c", "x", np.ones((1, 2, 1), "float32")),), ("c",))
    after = Model(inputs, (conv("c", "x", np.ones((1, 2, 3), "float32")),), ("c",))
    found = measured(before, after, "sizes of 1")
    assert "does not run on what the original runs on" in found.results[0].sentence
    assert check(before, after).verdict is Verdict.REFUTED
    # The other way round nothing can be compared there, and the certificate says so.
    assert measured(after, before, "sizes of 1").skipped
    assert "inputs sizes of 1: the original does not run" in check(after, after).notes


def test_an_original_that_does_not_run_at_its_own_size_is_an_error() -> None:
    class Broken(type(FRONTEND)):  # type: ignore[misc]
        def run(self, *_: Any, **__: Any) -> Any:
            raise InputError("it does not run")

    model = stack(np.random.default_rng(0), blocks=1)
    one, two = FRONTEND.lift(model.before), FRONTEND.lift(model.after)
    chosen = sets_of(one.graph)[0]
    with pytest.raises(InputError, match="does not run"):
        measure(Broken(), one, two, [chosen], proved=True)


def test_a_tensor_of_whole_numbers_is_never_scaled() -> None:
    found = FRONTEND.lift(Model({"x": (None, 3)}, (step("y", "relu", "x"),), ("y",)))
    values = {"x": replace(found.graph.values["x"], dtype="int32"), "y": found.graph.values["y"]}
    graph = replace(found.graph, values=values)
    made = sets_of(graph)
    assert [(s.name, len(s.arrays[0])) for s in made] == [("normal", 1), ("batch of 3", 3)]
    assert "whole numbers only" in list(left_out(graph))[-1]
    assert all(set(np.unique(s.arrays[0])) <= {0, 1} for s in made)


@pytest.mark.parametrize("shape", [(), (None,), (3,), (None, 2)])
def test_inputs_of_few_axes_are_measured_on_too(shape: tuple[int | None, ...]) -> None:
    graph = FRONTEND.lift(Model({"x": shape}, (step("y", "relu", "x"),), ("y",))).graph
    made = {found.name: found.arrays[0] for found in sets_of(graph)}
    assert made["one in a corner"].shape == made["zeros"].shape
    assert np.count_nonzero(made["one in a corner"]) == max(int(np.prod(made["zeros"].shape[:1])), 1)
