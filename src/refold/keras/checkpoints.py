"""Weight-normalized models of Keras 3 in files, made plain or the other way, without making a model of them.

What a layer is, and where its weights lie in the file, is read from the configuration; no class of it is looked up
but Keras' own kinds of layers, and nothing is called. The file is screened as :mod:`refold.keras.files` does it.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, final

import h5py
import keras
import numpy as np

from refold.checkpoints.dtypes import Spec, raw_dtype, wide_code
from refold.checkpoints.formulas import Formula
from refold.checkpoints.hdf import read_hdf
from refold.checkpoints.naming import Form, Stored
from refold.checkpoints.plan import Converted, Copy, Plan, Rebuild, Wish
from refold.checkpoints.run import run
from refold.checkpoints.state import NewArrays
from refold.checkpoints.units import Units, chosen
from refold.errors import InputError
from refold.files import open_regular, write_atomically
from refold.keras.files.archive import METADATA, WEIGHTS, Archive, read_archive
from refold.keras.files.configuration import CONFIG, MAX_DEPTH
from refold.keras.files.refused import RefusedError
from refold.keras.kernels import KernelSpec, specs_of_class
from refold.keras.normalization import method_of
from refold.shown import printable
from refold.weights import METHODS, Normalization, Rows, Unit, method

Json = dict[str, Any]

ARCHIVE, NUMBERS = ".keras", ".weights.h5"
MAX_SIZE = 4 * 2**30
_REGISTERED = "refold>WeightNormalization"
_MODELS = ("Sequential", "Functional", "Model")
# Where a variable lies below its layer, by the path of attributes to it.
_PLACES = {
    "kernel": "vars/0",
    "embeddings": "vars/0",
    "depthwise_kernel": "vars/0",
    "pointwise_kernel": "vars/1",
    "cell.kernel": "cell/vars/0",
    "cell.recurrent_kernel": "cell/vars/1",
}


def convert_model(
    source: Path, target: Path, wish: Wish, *, architecture: Path | None = None, overwrite: bool = False
) -> Plan:
    """A ``.keras`` file converted to another, or a ``.weights.h5`` of the model in the file ``architecture``.

    ``to`` may be plain, or refold: then ``choices`` match the names of layers. The optimizer's state is left out,
    because it belongs to other variables, and so is how the model was compiled.

    Raises:
        InputError: a file cannot be read or written or is not what it must be, or a layer cannot become the other.
    """
    shown = printable(source)
    if wish.to not in (Form.PLAIN, Form.REFOLD):
        raise InputError(f"{shown}: a model of Keras 3 can be made plain or refold, not {wish.to.value}")
    if wish.to is Form.PLAIN and wish.method is not None:
        raise InputError(f"{shown}: a model of Keras says itself by which method; leave --method out")
    ending = ARCHIVE if source.name.endswith(ARCHIVE) else NUMBERS
    if not target.name.endswith(ending):
        raise InputError(f"{printable(target)}: from a {ending} file comes a {ending} file; choose such a name")
    if (ending == ARCHIVE) != (architecture is None):
        raise InputError(f"{shown}: an architecture belongs to {NUMBERS} files, and a {ARCHIVE} file has its own")
    try:
        archive = _archive(architecture or source)
        if ending == ARCHIVE:
            arrays = read_hdf(archive.weights, shown)
        else:
            with open_regular(source, MAX_SIZE) as file:
                arrays = read_hdf(file, shown)
        conversion = _Conversion(archive.config, arrays.specs, wish)
        conversion.decide()
    except RefusedError as refusal:
        raise InputError(f"{shown}: {refusal}") from refusal
    plan = conversion.plan
    made = NewArrays(plan.specs, {name: bytearray(spec.size) for name, spec in plan.specs.items()})
    run(plan.steps, arrays, made)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            if ending == NUMBERS:
                file.write(_hdf(made, conversion.names))
            else:
                _write_archive(file, conversion.config, archive, _hdf(made, conversion.names))

    inputs = [source] if architecture is None else [source, architecture]
    write_atomically(target, write, overwrite=overwrite, inputs=inputs)
    return plan


def _archive(path: Path) -> Archive:
    with open_regular(path, MAX_SIZE) as file:
        return read_archive(file)


# ---- where each layer's weights lie ------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class _Site:
    """A layer of a configuration, and the path below which the file has its weights."""

    entry: Json
    path: str

    @property
    def name(self) -> str:
        """What the user calls it."""
        return str(self.entry["config"].get("name", ""))

    @property
    def is_normalized(self) -> bool:
        return self.entry.get("registered_name") == _REGISTERED


def _sites(entry: Any, path: str = "", depth: int = 0) -> Iterator[_Site]:
    """All layers that hold weights of their own, in the order in which Keras numbers them."""
    if depth > MAX_DEPTH:
        raise RefusedError("its configuration is nested too deeply")
    if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
        raise RefusedError(f"its '{CONFIG}' describes no Keras 3 model")
    kind, config = entry.get("class_name"), entry["config"]
    if kind in _MODELS and isinstance(config.get("layers"), list):
        counts: dict[str, int] = {}
        for layer in config["layers"]:
            if not isinstance(layer, dict):
                raise RefusedError(f"its '{CONFIG}' describes no Keras 3 model")
            word = snake_case(str(layer.get("class_name")))
            counts[word] = counts.get(word, -1) + 1
            numbered = f"{word}_{counts[word]}" if counts[word] else word
            yield from _sites(layer, f"{path}layers/{numbered}/", depth + 1)
    elif kind == "TimeDistributed":
        yield from _sites(config.get("layer"), f"{path}layer/", depth + 1)
    else:
        yield _Site(entry, path)


def snake_case(name: str) -> str:
    """How Keras calls the group of a layer's weights by its class."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _own_classes(config: Any, depth: int = 0) -> Iterator[str]:
    """What is registered for refold anywhere in a configuration."""
    if depth > MAX_DEPTH:
        raise RefusedError("its configuration is nested too deeply")
    if isinstance(config, dict):
        registered = config.get("registered_name")
        if isinstance(registered, str) and registered.startswith("refold>"):
            yield registered.removeprefix("refold>")
    for inner in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from _own_classes(inner, depth + 1)


