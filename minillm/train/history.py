"""The log of a training: a dict for each step, also as a file, a summary and a picture.

    step         counted from 0
    loss         nats per learnt token, of this step's batch, before its update
    rate, norm   the learning rate; the gradient's norm before clipping
    learnt       the tokens whose prediction the step learnt
    tokens       all tokens that the model read, without padding
    seconds      of the step, without evaluation and saving
    held_out     the loss on held-out examples after the step (or `evaluation`: what evaluate= gave)
    best         the best so far of those that count (see `openings`): {"step", "value"}
"""

import contextlib
import dataclasses
import functools
import json
import logging
import pathlib

from minillm import files

MEASURES = ("held_out", "evaluation")
KEYS = {"step", "loss", "rate", "norm", "learnt", "tokens", "seconds"}  # of every line of a log
SIGN = "minillm: the log of a training, as a picture"  # in the picture's own metadata
logger = logging.getLogger("minillm")


def measured(record):
    """The held-out loss or evaluation after this step, or None."""
    return next((record[key] for key in MEASURES if key in record), None)


@contextlib.contextmanager
def journal(path, history):
    """Yield a function that adds a line to the log file, after the lines of the steps so far.

    An older log is replaced; FileExistsError for any other file. Without a path nothing is
    written.
    """
    if path is None:
        yield lambda record: None
        return
    check_log(path)
    with files.atomic(path) as new:
        new.write_text("".join(json.dumps(record) + "\n" for record in history))
    with open(path, "ab", buffering=0) as lines:
        yield functools.partial(add, lines)


def add(lines, record):
    """Write a line to the log, an open file without a buffer.

    A full disk ends the log with a warning. The training goes on without it.
    """
    rest = f"{json.dumps(record)}\n".encode()
    try:
        while rest and not lines.closed:
            rest = rest[lines.write(rest) :]
    except OSError as error:
        logger.warning("%s: %s. The log ends before step %d, and the training goes on without it",
                       lines.name, error.strerror, record["step"])
        lines.close()


def check_log(path):
    """FileExistsError for a file that is not a log; OSError if the path cannot be written."""
    files.check_writable(path, force=True)
    if pathlib.Path(path).is_file() and not is_log(path):
        raise FileExistsError(f"log={str(path)!r} is a file, but not the log of a training: "
                              "choose another name, or remove it")


def is_log(path):
    """Whether the first line of a file has all the keys of a log, or is the start of such a line.

    A killed run may leave only the start.
    """
    with open(path, "rb") as file:
        first = file.readline(1 << 16)
    try:
        return b'{"step": 0, "loss": '.startswith(first) or KEYS <= json.loads(first).keys()
    except (ValueError, AttributeError, RecursionError):
        return False


@dataclasses.dataclass
class Summary:
    """A training in a few numbers; `str()` gives them as text."""

    steps: int
    first: float  # mean loss per learnt token over the first tenth of the steps
    last: float  # over the last tenth
    best: dict | None  # of the measure: {"step" (from 0), "value"}
    measure: str | None  # "held_out" or "evaluation"
    tokens: int
    seconds: float
    tokens_per_second: float

    def __str__(self):
        part = max(1, self.steps // 10)
        lines = [f"loss {self.first:.3f} over the first {part} of {self.steps} steps, "
                 f"{self.last:.3f} over the last {part}"]
        if self.best:
            what = "held-out loss" if self.measure == "held_out" else "evaluation"
            step, value = self.best["step"] + 1, self.best["value"]
            lines.append(f"best {what} {value:.4g}, after step {step}")
        lines.append(f"{self.tokens:,} tokens in {self.seconds:,.1f} s: "
                     f"{self.tokens_per_second:,.0f} tokens/s")
        return "\n".join(lines)


def summary(history):
    """The Summary of the log that `train` returned. ValueError for an empty log."""
    if not history:
        raise ValueError("the log is empty: it has no step")
    part = max(1, len(history) // 10)
    tokens, seconds = (sum(record[key] for record in history) for key in ("tokens", "seconds"))
    best = best_of(history)
    measure = next((key for key in MEASURES for record in history if key in record), None)
    return Summary(len(history), mean(history[:part]), mean(history[-part:]), best, measure, tokens,
                   seconds, tokens / seconds if seconds else 0.0)


def best_of(history):
    """The best measure that counts: {"step", "value"}, or None."""
    return next((record["best"] for record in reversed(history) if "best" in record), None)


def mean(records):
    """The loss per learnt token over several steps."""
    return sum(r["loss"] * r["learnt"] for r in records) / sum(r["learnt"] for r in records)


def picture(history, path, force=False):
    """Draw the loss (raw, smoothed, held out) and the learning rate over the steps.

    path: a .png, .svg or .pdf file; `check_picture` says which files it does not replace. The
    smoothed loss is the mean over a window of a twentieth of the steps.
    """
    kind = check_picture(path, force)
    if not history:
        raise ValueError("the log is empty: there is nothing to draw")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps, losses = [r["step"] + 1 for r in history], [r["loss"] for r in history]
    above.plot(steps, losses, color="C0", alpha=0.3, linewidth=1, label="loss of each step")
    above.plot(steps, smoothed(losses), color="C0", label="smoothed")
    points = [(r["step"] + 1, measured(r)) for r in history if measured(r) is not None]
    if points:
        label = "held-out loss" if any("held_out" in r for r in history) else "evaluation"
        above.plot(*zip(*points), "o-", color="C1", markersize=4, label=label)
    best = best_of(history)
    if best:
        x, y = best["step"] + 1, best["value"]
        above.plot(x, y, "*", color="C1", markersize=12, label=f"best: {y:.3g} after step {x}")
    above.set(ylabel="nats per learnt token")
    above.legend(fontsize="small")
    below.plot(steps, [r["rate"] for r in history], color="C2")
    below.set(xlabel="step", ylabel="learning rate")
    with files.atomic(path) as new:
        figure.savefig(new, format=kind, dpi=120, metadata={"Creator": SIGN})


def check_picture(path, force=False):
    """The format that the ending of `path` names: "png", "svg" or "pdf".

    ValueError for another ending, ImportError without matplotlib, FileExistsError for a file
    that `picture` did not write, unless `force`.
    """
    kind = pathlib.Path(path).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise ValueError(f"{str(path)!r}: a picture ends in .png, .svg or .pdf")
    files.need("matplotlib", "plot")
    files.check_writable(path, force=True)
    old = pathlib.Path(path)
    if not force and old.is_file() and SIGN.encode() not in old.read_bytes():
        raise FileExistsError(f"picture={str(path)!r} is a file that minillm did not draw: choose "
                              "another name, or replace it with force=True (--force)")
    return kind


def smoothed(values):
    """The mean of each value and its neighbours: a fortieth of all values on either side."""
    reach, n = max(1, len(values) // 40), len(values)
    windows = [min(reach, i, n - 1 - i) for i in range(n)]  # symmetric, so narrower at the ends
    return [sum(values[i - w : i + w + 1]) / (2 * w + 1) for i, w in enumerate(windows)]
