"""State dicts from every form to every other, against formulas written out in float64."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensor_files import literal, weights

import refold
from refold.checkpoints import FORMS
from refold.errors import InputError
from refold.weights import METHODS, NUMPY, method

NORMS = ("torch", "torch-legacy", "refold", "paddle", "tf-addons")
U32 = 2.0**-24


def state_in(form: str, v: Any, g: Any, name: str = "net.weight", axis: int = 0) -> dict[str, Any]:
    """The weight with these rows, stored along ``axis`` of a matrix, as the library of that form stores it."""
    stored = v if axis == 0 else np.ascontiguousarray(v.T)
    kept = g if axis == 0 else g.T
    owner, _, leaf = name.rpartition(".")
    inside = f"{owner}.parametrizations.{leaf}."
    match form:
        case "torch":
            return {f"{inside}original0": kept, f"{inside}original1": stored}
        case "torch-legacy":
            return {f"{name}_g": kept, f"{name}_v": stored}
        case "refold":
            return {f"{inside}original0": stored, f"{inside}original1": g.reshape(-1)}
        case "paddle":
            return {f"{name}_v": stored, f"{name}_g": g.reshape(-1)}
        case _:
            assert axis == 1
            return {"d/kernel:0": stored, "d/g:0": g.reshape(-1), "d/initialized:0": np.array(True)}


def one_rounding(got: Any, exact: Any, unit: float = U32) -> None:
    """Each number is the exact one rounded once (and float64's own rounding, which is far below)."""
    subnormal = 2.0**-25 if got.dtype == np.float16 else 0.0
    assert np.all(np.abs(got.astype("float64") - exact) <= unit * 1.0001 * np.abs(exact) + subnormal)


@pytest.mark.parametrize(
    ("form", "axis"), [*itertools.product(NORMS[:4], (0, 1)), ("tf-addons", 1)], ids=lambda value: str(value)
)
def test_plain_weights_are_the_formula_rounded_once(form: str, axis: int) -> None:
    v, g = weights(0, 5, 7)
    state = state_in(form, v, g, axis=axis) | {"net.bias": np.arange(5.0)}
    before = {name: array.copy() for name, array in state.items()}
    plain = refold.convert_state(state, method="unit" if form == "refold" else None)
    name = "d/kernel:0" if form == "tf-addons" else "net.weight"
    assert set(plain) == {name, "net.bias"}
    assert plain[name].dtype == np.float32
    one_rounding(plain[name] if axis == 0 else plain[name].T, literal(v, g))
    assert all(np.array_equal(state[key], before[key]) for key in state)


@pytest.mark.parametrize(("source", "to"), list(itertools.permutations(NORMS[:4], 2)))
def test_the_same_norm_under_other_names_is_the_same_numbers(source: str, to: str) -> None:
    v, g = weights(1, 5, 7)
    state = state_in(source, v, g)
    other = refold.convert_state(state, to, method="unit" if source == "refold" else None)
    wanted = state_in(to, v, g)
    assert set(other) == set(wanted)
    for name, array in other.items():
        assert array.shape == wanted[name].shape
        assert np.array_equal(array, wanted[name])
    back = refold.convert_state(other, source, method="unit" if to == "refold" else None)
    assert all(np.array_equal(back[name], array) for name, array in state.items())


@pytest.mark.parametrize("to", NORMS)
def test_plain_weights_are_taken_apart_and_back(to: str) -> None:
    v, _ = weights(2, 5, 7)
    axis, name = (1, "d/kernel:0") if to == "tf-addons" else (0, "net.weight")
    state = {name: v.T.copy() if axis else v, "other": np.ones((3, 3), "float32"), "norm": np.ones(5, "float32")}
    taken = refold.convert_state(state, to, axes=[f"*weight={axis}", f"*kernel:0={axis}", "norm=0"])
    sizes = np.sqrt((v.astype("float64") ** 2).sum(1))
    (gain,) = (array for key, array in taken.items() if array.size == 5 and key != "norm")
    one_rounding(gain.reshape(-1), sizes)
    assert np.array_equal(taken["other"], state["other"])
    assert np.array_equal(taken["norm"], state["norm"])
    back = refold.convert_state(taken, method="unit" if to == "refold" else None)
    np.testing.assert_allclose(back[name], state[name], rtol=2 * 2.0**-23)
    assert set(back) == set(state)


@pytest.mark.parametrize("name", METHODS)
def test_all_methods_of_refold(name: str) -> None:
    v, _ = weights(3, 4, 9)
    taken = refold.convert_state({"a.weight": v}, "refold", axes=["a.weight=0"], method=name)
    assert np.array_equal(taken["a.parametrizations.weight.original0"], v)
    assert ("a.parametrizations.weight.original2" in taken) == method(name).centered
    back = refold.convert_state(taken, method=name)["a.weight"]
    np.testing.assert_allclose(back, v, rtol=1e-5, atol=1e-6)
    # and by the formula, for parts that are not those of attaching
    taken["a.parametrizations.weight.original1"] = np.array([1.0, -2.0, 0.5, 3.0], "float32")
    gain = np.array([[1.0], [-2.0], [0.5], [3.0]])
    offset = taken.get("a.parametrizations.weight.original2")
    column = None if offset is None else offset.astype("float64")[:, None]
    wanted = method(name).compose(NUMPY, v.astype("float64"), gain, column)
    np.testing.assert_allclose(refold.convert_state(taken, method=name)["a.weight"], wanted, rtol=1e-6, atol=1e-7)


def test_from_one_method_to_another_library_goes_through_the_weight() -> None:
    v, _ = weights(4, 4, 9)
    layer = refold.convert_state({"a.weight": v}, "refold", axes=["a.weight=0"], method="layer")
    layer["a.parametrizations.weight.original1"] *= np.float32(1.5)
    plain = refold.convert_state(layer, method="layer")["a.weight"]
    torch = refold.convert_state(layer, "torch", method="layer")
    assert np.array_equal(torch["a.parametrizations.weight.original1"], plain)
    np.testing.assert_allclose(refold.convert_state(torch)["a.weight"], plain, rtol=2e-7)


@pytest.mark.parametrize(
    ("dtype", "unit"),
    [("float64", 2.0**-50), ("float32", U32), ("float16", 2.0**-11), (ml_dtypes.bfloat16, 2.0**-8)],
)
def test_types_stay_and_half_types_are_rounded_once(dtype: Any, unit: float) -> None:
    v, g = weights(5, 6, 40)
    v, g = v.astype(dtype), g.astype(dtype)
    plain = refold.convert_state({"w.weight_v": v, "w.weight_g": g})["w.weight"]
    assert plain.dtype == np.dtype(dtype)
    one_rounding(plain, literal(v, g), unit)
    taken = refold.convert_state({"w.weight": v}, "torch", axes=["*=0"])
    gain = taken["w.parametrizations.weight.original0"]
    assert gain.dtype == (np.float64 if dtype == "float64" else np.float32)
    back = refold.convert_state(taken)["w.weight"]
    if unit > U32:  # a gain in float32 is enough for every bit of a half type
        assert np.array_equal(back, v)


@given(st.integers(0, 10**6))
def test_any_axes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(size) for size in rng.integers(1, 5, rng.integers(2, 6)))
    axis = int(rng.integers(len(shape)))
    v = rng.normal(size=shape).astype("float32")
    g = rng.normal(size=[size if place == axis else 1 for place, size in enumerate(shape)]).astype("float32")
    plain = refold.convert_state({"weight_v": v, "weight_g": g})["weight"]
    wide = v.astype("float64")
    others = tuple(place for place in range(len(shape)) if place != axis)
    one_rounding(plain, g * wide / np.sqrt((wide**2).sum(others, keepdims=True)))