# ---- what is done to them ----------------------------------------------------------------------------


@final
@dataclass
class _Conversion:
    """The plan while it grows: ``config`` becomes the new model's; ``names`` are those of layers by their paths."""

    config: Json
    specs: Mapping[str, Spec]
    wish: Wish
    plan: Plan = field(init=False)
    names: dict[str, str] = field(default_factory=dict)

    def decide(self) -> None:
        """Go through all layers."""
        self.plan = Plan(self.wish.to)
        before = list(_sites(self.config))
        steps = [(site, *self.rewrite(site)) for site in before]
        # What became of another class changes the numbers of its neighbors.
        after = [site.path for site in _sites(self.config)]
        left = dict.fromkeys(self.specs)
        changed = any(normalized is not None for _, normalized, _ in steps)
        for (site, normalized, inner), new in zip(steps, after, strict=True):
            self.names[new] = site.name
            own = [name for name in self.specs if name.startswith(site.path)]
            for name in own:
                left.pop(name, None)
            if normalized is None:
                self.copy(own, site.path, new)
            elif self.wish.to is Form.PLAIN:
                self.make_plain(site, normalized, inner, own, new)
            else:
                self.make_rich(site, normalized, inner, own, new)
        rest = [name for name in left if not (changed and name.startswith("optimizer/"))]
        self.plan.dropped += [name for name in left if name not in rest]
        self.copy(rest, "", "")
        if changed:
            self.config.pop("compile_config", None)

    def copy(self, names: Sequence[str], old: str, new: str) -> None:
        for name in names:
            target = new + name.removeprefix(old)
            self.plan.add(Copy(name, target, name), {target: self.specs[name]})
            self.plan.kept += 1

    def rewrite(self, site: _Site) -> tuple[Json | None, Json]:
        """Change the configuration of a layer, if it is one to change; gives the options of its normalization (None
        if it stays) and the plain layer's configuration."""
        entry, shown = site.entry, f"the layer '{printable(site.name, 80)}'"
        if any(fnmatchcase(site.name, pattern) for pattern in self.wish.skip):
            return None, entry
        if self.wish.to is Form.REFOLD:
            units = chosen(self.wish.choices, site.name)
            if units is None or site.is_normalized:
                return None, entry
            specs = _kernels(entry, None, shown)
            if len(specs) != 1 or units.groups != 1 or not units.axes:
                raise RefusedError(f"{shown} is not one kernel with units on its axes; wrap it in code")
            plain = {key: value for key, value in entry.items() if key not in ("name", "inbound_nodes")}
            rank = len(self.rows(site.path + _PLACES[specs[0].path], units.axes, shown).shape)
            usual = {axis % rank for axis in specs[0].unit_axes} == {axis % rank for axis in units.axes}
            return self.wrap(entry, plain, None if usual else list(units.axes)), plain
        if not site.is_normalized:
            for inside in _own_classes(entry):
                raise RefusedError(
                    f"{shown} is or holds a {inside}; fold it (refold fold), or leave it with --skip"
                )
            return None, entry
        options, inner = entry["config"], entry["config"].get("layer")
        if not isinstance(inner, dict) or not isinstance(inner.get("config"), dict):
            raise RefusedError(f"{shown} normalizes no layer")
        plain = {**{key: entry[key] for key in ("name", "inbound_nodes") if key in entry}, **inner}
        plain["config"] = {**inner["config"], "name": site.name}
        if options.get("trainable") is False:
            plain["config"]["trainable"] = False
        entry.clear()
        entry.update(plain)
        return options, plain

    def wrap(self, entry: Json, plain: Json, axis: list[int] | None) -> Json:
        chosen_method = self.wish.method or Unit()
        config = plain["config"]
        options: Json = {
            "name": config.get("name"),
            "trainable": config.get("trainable", True),
            "dtype": config.get("dtype"),
            "layer": plain,
            "axis": axis,
            **_method_config(chosen_method),
            "gain": True,
            "offset": chosen_method.centered,
            "force": False,
        }
        around: Json = {key: entry[key] for key in ("name", "inbound_nodes", "build_config") if key in entry}
        entry.clear()
        entry.update(
            {
                "module": "refold.keras.normalization",
                "class_name": "WeightNormalization",
                "config": options,
                "registered_name": _REGISTERED,
                **around,
            }
        )
        return options

    def make_plain(self, site: _Site, options: Json, inner: Json, own: list[str], new: str) -> None:
        shown = f"the layer '{printable(site.name, 80)}'"
        formula = Formula(_method(options, shown))
        places = iter(f"{site.path}vars/{i}" for i in range(len(own) + 1))
        handled = set()
        for spec in _kernels(inner, options.get("axis"), shown):
            parts = {"direction": f"{site.path}layer/{_PLACES[spec.path]}"}
            for role in ("gain", "offset"):
                if options.get(role):
                    parts[role] = next(places)
            rows = self.rows(parts["direction"], spec.unit_axes, shown)
            for role, name in parts.items():
                if name not in self.specs or (role != "direction" and self.specs[name].shape != (rows.units,)):
                    raise RefusedError(f"{shown} has not the weights that its configuration says")
            handled |= set(parts.values())
            target = new + _PLACES[spec.path]
            stored = Stored(Form.REFOLD, self.called(site, spec), parts)
            self.plan.add(
                Rebuild(stored, formula, None, rows, rows, {"direction": target}),
                {target: self.specs[parts["direction"]]},
            )
            self.plan.dropped += [name for role, name in parts.items() if role != "direction"]
            self.plan.converted.append(Converted(stored.name, Form.REFOLD, Form.PLAIN, rows.units))
        others = [name for name in own if name not in handled]
        if not all(name.startswith(f"{site.path}layer/") for name in others):
            raise RefusedError(f"{shown} has not the weights that its configuration says")
        self.copy(others, f"{site.path}layer/", new)

    def make_rich(self, site: _Site, options: Json, inner: Json, own: list[str], new: str) -> None:
        shown = f"the layer '{printable(site.name, 80)}'"
        formula = Formula(self.wish.method or Unit())
        (spec,) = _kernels(inner, options["axis"], shown)
        direction = site.path + _PLACES[spec.path]
        rows = self.rows(direction, spec.unit_axes, shown)
        roles = ["gain", "offset"] if options["offset"] else ["gain"]
        targets = {role: f"{new}vars/{i}" for i, role in enumerate(roles)}
        part = Spec(wide_code(self.specs[direction].dtype), (rows.units,))
        self.copy(own, site.path, f"{new}layer/")
        stored = Stored(Form.PLAIN, self.called(site, spec), {"direction": direction})
        self.plan.add(Rebuild(stored, None, formula, rows, rows, targets), dict.fromkeys(targets.values(), part))
        self.plan.converted.append(Converted(stored.name, Form.PLAIN, Form.REFOLD, rows.units))

    def called(self, site: _Site, spec: KernelSpec) -> str:
        return f"{site.name}.{spec.path}"

    def rows(self, name: str, axes: tuple[int, ...], shown: str) -> Rows:
        if name not in self.specs:
            raise RefusedError(f"{shown} has not the weights that its configuration says")
        try:
            return Units(axes).rows(self.specs[name].shape, shown)
        except InputError as error:
            raise RefusedError(str(error)) from error


