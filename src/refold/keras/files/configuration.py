"""The configuration: which classes, functions and calls it may name. No object is made of it here."""

from __future__ import annotations

import io
import json
import re
import sys
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import keras
from keras.src.api_export import get_symbol_from_name

from refold.keras.files.refused import RefusedError, sentence
from refold.shown import printable

Json = dict[str, Any]

CONFIG = "config.json"
MAX_DEPTH = 200  # of nested lists and objects: twenty nested models have about a hundred
MAX_ITEMS = 2_000_000
MAX_PARTS = 65_536  # into which one operator may split a tensor

# The kinds of object that a model is made of. Losses, metrics and optimizers are training's business.
FAMILIES: tuple[type, ...] = (
    keras.Layer,
    keras.initializers.Initializer,
    keras.regularizers.Regularizer,
    keras.constraints.Constraint,
    keras.dtype_policies.DTypePolicy,
    keras.dtype_policies.DTypePolicyMap,
    keras.quantizers.Quantizer,
    keras.quantizers.QuantizationConfig,
    keras.random.SeedGenerator,
)
# Layers that carry code, or run what another framework's file says.
DANGEROUS: tuple[type, ...] = (
    keras.layers.Lambda,
    keras.layers.TFSMLayer,
    keras.layers.TorchModuleWrapper,
    keras.layers.JaxLayer,
    keras.layers.FlaxLayer,
)
# Where Keras keeps serializable classes that are no part of its public interface.
INTERNAL = re.compile(r"keras\.src\.(ops|activations|models|layers|applications)(\.\w+)+")
INTERNAL_REFUSED = ("keras.src.ops.function", "keras.src.layers.preprocessing.feature_space")
# How Keras writes values that JSON does not have.
VALUES = {"__keras_tensor__", "__tensor__", "__numpy__", "__bytes__", "__ellipsis__", "__slice__"}
DTYPES = re.compile(r"bool|u?int(4|8|16|32|64)|bfloat16|float(8\w{0,12}|16|32|64)|complex(64|128)")


