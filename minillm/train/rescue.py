"""Keep a training when the disk is full.

    a periodic checkpoint    one warning; the training goes on, and older checkpoints stay
    Ctrl-C, and an error     a checkpoint in the directory of the training; if that is full, in
    after the last step      the cache directory; if that is full, in the temporary directory
"""

import contextlib
import logging
import pathlib
import shutil
import signal
import tempfile

from minillm import distributed, files
from minillm.train.checkpoints import newest, path_of, save
from minillm.train.interrupt import Interrupted

logger = logging.getLogger("minillm")


def save_or_go_on(run):
    """Save a checkpoint. If it cannot be written, the training goes on, with one warning."""
    try:
        save(run)
    except OSError as error:  # of the process that writes; the others wait for it
        if not run.warned:
            logger.warning("%s. There is no checkpoint after step %d, and the training goes on; "
                           "the older checkpoints stay", error, len(run.history))
        run.warned = True
        distributed.wait()


def leave(run, number):
    """Save and raise Interrupted. number: of the signal that ended the training."""
    try:
        path = save(run)
    except OSError as error:
        path = elsewhere(run, error)
    raise interrupted(run, path, number)


def interrupted(run, path, number):
    own = path.parent == pathlib.Path(run.options.checkpoints)
    return Interrupted(path, len(run.history), run.options.steps, number, not own)


def elsewhere(run, error):
    """Write a checkpoint where there is room and return its path; raise `error` if there is none.

    With several processes the first raises `error`, because the others do not save again.
    """
    if distributed.place()[1] > 1:
        raise error
    for above in (files.cache(), pathlib.Path(tempfile.gettempdir())):
        directory = None
        try:
            above.mkdir(parents=True, exist_ok=True)
            directory = pathlib.Path(tempfile.mkdtemp(prefix="interrupted-", dir=above))
            return save(run, directory)
        except OSError:
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)
    error.add_note("the training is lost: a checkpoint cannot be written in the cache "
                   f"({files.cache()}) or in {tempfile.gettempdir()} either")
    raise error


@contextlib.contextmanager
def rescued(run):
    """Save the whole training if an error or Ctrl-C comes inside, after the last step.

    The error gets a note that names the checkpoint. With several processes there is no
    checkpoint: the others are elsewhere in the program and cannot send their parts.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        directory = run.options.checkpoints
        if not run.trained or directory is None or distributed.place()[1] > 1:
            raise
        try:
            path = whole(run, directory)
        except (OSError, RuntimeError) as second:
            error.add_note(f"the training is lost: no checkpoint can be written either ({second})")
            raise error from None
        found = interrupted(run, path, signal.SIGINT)
        if isinstance(error, KeyboardInterrupt):
            raise found from error
        error.add_note(f"all steps are done, and saved in {path}: {found.how} goes on from "
                       "there, and only writes")
        raise


def whole(run, directory):
    """The path of a checkpoint after the last step."""
    try:
        with files.lock(directory):
            path = newest(directory)
            return path if path == path_of(run) else save(run)
    except (OSError, RuntimeError) as error:  # no room, or another run has taken the directory
        return elsewhere(run, error)
