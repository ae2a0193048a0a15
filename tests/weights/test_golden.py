"""numpy against the golden vectors, and their checker against faults. The frameworks' folders have their own."""

import json

import numpy as np
import pytest

from refold.weights import METHODS, NUMPY
from weights import golden, make_golden


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", golden.CASES, ids=str)
def test_numpy(case, dtype):
    arrays = {name: array.astype(dtype) for name, array in case.arrays.items()}
    made = golden.compose(case, NUMPY, arrays)
    assert made.dtype == dtype
    golden.check(case, made, dtype=dtype)


@pytest.mark.parametrize("case", golden.CASES, ids=str)
def test_inputs_are_the_same_numbers_in_every_type(case):
    for name, array in case.arrays.items():
        if name not in ("left", "right"):
            # Two bytes of a float32 are a bfloat16.
            assert not np.any(array.astype("float32").view("uint32") & 0xFFFF), name
            np.testing.assert_array_equal(array.astype("float32"), array)


def test_every_method_has_a_case():
    rows = {type(make()) for make in METHODS.values()}
    assert rows == {type(case.method) for case in golden.ROW_CASES}
    assert len({case.name for case in golden.CASES}) == len(golden.CASES)


def test_the_file_is_what_its_script_writes():
    written = {entry["name"]: entry for entry in json.loads(make_golden.FILE.read_text(encoding="utf-8"))}
    assert list(written) == list(make_golden.CASES)
    for name in ("unit", "dora", "cayley, two rows"):
        assert written[name] == make_golden.CASES[name].entry(name)


@pytest.mark.parametrize(
    "fault", [lambda w: w * (1 + 1e-4), lambda w: w[:, ::-1], lambda w: w * np.nan, lambda w: w[:2]]
)
def test_the_checker_rejects(fault):
    case = golden.CASES[0]
    golden.check(case, case.weight, case.gradients)
    with pytest.raises(AssertionError, match="unit: the weight"):
        golden.check(case, fault(case.weight))
    with pytest.raises(AssertionError, match="unit: the gradient of direction"):
        golden.check(case, case.weight, {**case.gradients, "direction": fault(case.gradients["direction"])})
    with pytest.raises(AssertionError, match="gradients of"):
        golden.check(case, case.weight, {"direction": case.gradients["direction"]})
