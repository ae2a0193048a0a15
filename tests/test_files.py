"""Files of any kind: what is opened, and what is written whatever goes wrong."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import refold
from refold.files import open_regular, size_in_words, write_atomically
from refold.shown import printable
from refusing import refused

SOURCE = str(Path(refold.__file__).parents[1])


def content(text: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(text)

    return write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("conv2d_1", "conv2d_1"),
        ("größe 3×3", "größe 3×3"),
        ("<script>../../etc", "<script>../../etc"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\nb\r\tc\0", "a\\x0ab\\x0d\\x09c\\x00"),
        ("gnp\u202egpj", "gnp\\u202egpj"),
        ("zero\u200bwidth", "zero\\u200bwidth"),
        ("\x9b31m", "\\x9b31m"),
        ("\udcff", "\\udcff"),
        ("\u2028", "\\u2028"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_printable_shows_every_character_that_does_something_as_an_escape(name: str, shown: str) -> None:
    assert printable(name) == shown
    assert printable(name).isprintable()


def test_printable_shortens_a_name_of_a_megabyte() -> None:
    shown = printable("a" * 500_000 + "\x1b" * 500_000)
    assert shown.startswith("aaa")
    assert "999800 more characters" in shown
    assert len(shown) < 1000
    assert shown.isprintable()


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (3 * 2**29, "1.5 GiB"), (2**200, "EiB")],
)
def test_sizes_in_words(size: int, words: str) -> None:
    assert size_in_words(size).endswith(words)


# ---- opening -----------------------------------------------------------------------------------------


def test_a_regular_file_is_opened_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"weights")
    (tmp_path / "link").symlink_to("model")
    for name in ("model", "link"):
        with open_regular(tmp_path / name, max_size=7) as file:
            assert file.read() == b"weights"


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "big").write_bytes(b"x" * 2000)
    (tmp_path / "nowhere").symlink_to("missing")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "hidden").write_bytes(b"x")
    (tmp_path / "hidden").chmod(0)
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path)  # a socket's path must be short
        try:
            server.bind("socket")
        finally:
            os.chdir(here)
        cases = {
            str(tmp_path): "a folder",
            str(tmp_path / "fifo"): "a pipe",
            str(tmp_path / "socket"): "a socket",
            "/dev/zero": "a device",
            "/dev/null": "a device",
            str(tmp_path / "empty"): "empty",
            str(tmp_path / "big"): "2.0 KiB",
            str(tmp_path / "missing"): "no such file",
            str(tmp_path / "nowhere"): "no such file",
            str(tmp_path / "loop"): "cannot be opened",
            str(tmp_path / "a\0b"): "a\\x00b",
            str(tmp_path / "\x1b[2J"): "\\x1b[2J",
        }
        if os.geteuid() != 0:
            cases[str(tmp_path / "hidden")] = "permission"
        before = time.monotonic()
        for path, fragment in cases.items():
            with refused(fragment):
                open_regular(path, max_size=1000)
        assert time.monotonic() - before < 1


# ---- writing -----------------------------------------------------------------------------------------


def test_a_new_file_gets_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    target = tmp_path / "model.keras"
    before = os.umask(0o027)
    try:
        write_atomically(target, content(b"new"))
    finally:
        os.umask(before)
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert names(tmp_path) == ["model.keras"]


def test_the_temporary_file_is_in_the_same_folder_with_the_same_ending(tmp_path: Path) -> None:
    seen: list[Path] = []

    def write(path: Path) -> None:
        seen.append(path)
        path.write_bytes(b"new")

    write_atomically(tmp_path / "model.keras", write)
    assert seen[0].parent == tmp_path
    assert seen[0].suffix == ".keras"
    assert seen[0].name != "model.keras"


def test_an_existing_file_is_only_replaced_on_request_and_keeps_its_mode(tmp_path: Path) -> None:
    target = tmp_path / "model.keras"
    target.write_bytes(b"old")
    target.chmod(0o604)
    with refused("exists already", "--force"):
        write_atomically(target, content(b"new"))
    assert target.read_bytes() == b"old"

    def write(path: Path) -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600  # not open to all while it is written
        path.write_bytes(b"new")

    write_atomically(target, write, overwrite=True)
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o604
    assert names(tmp_path) == ["model.keras"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("exists", [False, True])
def test_an_exception_while_writing_leaves_everything_as_it_was(
    tmp_path: Path, error: type[BaseException], exists: bool
) -> None:
    target = tmp_path / "model.keras"
    if exists:
        target.write_bytes(b"old")

    def write(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    with pytest.raises(error):
        write_atomically(target, write, overwrite=True)
    assert names(tmp_path) == (["model.keras"] if exists else [])
    assert not exists or target.read_bytes() == b"old"


def test_an_error_of_the_system_is_told_in_a_sentence(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with refused("model.keras", "no space left on device", "unchanged"):
        write_atomically(tmp_path / "model.keras", write)
    assert names(tmp_path) == []


def test_a_symbolic_link_stays_one_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "model.keras").write_bytes(b"old")
    (tmp_path / "link.keras").symlink_to("real/model.keras")
    write_atomically(tmp_path / "link.keras", content(b"new"), overwrite=True)
    assert (tmp_path / "link.keras").is_symlink()
    assert (tmp_path / "real" / "model.keras").read_bytes() == b"new"
    assert names(tmp_path / "real") == ["model.keras"]


def test_a_link_to_nowhere_counts_as_existing(tmp_path: Path) -> None:
    (tmp_path / "link.keras").symlink_to("later.keras")
    with refused("exists already"):
        write_atomically(tmp_path / "link.keras", content(b"new"))
    write_atomically(tmp_path / "link.keras", content(b"new"), overwrite=True)
    assert (tmp_path / "later.keras").read_bytes() == b"new"


def test_the_file_that_is_read_is_refused_under_every_name(tmp_path: Path) -> None:
    source = tmp_path / "model.keras"
    source.write_bytes(b"old")
    (tmp_path / "soft.keras").symlink_to("model.keras")
    os.link(source, tmp_path / "hard.keras")
    for name in ("model.keras", "soft.keras", "hard.keras", "../" + tmp_path.name + "/model.keras"):
        with refused("is being read"):
            write_atomically(tmp_path / name, content(b"new"), inputs=[tmp_path / "other.keras", source])
    assert source.read_bytes() == b"old"
    write_atomically(tmp_path / "hard.keras", content(b"new"), overwrite=True, inputs=[source])
    assert source.read_bytes() == b"old"  # a new file took the place of the second name
    write_atomically(source, content(b"new"), overwrite=True, inputs=[source])
    assert source.read_bytes() == b"new"


def test_what_is_no_file_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for path, fragment in {
        tmp_path / "fifo": "a pipe",
        tmp_path / "folder": "a folder",
        tmp_path / "missing" / "model.keras": "does not exist",
        tmp_path / "a\0b": "a\\x00b",
        tmp_path / ("x" * 300): "cannot be written",
    }.items():
        with refused(fragment):
            write_atomically(path, content(b"new"), overwrite=True)
    assert names(tmp_path) == ["fifo", "folder"]


def test_a_file_that_appears_in_the_meantime_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "model.keras"

    def write(path: Path) -> None:
        path.write_bytes(b"new")
        target.write_bytes(b"somebody else's")

    with refused("in the meantime"):
        write_atomically(target, write)
    assert target.read_bytes() == b"somebody else's"
    assert names(tmp_path) == ["model.keras"]


def child(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {SOURCE!r})\n{code}", *arguments]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "model.keras"
    target.write_bytes(b"old")
    code = """
import resource
from refold.errors import InputError
from refold.files import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically(sys.argv[1], lambda path: path.write_bytes(b"x" * 5000), overwrite=True)
except InputError as error:
    print(error)
"""
    ran = subprocess.run(child(code, str(target)), capture_output=True, text=True, check=True)
    assert "cannot be written" in ran.stdout
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["model.keras"]


def test_a_killed_process_leaves_a_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "model.keras"
    target.write_bytes(b"0" * 1_000_000)
    code = """
from refold.files import write_atomically
print("ready", flush=True)
for turn in range(10**9):
    write_atomically(sys.argv[1], lambda path: path.write_bytes(b"%d" % (turn % 10) * 1_000_000), overwrite=True)
"""
    for wait in (0.05, 0.11, 0.17):
        with subprocess.Popen(child(code, str(target)), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
        found = target.read_bytes()
        assert len(found) == 1_000_000
        assert len(set(found)) == 1
        assert all(name == "model.keras" or name.startswith(".refold-") for name in names(tmp_path))