def test_one_norm_for_the_whole_weight() -> None:
    v, _ = weights(6, 4, 5)
    state = {"weight_v": v, "weight_g": np.float32(3.0).reshape(())}
    plain = refold.convert_state(state)["weight"]
    one_rounding(plain, 3.0 * v.astype("float64") / np.sqrt((v.astype("float64") ** 2).sum()))
    assert refold.convert_state({"weight": v}, "torch", axes=["weight=none"])[
        "parametrizations.weight.original0"
    ].shape == ()  # fmt: skip


def test_units_of_grouped_transposed_convolutions() -> None:
    """Of shape (in, out/groups, taps): a unit sums over the inputs of its group."""
    rng = np.random.default_rng(0)
    v = rng.normal(size=(6, 2, 3)).astype("float32")  # 3 groups, 6 outputs
    taken = refold.convert_state({"up.weight": v}, "refold", axes=["up.weight=1/3"])
    gain = taken["up.parametrizations.weight.original1"]
    wide = v.astype("float64").reshape(3, 2, 2, 3)
    one_rounding(gain, np.sqrt((wide**2).sum((1, 3))).reshape(-1))
    gain *= np.arange(1.0, 7.0, dtype="float32")
    plain = refold.convert_state(taken, method="unit", axes=["up.weight=1/3"])["up.weight"]
    factors = np.arange(1.0, 7.0).reshape(3, 1, 2, 1)
    np.testing.assert_allclose(plain, (wide * factors).reshape(6, 2, 3), rtol=3e-7)


