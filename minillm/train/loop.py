"""The training loop: read `update` first, one optimizer step from top to bottom.

    theta <- AdamW(theta, gradient of the mean cross-entropy per learnt token)

AdamW: Loshchilov & Hutter 2019, arXiv 1711.05101. The parameters that learn are those with
`requires_grad`: the `wrap` of a technique decides that, not the loop.
"""

import contextlib
import itertools
import json
import logging
import math
import time

import torch
from tqdm.auto import tqdm

from minillm import data, distributed, files
from minillm.calling import native
from minillm.train import identity, masters, openings
from minillm.train.checkpoints import ready, restore
from minillm.train.disk import check_checkpoints
from minillm.train.history import journal, measured
from minillm.train.interrupt import deferred
from minillm.train.losses import NotFinite, held_out_loss, learnt, loss_sum
from minillm.train.groups import groups
from minillm.train.rescue import leave, rescued, save_or_go_on
from minillm.train.room import check_room
from minillm.train.schedules import rate
from minillm.train.settings import COMPARED, resolve
from minillm.train.state import put_back, snapshot

logger = logging.getLogger("minillm")


def train(model, examples, *, steps=None, epochs=None, lr, batch_size=8, accumulate=1,
          schedule="cosine", warmup=0, weight_decay=0.0, betas=(0.9, 0.999), clip=1.0, rates=None,
          seed=0, pad=0, held_out=None, evaluate=None, every=None, patience=None, restore_best=True,
          checkpoints=None, save_every=None, keep=2, resume=False, write=None, loss=None,
          on_step=None, log=None, progress=True, name="train"):
    """Train the model on a list of `data.Example`; returns the log (see `history`).

    The whole model is in train mode meanwhile: dropout is active, BatchNorm's statistics move.

    steps, epochs    give one of them: optimizer steps, or passes through the examples (0.5 is
                     half a pass). The last step takes only what is left of the epochs
    lr, schedule     AdamW's peak rate, and its share over the steps: a name or a function of
                     `schedules`. Half precision costs 10 bytes a parameter (see `masters`)
    warmup           steps in which the rate rises; a number below 1 is a share of all steps
    batch_size, accumulate    examples per batch, padded to one length (`pad`); batches per step
    weight_decay, betas       AdamW's; only matrices decay
    clip             the largest norm of the gradient; None: never clip
    rates            {regular expression: factor of the rate}, for parameters by name: `groups`
    seed             decides the order of the examples (a new one each epoch) and the dropout
    held_out         examples whose mean loss is measured ("held_out" in the log), or
    evaluate         a function from the model to a number, lower is better ("evaluation"):
                     measured every `every` steps (default: a tenth of all) and after the last
    patience         the training ends after so many measures without a better one
    restore_best     the model ends as it was after its best measure; costs a copy of what learns.
                     Measures before `on_step` has settled do not count (see `openings`)
    checkpoints      a directory for checkpoints: every `save_every` steps (default: a tenth of
                     all), after the last and on Ctrl-C; with 0 on Ctrl-C only. The last `keep`
                     stay. resume=True continues from the newest, or starts anew if there is none
    write            a function that saves the trained model, called with it at the end. If it
                     fails, or Ctrl-C ends it, the training is saved in `checkpoints`
    loss             loss(model, ids, labels, mask): the summed loss of a batch (None: `loss_sum`)
    on_step          on_step(model, step, steps), called between backward and step: see `openings`
    log              a file for the returned log, as JSON lines; progress, name: of the bar

    ValueError for a wrong setting, an example beyond the model's positions or vocabulary, a model
    in which nothing learns, a checkpoint of another training, and a loss that is no number;
    FileExistsError for another's `checkpoints`; Interrupted (KeyboardInterrupt) on a saved Ctrl-C.
    """
    given = {key: value for key, value in locals().items() if key not in ("model", "examples")}
    run = Run(model, examples, resolve(examples, given))
    with rescued(run):
        with contextlib.ExitStack() as stack:
            note, bar, asked = begin(run, stack)
            while not run.over():
                record = update(run)
                run.history.append(record)
                if run.due(run.options.every):
                    measure(run, record)
                note(record)
                show(bar, record)
                signal = distributed.largest(asked.signal, run.device)  # that any process got
                if signal:
                    leave(run, signal)
                if checkpoints is not None and run.due(run.options.save_every):
                    save_or_go_on(run)
            run.trained = True
            finish(run)
        if write is not None:
            write(model)
    return run.history


