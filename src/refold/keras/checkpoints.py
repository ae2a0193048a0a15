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
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, final

import h5py
import numpy as np

from refold.checkpoints.dtypes import WEIGHTS as WEIGHT_TYPES
from refold.checkpoints.dtypes import Spec, raw_dtype, wide_code
from refold.checkpoints.formulas import Formula
from refold.checkpoints.hdf import read_hdf
from refold.checkpoints.naming import Form, Stored
from refold.checkpoints.plan import Compose, Converted, Copy, Plan, Rebuild, Wish
from refold.checkpoints.run import run
from refold.checkpoints.state import NewArrays
from refold.checkpoints.units import Units, chosen
from refold.errors import InputError
from refold.files import open_regular, write_atomically
from refold.keras.described import (
    REGISTERED,
    Described,
    call_apart,
    call_together,
    described,
    is_attention,
    kernels_of,
    known_kernels,
    layer_class,
    normalization_options,
    place_of,
)
from refold.keras.files.archive import METADATA, WEIGHTS, Archive, read_archive
from refold.keras.files.configuration import CONFIG, MAX_DEPTH
from refold.keras.files.refused import RefusedError
from refold.keras.kernels import KernelSpec
from refold.shown import printable
from refold.weights import LowRank, Normalization, Rows, Unit

Json = dict[str, Any]

ARCHIVE, NUMBERS = ".keras", ".weights.h5"
MAX_SIZE = 4 * 2**30
_MODELS = ("Sequential", "Functional", "Model")


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
            kind = layer_class(layer)  # some are saved under an older name than that of their group
            word = snake_case(str(layer.get("class_name")) if kind is None else kind.__name__)
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


