"""No write loses a file: what is in the way, what stays, modes, links, a full disk, kill -9."""

import contextlib
import errno
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from minillm import files, swap


def tree(path):
    """{name: text} of all files below a directory."""
    return {str(p.relative_to(path)): p.read_text() for p in sorted(path.rglob("*")) if p.is_file()}


def made(path, **named):
    """A directory with these files (`_` in a name stands for a dot)."""
    path.mkdir(parents=True, exist_ok=True)
    for name, text in named.items():
        (path / name.replace("_", ".")).write_text(text)
    return path


def test_what_is_in_the_way_is_said_before_the_work(tmp_path):
    made(tmp_path / "full", a_txt="a", b_txt="b", c_txt="c", d_txt="d")
    made(tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    for name in ("new", "empty", "new/deep/deeper"):
        files.check_writable(tmp_path / name, directory=True)
    files.check_writable(tmp_path / "new" / "file")
    for name, options, kind, message in [
        ("full", dict(directory=True), FileExistsError,
         "full holds a.txt, b.txt, c.txt and 1 more.*force=True"),
        ("file", {}, FileExistsError,
         "file exists: choose another path, or replace it with force=True"),
        ("file", dict(directory=True, force=True), NotADirectoryError,
         "file is a file, and a directory is"),
        ("full", dict(force=True), IsADirectoryError, "full is a directory, and a file is"),
        ("file/new", {}, NotADirectoryError, "cannot be written: .*file is not a directory"),
    ]:
        with pytest.raises(kind, match=message) as error:
            files.check_writable(tmp_path / name, **options)
        assert str(error.value).count(str(tmp_path / name)) == 1
    files.check_writable(tmp_path / "file", force=True)
    files.check_writable(tmp_path / "full", directory=True, force=True)
    files.check_writable(tmp_path / "full", directory=True,
                         own={"a.txt", "b.txt", "c.txt", "d.txt"})
    with pytest.raises(FileExistsError, match="full holds c.txt, d.txt, which .*never replaces it"):
        files.check_writable(tmp_path / "full", directory=True, force=True, own={"a.txt"},
                             needs="[acd].txt")


def test_a_device_a_mount_point_and_the_current_directory_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="/dev/null is neither a file nor a directory"):
        files.check_writable("/dev/null", force=True)
    with pytest.raises(FileExistsError, match="/proc is a mount point"):
        files.check_writable("/proc", directory=True, force=True)
    monkeypatch.chdir(made(tmp_path / "here" / "below"))
    for path in (".", "..", "/"):
        with pytest.raises(FileExistsError, match=" is the current directory or one above it"):
            files.check_writable(path, directory=True, force=True)
    files.check_writable("new", directory=True)


def test_a_directory_without_permission_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(PermissionError, match=f"no permission to write in {tmp_path}"):
        files.check_writable(tmp_path / "a" / "b")


def test_a_directory_that_takes_no_file_is_named(tmp_path):
    before = os.listdir(tmp_path)
    files.check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == before
    with pytest.raises(OSError, match="^/proc/a/z cannot be written: /proc takes no new file \\("):
        files.check_writable("/proc/a/z")


def test_a_directory_is_replaced_and_what_others_wrote_stays(tmp_path):
    old = made(tmp_path / "d", own_txt="old", stale_txt="old", notes_txt="mine")
    made(old / "sub" / "deep", deep_txt="mine too")
    made(old / "empty")
    (old / "link").symlink_to("notes.txt")
    (old / "sublink").symlink_to("sub")
    inode = (old / "notes.txt").stat().st_ino
    with files.atomic(old, own={"own.txt", "stale.txt"}) as new:
        made(new, own_txt="new")
    assert tree(old) == {"own.txt": "new", "notes.txt": "mine", "sub/deep/deep.txt": "mine too",
                         "link": "mine"}
    assert ((old / "link").is_symlink() and (old / "sublink").is_symlink()
            and (old / "empty").is_dir())
    assert (old / "notes.txt").stat().st_ino == inode, "it is the same file, not a copy"
    assert os.listdir(tmp_path) == ["d"]


def test_what_minillm_did_not_write_is_never_replaced_in_a_directory(tmp_path):
    old = made(tmp_path / "d", own_txt="theirs")
    with pytest.raises(FileExistsError, match="own.txt is in the way: minillm did not write it"):
        with files.atomic(old) as new:
            made(new, own_txt="new")
    assert tree(old) == {"own.txt": "theirs"} and os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize("exchange", [True, False])
