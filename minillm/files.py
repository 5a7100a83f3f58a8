"""Files that are never half written, and optional packages that are asked for by name.

A program that dies in the middle of a save must leave the old file as it was. So everything that `minillm` writes goes to a
temporary name in the same directory, is flushed to the disk, and is then renamed: a rename within one file system is atomic.
"""

import contextlib
import importlib
import os
import pathlib
import shutil
import tempfile


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; rename it to `path` if the block ends well, remove it if it does not.

    Serves files and, where the block makes a directory at the temporary path, directories (one that stands at `path`
    is moved aside first and removed last, so at every moment one of the two is whole).
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new, old = scratch / path.name, scratch / "old"
        yield new
        for file in [new] if new.is_file() else sorted(p for p in new.rglob("*") if p.is_file()):
            with open(file, "rb+") as f:
                os.fsync(f.fileno())
        if new.is_dir() and path.exists():
            path.rename(old)
            try:
                new.rename(path)
            except OSError:
                old.rename(path)
                raise
        else:
            os.replace(new, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def need(package, extra):
    """The optional `package`, imported; or an ImportError that says which extra of minillm brings it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"this needs the package {package!r}: python -m pip install 'minillm[{extra}]'") from error


def cache():
    """The user's cache directory: `$MINILLM_CACHE`, else `$XDG_CACHE_HOME/minillm`, else `~/.cache/minillm`."""
    own = os.environ.get("MINILLM_CACHE")
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return pathlib.Path(own).expanduser() if own else home / "minillm"


@contextlib.contextmanager
def lock(directory):
    """Hold a directory for one process; a second one gets an error at once. A process that dies lets go."""
    path = pathlib.Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "a") as file:
        try:
            import fcntl
        except ImportError:  # Windows: an open file cannot be replaced there, which is protection enough
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"another run is writing to {path}: give this one a directory of its own") from error
        yield
