"""All techniques side by side on one model and one task: what each costs, and what it
gives, before and after making it small.

For each technique, in a process of its own:

    load, measure | for each learning rate: wrap, train, measure on the validation split
    | for each seed: wrap, train at the best rate, measure on the test split | merge
    where it can be | int8: measure | half of the weights pruned: measure

- The learning rate is chosen for each technique by itself, for a technique at another's
  rate says nothing: the sweep starts with three rates around a usual one and moves on
  while the best is at its edge. Each rate is tried for as many steps as the training
  takes, because a short training prefers another rate than a long one. Nine variants of
  LoRA, each so tuned, end within 2% of each other (arXiv 2602.04998).
- What a technique gives is its change against the untuned model on the same held-out
  text, the mean over the seeds, with a 95% interval over text and seeds
  (`measure.difference` says how). What int8 and pruning cost is the change against the
  trained model.
- Peak memory is that of training alone: weights, gradients, the optimizer's state,
  activations (`report.Peak` says how).
- The rows are in table.json as soon as they are known. The same command goes on with
  those that are missing or failed.
"""

import contextlib
import difflib
import multiprocessing
import signal
import sys
import threading
import traceback

from tqdm.auto import tqdm

from minillm import data as texts
from minillm import zoo
from minillm.compare.picture import picture
from minillm.compare.row import BASIC, RATES, make_row, parts, score, scores, sweep, usual
from minillm.compare.table import Table, failed, shown, text, tried, write

__all__ = [
    "RATES",
    "SIZES",
    "Table",
    "compare",
    "failed",
    "picture",
    "score",
    "scores",
    "shown",
    "sweep",
    "text",
    "tried",
    "usual",
    "write",
]

SIZES = {  # what a run takes by default: the tiny model needs more steps and has the speed for them
    "tiny": dict(steps=80, seeds=3, batch_size=4, windows=24, limit=64),
    "smollm2": dict(steps=40, seeds=1, batch_size=4, windows=8, limit=32),
}


def compare(
    model="tiny",
    task="language",
    names=None,
    *,
    data=None,
    out=None,
    force=False,
    length=128,
    seed=0,
    device=None, dtype=None, threads=None,
    progress=True,
    **sizes,
):
    """The table: a list of rows, a dict for each technique in `names` (None: all).

    model, task  as `zoo.load` and `data.task` take them
    data         a file of the user's own instead of a task (see `row.own`)
    out          a directory that gets table.json after each technique, and table.md and
                 table.png at the end. Rows that an earlier run of the same settings and
                 versions has left there are kept, and only the others are measured.
                 Anything else in their place is a FileExistsError, unless force=True
    device, dtype    as `zoo.load` takes them
    length       tokens of an example; windows of text have twice as many
    sizes        steps, sweep_steps (as many as steps), seeds, batch_size, windows, limit:
                 numbers in place of those in SIZES

    A technique that fails, even one whose process is killed, has a row with its
    "error"; the others go on (see `failed`). ValueError for an unknown technique, task
    or size, before any work.
    """
    names = BASIC if names is None else list(dict.fromkeys(names))
    settings = check(
        names, model, task, data,
        dict(length=length, seed=seed, device=device, dtype=dtype, threads=threads), sizes
    )
    table = Table(out, force)  # says now, not after the work, what will not be written
    table.begin(settings)
    loaded, tokenizer = zoo.load(model)  # makes the tiny model, or says now what is missing
    positions = getattr(loaded.config, "positions", 2 * length)
    if not data and task == "language" and 2 * length > positions:
        raise ValueError(
            f"length={length}: windows of {2 * length} tokens are beyond "
            f"this model's {positions} positions"
        )
    splits = parts(tokenizer, settings)
    table.on(loaded)
    del loaded
    todo = [name for name in names if name not in table.done()]
    if progress and len(todo) < len(names):
        print(
            f"{table.path} has {', '.join(table.done())} of the same settings: not measured again",
            file=sys.stderr,
        )
    with table.held():
        for name in tqdm(todo, desc="compare", unit="technique", disable=not progress):
            table.add(measured(name, settings | dict(progress=progress), splits))
        table.finish()
    return [table.rows[name] for name in names]


def check(names, model, task, data, settings, sizes):
    """The whole of the settings, a dict; ValueError for what is unknown or too small."""
    for name in names:
        if name not in RATES:
            close = difflib.get_close_matches(name, RATES, 1)
            raise ValueError(
                f"technique {name!r} is not one that trains; "
                + (f"did you mean {close[0]!r}? " if close else "")
                + f"known: {', '.join(RATES)}"
            )
    texts.check(task)
    usual = SIZES.get(str(model), SIZES["smollm2"])
    unknown = set(sizes) - set(usual) - {"sweep_steps"}
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(unknown))}: unknown; known: {', '.join([*usual, 'sweep_steps'])}"
        )
    language = not data and task == "language"
    for key, used, by in (
        ("windows", language, "the text of the task 'language' alone is cut into windows"),
        ("limit", not data and not language, "the tasks 'summary' and 'package' alone have one"),
    ):
        if sizes.get(key) is not None and not used:
            raise ValueError(f"{key}={sizes[key]} would be ignored: {by}")
    settings |= usual | {key: value for key, value in sizes.items() if value is not None}
    settings.setdefault("sweep_steps", settings["steps"])
    for key, least in (*dict.fromkeys([*usual, "sweep_steps"], 1).items(), ("length", 2)):
        if settings[key] < least:
            raise ValueError(f"{key}={settings[key]}: the least is {least}")
    return dict(model=str(model), task=None if data else task, data=data and str(data), **settings)


def measured(name, settings, splits):
    """The row of one technique, measured in a process of its own; an error becomes a row too."""
    try:
        return apart(make_row, name, settings, splits)
    except ChildProcessError as error:
        return dict(technique=name, error=str(error))


def apart(function, *arguments):
    """function(*arguments) in a new process; ChildProcessError, with the error's text,
    where it fails or the process is killed.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=answer, args=(there,), daemon=True)
    with ignored():
        process.start()
    there.close()  # so that the end of the process is the end of the pipe
    try:
        here.send((function, arguments))
        while not here.poll(0.2):  # a Ctrl-C that another thread gets ends no longer wait
            pass
        result, error = here.recv()
        process.join()  # its end cleans up
    except (EOFError, ConnectionError):
        process.join()
        code = process.exitcode
        how = (
            f"signal {-code}; the system may have run out of memory"
            if code < 0
            else f"exit code {code}"
        )
        raise ChildProcessError(f"its process ended without a result ({how})") from None
    finally:  # Ctrl-C, too, ends the work at once
        process.kill()
        process.join()
    if error is not None:
        raise ChildProcessError(error)
    return result


@contextlib.contextmanager
def ignored():
    """A process that is started inside ignores Ctrl-C, which would make it print a traceback.

    The one that started it gets Ctrl-C as well, and ends it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is ignored is inherited
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def answer(there):
    """What the process of `apart` does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where nothing is inherited (Windows)
    try:
        function, arguments = there.recv()
        found = function(*arguments), None
    except Exception as error:
        traceback.print_exc()
        found = None, f"{type(error).__name__}: {error}"
    there.send(found)
