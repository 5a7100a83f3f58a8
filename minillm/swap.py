"""How a new directory takes the place of an old one without the loss of a file.

    link        what the old one holds beside minillm's own files gets a second name in the new one
    exchange    the two names change places, in one step where the system can
    rescue      what somebody wrote into the old one during these two steps is moved over

A second name (a hard link) costs no copy, and the file is in both directories at once, so a process
that is killed between two steps leaves one whole directory.
"""

import ctypes
import os
import shutil
import sys


def swap(new, old, own):
    """Put the directory `new` in the place of `old`, with all that `old` holds beside `own`.

    At every moment one whole directory with all these files is there. `old` ends at the place of
    `new`; what somebody wrote into it in the meantime is moved over as well.
    """
    for name in others(old, own):
        keep(link, old, new, name)
    if not exchange(new, old):
        aside = new.with_name("old")
        old.rename(aside)
        try:
            new.rename(old)
        except OSError:
            aside.rename(old)
            raise
        new = aside
    for name in others(new, own):
        if not same(new / name, old / name):
            keep(os.replace, new, old, name)


def keep(put, here, there, name):
    """Put one file, symbolic link or empty directory of a directory into another."""
    source, target = here / name, there / name
    if not target.parent.exists():
        target.parent.mkdir(parents=True)
        shutil.copymode(source.parent, target.parent)
    if source.is_dir() and not source.is_symlink():
        target.mkdir(exist_ok=True)
    else:
        put(source, target)


def link(source, target):
    """Give a file, or a symbolic link, a second name; OSError where that is not possible."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError as error:
        raise FileExistsError(f"{source} is in the way: minillm did not write it") from error
    except OSError as error:
        why = (f"{error.strerror}: the file cannot get a second name (hard link), so it cannot "
               "stay while its directory is replaced")
        raise OSError(error.errno, why, str(source)) from error


def same(a, b):
    """Whether two names are one file, or two directories."""
    if not os.path.lexists(b):
        return False
    return os.path.samestat(a.lstat(), b.lstat()) or (a.is_dir() and b.is_dir())


def exchange(a, b):
    """Let two names change places in one step; False where the system cannot (Linux can)."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(a), here, os.fsencode(b), flag) == 0


def others(directory, own=()):
    """The names, relative to `directory`, of what it holds beside the files `own`, sorted.

    A directory within counts by what it holds, and by its own name where it is empty.
    """
    found = []
    for here, directories, names in os.walk(directory, onerror=fail):
        links = [name for name in directories if os.path.islink(os.path.join(here, name))]
        inner = os.path.relpath(here, directory)
        if inner == os.curdir:
            names, inner = [name for name in names if name not in own], ""
        elif not names and not directories:
            found.append(inner)
        found += [os.path.join(inner, name) for name in names + links]
    return sorted(found)


def fail(error):
    raise error


def flush(path):
    """Have the system write a file, or a directory's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no directory
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
