"""What a conversion does with each tensor, decided from names, types and shapes alone: no number is read here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import final

from refold.checkpoints.dtypes import WEIGHTS, Spec, wide_code
from refold.checkpoints.formulas import Formula
from refold.checkpoints.naming import SPECTRAL, Form, Stored, find_stored, part_names
from refold.checkpoints.units import Choice, Units, chosen, units_counted, units_kept
from refold.errors import InputError
from refold.shown import printable
from refold.weights import LowRank, Normalization, Orthogonal, Rows, Spectral, Unit

# What these libraries divide a row by where it is shorter (TensorFlow: the root of 1e-12).
_FLOORS = {Form.PADDLE: 1e-12, Form.ADDONS: 1e-6}


@final
@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asks for.

    ``choices`` say the axes of the output units, and which plain weights are to be reparameterized; ``skip`` are
    patterns of names that stay as they are; ``method`` is the normalization of weights in refold's form.
    """

    to: Form = Form.PLAIN
    choices: Sequence[Choice] = ()
    skip: Sequence[str] = ()
    method: Normalization | None = None


# Each step has a ``home``: the tensor of the source into whose file, of several, its results go.


@final
@dataclass(frozen=True, slots=True)
class Copy:
    """The bytes of a tensor under another name, perhaps in another shape."""

    source: str
    target: str
    home: str


@final
@dataclass(frozen=True, slots=True)
class Constant:
    """A small tensor that is new."""

    data: bytes
    target: str
    home: str


@final
@dataclass(frozen=True, slots=True)
class Rebuild:
    """Rows computed from rows.

    The weight is computed from the parts of ``stored`` by ``source`` (None: it is plain), and taken apart again
    by ``goal`` (None: it stays plain). ``source_rows`` and ``goal_rows`` say the units of both. ``targets`` are the
    names of what is written, by role; without a ``direction`` among them the stored direction stays (another step
    copies it).
    """

    stored: Stored
    source: Formula | None
    goal: Formula | None
    source_rows: Rows
    goal_rows: Rows
    targets: Mapping[str, str]

    @property
    def home(self) -> str:
        """The direction."""
        return self.stored.parts["direction"]


@final
@dataclass(frozen=True, slots=True)
class Unspectral:
    """A weight over the singular value that its stored vectors give it."""

    stored: Stored
    axis: int
    target: str

    @property
    def home(self) -> str:
        """The weight as it is stored."""
        return self.stored.parts["direction"]


MatrixMethod = Spectral | Orthogonal | LowRank


@final
@dataclass(frozen=True, slots=True)
class Compose:
    """A weight that a method makes of whole matrices: ``stored`` has a ``direction``, in the shape of the weight,
    and the method's own parts."""

    stored: Stored
    method: MatrixMethod
    rows: Rows
    target: str

    @property
    def home(self) -> str:
        """The weight as it is stored."""
        return self.stored.parts["direction"]


Step = Copy | Constant | Rebuild | Unspectral | Compose


def made_by(step: Step) -> tuple[str, ...]:
    """The tensors that a step writes."""
    return tuple(step.targets.values()) if isinstance(step, Rebuild) else (step.target,)


@final
@dataclass(frozen=True, slots=True)
class Converted:
    """One weight of a conversion: from which form to which, and how many output units it has (None: not known
    or not needed)."""

    name: str
    source: Form
    to: Form
    units: int | None


@final
@dataclass(slots=True)
class Plan:
    """The steps of a conversion and what they make; ``kept`` tensors of no weight that changes its form stay."""

    to: Form
    steps: list[Step] = field(default_factory=list)
    specs: dict[str, Spec] = field(default_factory=dict)
    converted: list[Converted] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    kept: int = 0

    def add(self, step: Step, specs: Mapping[str, Spec]) -> None:
        """One more step, and the tensors that it makes. Raises InputError if one is there already."""
        for name in specs:
            if name in self.specs:
                raise InputError(f"two tensors of the result would be called '{printable(name)}'")
        self.steps.append(step)
        self.specs.update(specs)


