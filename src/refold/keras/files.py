"""Keras models in files: read as if an enemy had made them, written whole or not at all.

Keras' own safe mode is no boundary: it has been walked around again and again, and it says nothing about
what a file may cost. So an archive is screened before Keras sees any of it, in this order: the file, the
archive, the configuration's text, the classes it names, the weights, and the size of the model it describes
(its variables are counted without being made). Keras then reads a clean copy in memory that holds what was
screened and nothing else, so that no difference between two readers of a format can matter.

What is not held off: a fault in the HDF5 library itself, and computing time. A model from someone you have
reason to fear belongs in a process with limits.
"""

from __future__ import annotations

import io
import json
import math
import re
import stat
import sys
import types
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, final

import h5py
import keras
from keras.src.api_export import get_symbol_from_name
from keras.src.backend.common import global_state
from keras.src.saving import saving_lib
from keras.src.saving.serialization_lib import ObjectSharingScope, SafeModeScope

from refold.errors import InputError
from refold.files import open_regular, printable, size_in_words, write_atomically

Json = dict[str, Any]

MIB = 2**20
MAX_SIZE = 4 * 2**30

# Keras stores everything uncompressed. Up to SMALL nothing is suspicious; above, what a file says it holds
# may be this many times what it stores.
SMALL = 16 * MIB
EXPANSION = 8
MAX_DIRECTORY = MIB  # of the archive: some twenty thousand members
MAX_CONFIG = 16 * MIB
MAX_METADATA = MIB
MAX_DEPTH = 200  # of nested lists and objects: twenty nested models have about a hundred
MAX_ITEMS = 2_000_000
MAX_OBJECTS = 100_000  # groups and datasets
MAX_PARTS = 65_536  # into which one operator may split a tensor
# Of what an exception says, this much is passed on.
SENTENCE = 250
# Some layers keep part of their variables out of the file, or pack them.
UNSTORED = MIB

CONFIG, METADATA, WEIGHTS, ASSETS = "config.json", "metadata.json", "model.weights.h5", "assets/"

# HDF5's own filters (deflate, shuffle, fletcher32) and h5py's lzf: all others are plug-ins that load code.
FILTERS = {1, 2, 3, 32000}
LINKS = {h5py.SoftLink: "a soft link", h5py.ExternalLink: "a link to another file"}

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
# Layers of ours, which register themselves when they are imported.
OWN = ("refold.keras.blocks", "refold.keras.normalization")


class _RefusedError(Exception):
    """A file cannot be used: half a sentence, to follow the file's name."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Archive:
    """The members of an archive, out of it."""

    config: Any
    written_by: str
    weights: io.BytesIO
    assets: Mapping[str, io.BytesIO]


def load(path: str | Path, *, imports: Sequence[str] = (), trust: bool = False, max_size: int = MAX_SIZE) -> Any:
    """The model in a ``.keras`` file, which is taken for hostile.

    Only the architecture and the weights are read, not the optimizer's state or the loss. Nothing is written
    anywhere but, if the model has assets such as vocabularies, for a moment in the system's temporary folder.

    Args:
        path: the file.
        imports: names of modules to import first, with the code of custom layers. Classes in them need not
            be registered. Without this, only layers of Keras, of refold, and what this process has registered
            with ``keras.saving.register_keras_serializable`` can be in the file.
        trust: believe the file: its own code runs (``Lambda`` and the like), and it may ask for as much
            memory as it wants. The archive and its weights are still screened.
        max_size: in bytes, of the file.

    Raises:
        InputError: the file cannot be read, looks like an attack, or holds a model that Keras cannot make.
            The message names the file and what in it is wrong.
    """
    shown = printable(path)
    for module in OWN:
        import_module(module)
    customs = _imported(imports)
    try:
        with open_regular(path, max_size) as file:
            archive = _read_archive(file)
        uses_customs = False
        if not trust:
            uses_customs = _screen_config(archive.config, customs)
        stored = _screen_weights(archive.weights)
        copy = _clean_copy(archive)
        if not trust:
            _screen_size(archive, customs, stored, uses_customs)
        return _load(copy, archive.written_by, customs, trust)
    except _RefusedError as refusal:
        raise InputError(f"{shown}: {refusal}") from refusal


def save(model: Any, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a model to a ``.keras`` file, whole or not at all (see :func:`refold.files.write_atomically`).

    Raises:
        InputError: ``path`` does not end in ``.keras``, exists and ``overwrite`` is not set, or cannot be
            written; or Keras cannot save the model.
    """
    target = Path(path)
    if target.suffix != ".keras":
        raise InputError(
            f"{printable(path)}: a Keras model is saved to a name that ends in .keras; choose such a name"
        )

    def write(temporary: Path) -> None:
        try:
            keras.saving.save_model(model, str(temporary), overwrite=True)
        except OSError:
            raise
        except Exception as error:
            reason = _sentence(error)
            raise InputError(f"{printable(path)}: Keras cannot save this model ({reason})") from error

    write_atomically(target, write, overwrite=overwrite)


