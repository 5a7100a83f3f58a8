"""A disk that is full costs no training: what is saved then, where, and what is said.

    a periodic checkpoint    a warning, once; the training goes on, and older checkpoints stay
    Ctrl-C, and an error     a checkpoint in the directory of the training; where that takes none,
    after the last step      in the cache directory; or else in that of temporary files
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
    """As `save`. Where nothing can be written, the training goes on, and says so once."""
    try:
        save(run)
    except OSError as error:  # of the process that writes; the others wait for it
        if not run.warned:
            logger.warning("%s. There is no checkpoint after step %d, and the training goes on; "
                           "those that are written stay", error, len(run.history))
        run.warned = True
        distributed.wait()


def leave(run, number):
    """Save and raise Interrupted. number: that of the signal that asked for it."""
    try:
        path = save(run)
    except OSError as error:
        path = elsewhere(run, error)
    raise interrupted(run, path, number)


def interrupted(run, path, number):
    own = path.parent == pathlib.Path(run.options.checkpoints)
    return Interrupted(path, len(run.history), run.options.steps, number, not own)


def elsewhere(run, error):
    """The path of a checkpoint that is written where there is room; `error` where there is none.

    Of several processes `error` is raised by the first: the others cannot be asked to save again.
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
    error.add_note("the training is lost: nor can a checkpoint be written in the cache "
                   f"({files.cache()}) or in {tempfile.gettempdir()}")
    raise error


@contextlib.contextmanager
def rescued(run):
    """An error or a Ctrl-C inside, after the last step, leaves a checkpoint of the whole training.

    The error gets a note that says where. In several processes it is raised as it is: the others
    are at another place, and cannot be asked for their parts.
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
        error.add_note(f"the training is whole, and saved in {path}: {found.how} goes on from "
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