def make_plan(specs: Mapping[str, Spec], wish: Wish) -> Plan:
    """How tensors of these names, types and shapes become the form that is wished for.

    Raises:
        InputError: something about a weight is not known, or its form cannot become the other exactly.
    """
    if any(choice.units.usual for choice in wish.choices):
        raise InputError("'auto' is for models of Keras, whose layers say their units: write the axis")
    plan = Plan(wish.to)
    seen = {name: spec for name, spec in specs.items() if not _matches(name, wish.skip)}
    found = find_stored({name: spec.shape for name, spec in seen.items()})
    found = [stored for stored in found if not _matches(stored.name, wish.skip)]
    by_direction = {stored.parts["direction"]: stored for stored in found}
    taken = {name for stored in found for name in (*stored.parts.values(), *stored.unneeded)}
    for name, spec in specs.items():
        if stored := by_direction.get(name):
            _convert(plan, stored, specs, wish)
        elif name not in taken:
            units = chosen(wish.choices, name) if name in seen and wish.to is not Form.PLAIN else None
            # A vector is no weight with several inputs per unit; what is not real has no norm.
            if units is None or len(spec.shape) < 2 or spec.dtype not in WEIGHTS:
                plan.add(Copy(name, name, name), {name: spec})
                plan.kept += 1
            else:
                _convert(plan, Stored(Form.PLAIN, name, {"direction": name}), specs, wish)
    return plan


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _convert(plan: Plan, stored: Stored, specs: Mapping[str, Spec], wish: Wish) -> None:
    if stored.form is wish.to:
        for name in (*stored.parts.values(), *stored.unneeded):
            plan.kept += 1
            plan.add(Copy(name, name, stored.parts["direction"]), {name: specs[name]})
        return
    spec = specs[stored.parts["direction"]]
    shown = f"'{printable(stored.name)}'"
    if spec.dtype not in WEIGHTS:
        raise InputError(f"{shown} is stored as {spec.dtype}, which no weight with a norm is; leave it with --skip")
    if not spec.count:
        raise InputError(f"{shown} has no numbers at all; leave it with --skip")
    for name in stored.parts.values():
        if name != stored.parts.get("initialized") and specs[name].dtype not in WEIGHTS:
            raise InputError(f"'{printable(name)}' is stored as {specs[name].dtype}; leave {shown} with --skip")
    if stored.form in SPECTRAL or wish.to in SPECTRAL:
        units = _convert_spectral(plan, stored, specs, wish, shown)
    else:
        units = _convert_rows(plan, stored, specs, wish, shown)
    plan.converted.append(Converted(stored.name, stored.form, wish.to, units))


# ---- weights with a norm per row ---------------------------------------------------------------------


def _convert_rows(plan: Plan, stored: Stored, specs: Mapping[str, Spec], wish: Wish, shown: str) -> int:
    spec = specs[stored.parts["direction"]]
    wanted = chosen(wish.choices, stored.name)
    own = _own_units(stored, specs, wanted, shown)
    goal = wanted or own
    if wish.to is Form.REFOLD and wanted is None:
        _refuse_two_readings(spec.shape, own, shown)
    source_rows, goal_rows = own.rows(spec.shape, shown), goal.rows(spec.shape, shown)
    source, target = _formula(stored, wish.method, own), _goal_formula(wish, goal)
    names = part_names(wish.to, stored.name)
    if target is None:
        plan.add(
            Rebuild(stored, source, None, source_rows, goal_rows, {"direction": names["direction"]}),
            {names["direction"]: spec},
        )
        plan.dropped += _rest(stored, specs)
        return source_rows.units
    gain_shape = _gain_shape(wish.to, spec.shape, goal, goal_rows, shown)
    gain = Spec(wide_code(spec.dtype), gain_shape)
    same_rows = source_rows == goal_rows
    if source == target and same_rows and "offset" not in stored.parts.keys() - names.keys():
        _rename(plan, stored, specs, names, gain_shape)
        _initialize(plan, wish.to, names, stored)
        return goal_rows.units
    keeps_direction = source is None or (
        source.is_a_norm and target.is_a_norm and same_rows and "offset" not in stored.parts
    )
    if keeps_direction:
        direction = stored.parts["direction"]
        plan.add(Copy(direction, names["direction"], direction), {names["direction"]: spec})
        if "gain" in stored.parts:
            gain = Spec(specs[stored.parts["gain"]].dtype, gain_shape)
    made = {names["gain"]: gain}
    targets = {"gain": names["gain"]}
    if not keeps_direction:
        targets["direction"] = names["direction"]
        made[names["direction"]] = spec
    if target.method.centered:
        targets["offset"] = names["offset"]
        made[names["offset"]] = Spec(wide_code(spec.dtype), (goal_rows.units,))
    plan.add(Rebuild(stored, source, target, source_rows, goal_rows, targets), made)
    _initialize(plan, wish.to, names, stored)
    return goal_rows.units


