"""Ctrl-C in the middle of a step must not cost the steps before it.

A signal that arrives while AdamW writes the parameters would leave half of them new and half
of them old, a state that cannot be saved. So the signal is only noted: the loop finishes the
step, saves, and then raises.
"""

import contextlib
import logging
import signal
import threading

logger = logging.getLogger("minillm")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM has ended a training, after a checkpoint.

    path: the checkpoint; step: how many of the `steps` are done; signal: the signal's number;
    elsewhere: whether the checkpoint lies outside the training's own directory; how: the
    arguments that resume from it.
    """

    def __init__(self, path, step, steps, number, elsewhere=False):
        self.how = (f"checkpoints={str(path.parent)!r}, " if elsewhere else "") + "resume=True"
        super().__init__(f"interrupted after step {step} of {steps}; saved {path}: "
                         f"{self.how} goes on from there")
        self.path, self.step, self.steps, self.signal = path, step, steps, number


class Asked:
    """The number of the signal that asks the training to stop, or 0."""

    signal = 0


@contextlib.contextmanager
def deferred(active):
    """Yield an Asked, which notes the first Ctrl-C or SIGTERM; a second one acts at once.

    A signal that the program handles in its own way, or ignores, is left alone.
    """
    asked, before = Asked(), {}

    def note(number, frame):
        if asked.signal:
            raise KeyboardInterrupt
        asked.signal = number
        logger.warning("the training ends after this step, with a checkpoint; a second signal "
                       "ends it at once, without one")

    if active and threading.current_thread() is threading.main_thread():
        for number, default in ((signal.SIGINT, signal.default_int_handler),
                                (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) is default:
                before[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked.signal:  # it came after the last check of the loop
        raise KeyboardInterrupt
