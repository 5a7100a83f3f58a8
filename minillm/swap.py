"""Replace an old directory with a new one without losing a file.

    link        every file in the old directory that is not minillm's gets a hard link in the new
    exchange    the two directories change places, in one step if the system can
    rescue      files that came into the old directory during these two steps are moved over

A hard link (a second name) costs no copy, and the file is in both directories at once, so a process
that is killed between two steps leaves one whole directory.
"""

import ctypes
import os
import shutil
import sys


def swap(new, old, own):
    """Replace the directory `old` with `new`, and keep all files of `old` but those named in `own`.

    One whole directory with all these files exists at every moment. The old directory ends at the
    path of `new`; files that came into it in the meantime are moved over as well.
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
    """Put the file, symbolic link or empty directory `name` from one directory into another."""
    source, target = here / name, there / name
    if not target.parent.exists():
        target.parent.mkdir(parents=True)
        shutil.copymode(source.parent, target.parent)
    if source.is_dir() and not source.is_symlink():
        target.mkdir(exist_ok=True)
    else:
        put(source, target)


def link(source, target):
    """Give a file or a symbolic link a second name; OSError if that is not possible."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError as error:
        raise FileExistsError(f"{source} is in the way: minillm did not write it") from error
    except OSError as error:
        why = (f"{error.strerror}: the file cannot get a second name (hard link), so it would be "
               "lost when its directory is replaced")
        raise OSError(error.errno, why, str(source)) from error


def same(a, b):
    """Whether two names are one file, or two directories."""
    if not os.path.lexists(b):
        return False
    return os.path.samestat(a.lstat(), b.lstat()) or (a.is_dir() and b.is_dir())


def exchange(a, b):
    """Exchange two paths in one step; False if the system cannot (Linux can)."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(a), here, os.fsencode(b), flag) == 0


def others(directory, own=()):
    """The sorted paths, relative to `directory`, of all files in it but those named in `own`.

    A directory inside it is listed only if it is empty.
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
    """Make the system write a file, or a directory's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no directory
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