def test_what_comes_into_a_directory_during_the_save_stays(tmp_path, monkeypatch, exchange):
    old, real = made(tmp_path / "d", own_txt="old"), swap.exchange

    def late(a, b):
        (old / "late.txt").write_text("just now")
        return exchange and real(a, b)

    monkeypatch.setattr(swap, "exchange", late)
    with files.atomic(old, own={"own.txt"}) as new:
        made(new, own_txt="new")
    assert tree(old) == {"own.txt": "new", "late.txt": "just now"}


def test_a_file_that_cannot_get_a_second_name_is_named(tmp_path, monkeypatch):
    old = made(tmp_path / "d", notes_txt="mine")

    def refused(*args, **options):
        raise PermissionError(errno.EPERM, "Operation not permitted", *map(str, args))

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(PermissionError, match="hard link.*d/notes.txt'$"), files.atomic(old) as new:
        made(new, own_txt="new")
    assert tree(old) == {"notes.txt": "mine"} and os.listdir(tmp_path) == ["d"]


def test_two_directories_change_places_in_one_step(tmp_path):
    a, b = made(tmp_path / "a", a="a"), made(tmp_path / "b", b="b")
    if not swap.exchange(a, b):
        pytest.skip("this file system cannot")
    assert os.listdir(a) == ["b"] and os.listdir(b) == ["a"]


def test_a_file_never_takes_the_place_of_a_directory_nor_the_other_way_round(tmp_path):
    made(tmp_path / "d", a_txt="a"), (tmp_path / "f").write_text("mine")
    with pytest.raises(FileExistsError, match="d is a directory, and a file was to be written"):
        with files.atomic(tmp_path / "d") as new:
            new.write_text("file")
    with pytest.raises(FileExistsError, match="f is a file, and a directory was to be written"):
        with files.atomic(tmp_path / "f") as new:
            made(new, a_txt="a")
    assert tree(tmp_path) == {"d/a.txt": "a", "f": "mine"}


def test_symbolic_links_are_written_through(tmp_path):
    made(tmp_path / "there", own_txt="old", notes_txt="mine")
    (tmp_path / "d").symlink_to("there")
    (tmp_path / "f").symlink_to("there/notes.txt")
    (tmp_path / "nowhere").symlink_to("new.txt")
    (tmp_path / "circle").symlink_to("circle")
    with files.atomic(tmp_path / "d", own={"own.txt"}) as new:
        made(new, own_txt="new")
    for name in ("f", "nowhere"):
        with files.atomic(tmp_path / name) as new:
            new.write_text("written")
    assert all((tmp_path / name).is_symlink() for name in ("d", "f", "nowhere"))
    assert tree(tmp_path / "there") == {"own.txt": "new", "notes.txt": "written"}
    assert (tmp_path / "new.txt").read_text() == "written"
    with pytest.raises(FileExistsError, match="circle is a symbolic link that leads in a circle"):
        files.check_writable(tmp_path / "circle")


def mode(path):
    return path.stat().st_mode & 0o777


def test_files_get_the_mode_of_the_umask_and_keep_their_own(tmp_path):
    tensors = {"a": torch.zeros(3)}
    before = os.umask(0o027)
    try:
        with files.atomic(tmp_path / "f") as new:
            safetensors.torch.save_file(tensors, new)  # 0600
        with files.atomic(tmp_path / "d") as new:
            safetensors.torch.save_file(tensors, made(new) / "x.safetensors")
        assert mode(tmp_path / "f") == mode(tmp_path / "d" / "x.safetensors") == 0o640
        assert mode(tmp_path / "d") == 0o750
        (tmp_path / "f").chmod(0o604), (tmp_path / "d").chmod(0o705)
        (tmp_path / "d" / "x.safetensors").chmod(0o444)
        with files.atomic(tmp_path / "f") as new:
            safetensors.torch.save_file(tensors, new)
        with files.atomic(tmp_path / "d", own={"x.safetensors"}) as new:
            safetensors.torch.save_file(tensors, made(new) / "x.safetensors")
        assert (mode(tmp_path / "f"), mode(tmp_path / "d")) == (0o604, 0o705)
        assert mode(tmp_path / "d" / "x.safetensors") == 0o444
    finally:
        os.umask(before)


@contextlib.contextmanager
def full_disk(limit=4096):
    """Writes beyond `limit` bytes of a file fail, as on a full disk."""
    heard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, heard)