# ---- the user's own code -----------------------------------------------------------------------------


def _imported(names: Sequence[str]) -> dict[str, Any]:
    """The Keras classes that the modules define, by name."""
    customs: dict[str, Any] = {}
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise InputError(
                f"--import {printable(name)}: this is not the name of a Python module, like package.layers"
            )
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            missing = printable(error.name)
            raise InputError(
                f"--import {name}: there is no module '{missing}' here; install it, or put its folder on PYTHONPATH"
            ) from error
        except Exception as error:
            raise InputError(
                f"--import {name}: the module cannot be imported ({type(error).__name__}: {_sentence(error)})"
            ) from error
        package = name.split(".")[0]
        for value in vars(module).values():
            # What the module itself has imported from elsewhere is not the user's own code.
            if (
                isinstance(value, type)
                and issubclass(value, FAMILIES)
                and value.__module__.split(".")[0] == package
            ):
                customs[value.__name__] = value
    return customs


# ---- the archive -------------------------------------------------------------------------------------


class _ShortReads:
    """A file that is never asked for much at once: how large an archive's table of contents is, the archive
    says itself, and `zipfile` believes it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise _RefusedError(f"the archive's table of contents has {size_in_words(size)}; no model needs that")
        return self._file.read(size)


def _read_archive(file: BinaryIO) -> _Archive:
    start = file.read(16)
    if start[:2] != b"PK":
        raise _RefusedError(_other_format(start))
    size = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(_ShortReads(file)) as archive:
            members = _screen_members(archive.infolist(), size)
            config = _read_member(archive, members[CONFIG])
            metadata = _parse(_read_member(archive, members[METADATA]), METADATA)
            weights = _read_member(archive, members[WEIGHTS])
            assets = {
                name: _read_member(archive, info)
                for name, info in members.items()
                if name.startswith(ASSETS) and not info.is_dir()
            }
    except _RefusedError:
        raise
    except MemoryError as error:
        raise _RefusedError("there is not enough memory to read it") from error
    except Exception as error:
        # `zipfile` has no common base for what a damaged archive makes it raise.
        raise _RefusedError(
            f"the archive is damaged or cut off ({_sentence(error)}); copy the file again"
        ) from error
    version = metadata.get("keras_version") if isinstance(metadata, dict) else None
    return _Archive(_parse(config, CONFIG), str(version or ""), weights, assets)


def _other_format(start: bytes) -> str:
    if start.startswith(b"\x89HDF"):
        return (
            "this is a model in Keras' old HDF5 format, which cannot be read safely; load it where it came from "
            "and save it again under a name that ends in .keras"
        )
    what = "this is no Keras archive"
    if start[:1] == b"\x80":
        what = "this looks like a Python pickle (an old PyTorch or Paddle file)"
    elif start[8:9] == b"{":
        what = "this looks like a safetensors file"
    elif start[:1] == b"\x08":
        what = "this looks like an ONNX or TensorFlow file"
    elif start[:2] == b"\x1f\x8b":
        what = "this is a gzip archive"
    return f"{what}; give the .keras file that model.save() writes"


def _screen_members(infos: Sequence[zipfile.ZipInfo], size: int) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name, shown = info.filename, f"the archive's member '{printable(info.orig_filename, 80)}'"
        if name in members:
            raise _RefusedError(f"{shown} is there twice")
        if info.orig_filename != name or not _is_plain(name):
            raise _RefusedError(f"{shown} has a name that could leave its folder")
        if info.flag_bits & 0x1:
            raise _RefusedError(f"{shown} is encrypted; save the model without a password")
        mode = info.external_attr >> 16
        if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _RefusedError(f"{shown} is a link or a device, not a file")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _RefusedError(f"{shown} is compressed in a way that Keras does not use; save the model again")
        if info.file_size > max(SMALL, EXPANSION * info.compress_size):
            raise _RefusedError(
                f"{shown} says that it holds {size_in_words(info.file_size)} "
                f"but stores {size_in_words(info.compress_size)}, as a decompression bomb would"
            )
        if name not in (CONFIG, METADATA, WEIGHTS) and not name.startswith(ASSETS):
            raise _RefusedError(_unexpected(name, shown, [other.filename for other in infos]))
        members[name] = info
    for name, limit in ((CONFIG, MAX_CONFIG), (METADATA, MAX_METADATA), (WEIGHTS, None)):
        if name not in members:
            raise _RefusedError(f"the archive has no member '{name}', so it is no Keras model")
        if limit is not None and members[name].file_size > limit:
            raise _RefusedError(
                f"its '{name}' has {size_in_words(members[name].file_size)}, more than {size_in_words(limit)}"
            )
    # Members that share their bytes are each as small as they say.
    total = sum(info.file_size for info in infos)
    if total > max(SMALL, EXPANSION * size):
        raise _RefusedError(
            f"the archive says that it holds {size_in_words(total)} in {size_in_words(size)}, "
            "as a decompression bomb would"
        )
    return members


def _is_plain(name: str) -> bool:
    """Whether a name stays where it is put, on every system."""
    parts = name.removesuffix("/").split("/")
    return not any(part in ("", ".", "..") or re.search(r"[\\:\x00-\x1f\x7f]", part) for part in parts)


def _unexpected(name: str, shown: str, names: Sequence[str]) -> str:
    if name == "model.weights.npz":
        return "its weights are in NumPy's format, which Keras no longer reads; save the model again without that"
    if name.startswith("model.weights"):
        return (
            f"{shown} is part of weights in several files, which are read from no .keras file; save the model whole"
        )
    if any(other.endswith("data.pkl") for other in names):
        return "this is a PyTorch file; give the .keras file that model.save() writes"
    return f"{shown} is nothing that Keras writes; remove it or save the model again"


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> io.BytesIO:
    """All of a member, and not more than it says it holds."""
    content = io.BytesIO()
    with archive.open(info) as stream:
        while chunk := stream.read(MIB):
            content.write(chunk)
            if content.tell() > info.file_size:
                raise _RefusedError(f"its '{printable(info.filename, 80)}' holds more than it says")
    if content.tell() != info.file_size:
        raise _RefusedError(f"its '{printable(info.filename, 80)}' holds less than it says; copy the file again")
    content.seek(0)
    return content


# ---- the configuration -------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _RefusedError(f"its configuration says '{printable(twice, 80)}' twice in one place")
    return found


def _parse(content: io.BytesIO, member: str) -> Any:
    raw = content.getvalue()
    # An empty list costs two bytes here and sixty in memory.
    if sum(map(raw.count, (b",", b"[", b"{"))) > MAX_ITEMS:
        raise _RefusedError(f"its '{member}' has more than {MAX_ITEMS} values; no model needs that")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise _RefusedError(f"its '{member}' is nested too deeply") from error
    except ValueError as error:  # also what is not UTF-8, and numbers of too many digits
        raise _RefusedError(f"its '{member}' is no valid JSON ({_sentence(error)})") from error


def _screen_config(config: Any, customs: Mapping[str, Any]) -> bool:
    """Refuse a configuration with an object that may not be made; and tell whether the user's own classes are
    among them. Takes out what belongs to training: how to compile is nothing that a fold needs."""
    if not isinstance(config, dict) or not {"class_name", "config", "module"} <= config.keys():
        raise _RefusedError(f"its '{CONFIG}' describes no Keras 3 model")
    uses_customs = False
    for found in _objects(config):
        if "class_name" in found:
            found.pop("compile_config", None)
    for found in _objects(config):
        if "class_name" in found:
            uses_customs |= _screen_object(found, customs)
        for key in ("indices_or_sections", "num"):
            if isinstance(found.get(key), int) and found[key] > MAX_PARTS:
                raise _RefusedError(
                    f"it splits a tensor into {printable(found[key], 40)} parts; no model needs that"
                )
    return uses_customs


def _objects(config: Any) -> Iterator[Json]:
    """All JSON objects, from the outside in."""
    waiting = [(config, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise _RefusedError(f"its '{CONFIG}' is nested too deeply")
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
        raise _RefusedError("its configuration has an object whose class has no name")
    shown = f"'{printable(class_name, 80)}'"
    if class_name in VALUES:
        dtype = inner.get("dtype") if isinstance(inner, dict) else None
        if class_name in ("__tensor__", "__numpy__") and not (isinstance(dtype, str) and DTYPES.fullmatch(dtype)):
            raise _RefusedError(f"its configuration holds numbers of the unknown type '{printable(dtype, 40)}'")
        return False
    if class_name == "__lambda__":
        raise _RefusedError(
            "it carries Python code (a lambda) that would run; if you know who made it, use --trust"
        )
    if class_name.startswith("__"):
        raise _RefusedError(f"its configuration holds a {shown}, which no model needs")
    for node in found.get("inbound_nodes") or ():
        _screen_node(node, found)
    is_function = class_name == "function"
    registered = inner if is_function else found.get("registered_name", class_name)
    if isinstance(registered, str):
        custom = keras.saving.get_registered_object(registered, custom_objects=customs)
        if custom is not None:
            if is_function != isinstance(custom, types.FunctionType):
                raise _RefusedError(f"it uses '{printable(registered, 80)}' as something else than it is")
            return not custom.__module__.startswith("refold.")
    if is_function:
        _screen_function(inner, found.get("module"))
    else:
        _screen_class(class_name, found.get("module"))
    if isinstance(inner, dict) and isinstance(inner.get("vocabulary"), str):
        raise _RefusedError(
            f"its {shown} wants to read the file '{printable(inner['vocabulary'])}' of this machine"
        )
    return False


def _screen_node(node: Any, layer: Json) -> None:
    """Refuse a call that is no part of the model's graph: it would be run on the spot, with whatever
    arguments the file gives."""
    name = printable(layer.get("name"), 80)
    if not isinstance(node, dict) or not {"args", "kwargs"} <= node.keys():
        raise _RefusedError(f"the call of '{name}' is written as an older Keras did; save the model with Keras 3")
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
    raise _RefusedError(f"'{name}' is called on no tensor of the model, so loading would run it at once")


def _screen_function(name: Any, module: Any) -> None:
    known = getattr(keras.activations, name, None) if isinstance(name, str) else None
    if module not in ("builtins", "keras.activations") or not isinstance(known, types.FunctionType):
        shown = f"'{printable(module, 80)}.{printable(name, 80)}'"
        raise _RefusedError(
            f"it uses the function {shown}, which is no activation of Keras; if it is yours, register it with "
            "keras.saving.register_keras_serializable and say where it is with --import MODULE"
        )


def _screen_class(name: str, module: Any) -> None:
    shown = f"'{printable(name, 80)}'"
    if not isinstance(module, str) or module.split(".")[0] != "keras":
        where = f" (from '{printable(module, 80)}')" if module else ""
        raise _RefusedError(
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
        raise _RefusedError(f"it uses {shown} of '{printable(module, 80)}', which {version} does not have")
    if isinstance(cls, type) and issubclass(cls, DANGEROUS):
        raise _RefusedError(
            f"its layer {shown} carries code of its own that would run; if you know who made it, use --trust"
        )
    if not isinstance(cls, type) or not issubclass(cls, families):
        raise _RefusedError(f"it uses '{printable(module, 80)}.{printable(name, 80)}', which is no part of a model")


# ---- the weights -------------------------------------------------------------------------------------


def _screen_weights(content: io.BytesIO) -> int:
    """How many numbers a weights file stores, after a look at every object in it; no number is read."""
    try:
        with h5py.File(content, "r") as file:
            numbers = _screen_groups(file, content.getbuffer().nbytes)
    except _RefusedError:
        raise
    except Exception as error:  # h5py turns the library's errors into many types
        raise _RefusedError(f"its weights are damaged ({_sentence(error)}); copy the file again") from error
    finally:
        content.seek(0)
    return numbers


def _screen_groups(file: Any, size: int) -> int:
    seen: set[Any] = set()
    waiting = [file["/"]]
    numbers = declared = 0
    while waiting:
        group = waiting.pop()
        for key in group:
            shown = f"its weight '{printable(f'{group.name}/{key}'.lstrip('/'), 120)}'"
            link = group.get(key, getlink=True)
            if type(link) is not h5py.HardLink:
                raise _RefusedError(
                    f"{shown} is {LINKS.get(type(link), 'a link of an unknown kind')}, not a weight"
                )
            found = group[key]
            address = h5py.h5o.get_info(found.id).addr
            if address in seen:
                continue
            seen.add(address)
            if len(seen) > MAX_OBJECTS:
                raise _RefusedError(f"its weights have more than {MAX_OBJECTS} parts; no model needs that")
            if isinstance(found, h5py.Group):
                waiting.append(found)
            else:
                count = _screen_dataset(found, shown)
                numbers += count
                declared += count * found.dtype.itemsize
    if declared > max(SMALL, EXPANSION * size):
        raise _RefusedError(f"its weights say that they have {size_in_words(declared)} in {size_in_words(size)}")
    return numbers


def _screen_dataset(dataset: Any, shown: str) -> int:
    if not isinstance(dataset, h5py.Dataset):
        raise _RefusedError(f"{shown} is no array")
    if dataset.external or dataset.is_virtual:
        raise _RefusedError(f"{shown} is kept in another file")
    dtype = dataset.dtype
    # bfloat16 and 8-bit floats are stored as raw bytes.
    if not (dtype.kind in "biuf" or (dtype.kind == "c") or (dtype.kind == "V" and not dtype.fields)):
        raise _RefusedError(f"{shown} holds no numbers")
    if dtype.itemsize > 16 or dataset.shape is None:
        raise _RefusedError(f"{shown} holds no numbers")
    creation = dataset.id.get_create_plist()
    if any(creation.get_filter(i)[0] not in FILTERS for i in range(creation.get_nfilters())):
        raise _RefusedError(f"{shown} is compressed in a way that Keras does not use; save the model again")
    count = math.prod(map(int, dataset.shape))
    stored = int(dataset.id.get_storage_size())
    # A chunk is unpacked whole, however little of it is used.
    declared = max(count, math.prod(map(int, dataset.chunks or ()))) * int(dtype.itemsize)
    if declared > max(SMALL, EXPANSION * stored):
        raise _RefusedError(
            f"{shown} says that it has {size_in_words(declared)} but stores {size_in_words(stored)}, "
            "as a decompression bomb would"
        )
    return count


# ---- handing over to Keras ---------------------------------------------------------------------------


def _clean_copy(archive: _Archive) -> io.BytesIO:
    """An archive of what was screened, as it was understood."""
    copy = io.BytesIO()
    members = {METADATA: io.BytesIO(b"{}"), CONFIG: io.BytesIO(json.dumps(archive.config).encode())}
    members |= {WEIGHTS: archive.weights, **archive.assets}
    with zipfile.ZipFile(copy, "w") as target:
        for name, content in members.items():
            with target.open(name, "w", force_zip64=True) as stream:
                stream.write(content.getbuffer())
            content.close()
    copy.seek(0)
    return copy


@final
class _Budget(list[Any]):
    """Keras' list of the variables that were declared and not made yet, with a limit to their size."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.total = 0

    @property
    def is_exceeded(self) -> bool:
        return self.total > self.limit

    def append(self, variable: Any) -> None:
        self.total += math.prod(map(int, variable.shape))
        if self.is_exceeded:  # before anything else can ask for a value of it
            raise _RefusedError("too many parameters")
        super().append(variable)