def _rename(
    plan: Plan,
    stored: Stored,
    specs: Mapping[str, Spec],
    names: Mapping[str, str],
    gain_shape: tuple[int, ...],
) -> None:
    """The same numbers under other names."""
    for role in ("direction", "gain", "offset"):
        if role in stored.parts:
            spec = specs[stored.parts[role]]
            shape = spec.shape if role == "direction" else gain_shape
            copy = Copy(stored.parts[role], names[role], stored.parts["direction"])
            plan.add(copy, {names[role]: Spec(spec.dtype, shape)})


def _own_units(stored: Stored, specs: Mapping[str, Spec], wanted: Units | None, shown: str) -> Units:
    """The units over which the stored parts are meant: what the gain says, or else what the user says."""
    spec = specs[stored.parts["direction"]]
    if stored.form is Form.PLAIN:
        assert wanted is not None  # or it would stay as it is
        return wanted
    if len(spec.shape) < 2:
        raise InputError(f"{shown} has {len(spec.shape)} axes, and a weight with a norm per unit has two or more")
    if "gain" not in stored.parts:
        raise InputError(f"{shown} has a direction and no gain; fold the model itself (refold.fold)")
    gain = specs[stored.parts["gain"]].shape
    for role in ("gain", "offset"):
        if role in stored.parts and specs[stored.parts[role]].shape != gain:
            raise InputError(f"{shown}: its gain and its offset have not the same shape")
    misfit = InputError(f"{shown}: a gain of shape {list(gain)} does not fit a weight of shape {list(spec.shape)}")
    if stored.form is Form.ADDONS:
        if gain != spec.shape[-1:]:
            raise misfit
        return Units((len(spec.shape) - 1,))
    if stored.form in (Form.TORCH, Form.TORCH_LEGACY):
        kept = units_kept(spec.shape, gain)
        if kept is None:
            raise misfit
        return kept
    if len(gain) > 1:
        raise misfit
    readings = units_counted(spec.shape, gain[0] if gain else 1, grouped=stored.form is Form.REFOLD)
    if wanted is not None:
        rows = wanted.rows(spec.shape, shown)
        if rows.units != (gain[0] if gain else 1):
            raise InputError(
                f"{shown}: its gain has {gain[0]} units, and {rows.units} lie on the axis that was given"
            )
        return wanted
    if not readings:
        raise misfit
    if len(readings) > 1:
        raise _ask(shown, spec.shape)
    return readings[0]


def _refuse_two_readings(shape: tuple[int, ...], units: Units, shown: str) -> None:
    """Whether refold's layer for a transposed convolution would take these units for others, without a word."""
    if units.axes and len(units_counted(shape, shape[units.axes[0]], grouped=True)) > 1 and len(shape) > 2:
        raise _ask(shown, shape)


def _ask(shown: str, shape: tuple[int, ...]) -> InputError:
    return InputError(
        f"{shown}: its shape {list(shape)} does not say which axis numbers the output units; say it, such as "
        f"--axis {shown[:-1]}=0' for a layer or --axis {shown[:-1]}=1' for a transposed convolution of torch"
    )


def _formula(stored: Stored, method: Normalization | None, units: Units) -> Formula | None:
    match stored.form:
        case Form.PLAIN:
            return None
        case Form.REFOLD | Form.PADDLE if method is not None:
            return Formula(method)
        case Form.REFOLD:
            raise InputError(
                f"'{printable(stored.name)}' is stored as refold stores it, and names do not say by which "
                "normalization: pass --method unit, or the name that it was attached with"
            )
        case Form.PADDLE if "offset" in stored.parts:
            raise InputError(
                f"'{printable(stored.name)}' has an offset, and names do not say by which normalization: pass "
                "--method with the name that it was attached with"
            )
        case Form.PADDLE if not units.axes:
            return Formula(Unit(epsilon=1e-12))
        case form:
            return Formula(floor=_FLOORS.get(form, 0.0))