def _kernels(entry: Json, axis: Any, shown: str) -> tuple[KernelSpec, ...]:
    """The kernels of a layer by its configuration."""
    kind, config = str(entry.get("class_name")), entry["config"]
    cls = getattr(keras.layers, kind, None) if str(entry.get("module")).startswith("keras.") else None
    specs = specs_of_class(cls, config) if isinstance(cls, type) else ()
    if not specs or any(spec.path not in _PLACES for spec in specs):
        raise RefusedError(
            f"{shown} is a {printable(kind, 60)}, whose weights have no places that are known here; "
            "fold the model (refold fold)"
        )
    if axis is None:
        return specs
    axes = (axis,) if isinstance(axis, int) else axis
    if len(specs) > 1 or not isinstance(axes, list | tuple) or not all(type(a) is int for a in axes):
        raise RefusedError(f"{shown} has an axis that is none")
    return (KernelSpec(specs[0].path, tuple(axes)),)


# ---- methods in configurations -----------------------------------------------------------------------


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float | bool)


def _method(options: Json, shown: str) -> Normalization:
    named, epsilon = options.get("normalizer"), options.get("epsilon")
    try:
        if isinstance(named, str) and isinstance(epsilon, int | float | None):
            return method(named, epsilon)
        if isinstance(named, dict) and "method" in named and all(map(_is_plain, named.values())):
            return method_of(named)
    except (ValueError, TypeError) as error:
        raise RefusedError(f"{shown}: {error}") from error
    raise RefusedError(f"{shown} is normalized by a layer of Keras; fold the model (refold fold)")