def _screen_size(archive: _Archive, customs: Mapping[str, Any], stored: int, uses_customs: bool) -> None:
    """Refuse a configuration that asks for far more parameters than the file stores.

    Keras would make them all, with random numbers, before it looks at the stored ones. So the model is made
    once without values: in a stateless scope, variables are only declared.
    """
    key = "uninitialized_variables"
    before = global_state.get_global_attribute(key)
    budget = _Budget(4 * stored + UNSTORED)
    failure: Exception | None = None
    global_state.set_global_attribute(key, budget)
    try:
        with keras.StatelessScope(initialize_variables=False), SafeModeScope(True), ObjectSharingScope():
            # Keras consumes what it is given.
            config = json.loads(json.dumps(archive.config))
            keras.saving.deserialize_keras_object(config, custom_objects=dict(customs), safe_mode=True)
    except Exception as error:
        failure = error
    finally:
        global_state.set_global_attribute(key, before)
    if budget.is_exceeded:
        raise _RefusedError(
            f"its layers ask for at least {budget.total:,} parameters, but its weights hold {stored:,} numbers"
        )
    # A custom layer may need values to be built, and is known not to be hostile.
    if failure is not None and not uses_customs:
        raise _RefusedError(_not_loaded(failure, archive.written_by)) from failure


