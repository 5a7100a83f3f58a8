"""Files that are never half written and never lost; optional packages, asked for by name.

A program that dies in the middle of a save must leave the old file as it was. So everything that
`minillm` writes goes to a temporary name in the same directory, is flushed to the disk, and is then
renamed: a rename within one file system is atomic.

Three rules keep what the user has:

    1. `check_writable` finds what is in the way, and callers run it before their work.
    2. A file never takes the place of a directory, nor a directory that of a file.
    3. A directory is replaced as a whole, and what minillm did not write stays in it: the new
       directory gets hard links to these files before the two change places.
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

    directory: a directory is wanted at `path`, not a file. force: an existing file may be
    replaced, and a directory may be written in which other files are. own: names in the existing
    directory that minillm wrote and may replace. needs: a regular expression of the names that
    the write uses; a file of such a name that is not among `own` is in the way even with force.

    FileExistsError, which names what is in the way; IsADirectoryError and NotADirectoryError for
    the other kind of thing; PermissionError where the directory above cannot be written.
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
        raise FileExistsError(f"{path} holds {listed(foreign)}, which minillm did not write: "
                              "choose another directory, or keep that and write beside it with "
                              "force=True (--force)")


def check_above(path):
    """An error where the directory of `path` cannot be made or written."""
    above = next(p for p in path.parents if os.path.lexists(p))
    if not above.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {above} is not a directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: there is no permission to write in "
                              f"{above}")
    try:
        with tempfile.TemporaryFile(dir=above):  # /proc says yes, and takes no file
            pass
    except OSError as error:
        why = error.strerror or error
        raise type(error)(f"{path} cannot be written: {above} takes no new file ({why})") from error


def behind_links(path):
    """The absolute path that is really written: a symbolic link is followed, and stays."""
    real = pathlib.Path(os.path.realpath(path))
    if real.is_symlink():
        raise FileExistsError(f"{path} is a symbolic link that leads in a circle")
    return real


def listed(names):
    """Three of them, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# --- the write -------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path, own=()):
    """Yield a temporary path beside `path`; put it at `path` if the block ends well.

    The block makes a file or a directory there. A new file gets the mode of the user's umask, one
    that replaces another the mode of that. A directory at `path` loses its files `own` (names) and
    keeps all others. A symbolic link is written through.

    OSError, which names `path` once, where the disk is full or the place cannot be written.
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
    """A name's beginning, so that what is added to it does not make it too long for a name."""
    return name.encode(errors="surrogateescape")[:most].decode(errors="ignore")


@contextlib.contextmanager
def one_error(path, scratch=None):
    """Turn the errors of writing `path`, which speak of temporary names or of none, into one line.

    safetensors reports the system's error only as a text, numpy's `tofile` not at all.
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

    Libraries make theirs readable by the user alone: the umask, or the file that is replaced, says
    who may read them. A file made here shows what the umask says, without changing it.
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
    """The temporary directories that an `atomic` write has left when it was killed.

    names: a regular expression of the names that were to be written. A directory counts where it
    has such a name, and holds no more than such a write puts there.
    """
    found = []
    for path in pathlib.Path(directory).glob(".*"):
        name, _, random = path.name[1:].rpartition(".")
        if re.fullmatch(names, name) and re.fullmatch("[a-z0-9_]{8}", random) and path.is_dir():
            inside = list(path.iterdir()) if not path.is_symlink() else [path]
            if all(p.is_file() and p.name in (name, "probe") for p in inside):
                found.append(path)
    return found


# --- what files say --------------------------------------------------------------------------


def read_json(path):
    """The object that a JSON file holds, as a dict.

    ValueError where it is not whole, is no object, or has a text that is no Unicode (half of a
    surrogate pair), which could later be neither printed nor written.
    """
    try:
        told = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        json.dumps(told, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{path} holds {half!r}, half of a character, which is no text") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from error
    if not isinstance(told, dict):
        raise ValueError(f"{path} holds {type(told).__name__}, not an object of fields")
    return told


def sort_metadata(path):
    """Put the metadata of a safetensors file in the order of its keys, in place.

    The safetensors library writes it in an order of chance, so that no two files would be equal.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")  # of the header, which ends in spaces
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # else the library has written it more shortly: as it is
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
    """The optional `package`, imported; or an ImportError that says which extra brings it."""
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
    """Hold a directory for one process; a second one gets an error at once. A dead process lets go.

    RuntimeError where another process holds it.
    """
    path = pathlib.Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "a") as file:
        try:
            import fcntl
        except ImportError:  # Windows: an open file cannot be replaced there, which is enough
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"another run is writing to {path}: "
                               "give this one a directory of its own") from error
        yield


def unlock(directory):
    """Remove the file of a `lock`. A file of that name with something in it is the user's."""
    path = pathlib.Path(directory) / ".lock"
    if path.is_file() and path.stat().st_size == 0:
        path.unlink()