def update(run):
    """Make one optimizer step; returns its record for the log."""
    began, o, step = time.perf_counter(), run.options, len(run.history)

    # The learning rate of this step, for each group of parameters.
    share = rate(step, o.steps, o.schedule, o.warmup)
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak"] * share

    # The gradient of the loss summed over all micro-batches, divided by the tokens that all of
    # them learn. (A mean of means would weigh short examples more.)
    cut = o.last_accumulate and step == o.steps - 1  # the epochs end within this step
    parts = o.last_accumulate if cut else o.accumulate
    micro = [run.on_device(batch) for batch in itertools.islice(run.batches, parts)]
    count = sum(learnt(labels) for _, labels, _ in micro)
    total = 0.0
    with openings.around(o.on_step, run.model, step, o.steps):
        for batch in micro:
            part = openings.checked(run.loss(*distributed.rows(batch)))
            (part * (distributed.place()[1] / count)).backward()
            masters.collect(run.masters)
            total += part.item()
    total = distributed.total(total, run.device)

    if o.on_step is not None:
        with masters.shown(run.masters):
            o.on_step(run.model, step, o.steps)

    # Clipping: the gradients of all parameters together get at most this norm.
    norm = torch.nn.utils.clip_grad_norm_(run.stepped.values(), o.clip or math.inf)
    norm = distributed.whole(norm).item()
    if not math.isfinite(total) or not math.isfinite(norm):
        raise NotFinite(f"step {step}: the loss is {total / count} and the gradient's norm "
                        f"{norm}; a lower learning rate than {o.lr} may help")

    # AdamW; a parameter of less than float32 has a float32 copy that steps (see `masters`).
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    masters.write_back(run.masters)
    openings.after(run, step)

    tokens = sum(ids.numel() if mask is None else int((mask > 0).sum()) for ids, _, mask in micro)
    return dict(step=step, loss=total / count, rate=o.lr * share, norm=norm, learnt=count,
                tokens=tokens, seconds=time.perf_counter() - began)


def measure(run, record):
    """Evaluate the model and add the result to the record; if it is the best, copy what learns."""
    o = run.options
    run.given.eval()
    with forked(run.device):  # its random numbers do not change those of the training
        if o.held_out is not None:
            value = held_out_loss(run.given, o.held_out, o.batch_size, o.pad)
        else:
            value = float(o.evaluate(run.given))
    run.given.train()
    value = distributed.total(value, run.device) / distributed.place()[1]
    if not math.isfinite(value):
        raise ValueError(f"step {record['step']}: the evaluation is {value}, which cannot be "
                         "compared")
    record["held_out" if o.held_out is not None else "evaluation"] = value
    if run.count(record) and o.restore_best:
        run.best_state = snapshot(run)
    if run.best is not None:
        record["best"] = dict(run.best)