def _unique(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise RefusedError(f"its configuration says '{printable(twice, 80)}' twice in one place")
    return found


def parse(content: io.BytesIO, member: str) -> Any:
    """The values in the JSON text of a member. Raises RefusedError."""
    raw = content.getvalue()
    # An empty list costs two bytes here and sixty in memory.
    if sum(map(raw.count, (b",", b"[", b"{"))) > MAX_ITEMS:
        raise RefusedError(f"its '{member}' has more than {MAX_ITEMS} values; no model needs that")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise RefusedError(f"its '{member}' is nested too deeply") from error
    except ValueError as error:  # also what is not UTF-8, and numbers of too many digits
        raise RefusedError(f"its '{member}' is no valid JSON ({sentence(error)})") from error


def screen_config(config: Any, customs: Mapping[str, Any]) -> bool:
    """Refuse a configuration with an object that may not be made; and tell whether the user's own classes are
    among them. Takes out what belongs to training: how to compile is nothing that a fold needs."""
    if not isinstance(config, dict) or not {"class_name", "config", "module"} <= config.keys():
        raise RefusedError(f"its '{CONFIG}' describes no Keras 3 model")
    uses_customs = False
    for found in _objects(config):
        if "class_name" in found:
            found.pop("compile_config", None)
    for found in _objects(config):
        if "class_name" in found:
            uses_customs |= _screen_object(found, customs)
        for key in ("indices_or_sections", "num"):
            if isinstance(found.get(key), int) and found[key] > MAX_PARTS:
                raise RefusedError(
                    f"it splits a tensor into {printable(found[key], 40)} parts; no model needs that"
                )
    return uses_customs


def _objects(config: Any) -> Iterator[Json]:
    """All JSON objects, from the outside in."""
    waiting = [(config, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise RefusedError(f"its '{CONFIG}' is nested too deeply")
        if isinstance(value, dict):
            yield value
            waiting.extend((inner, depth + 1) for inner in value.values() if isinstance(inner, dict | list))
        else:
            waiting.extend((inner, depth + 1) for inner in value if isinstance(inner, dict | list))


def _screen_object(found: Json, customs: Mapping[str, Any]) -> bool:
    """Whether what would be made of ``found`` is the user's own code; refused if it may not be made.

    Looks a class up in the same order as Keras: what is registered comes first, whatever the module.
    """
    class_name, inner = found["class_name"], found.get("config")
    if not isinstance(class_name, str):
        raise RefusedError("its configuration has an object whose class has no name")
    shown = f"'{printable(class_name, 80)}'"
    if class_name in VALUES:
        dtype = inner.get("dtype") if isinstance(inner, dict) else None
        if class_name in ("__tensor__", "__numpy__") and not (isinstance(dtype, str) and DTYPES.fullmatch(dtype)):
            raise RefusedError(f"its configuration holds numbers of the unknown type '{printable(dtype, 40)}'")
        return False
    if class_name == "__lambda__":
        raise RefusedError("it carries Python code (a lambda) that would run; if you know who made it, use --trust")
    if class_name.startswith("__"):
        raise RefusedError(f"its configuration holds a {shown}, which no model needs")
    for node in found.get("inbound_nodes") or ():
        _screen_node(node, found)
    is_function = class_name == "function"
    registered = inner if is_function else found.get("registered_name", class_name)
    if isinstance(registered, str):
        custom = keras.saving.get_registered_object(registered, custom_objects=customs)
        if custom is not None:
            if is_function != isinstance(custom, types.FunctionType):
                raise RefusedError(f"it uses '{printable(registered, 80)}' as something else than it is")
            return not custom.__module__.startswith("refold.")
    if is_function:
        _screen_function(inner, found.get("module"))
    else:
        _screen_class(class_name, found.get("module"))
    if isinstance(inner, dict) and isinstance(inner.get("vocabulary"), str):
        raise RefusedError(f"its {shown} wants to read the file '{printable(inner['vocabulary'])}' of this machine")
    return False


def _screen_node(node: Any, layer: Json) -> None:
    """Refuse a call that is no part of the model's graph: it would be run on the spot, with whatever
    arguments the file gives."""
    name = printable(layer.get("name"), 80)
    if not isinstance(node, dict) or not {"args", "kwargs"} <= node.keys():
        raise RefusedError(f"the call of '{name}' is written as an older Keras did; save the model with Keras 3")
    waiting = [node["args"], node["kwargs"]]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, dict):
            if value.get("class_name") == "__keras_tensor__":
                return
            if "class_name" not in value:
                waiting.extend(value.values())
    raise RefusedError(f"'{name}' is called on no tensor of the model, so loading would run it at once")


def _screen_function(name: Any, module: Any) -> None:
    known = getattr(keras.activations, name, None) if isinstance(name, str) else None
    if module not in ("builtins", "keras.activations") or not isinstance(known, types.FunctionType):
        shown = f"'{printable(module, 80)}.{printable(name, 80)}'"
        raise RefusedError(
            f"it uses the function {shown}, which is no activation of Keras; if it is yours, register it with "
            "keras.saving.register_keras_serializable and say where it is with --import MODULE"
        )


def _screen_class(name: str, module: Any) -> None:
    shown = f"'{printable(name, 80)}'"
    if not isinstance(module, str) or module.split(".")[0] != "keras":
        where = f" (from '{printable(module, 80)}')" if module else ""
        raise RefusedError(
            f"it uses the custom class {shown}{where}, whose code is not loaded: "
            "say where it is with --import MODULE"
        )
    cls = get_symbol_from_name(f"{module}.{name}")
    families = FAMILIES
    if cls is None and INTERNAL.fullmatch(module) and module not in INTERNAL_REFUSED:
        # Keras would import the module; all that is meant here are loaded with Keras.
        cls = vars(sys.modules.get(module, types)).get(name)
        families = (*FAMILIES, keras.Operation)
        if getattr(cls, "__module__", None) != module:
            cls = None
    if cls is None:
        version = f"Keras {keras.__version__}"
        raise RefusedError(f"it uses {shown} of '{printable(module, 80)}', which {version} does not have")
    if isinstance(cls, type) and issubclass(cls, DANGEROUS):
        raise RefusedError(
            f"its layer {shown} carries code of its own that would run; if you know who made it, use --trust"
        )
    if not isinstance(cls, type) or not issubclass(cls, families):
        raise RefusedError(f"it uses '{printable(module, 80)}.{printable(name, 80)}', which is no part of a model")
