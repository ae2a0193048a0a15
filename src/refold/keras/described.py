"""Layers as a configuration describes them: their kernels, where a file has these, and what they are computed of.

No class is looked up but Keras' own kinds of layers, and none is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, final

import keras

from refold.checkpoints.plan import MatrixMethod
from refold.keras.files.refused import RefusedError
from refold.keras.kernels import ATTENTION, KernelSpec, specs_of_class
from refold.keras.normalization import method_of
from refold.shown import printable
from refold.weights import METHODS, LowRank, Normalization, Orthogonal, Rows, Spectral, method

Json = dict[str, Any]

# Which variable of its layer a kernel is, by its attribute; attention layers have theirs in layers of their own.
_NUMBERS = {
    "kernel": 0,
    "embeddings": 0,
    "depthwise_kernel": 0,
    "pointwise_kernel": 1,
    "recurrent_kernel": 1,
}


def kernels_of(entry: Json, axis: Any, shown: str) -> tuple[KernelSpec, ...]:
    """The kernels of a layer by its configuration. Raises RefusedError."""
    specs = known_kernels(entry)
    if not specs:
        kind = printable(str(entry.get("class_name")), 60)
        raise RefusedError(
            f"{shown} is a {kind}, whose weights have no places that are known here; fold the model (refold fold)"
        )
    if axis is None:
        return specs
    axes = (axis,) if isinstance(axis, int) else axis
    if len(specs) > 1 or not isinstance(axes, list | tuple) or not all(type(a) is int for a in axes):
        raise RefusedError(f"{shown} has an axis that is none")
    return (KernelSpec(specs[0].path, tuple(axes)),)


def known_kernels(entry: Json) -> tuple[KernelSpec, ...]:
    """The kernels of a layer by its configuration; none where its kind does not say them."""
    kind = layer_class(entry)
    return () if kind is None else specs_of_class(kind, entry["config"])


def layer_class(entry: Any) -> type | None:
    """The kind of layer of Keras that a configuration names, if it is one."""
    if not isinstance(entry, dict) or not str(entry.get("module")).startswith("keras."):
        return None
    found = getattr(keras.layers, str(entry.get("class_name")), None)
    return found if isinstance(found, type) and issubclass(found, keras.Layer) else None


def is_attention(entry: Json) -> bool:
    """Whether a configuration is of an attention layer, which is called with several tensors."""
    return layer_class(entry) in ATTENTION


def place_of(spec: KernelSpec, below: str, names: Mapping[str, Any]) -> str:
    """Where a file has a kernel of the layer whose weights are below a path. ``names`` is what the file has: some
    attributes have a second name without the underscore, under which Keras saves them."""
    *attributes, own = spec.path.split(".")
    last = f"vars/{_NUMBERS[own]}"
    place = "/".join((*attributes, last))
    public = "/".join((*(attribute.lstrip("_") for attribute in attributes), last))
    return place if below + place in names else public


# ---- methods in configurations -----------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Described:
    """What one of refold's layers computes a kernel by: the method, and the parts that train and that do not.

    They are in the order in which each kernel has them; ``rank`` is that of a low-rank adaptation.
    """

    method: Normalization | MatrixMethod
    trained: tuple[str, ...]
    fixed: tuple[str, ...] = ()
    rank: int = 0

    def places(self, specs: tuple[KernelSpec, ...]) -> dict[tuple[str, str], str]:
        """The places of the parts below the layer, by the paths of the kernels and their names: Keras numbers what
        trains first."""
        pairs = [(spec.path, part) for group in (self.trained, self.fixed) for spec in specs for part in group]
        return {pair: f"vars/{number}" for number, pair in enumerate(pairs)}

    def shape(self, part: str, rows: Rows) -> tuple[int, ...]:
        """The shape of a part of a kernel."""
        shapes = {
            "left": (1, rows.units),
            "right": (1, rows.fan_in),
            "base": (rows.units, rows.fan_in),
            "up": (rows.units, self.rank),
            "down": (self.rank, rows.fan_in),
            "offset": (rows.units,),
            "gain": () if isinstance(self.method, Spectral | Orthogonal) else (rows.units,),
        }
        return shapes[part]


REGISTERED = "refold>WeightNormalization"


def described(entry: Json, shown: str) -> Described | None:
    """How a layer of refold computes its kernels; None for other layers and for blocks. Raises RefusedError."""
    options = entry["config"]
    gain = ("gain",) if options.get("gain") else ()
    try:
        match entry.get("registered_name"):
            case "refold>WeightNormalization":
                offset = ("offset",) if options.get("offset") else ()
                return Described(_normalization(options, shown), (*gain, *offset))
            case "refold>SpectralNormalization":
                return Described(Spectral(float(options["epsilon"])), gain, ("left", "right"))
            case "refold>OrthogonalWeights":
                return Described(Orthogonal(options["map"]), gain, ("base",))
            case "refold>LowRankAdaptation":
                rank, alpha = int(options["rank"]), float(options["alpha"])
                adapted = LowRank.of_rank(rank, alpha, bool(options["magnitude"]))
                return Described(adapted, ("up", "down", *(("gain",) if adapted.magnitude else ())), rank=rank)
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError(f"{shown}: its options are none ({error})") from error
    return None


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float | bool)


def _normalization(options: Json, shown: str) -> Normalization:
    named, epsilon = options.get("normalizer"), options.get("epsilon")
    try:
        if isinstance(named, str) and isinstance(epsilon, int | float | None):
            return method(named, epsilon)
        if isinstance(named, dict) and "method" in named and all(map(_is_plain, named.values())):
            return method_of(named)
    except (ValueError, TypeError) as error:
        raise RefusedError(f"{shown}: {error}") from error
    raise RefusedError(f"{shown} is normalized by a layer of Keras; fold the model (refold fold)")


def normalization_options(chosen: Normalization) -> Json:
    """The options that make a layer use a method."""
    for name in METHODS:
        if method(name, chosen.epsilon) == chosen:
            return {"normalizer": name, "epsilon": chosen.epsilon}
    own = {f.name: getattr(chosen, f.name) for f in fields(chosen)}  # type: ignore[arg-type]  # all methods are dataclasses
    return {"normalizer": {"method": type(chosen).__name__, **own}, "epsilon": None}


# ---- calls of attention layers -----------------------------------------------------------------------

_TENSORS = ("query", "value", "key")


def calls(entry: Json, shown: str) -> Iterator[Json]:
    """The calls of a layer in a model. Raises RefusedError."""
    nodes = entry.get("inbound_nodes", [])
    for node in nodes if isinstance(nodes, list) else [None]:
        if not isinstance(node, dict) or not isinstance(node.get("args"), list):
            raise RefusedError(f"{shown} is called in a way that is not known here; fold the model (refold fold)")
        yield node


def call_apart(entry: Json, shown: str) -> None:
    """Have a plain attention layer called with the tensors of the list that refold's layer took."""
    for node in calls(entry, shown):
        args = node["args"]
        if len(args) != 1 or not isinstance(args[0], list):
            raise RefusedError(f"{shown} is called in a way that is not known here; fold the model (refold fold)")
        node["args"] = args[0]


def call_together(entry: Json, shown: str) -> None:
    """Have refold's layer called with a list of the tensors that an attention layer took, and say their shapes."""
    for node in calls(entry, shown):
        args, kwargs = node["args"], node.get("kwargs")
        if not isinstance(kwargs, dict):
            raise RefusedError(f"{shown} is called in a way that is not known here; wrap it in code")
        given = dict(zip(_TENSORS, args, strict=False)) | {k: kwargs.pop(k) for k in _TENSORS if k in kwargs}
        if len(args) > len(_TENSORS) or given.get("query") is None or given.get("value") is None:
            raise RefusedError(f"{shown} is called with masks by their places; give them by name")
        node["args"] = [[given[name] for name in _TENSORS if given.get(name) is not None]]
    built = entry.get("build_config")
    shapes = built.get("shapes_dict") if isinstance(built, dict) else None
    if not isinstance(shapes, dict):
        raise RefusedError(f"{shown} does not say the shapes of its inputs; call the model once, and save it again")
    found = [shapes.get(f"{name}_shape") for name in _TENSORS]
    entry["build_config"] = {"input_shape": [shape for shape in found if shape is not None]}
