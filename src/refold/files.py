"""Files that someone else may have made: opened with care, written whole or not at all.

Knows no framework and no model format.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from refold.errors import InputError
from refold.shown import printable

# Not every system has them.
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_DIRECTORY = getattr(os, "O_DIRECTORY", 0)

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def size_in_words(size: int) -> str:
    """A number of bytes for people.

    >>> size_in_words(3 * 2**29)
    '1.5 GiB'
    """
    if size < 1024:
        return f"{size} bytes"
    power = min((size.bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{size / 1024**power:.1f} {_UNITS[power]}"


def open_regular(path: str | os.PathLike[str], max_size: int | None = None) -> BinaryIO:
    """Open a file for reading, if it is one: a regular, readable file that is not empty.

    Never waits: a pipe without a writer is refused, not opened. The size is that of the opened file, not of
    what the name meant a moment before. Symbolic links are followed.

    Raises:
        InputError: there is no such file, it is a folder, pipe, socket or device, it may not be read, it is
            empty, or it is larger than ``max_size`` bytes.
    """
    shown = printable(path)
    try:
        # Opening a device can have effects (a tape rewinds), so look first; and look again at what was
        # opened, because the name may mean something else by then.
        _refuse_irregular(shown, os.stat(path))
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | _NONBLOCK | _BINARY)
    except FileNotFoundError as error:
        raise InputError(f"{shown}: there is no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{shown}: it cannot be opened ({_reason(error)})") from error
    file = os.fdopen(descriptor, "rb")
    try:
        status = os.fstat(descriptor)
        _refuse_irregular(shown, status)
        if status.st_size == 0:
            raise InputError(f"{shown}: the file is empty")
        if max_size is not None and status.st_size > max_size:
            raise InputError(
                f"{shown}: the file has {size_in_words(status.st_size)}, "
                f"which is more than the {size_in_words(max_size)} that are read at most"
            )
    except BaseException:
        file.close()
        raise
    return file


def _refuse_irregular(shown: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((words for test, words in _KINDS if test(status.st_mode)), "something special")
        raise InputError(f"{shown}: this is {kind}, not a file")


def _reason(error: Exception) -> str:
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(words.lower())


def write_atomically(
    path: str | os.PathLike[str],
    write: Callable[[Path], None],
    *,
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> None:
    """Make a file at ``path`` with what ``write`` writes, whole or not at all.

    ``write`` is given the path of a new, empty file in the same folder, with the same ending, and fills it.
    Only when that is on the disk does it take the place of ``path``; whatever happens before (an exception,
    Ctrl-C, a full disk) leaves what was there as it was and no temporary file behind. A killed process or a
    power cut may leave a file ``.refold-...`` beside it, never half a file at ``path``.

    A file that is replaced keeps its mode, and a symbolic link keeps being one: what it points to is
    replaced. A new file gets the mode that the umask says.

    Args:
        path: where the file goes.
        write: fills the file whose path it is given.
        overwrite: whether ``path`` may be replaced if it exists.
        inputs: files that are being read: refused as ``path``, under whatever name, unless ``overwrite``.

    Raises:
        InputError: ``path`` exists and ``overwrite`` is not set, is not a regular file, or cannot be written.
            What ``write`` raises comes through, but for OSError.
    """
    write_together({Path(path): write}, overwrite=overwrite, inputs=inputs)


def write_together(
    writers: Mapping[Path, Callable[[Path], None]],
    *,
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> None:
    """Make several files as :func:`write_atomically` makes one: none takes its place before all are on the disk.

    They take their places in the order given, so the last can be an index of the others. Raises InputError.
    """
    with ExitStack() as undo:
        waiting = [_prepare(path, write, overwrite, inputs, undo) for path, write in writers.items()]
        for temporary, target, shown in waiting:
            with _writing(shown):
                if overwrite:
                    os.replace(temporary, target)
                else:
                    _publish(temporary, target, shown)
        for folder in {target.parent for _, target, _ in waiting}:
            with suppress(OSError):  # not every file system can
                _flush(folder, os.O_RDONLY | _DIRECTORY)


def _prepare(
    path: Path,
    write: Callable[[Path], None],
    overwrite: bool,
    inputs: Sequence[str | os.PathLike[str]],
    undo: ExitStack,
) -> tuple[Path, Path, str]:
    """Write a temporary file, which ``undo`` removes; it, where it goes, and what that is called in errors."""
    shown = printable(path)
    try:
        target, old = _target(path, shown, overwrite, inputs)
    except (OSError, ValueError) as error:
        raise InputError(f"{shown}: it cannot be written ({_reason(error)})") from error
    # Private until it is whole if the old one was; the process' umask takes care of a new one.
    mode = 0o666 if old is None else 0o600
    temporary = target.with_name(f".refold-{secrets.token_hex(8)}{target.suffix}")
    undo.callback(_remove, temporary)
    with _writing(shown):
        os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
        write(temporary)
        if old is not None:
            os.chmod(temporary, old)
        _flush(temporary, os.O_RDWR)
    return temporary, target, shown


@contextmanager
def _writing(shown: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{shown}: it cannot be written ({_reason(error)}); what was there before is unchanged"
        ) from error


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _target(
    path: Path, shown: str, overwrite: bool, inputs: Sequence[str | os.PathLike[str]]
) -> tuple[Path, int | None]:
    """What ``path`` stands for, and the mode of the file that is there."""
    if "\0" in str(path):
        raise ValueError("there is a NUL in the name")
    if not os.path.lexists(path):
        if not path.parent.is_dir():
            raise InputError(f"{shown}: the folder '{printable(path.parent)}' does not exist; make it first")
        return path.parent.resolve() / path.name, None
    if not overwrite:
        for other in inputs:
            if os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other):
                raise InputError(
                    f"{shown}: this is the file that is being read; choose another name for the result"
                )
        raise InputError(f"{shown}: the file exists already; choose another name, or overwrite it with --force")
    target = path.resolve()
    try:
        status = target.stat()
    except FileNotFoundError:  # a link to nowhere
        return target, None
    _refuse_irregular(shown, status)
    return target, stat.S_IMODE(status.st_mode) & 0o777


def _publish(temporary: Path, target: Path, shown: str) -> None:
    """Give a file its name, unless another took the name in the meantime."""
    try:
        os.link(temporary, target)  # unlike a rename, this fails if the name is taken
    except FileExistsError as error:
        raise InputError(f"{shown}: the file was made by someone else in the meantime") from error
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise InputError(f"{shown}: the file was made by someone else in the meantime") from None
        os.replace(temporary, target)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
