"""Atomic writes that never lose a file; also JSON, checksums, locks and optional packages.

A program that dies in the middle of a save must leave the old file as it was. So everything that
`minillm` writes goes to a temporary name in the same directory, is flushed to the disk, and is then
renamed: a rename within one file system is atomic.

Three rules protect the user's files:

    1. `check_writable` finds what is in the way, and callers run it before their work.
    2. A file never replaces a directory, and a directory never replaces a file.
    3. A directory is replaced as a whole, and files in it that minillm did not write stay: the new
       directory gets hard links to them before the two directories change places.
"""

import contextlib
import hashlib
import importlib
import json
import os
import pathlib
import re
import shutil
import stat
import tempfile

import safetensors

from minillm.swap import flush, others, swap

# --- before the work: what is in the way -----------------------------------------------------


def check_writable(path, directory=False, force=False, own=(), needs=None):
    """Raise the error that a later write of `path` would meet; write nothing that stays.

    directory: whether `path` is to be a directory, not a file. force: an existing file may be
    replaced, and a directory that holds other files may be written to. own: names in the existing
    directory that minillm wrote and may replace. needs: a regular expression for the names that
    the write uses; a file with such a name that is not in `own` is an error even with force.

    FileExistsError, which names what is in the way; IsADirectoryError or NotADirectoryError if
    `path` is of the other kind; PermissionError if the directory above cannot be written.
    """
    path, wanted = behind_links(path), "a directory" if directory else "a file"
    if not os.path.lexists(path):
        return check_above(path)
    if path.is_dir() and not directory:
        raise IsADirectoryError(f"{path} is a directory, and {wanted} is to be written there")
    if directory and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, and {wanted} is to be written there")
    inside = path in (pathlib.Path.cwd(), *pathlib.Path.cwd().parents)
    if directory and (os.path.ismount(path) or inside):
        here = "the current directory or one above it" if inside else "a mount point"
        raise FileExistsError(f"{path} is {here}, which cannot be replaced as a whole: choose a "
                              "directory in it")
    check_above(path)
    if not directory:
        if not path.is_file():
            raise FileExistsError(f"{path} is neither a file nor a directory: choose another path")
        if not force:
            raise FileExistsError(f"{path} exists: choose another path, or replace it with "
                                  "force=True (--force)")
        return
    foreign = others(path, own)
    taken = [name for name in foreign if needs and re.fullmatch(needs, name)]
    if taken:
        raise FileExistsError(f"{path} holds {listed(taken)}, which minillm did not write or which "
                              "was changed since: choose another directory, or move it away. "
                              "minillm never replaces it")
    if foreign and not force:
        raise FileExistsError(f"{path} holds {listed(foreign)}, which no earlier save there "
                              "wrote: choose another directory, or write beside it with force=True "
                              "(--force), which keeps it")


def check_above(path):
    """Raise an error if the directory of `path` cannot be made or written."""
    above = next(p for p in path.parents if os.path.lexists(p))
    if not above.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {above} is not a directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: there is no permission to write in "
                              f"{above}")
    try:
        with tempfile.TemporaryFile(dir=above):  # os.access is True for /proc, which takes no file
            pass
    except OSError as error:
        why = error.strerror or error
        raise type(error)(f"{path} cannot be written: {above} takes no new file ({why})") from error


def behind_links(path):
    """The absolute path to write: a symbolic link is followed, and stays."""
    real = pathlib.Path(os.path.realpath(path))
    if real.is_symlink():
        raise FileExistsError(f"{path} is a symbolic link that leads in a circle")
    return real


