"""Safetensors checkpoints converted from file to file: headers first, then rows, a few at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

from refold.checkpoints.dtypes import Spec
from refold.checkpoints.header import Entry, layout
from refold.checkpoints.plan import Plan, Step, Wish, made_by, make_plan
from refold.checkpoints.run import run
from refold.checkpoints.shards import SINGLE, Checkpoint, open_checkpoint
from refold.errors import InputError
from refold.files import size_in_words, write_together
from refold.shown import printable


@final
@dataclass(frozen=True, slots=True)
class _File:
    """A file that tensors are written into, each at its place."""

    descriptor: int
    entries: Mapping[str, Entry]

    def write(self, name: str, start: int, data: bytes | memoryview) -> None:
        """These bytes of a tensor, from the byte ``start`` of it."""
        at = self.entries[name].start + start
        view = memoryview(data)
        while view:
            done = os.pwrite(self.descriptor, view, at)
            view, at = view[done:], at + done


def convert_stream(
    source: Path,
    target: Path,
    wish: Wish,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Convert a safetensors checkpoint to one file, or, if ``target`` is a folder or has no ending, to as many
    files as it has, with the index last. ``progress`` is told the bytes that are done, and all of them.

    No more than a few MiB are in memory, however large the tensors are, unless one row is.

    Raises:
        InputError: the source is not as it must be, its weights cannot become what is wished for, the target exists
            and ``overwrite`` is not set, is a file of the source, or cannot be written. Nothing is written then.
    """
    with ExitStack() as stack:
        checkpoint = open_checkpoint(source, stack)
        with _named(source):
            plan = make_plan(checkpoint.specs, wish)
        single = target.name.endswith(SINGLE)
        outputs = [target] if single else _folder_targets(target, checkpoint)
        index = None if single or checkpoint.index is None else target / checkpoint.index[0]
        _refuse_inputs([*outputs, *([] if index is None else [index])], source, checkpoint)
        parts = _by_file(plan, checkpoint, single)
        told = _teller(checkpoint, progress)
        writers: dict[Path, Callable[[Path], None]] = {}
        specs_of: dict[Path, Mapping[str, Spec]] = {}
        for number, steps in parts.items():
            specs_of[outputs[number]] = specs = {n: plan.specs[n] for step in steps for n in made_by(step)}
            metadata = checkpoint.shards[number].header.metadata
            writers[outputs[number]] = _writer(source, checkpoint, steps, specs, metadata, told)
        folder = target.parent if single else target
        made_folder = not single and not folder.exists()
        _check_space(folder, sum(spec.size for spec in plan.specs.values()))
        if index is not None:
            writers[index] = _index_writer(checkpoint, specs_of)
        try:
            if made_folder:
                folder.mkdir()
            write_together(writers, overwrite=overwrite, inputs=checkpoint.paths)
        except BaseException as error:
            if made_folder and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
            if isinstance(error, OSError):
                raise InputError(f"{printable(folder)}: this folder cannot be made ({error.strerror})") from error
            raise
        return plan


def _folder_targets(target: Path, checkpoint: Checkpoint) -> list[Path]:
    shown = printable(target)
    if target.suffix and not target.is_dir():
        raise InputError(f"{shown}: the result is safetensors; give a name that ends in .safetensors, or a folder")
    if target.exists() and not target.is_dir():
        raise InputError(f"{shown}: the result is several files, and this is no folder; choose another name")
    if not target.absolute().parent.is_dir():
        raise InputError(f"{shown}: there is no folder {printable(target.absolute().parent)}; make it first")
    return [target / shard.name for shard in checkpoint.shards]


def _refuse_inputs(outputs: list[Path], source: Path, checkpoint: Checkpoint) -> None:
    inputs = [*checkpoint.paths, *([source] if source.is_file() else [])]
    for output in outputs:
        if output.exists() and any(output.samefile(path) for path in inputs):
            raise InputError(
                f"{printable(output)}: this is a file that is being read; choose another name for the result"
            )


def _by_file(plan: Plan, checkpoint: Checkpoint, single: bool) -> dict[int, list[Step]]:
    """The steps by the file that they write: that of the tensor which the result is made of."""
    parts: dict[int, list[Step]] = {}
    for step in plan.steps:
        parts.setdefault(0 if single else checkpoint.homes[step.home], []).append(step)
    return parts or {0: []}


def _teller(checkpoint: Checkpoint, progress: Callable[[int, int], None] | None) -> Callable[[int], None] | None:
    if progress is None:
        return None
    total = sum(spec.size for spec in checkpoint.specs.values())
    done = 0

    def tell(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    return tell


@contextmanager
def _named(source: Path) -> Iterator[None]:
    """Errors about tensors say of which checkpoint."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{printable(source)}: {error}") from error


def _writer(
    source: Path,
    checkpoint: Checkpoint,
    steps: list[Step],
    specs: Mapping[str, Spec],
    metadata: Mapping[str, str],
    told: Callable[[int], None] | None,
) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        header, entries, size = layout(specs, metadata)
        with path.open("r+b") as file:
            file.write(header)
            file.truncate(size)
            file.flush()
            with _named(source):
                run(steps, checkpoint, _File(file.fileno(), entries), told)

    return write


def _index_writer(checkpoint: Checkpoint, specs_of: Mapping[Path, Mapping[str, Spec]]) -> Callable[[Path], None]:
    rest = dict(checkpoint.index[1]) if checkpoint.index is not None else {}
    metadata = rest.get("metadata")
    total = sum(spec.size for specs in specs_of.values() for spec in specs.values())
    rest["metadata"] = (metadata if isinstance(metadata, dict) else {}) | {"total_size": total}
    rest["weight_map"] = dict(sorted((name, path.name) for path, specs in specs_of.items() for name in specs))

    def write(path: Path) -> None:
        path.write_text(json.dumps(rest, indent=2) + "\n", encoding="utf-8")

    return write


def _check_space(folder: Path, size: int) -> None:
    around = folder if folder.is_dir() else folder.absolute().parent
    if around.is_dir() and (free := shutil.disk_usage(around).free) < size:
        raise InputError(
            f"{printable(folder)}: the result has {size_in_words(size)}, and {size_in_words(free)} are free there"
        )