class Run:
    """The state of a training while it runs; a checkpoint holds all of it that changes."""

    def __init__(self, model, examples, options):
        check_compiled(model)
        self.given, self.options = model, options
        self.model = getattr(model, "_orig_mod", model)  # torch.compile would change the names
        o = options
        check_room(self.model, examples)
        check_room(self.model, options.held_out or (), "held-out example")
        openings.check(o, self.model, examples)
        sets = groups(self.model, o.lr, o.weight_decay, o.rates)
        self.learning = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        for _, p in self.learning:
            p.grad = None  # remove older gradients
        self.masters = masters.copies(self.learning)
        self.stepped = {n: self.masters.get(p, p) for n, p in self.learning}  # by the optimizer
        for group in sets:
            group["params"] = [self.masters.get(p, p) for p in group["params"]]
        self.optimizer = torch.optim.AdamW(sets, betas=o.betas)
        self.device = self.learning[0][1].device
        self.batches = data.batches(examples, o.batch_size, o.seed, o.pad)
        self.loss = distributed.spread(model, o.loss or loss_sum)
        self.history, self.trained = [], False
        self.warned = False  # that a checkpoint could not be written
        self.best, self.best_state, self.waited = None, None, 0  # of the evaluations
        self.settled = openings.settled(o.on_step, o.steps)
        self.identity = self.compared = None  # only checkpoints need them

    def describe(self):
        """Note all settings and properties that a resumed training must share with this one.

        They become JSON here, so a value that has none fails before the first step, not at the
        first checkpoint.
        """
        o = self.options
        settings = {key: getattr(o, key) for key in COMPARED}
        settings |= dict(data=identity.examples(self.batches.examples),
                         held_out=o.held_out and identity.examples(o.held_out),
                         schedule=openings.named(o.schedule),
                         loss=openings.named(o.loss), on_step=openings.named(o.on_step),
                         evaluate=openings.named(o.evaluate),
                         processes=distributed.place()[1])
        self.compared = json.loads(json.dumps(settings))
        self.identity = json.loads(json.dumps(identity.of(self.model, o.on_step)))

    def count(self, record):
        """Whether the record has an evaluation that is the best; counts the worse ones since.

        Until `on_step` has settled, the model is not yet the wanted one (a pruning is half done,
        for example), so an earlier evaluation does not count.
        """
        value = measured(record)
        if value is None or record["step"] < self.settled:
            return False
        if self.best is None or value < self.best["value"]:
            self.best, self.waited = dict(step=record["step"], value=value), 0
            return True
        self.waited += 1
        return False

    def due(self, every):
        """Whether an action that comes every `every` steps, and at the end, is due now."""
        return bool(every) and (len(self.history) % every == 0 or self.over())

    def over(self):
        o = self.options
        stopped = o.patience is not None and self.waited >= o.patience
        return stopped or len(self.history) >= o.steps

    def on_device(self, batch):
        return tuple(None if t is None else t.to(self.device) for t in batch)


def check_compiled(model):
    """TypeError for a compiled model whose compiled part `train` would never call."""
    wrapped = hasattr(model, "_orig_mod")  # by torch.compile(model), not model.compile()
    compiled = wrapped or getattr(model, "_compiled_call_impl", None) is not None
    if compiled and native(model):
        raise TypeError("torch.compile(model) compiles the model's forward, but train calls its "
                        "`loss`: nothing would be compiled. minillm.compile(model) compiles its "
                        "blocks")


def begin(run, stack):
    """Enter every context of the training into the stack; returns (note a line, bar, Asked)."""
    o, rank = run.options, distributed.place()[0]
    stack.enter_context(training_mode(run))
    stack.enter_context(forked(run.device))
    torch.manual_seed(o.seed + rank)
    if o.checkpoints is not None:
        if rank == 0:
            stack.enter_context(files.lock(o.checkpoints))
        path = ready(o.checkpoints, o.resume)
        check_checkpoints(run)
        run.describe()
        if path is not None:
            restore(run, path)
    note = stack.enter_context(journal(o.log if rank == 0 else None, run.history))
    bar = tqdm(total=o.steps, initial=len(run.history), desc=o.name, unit="step",
               disable=not o.progress or rank > 0, leave=False)
    return note, stack.enter_context(bar), stack.enter_context(deferred(o.checkpoints is not None))


@contextlib.contextmanager
def training_mode(run):
    """Train mode inside (dropout is active); afterwards every module has its old mode."""
    modes = [(module, module.training) for module in run.model.modules()]
    run.given.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def forked(device):
    """Random numbers drawn inside do not change those drawn afterwards."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def show(bar, record):
    speed = record["tokens"] / record["seconds"]
    bar.set_postfix_str(f"loss {record['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
    bar.update()


def finish(run):
    """Put the parameters of the best step back, if a best was kept and is not the last step."""
    steps = len(run.history)
    if steps < run.options.steps:
        logger.info("stopped early after step %d of %d: %d evaluations were not below %.4g",
                    steps, run.options.steps, run.waited, run.best["value"])
    if run.best_state is not None and run.best["step"] != steps - 1:
        put_back(run, run.best_state)
