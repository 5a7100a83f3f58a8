"""Check, before a training starts, that the disk has room for all that it will write."""

import os
import pathlib
import shutil

from minillm import distributed
from minillm.train.checkpoints import saved

try:
    import resource
except ImportError:  # Windows
    resource = None


def check_disk(needs):
    """OSError if the disks have no room for all the files of `needs` together.

    needs: [(what, path, how many files, bytes of each)]; `what` names the path in an error.
    """
    disks = {}
    for what, path, number, size in needs:
        most = largest_file()
        if size > most:
            raise OSError(f"{what} {path} takes a file of {shown(size)}, but this process may "
                          f"write files of at most {shown(most)} (ulimit -f)")
        above = pathlib.Path(os.path.realpath(path))
        above = next(p for p in (above, *above.parents) if p.is_dir())
        entry = disks.setdefault(os.stat(above).st_dev, [above, 0, []])
        entry[1] += number * size
        entry[2].append(f"{what} {path} takes {shown(number * size)}")
    for above, size, parts in disks.values():
        free = shutil.disk_usage(above).free
        if size > free:
            raise OSError(f"{' and '.join(parts)}, but the disk has only {shown(free)} left")


def largest_file():
    """The most bytes that a file written by this process may have."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0] if resource else -1
    return limit if limit >= 0 else float("inf")


def shown(size):
    """A number of bytes as text, in the unit that fits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def checkpoint_bytes(model, best=False):
    """About how many bytes a checkpoint has; best: with a copy of the best step's parameters.

    AdamW has two moments for each parameter that learns, in float32 at least. A parameter of
    less than float32 has a float32 copy as well.
    """
    learns = [p for p in model.parameters() if p.requires_grad]
    moments = sum(2 * p.numel() * max(4, p.dtype.itemsize) for p in learns)
    copies = sum(4 * p.numel() for p in learns if p.dtype.itemsize < 4)
    return moments + copies + (2 if best else 1) * sum(map(size_of, learns))


def size_of(t):
    return t.numel() * t.dtype.itemsize


def check_checkpoints(run):
    """OSError if the periodic checkpoints of a training would fill the disk."""
    o, best = run.options, run.options.restore_best and run.options.every
    if o.save_every and distributed.place()[0] == 0:
        written = len(saved(o.checkpoints))
        check_disk([checkpoint_needs("checkpoints", o.checkpoints, o.keep, run.model, best,
                                     written)])


def checkpoint_needs(what, directory, keep, model, best, written=0):
    """An entry for `check_disk`: keep + 1 files, because the oldest goes after the new is written.

    written: how many are there already.
    """
    return what, directory, max(1, keep + 1 - written), checkpoint_bytes(model, best)
