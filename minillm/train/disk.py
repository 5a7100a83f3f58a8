"""Whether the disk has room for what a training will write: asked before it starts."""

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
    """OSError where the disks have no room for what is to be written, all of it together.

    needs: [(what, path, how many files, bytes of each)]; `what` is what an error calls the path.
    """
    disks = {}
    for what, path, number, size in needs:
        most = largest_file()
        if size > most:
            raise OSError(f"{what} {path} takes a file of {shown(size)}, and this process may "
                          f"write files of at most {shown(most)} (ulimit -f)")
        above = pathlib.Path(os.path.realpath(path))
        above = next(p for p in (above, *above.parents) if p.is_dir())
        entry = disks.setdefault(os.stat(above).st_dev, [above, 0, []])
        entry[1] += number * size
        entry[2].append(f"{what} {path} takes {shown(number * size)}")
    for above, size, parts in disks.values():
        free = shutil.disk_usage(above).free
        if size > free:
            raise OSError(f"{' and '.join(parts)}, and the disk has {shown(free)} left")


def largest_file():
    """The bytes that a file may have in this process."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0] if resource else -1
    return limit if limit >= 0 else float("inf")


def shown(size):
    """A number of bytes in the unit that suits it."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def checkpoint_bytes(model, best=False):
    """About how large a checkpoint is; best: with the parameters of another step.

    AdamW's moments take twice what learns, in float32 at least, and so does a float32 copy.
    """
    learns = [p for p in model.parameters() if p.requires_grad]
    moments = sum(2 * p.numel() * max(4, p.dtype.itemsize) for p in learns)
    copies = sum(4 * p.numel() for p in learns if p.dtype.itemsize < 4)
    return moments + copies + (2 if best else 1) * sum(map(size_of, learns))


def size_of(t):
    return t.numel() * t.dtype.itemsize


def check_checkpoints(run):
    """OSError where the periodic checkpoints of a training would fill the disk."""
    o, best = run.options, run.options.restore_best and run.options.every
    if o.save_every and distributed.place()[0] == 0:
        written = len(saved(o.checkpoints))
        check_disk([checkpoint_needs("checkpoints", o.checkpoints, o.keep, run.model, best,
                                     written)])


def checkpoint_needs(what, directory, keep, model, best, written=0):
    """An entry for `check_disk`: one file more than stay, for a new one comes before an old goes.

    written: how many are there already.
    """
    return what, directory, max(1, keep + 1 - written), checkpoint_bytes(model, best)