@pytest.mark.parametrize("row", [0.0, 1e-30, 1e30, 1e-44])
def test_rows_of_any_size(row: float) -> None:
    v = np.full((2, 4), row, "float32")
    v[1] = 1.0
    plain = refold.convert_state({"weight_v": v, "weight_g": np.ones((2, 1), "float32")})["weight"]
    assert np.array_equal(plain[0], np.full(4, 0.5 if row else 0.0, "float32"))
    taken = refold.convert_state({"weight": v}, "torch", axes=["weight=0"])
    assert np.array_equal(refold.convert_state(taken)["weight"], v)


def test_rows_of_float64_beyond_its_squares() -> None:
    v = np.array([[3e200, 4e200], [3e-200, 4e-200]])
    plain = refold.convert_state({"weight_v": v, "weight_g": np.ones((2, 1))})["weight"]
    np.testing.assert_allclose(plain, [[0.6, 0.8], [0.6, 0.8]], rtol=1e-15)


def test_floors_of_other_libraries() -> None:
    """TensorFlow Addons divides by 1e-6, and Paddle by 1e-12, where a row is shorter."""
    v = np.array([[3e-8, 4e-8], [3e-15, 4e-15], [3.0, 4.0]])
    g = np.array([1.0, 1.0, 2.0])
    addons = {"d/kernel:0": v.T.copy(), "d/g:0": g, "d/initialized:0": np.array(True)}
    wanted = v / np.array([[1e-6], [1e-6], [2.5]])
    np.testing.assert_allclose(refold.convert_state(addons)["d/kernel:0"], wanted.T, rtol=1e-14)
    paddle = {"weight_v": v, "weight_g": g}
    wanted = v / np.array([[5e-8], [1e-12], [2.5]])
    np.testing.assert_allclose(refold.convert_state(paddle)["weight"], wanted, rtol=1e-14)
    # Under other names it is still the same weight: the gain takes the difference, and only where there is one.
    torch = refold.convert_state(paddle, "torch")
    np.testing.assert_allclose(refold.convert_state(torch)["weight"], wanted, rtol=1e-14)
    gain = torch["parametrizations.weight.original0"].reshape(-1)
    assert [gain[0], gain[2]] == [1.0, 2.0]
    assert gain[1] == pytest.approx(5e-3, rel=1e-12)


# ---- spectral normalization --------------------------------------------------------------------------


def spectral_state(axis: int = 0) -> tuple[dict[str, Any], Any]:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 4, 2)).astype("float32")
    matrix = np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1).astype("float64")
    u, v = (rng.normal(size=size).astype("float32") for size in matrix.shape)
    sigma = u.astype("float64") @ matrix @ v.astype("float64")
    return {"c.weight_orig": w, "c.weight_u": u, "c.weight_v": v}, w / sigma


@pytest.mark.parametrize("axis", [0, 1])
def test_spectral_normalization_is_what_its_state_says(axis: int) -> None:
    state, exact = spectral_state(axis)
    one_rounding(refold.convert_state(state)["c.weight"], exact)
    new = refold.convert_state(state, "spectral")
    inside = "c.parametrizations.weight."
    assert set(new) == {f"{inside}original", f"{inside}0._u", f"{inside}0._v"}
    one_rounding(refold.convert_state(new)["c.weight"], exact)
    old = refold.convert_state(new, "spectral-legacy")
    assert all(np.array_equal(old[name], array) for name, array in state.items())


# ---- what is refused ---------------------------------------------------------------------------------