@final
@dataclass(frozen=True, slots=True)
class _Work:
    """What is done to the weights of a layer: how they are, or are to be, computed, and which."""

    computed: Described
    specs: tuple[KernelSpec, ...]


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
        steps = [(site, self.rewrite(site)) for site in before]
        # What became of another class changes the numbers of its neighbors.
        after = [site.path for site in _sites(self.config)]
        left = dict.fromkeys(self.specs)
        changed = any(work is not None for _, work in steps)
        for (site, work), new in zip(steps, after, strict=True):
            self.names[new] = site.name
            own = [name for name in self.specs if name.startswith(site.path)]
            for name in own:
                left.pop(name, None)
            if work is None:
                self.copy(own, site.path, new)
            elif self.wish.to is Form.PLAIN:
                self.make_plain(site, work, own, new)
            else:
                self.make_rich(site, work, own, new)
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

    def rewrite(self, site: _Site) -> _Work | None:
        """Change the configuration of a layer, if it is one to change.

        Gives what is to be done to its weights; None if they stay.
        """
        entry, shown = site.entry, f"the layer '{printable(site.name, 80)}'"
        if any(fnmatchcase(site.name, pattern) for pattern in self.wish.skip):
            return None
        if self.wish.to is Form.REFOLD:
            units = chosen(self.wish.choices, site.name)
            has_none = units is not None and units.usual and not known_kernels(entry)
            if units is None or has_none or any(_own_classes(entry)):
                return None
            return self.wrap(site, units, shown)
        computed = described(entry, shown)
        if computed is None:
            for inside in _own_classes(entry):
                raise RefusedError(
                    f"{shown} is or holds a {inside}; fold it (refold fold), or leave it with --skip"
                )
            return None
        options, inner = entry["config"], entry["config"].get("layer")
        if not isinstance(inner, dict) or not isinstance(inner.get("config"), dict):
            raise RefusedError(f"{shown} normalizes no layer")
        specs = kernels_of(inner, options.get("axis"), shown)
        plain = {**{key: entry[key] for key in ("name", "inbound_nodes") if key in entry}, **inner}
        plain["config"] = {**inner["config"], "name": site.name}
        if isinstance(computed.method, LowRank):  # which freezes what it adapts
            plain["config"]["trainable"] = options.get("trainable", True)
        elif options.get("trainable") is False:
            plain["config"]["trainable"] = False
        if is_attention(inner):
            call_apart(plain, shown)
        entry.clear()
        entry.update(plain)
        return _Work(computed, specs)

    def wrap(self, site: _Site, units: Units, shown: str) -> _Work:
        """Make a plain layer's configuration that of a normalized one."""
        entry = site.entry
        specs, axis = kernels_of(entry, None, shown), None
        if not units.usual:
            if len(specs) != 1 or units.groups != 1:
                raise RefusedError(
                    f"{shown} is not one kernel with units on its axes; write 'auto' for those of its kind, or "
                    "wrap it in code"
                )
            rank = len(self.rows(site.path + place_of(specs[0], site.path, self.specs), units.axes, shown).shape)
            if {a % rank for a in specs[0].unit_axes} != {a % rank for a in units.axes}:
                axis = list(units.axes)
                specs = (KernelSpec(specs[0].path, units.axes),)
        plain = {key: value for key, value in entry.items() if key not in ("name", "inbound_nodes")}
        if is_attention(entry):
            call_together(entry, shown)
        chosen_method = self.wish.method or Unit()
        config = plain["config"]
        options: Json = {
            "name": config.get("name"),
            "trainable": config.get("trainable", True),
            "dtype": config.get("dtype"),
            "layer": plain,
            "axis": axis,
            **normalization_options(chosen_method),
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
                "registered_name": REGISTERED,
                **around,
            }
        )
        return _Work(Described(chosen_method, ("gain", "offset")[: 1 + chosen_method.centered]), specs)

    def make_plain(self, site: _Site, work: _Work, own: list[str], new: str) -> None:
        shown = f"the layer '{printable(site.name, 80)}'"
        method, places, inside = work.computed.method, work.computed.places(work.specs), f"{site.path}layer/"
        handled = set()
        for spec in work.specs:
            place = place_of(spec, inside, self.specs)
            parts = {"direction": inside + place}
            for part in (*work.computed.trained, *work.computed.fixed):
                parts[part] = site.path + places[spec.path, part]
            rows = self.rows(parts["direction"], spec.unit_axes, shown)
            own_parts = {part: name for part, name in parts.items() if part != "direction"}
            for part, name in own_parts.items():
                if name not in self.specs or self.specs[name].shape != work.computed.shape(part, rows):
                    raise RefusedError(f"{shown} has not the weights that its configuration says")
            handled |= set(parts.values())
            target = new + place
            stored = Stored(Form.REFOLD, self.called(site, spec), parts)
            step = (
                Rebuild(stored, Formula(method), None, rows, rows, {"direction": target})
                if isinstance(method, Normalization)
                else Compose(stored, method, rows, target)
            )
            self.plan.add(step, {target: self.specs[parts["direction"]]})
            self.plan.dropped += own_parts.values()
            self.plan.converted.append(Converted(stored.name, Form.REFOLD, Form.PLAIN, rows.units))
        others = [name for name in own if name not in handled]
        if not all(name.startswith(inside) for name in others):
            raise RefusedError(f"{shown} has not the weights that its configuration says")
        self.copy(others, inside, new)

    def make_rich(self, site: _Site, work: _Work, own: list[str], new: str) -> None:
        shown = f"the layer '{printable(site.name, 80)}'"
        places = work.computed.places(work.specs)
        self.copy(own, site.path, f"{new}layer/")
        for spec in work.specs:
            direction = site.path + place_of(spec, site.path, self.specs)
            rows = self.rows(direction, spec.unit_axes, shown)
            targets = {part: new + places[spec.path, part] for part in work.computed.trained}
            part = Spec(wide_code(self.specs[direction].dtype), (rows.units,))
            stored = Stored(Form.PLAIN, self.called(site, spec), {"direction": direction})
            formula = Formula(self.wish.method or Unit())
            self.plan.add(
                Rebuild(stored, None, formula, rows, rows, targets), dict.fromkeys(targets.values(), part)
            )
            self.plan.converted.append(Converted(stored.name, Form.PLAIN, Form.REFOLD, rows.units))

    def called(self, site: _Site, spec: KernelSpec) -> str:
        return f"{site.name}.{spec.path}"

    def rows(self, name: str, axes: tuple[int, ...], shown: str) -> Rows:
        if name not in self.specs:
            raise RefusedError(f"{shown} has not the weights that its configuration says")
        if self.specs[name].dtype not in WEIGHT_TYPES:
            raise RefusedError(f"{shown} stores its kernel as {self.specs[name].dtype}; leave it with --skip")
        try:
            return Units(axes).rows(self.specs[name].shape, shown)
        except InputError as error:
            raise RefusedError(str(error)) from error


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