def _load(copy: io.BytesIO, written_by: str, customs: Mapping[str, Any], trust: bool) -> Any:
    try:
        # Whatever this process has switched on for itself is not for this file.
        with SafeModeScope(not trust):
            return saving_lib.load_model(copy, custom_objects=dict(customs), compile=False, safe_mode=not trust)
    except Exception as error:
        raise _RefusedError(_not_loaded(error, written_by)) from error


def _not_loaded(error: Exception, written_by: str) -> str:
    version = re.fullmatch(r"(\d+)\.(\d+)[\w.+-]{0,20}", written_by)
    newer = ""
    if version:
        here = tuple(map(int, keras.__version__.split(".")[:2]))
        if (int(version[1]), int(version[2])) > here:
            newer = f"; it was written by Keras {written_by}, this is Keras {keras.__version__}"
    return f"Keras cannot load it ({_sentence(error)}){newer}"


def _sentence(error: Exception) -> str:
    """What an exception says, in one line, without the configurations that Keras quotes."""
    text = str(error)
    layer = re.search(r"Example error message for object (.*?):\n\n(.*)", text, re.DOTALL)
    if layer:
        text = f"{layer[1]}: {layer[2]}"
    # Behind all of a configuration, which may be megabytes.
    text = text.rpartition("Exception encountered:")[2].lstrip()[:2000]
    text = re.split(r"Full (?:object )?config:|config=\{|The following nodes failed", text)[0]
    line = text.partition("\n")[0].strip().rstrip(".,:")
    if len(line) > SENTENCE:
        line = line[:SENTENCE] + "..."
    return printable(line or type(error).__name__, 2 * SENTENCE)