V, G = weights(0, 4, 4)
CUBE = np.ones((4, 4, 3), "float32")
REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a square that says nothing": (
        {"a.weight_v": V, "a.weight_g": G.reshape(-1)}, {}, "does not say which axis.*--axis 'a.weight=0'"
    ),
    "a convolution, or a transposed one": (
        {"a.weight_v": CUBE, "a.weight_g": np.ones((4, 1, 1), "float32")}, {"to": "refold"},
        "does not say which axis",
    ),
    "units that only a model says": (
        {"a.weight": V}, {"to": "torch", "axes": ["*=auto"]}, "'auto' is for models of Keras"
    ),
    "a method that names do not say": (
        {"a.parametrizations.weight.original0": V, "a.parametrizations.weight.original1": G.reshape(-1)},
        {"axes": ["*=0"]}, "pass --method unit",
    ),
    "an offset without a method": (
        {"a.weight_v": V, "a.weight_g": G.reshape(-1), "a.weight_offset": G.reshape(-1)}, {"axes": ["*=0"]},
        "has an offset",
    ),
    "a gain that does not fit": (
        {"a.weight_v": V, "a.weight_g": np.ones((3, 1), "float32")}, {}, r"gain of shape \[3, 1\] does not fit"
    ),
    "a gain along two units": (
        {"a.weight_v": V, "a.weight_g": np.ones(3, "float32")}, {}, "does not fit"
    ),
    "an axis that has other units": (
        {"a.weight_v": V[:, :3], "a.weight_g": G.reshape(-1)}, {"axes": ["*=1"]}, "has 4 units, and 3 lie"
    ),
    "an axis that is none": ({"a.weight": V}, {"to": "torch", "axes": ["*=7"]}, "has no axes"),
    "another parametrization": (
        {"a.parametrizations.weight.original": V, "a.parametrizations.weight.0.base": V}, {},
        "leave this weight as it",
    ),
    "two parametrizations": (
        {"a.parametrizations.weight.original0": G, "a.parametrizations.weight.original1": V,
         "a.parametrizations.weight.1._u": V[0]}, {}, "formula a checkpoint does not say",
    ),
    "integers": ({"a.weight_v": V.astype("int64"), "a.weight_g": G}, {}, "stored as I64"),
    "an endless number": ({"a.weight_v": np.full((4, 4), np.inf, "float32"), "a.weight_g": G}, {}, "not finite"),
    "an endless gain": ({"a.weight_v": V, "a.weight_g": np.full((4, 1), np.nan, "float32")}, {}, "not finite"),
    "a result that its type cannot hold": (
        {"a.weight_v": np.eye(4, dtype="float16"), "a.weight_g": np.full((4, 1), 1e6, "float32")}, {}, "cannot hold"
    ),
    "a name that is taken": (
        {"a.weight_v": V, "a.weight_g": G, "a.weight": V}, {},
        "two tensors of the result would be called 'a.weight'",
    ),
    "no numbers": ({"a.weight_v": V[:, :0], "a.weight_g": G}, {}, "no numbers at all"),
    "spectral from plain": ({"a.weight": V}, {"to": "spectral", "axes": ["*=0"]}, "no exact way"),
    "spectral to a norm": (spectral_state()[0], {"to": "torch"}, "make it plain first"),
    "spectral vectors of a square": (
        {"a.weight_orig": V, "a.weight_u": V[0], "a.weight_v": V[1]}, {}, "does not say which axis"
    ),
    "spectral vectors that do not fit": (
        {"a.weight_orig": V, "a.weight_u": V[0], "a.weight_v": V[1, :3]}, {}, "do not fit"
    ),
    "spectral vectors of zeros": (
        {"a.weight_orig": V, "a.weight_u": 0 * V[0], "a.weight_v": V[1]}, {"axes": ["*=0"]}, "divides nothing"
    ),
    "a gain that is not set yet": (
        {"d/kernel:0": V, "d/g:0": V[0], "d/initialized:0": np.array(False)}, {}, "sets its gain at the first call"
    ),
    "Addons' units elsewhere": ({"d/kernel:0": V}, {"to": "tf-addons", "axes": ["*=0"]}, "on the last axis"),
    "Addons' names from others": ({"a.weight": V}, {"to": "tf-addons", "axes": ["*=1"]}, "names end in"),
    "groups of something else": ({"a.weight": V}, {"to": "refold", "axes": ["*=0/2"]}, "groups are for weights"),
    "groups in torch's form": ({"a.weight": V}, {"to": "torch", "axes": ["*=1/2"]}, "lie on several axes"),
    "a pattern without an axis": ({"a.weight": V}, {"to": "torch", "axes": ["*"]}, "does not say an axis"),
    "an unknown form": ({"a.weight": V}, {"to": "safetensors"}, "no form 'safetensors'"),
    "an unknown method": ({"a.weight": V}, {"method": "magic"}, "no weight normalization named"),
    "an epsilon of nothing": ({"a.weight": V}, {"epsilon": 1.0}, "say which"),
    "words": ({"a.weight": np.array(["x"])}, {}, "no array of numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    state, options, sentence = REFUSALS[case]
    with pytest.raises(InputError, match=sentence) as caught:
        refold.convert_state(state, **options)
    assert str(caught.value).isprintable()


def test_what_is_skipped_stays() -> None:
    state = {"a.weight_v": V, "a.weight_g": G, "b.weight_v": V, "b.weight_g": G}
    plain = refold.convert_state(state, skip=["b.*"])
    assert set(plain) == {"a.weight", "b.weight_v", "b.weight_g"}


def test_two_parameters_of_a_users_own_are_not_taken_for_a_weight() -> None:
    state = {"attention.proj_v": V, "attention.proj_g": G}
    assert set(refold.convert_state(state)) == set(state)


def test_every_form_stays_as_it_is_when_it_is_the_one_that_is_asked_for() -> None:
    for form in FORMS:
        states = {**spectral_state()[0]} if form == "spectral-legacy" else {}
        if form in NORMS:
            states |= state_in(form, V, G, axis=1)
        kept = refold.convert_state(states, form)
        assert all(np.array_equal(kept[name], array) for name, array in states.items())
