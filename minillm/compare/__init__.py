"""Compare all techniques on one model and one task: the cost and the quality of each,
before and after quantization and pruning.

For each technique, in a process of its own:

    1. load the model and measure it
    2. for each learning rate: wrap, train, measure on the validation split
    3. for each seed: wrap, train at the best rate, measure on the test split
    4. merge the technique, if it can be merged
    5. quantize to int8 and measure; prune half of the weights and measure

- Each technique has its own learning rate, because a comparison at the rate of another
  technique would show nothing. The sweep starts with three rates around a usual one and
  goes on while the best is at its edge. Each rate is tried for as many steps as the training
  takes, because a short training prefers another rate than a long one. Nine variants of
  LoRA, each tuned in this way, end within 2% of each other (arXiv 2602.04998).
- The first three rates of LoRA are trained at once over one base (see `train.many`), and each
  ends as if alone, within rounding. A row's memory and seconds are of its last training alone.
- The effect of a technique is its change against the untuned model on the same held-out
  text: the mean over the seeds, with a 95% interval over text and seeds
  (see `measure.difference`). The effect of int8 and of pruning is the change against the
  trained model.
- Peak memory is that of training alone: weights, gradients, the optimizer's state,
  activations (see `report.Peak`).
- Each row is written to table.json as soon as it is known. The same command, run again,
  measures only the rows that are missing or failed.
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
from minillm.compare.rates import BASIC, RATES, sweep, usual
from minillm.compare.row import make_row, parts, score, scores
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

SIZES = {  # the defaults of a run: the tiny model needs more steps, and is fast enough for them
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
    """The table: a list of rows, one dict for each technique in `names` (None: the base methods).

    model, task  as for `zoo.load` and `data.task`
    data         the user's own file instead of a task (see `row.own`)
    out          a directory for table.json, written after each technique, and for table.md
                 and table.png, written at the end. Rows of an earlier run with the same
                 settings and versions are kept, and only the others are measured. Any other
                 file in their place is a FileExistsError, unless force=True
    device, dtype    as for `zoo.load`
    length       tokens per example; windows of text have twice as many
    sizes        steps, sweep_steps (default: as steps), seeds, batch_size, windows, limit:
                 numbers in place of those in SIZES

    A technique that fails, even one whose process is killed, has a row with its
    "error", and the others are still measured (see `failed`). ValueError for an unknown
    technique, task or size, before any work.
    """
    names = BASIC if names is None else list(dict.fromkeys(names))
    settings = check(
        names, model, task, data,
        dict(length=length, seed=seed, device=device, dtype=dtype, threads=threads), sizes
    )
    table = Table(out, force)  # an output that cannot be written is an error now
    table.begin(settings)
    loaded, tokenizer = zoo.load(model)  # trains the tiny model; a missing model is an error now
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
            f"{table.path} has rows of the same settings, which are not measured again: "
            + ", ".join(map(repr, table.done())),
            file=sys.stderr,
        )
    with table.held():
        for name in tqdm(todo, desc="compare", unit="technique", disable=not progress):
            table.add(measured(name, settings | dict(progress=progress), splits))
        table.finish()
    return [table.rows[name] for name in names]


def check(names, model, task, data, settings, sizes):
    """All settings, a dict; ValueError for a name that is unknown or a number that is too small."""
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
        ("windows", language, "only the text of the task 'language' is cut into windows"),
        ("limit", not data and not language, "only the tasks 'summary' and 'package' have one"),
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
    """The row of one technique, measured in a process of its own; an error gives a row too."""
    try:
        return apart(make_row, name, settings, splits)
    except ChildProcessError as error:
        return dict(technique=name, error=str(error))


def apart(function, *arguments):
    """function(*arguments) in a new process; ChildProcessError, with the text of the error,
    if it fails or the process is killed.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=answer, args=(there,), daemon=True)
    with ignored():
        process.start()
    there.close()  # so that the pipe ends when the process ends
    try:
        here.send((function, arguments))
        while not here.poll(0.2):  # short waits, as Ctrl-C may not end a long one
            pass
        result, error = here.recv()
        process.join()  # wait until it has cleaned up
    except (EOFError, ConnectionError):
        process.join()
        code = process.exitcode
        how = (
            f"signal {-code}; the system may have run out of memory"
            if code < 0
            else f"exit code {code}"
        )
        raise ChildProcessError(f"its process ended without a result ({how})") from None
    finally:  # also on Ctrl-C
        process.kill()
        process.join()
    if error is not None:
        raise ChildProcessError(error)
    return result


@contextlib.contextmanager
def ignored():
    """Let a process that is started inside ignore Ctrl-C, so that it prints no traceback.

    The process that started it gets Ctrl-C as well, and ends it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a new process inherits this
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def answer(there):
    """The work of the process that `apart` starts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for Windows, where nothing is inherited
    tqdm.set_lock(threading.RLock())  # tqdm's own is a semaphore, which a killed process leaves
    try:
        function, arguments = there.recv()
        found = function(*arguments), None
    except Exception as error:
        traceback.print_exc()
        found = None, f"{type(error).__name__}: {error}"
    there.send(found)