def listed(names):
    """The first three names, and how many more there are, as text."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# --- the write -------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path, own=()):
    """Yield a temporary path beside `path`; put it at `path` if the block ends well.

    The block makes a file or a directory there. A new file gets its mode from the user's umask; a
    file that replaces another gets the mode of the old one. A directory at `path` loses its files
    `own` (names) and keeps all others. A symbolic link at `path` stays, and its target is written.

    OSError, which names `path` once, if the disk is full or the path cannot be written.
    """
    path = behind_links(path)
    with one_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{short(path.name)}.", dir=path.parent))
    try:
        with one_error(path, scratch):
            new = scratch / path.name
            yield new
            settle(new, path)
            if path.exists() and path.is_dir() != new.is_dir():
                kinds = ("a file", "a directory") if new.is_dir() else ("a directory", "a file")
                raise FileExistsError(f"{path} is {kinds[0]}, and {kinds[1]} was to be written "
                                      "there")
            if path.is_dir():
                swap(new, path, own)
            else:
                os.replace(new, path)
            flush(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def short(name, most=100):
    """The start of a name, so that it is not too long for the file system with an addition."""
    return name.encode(errors="surrogateescape")[:most].decode(errors="ignore")


@contextlib.contextmanager
def one_error(path, scratch=None):
    """Turn an error of the write, which names a temporary file or none, into one that names `path`.

    safetensors reports the system's error only as text, and numpy's `tofile` does not report it.
    """
    try:
        yield
    except safetensors.SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except OSError as error:
        if error.errno is None and re.fullmatch(r"\d+ requested and \d+ written", str(error)):
            raise OSError(f"{path} was not written whole ({error}): the disk is full") from error
        inside = error.filename is None or scratch is None or str(scratch) in str(error.filename)
        if error.errno is None or not inside:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def settle(new, old):
    """Give the new files their modes, and flush them to the disk.

    Libraries make files that only the user may read, but the umask or the replaced file decides
    the mode. A file that is made here shows the mode of the umask, without a change of it.
    """
    probe = new.parent / "probe"
    probe.touch()
    usual = stat.S_IMODE(probe.stat().st_mode)
    for file in [new] if new.is_file() else sorted(p for p in new.rglob("*") if p.is_file()):
        before = old / file.relative_to(new)
        os.chmod(file, stat.S_IMODE(before.stat().st_mode) if before.is_file() else usual)
        flush(file)
    if new.is_dir() and old.is_dir():
        shutil.copymode(old, new)


def leftovers(directory, names):
    """The temporary directories that killed `atomic` writes have left.

    names: a regular expression for the names that were to be written. A directory counts if its
    name fits, and if it holds nothing but what such a write puts there.
    """
    found = []
    for path in pathlib.Path(directory).glob(".*"):
        name, _, random = path.name[1:].rpartition(".")
        if re.fullmatch(names, name) and re.fullmatch("[a-z0-9_]{8}", random) and path.is_dir():
            inside = list(path.iterdir()) if not path.is_symlink() else [path]
            if all(p.is_file() and p.name in (name, "probe") for p in inside):
                found.append(path)
    return found


# --- the contents of files -------------------------------------------------------------------


def read_json(path):
    """The object in a JSON file, as a dict.

    ValueError if it is not whole, is not an object, or has half of a surrogate pair in a text,
    which could later be neither printed nor written.
    """
    try:
        told = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        json.dumps(told, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{path} holds {half!r}, which is half of a character") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from error
    if not isinstance(told, dict):
        raise ValueError(f"{path} holds {type(told).__name__}, not an object of fields")
    return told


def sort_metadata(path):
    """Sort the metadata of a safetensors file by key, in place.

    The safetensors library writes it in random order, so two saves would differ.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")  # of the header, which ends in spaces
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # else the library's text is shorter, and stays
            file.seek(8)
            file.write(text.ljust(size))


def checksum(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(directory):
    """{name: checksum} of the files in a directory."""
    return {p.name: checksum(p) for p in sorted(pathlib.Path(directory).iterdir()) if p.is_file()}


# --- optional packages, the cache, one process at a time --------------------------------------


def need(package, extra):
    """Import and return the optional `package`; the ImportError names the extra that has it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"this needs the package {package!r}: "
                          f"python -m pip install 'minillm[{extra}]'") from error


def cache():
    """The user's cache directory.

    It is `$MINILLM_CACHE`, else `$XDG_CACHE_HOME/minillm`, else `~/.cache/minillm`.
    """
    own = os.environ.get("MINILLM_CACHE")
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return pathlib.Path(own).expanduser() if own else home / "minillm"


@contextlib.contextmanager
def lock(directory):
    """Lock a directory for one process. The lock ends when the process ends, even if killed.

    RuntimeError, at once, if another process has the lock.
    """
    path = pathlib.Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "a") as file:
        try:
            import fcntl
        except ImportError:  # Windows, where an open file cannot be replaced, which is enough
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"another run is writing to {path}: "
                               "give this one a directory of its own") from error
        yield


def unlock(directory):
    """Remove the file of a `lock`. If it is not empty, it is the user's and stays."""
    path = pathlib.Path(directory) / ".lock"
    if path.is_file() and path.stat().st_size == 0:
        path.unlink()