def _goal_formula(wish: Wish, units: Units) -> Formula | None:
    match wish.to:
        case Form.PLAIN:
            return None
        case Form.REFOLD:
            return Formula(wish.method or Unit())
        case Form.PADDLE if wish.method is not None:
            return Formula(wish.method)
        case Form.PADDLE if not units.axes:
            return Formula(Unit(epsilon=1e-12))
        case form:
            return Formula(floor=_FLOORS.get(form, 0.0))


def _gain_shape(form: Form, shape: tuple[int, ...], units: Units, rows: Rows, shown: str) -> tuple[int, ...]:
    """The shape of a gain in a form. Raises InputError if the form has none for such units."""
    axes = tuple(axis % len(shape) for axis in units.axes)
    if form is Form.REFOLD:
        return (rows.units,)
    if units.groups > 1 or len(axes) > 1:
        raise InputError(
            f"{shown}: its output units lie on several axes, and {form.value} has one; choose refold, or plain"
        )
    if form is Form.ADDONS and axes != (len(shape) - 1,):
        raise InputError(f"{shown}: TensorFlow Addons has its units on the last axis, not on {list(axes)}")
    if form in (Form.TORCH, Form.TORCH_LEGACY):
        return tuple(size if axis in axes else 1 for axis, size in enumerate(shape)) if axes else ()
    return (rows.units,) if axes else ()


def _initialize(plan: Plan, form: Form, names: Mapping[str, str], stored: Stored) -> None:
    """Addons' flag, without which it would compute the gain anew at the first call."""
    if form is Form.ADDONS:
        flag = Constant(b"\1", names["initialized"], stored.parts["direction"])
        plan.add(flag, {names["initialized"]: Spec("BOOL", ())})


def _rest(stored: Stored, specs: Mapping[str, Spec]) -> list[str]:
    gone = [*(name for role, name in stored.parts.items() if role != "direction"), *stored.unneeded]
    return [name for name in gone if name in specs]


# ---- spectral normalization --------------------------------------------------------------------------


def _convert_spectral(plan: Plan, stored: Stored, specs: Mapping[str, Spec], wish: Wish, shown: str) -> int | None:
    names = part_names(wish.to, stored.name)
    if stored.form not in SPECTRAL:
        raise InputError(
            f"{shown}: no weight is the spectral normalization of itself unless its largest singular value is 1, "
            "so there is no exact way to that form"
        )
    if wish.to in SPECTRAL:
        for role, name in stored.parts.items():
            plan.add(Copy(name, names[role], stored.parts["direction"]), {names[role]: specs[name]})
        return None
    if wish.to is not Form.PLAIN:
        raise InputError(
            f"{shown} is stored with spectral normalization; make it plain first, and then {wish.to.value}"
        )
    spec = specs[stored.parts["direction"]]
    axis = _spectral_axis(stored, specs, chosen(wish.choices, stored.name), shown)
    plan.add(Unspectral(stored, axis, stored.name), {stored.name: spec})
    plan.dropped += _rest(stored, specs)
    return spec.shape[axis]


def _spectral_axis(stored: Stored, specs: Mapping[str, Spec], wanted: Units | None, shown: str) -> int:
    """The axis that is moved to the front to make a matrix of the weight."""
    spec = specs[stored.parts["direction"]]
    left, right = (specs[stored.parts[role]].shape for role in ("left", "right"))
    fits = [axis for axis, size in enumerate(spec.shape) if left == (size,) and right == (spec.count // size,)]
    if wanted is not None:
        fits = [axis for axis in fits if wanted.axes in ((axis,), (axis - len(spec.shape),))]
    if len(spec.shape) < 2 or not fits:
        raise InputError(
            f"{shown}: singular vectors of {list(left)} and {list(right)} do not fit a weight of shape "
            f"{list(spec.shape)}" + ("" if wanted is None else " on the axis that was given")
        )
    if len(fits) > 1:
        raise _ask(shown, spec.shape)
    return fits[0]