WRITES = {
    "safetensors": lambda new: safetensors.torch.save_file({"a": torch.zeros(9999)}, new),
    "numpy": lambda new: torch.zeros(9999).numpy().tofile(open(new, "wb")),
    "text": lambda new: new.write_text("a" * 9999),
}


@pytest.mark.filterwarnings("ignore:unclosed file")
@pytest.mark.parametrize("write", WRITES)
def test_a_full_disk_is_one_line_that_names_the_path_once(tmp_path, write):
    path = tmp_path / "f"
    path.write_text("old")
    with full_disk(), pytest.raises(OSError) as error:
        with files.atomic(path) as new:
            WRITES[write](new)
    said = str(error.value)
    assert said.count(str(path)) == 1 and "\n" not in said and "/." not in said
    assert "disk is full" in said if write == "numpy" else error.value.errno == errno.EFBIG
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]


def test_other_errors_of_a_write_name_the_path_and_no_temporary_one(tmp_path, monkeypatch):
    def denied(**options):
        raise PermissionError(errno.EACCES, "Permission denied", str(options["dir"] / ".f.abc"))

    monkeypatch.setattr(files.tempfile, "mkdtemp", denied)
    with pytest.raises(PermissionError) as error, files.atomic(tmp_path / "f"):
        pass
    assert str(error.value) == f"[Errno 13] Permission denied: '{tmp_path / 'f'}'"
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="elsewhere"), files.atomic(tmp_path / "f"):
        open("elsewhere")
    with pytest.raises(safetensors.SafetensorError), files.atomic(tmp_path / "f"):
        safetensors.torch.load(b"")


def test_a_name_of_the_longest_length_can_be_written(tmp_path):
    for name in ("a" * 255, "\u00e4" * 127):
        with files.atomic(tmp_path / name) as new:
            new.write_text("a")
        assert (tmp_path / name).read_text() == "a"


KILLED = """
import itertools, pathlib, sys
from minillm import files, swap
for i in itertools.count():
    with files.atomic(sys.argv[1], own={"own.txt"}) as new:
        new.mkdir()
        (new / "own.txt").write_text("x" * 1000 + str(i))
    print(i, flush=True)
"""


def test_a_process_killed_at_any_moment_leaves_one_whole_directory(tmp_path):
    old = made(tmp_path / "d", own_txt="x" * 1000 + "old", notes_txt="mine")
    if not swap.exchange(made(tmp_path / "a"), made(tmp_path / "b")):
        pytest.skip("this file system cannot exchange two directories in one step")
    for _ in range(3):  # a stale temporary directory blocks nothing
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(old)], stdout=subprocess.PIPE)
        for _ in range(2):
            process.stdout.readline()
        process.kill(), process.wait(), process.stdout.close()
        assert set(os.listdir(old)) == {"own.txt", "notes.txt"}
        assert ((old / "own.txt").read_text().startswith("x" * 1000)
                and (old / "notes.txt").read_text() == "mine")


@pytest.mark.parametrize("text, message", [
    ('{"a": "\\ud800"}', r"holds '\\ud800', which is half of a character"),
    ('{"\\udfff": 1}', "half of a character"),
    ("[1]", "holds list, not an object"), ("{", "not whole JSON"),
    ("[" * 100_000, "not whole JSON"), ("\xff", "not whole JSON")])
def test_json_that_is_no_object_of_texts_is_one_line(tmp_path, text, message):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        files.read_json(tmp_path / "a.json")
    assert ("a.json" in str(error.value) and str(error.value).encode()
            and "\n" not in str(error.value))
    (tmp_path / "a.json").write_text(json.dumps({"a": "\U0001f600"}))
    assert files.read_json(tmp_path / "a.json") == {"a": "\U0001f600"}


def test_only_linux_is_asked_to_exchange(tmp_path, monkeypatch):
    a, b = made(tmp_path / "a", x="a"), made(tmp_path / "b", x="b")
    monkeypatch.setattr(swap.sys, "platform", "darwin")
    assert not swap.exchange(a, b)


def test_names_that_are_relative_are_exchanged(tmp_path, monkeypatch):
    """From the directory in which the program runs, which AT_FDCWD says."""
    made(tmp_path / "a", own_txt="a"), made(tmp_path / "b", own_txt="b")
    if not swap.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange two directories in one step")
    monkeypatch.chdir(tmp_path)
    assert swap.exchange(pathlib.Path("a"), pathlib.Path("b"))
    assert (tmp_path / "a" / "own.txt").read_text() == "a", "twice is as before"