def _method_config(chosen_method: Normalization) -> Json:
    """The options that make a layer use a method."""
    for name in METHODS:
        if method(name, chosen_method.epsilon) == chosen_method:
            return {"normalizer": name, "epsilon": chosen_method.epsilon}
    own = {f.name: getattr(chosen_method, f.name) for f in fields(chosen_method)}  # type: ignore[arg-type]  # all methods are dataclasses
    return {"normalizer": {"method": type(chosen_method).__name__, **own}, "epsilon": None}


# ---- writing -----------------------------------------------------------------------------------------


def _hdf(made: NewArrays, names: Mapping[str, str]) -> bytes:
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for name, spec in made.specs.items():
            array = np.frombuffer(made.data[name], raw_dtype(spec.dtype)).reshape(spec.shape)
            file.create_dataset(name, data=array)
            group, _, _ = name.rpartition("/")
            owner = group.removesuffix("vars")
            if owner in names:
                file[group].attrs["name"] = names[owner]
    return content.getvalue()


def _write_archive(file: Any, config: Json, archive: Archive, weights: bytes) -> None:
    members = {
        METADATA: json.dumps({"keras_version": archive.written_by}).encode(),
        CONFIG: json.dumps(config).encode(),
        WEIGHTS: weights,
        **{name: content.getvalue() for name, content in archive.assets.items()},
    }
    with zipfile.ZipFile(file, "w") as target:
        for name, content in members.items():
            target.writestr(name, content)
