"""The training loop, whole.

    theta <- AdamW(theta, gradient of the mean cross-entropy per learnt token)     Loshchilov & Hutter 2019, arXiv 1711.05101

One function, read from top to bottom: batches, the loss, accumulation, clipping, the schedule, the log, evaluation, early
stopping, checkpoints. What learns is what has `requires_grad`: the techniques decide that by `wrap`, not the loop.

- The loss of an optimizer step is the sum over all its micro-batches divided by the number of tokens that all of them learn, so
  `accumulate=k` is the same step as a batch k times as large. (A mean of means weighs short examples more; trl and
  torchtune both had to mend this.)
- A checkpoint holds what learns, the optimizer's state, the step, the place in the data and the random state, in one safetensors file
  that is written beside its name and then renamed. `resume=True` goes on from the newest, and every later loss is the same to
  the last bit. Frozen weights are not in it: load the same model and wrap it the same way first.
- Under torchrun each process computes its share of every batch; the losses stay those of one (see `distributed`).
- transformers' Trainer does this and far more behind callbacks and 100 arguments. Not included: mixed precision by autocast (a
  bfloat16 model with float32 adapters needs none).
"""

import contextlib
import itertools
import json
import math
import pathlib
import re
import shutil
import time

import safetensors.torch
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from minillm import data, distributed, files
from minillm.registry import prepare
from minillm.verbs import read

SCHEDULES = {  # the share of the learning rate at x, from 0 (the end of the warm-up) to 1 (the last step)
    "constant": lambda x: 1.0,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


def rate(step, steps, schedule="cosine", warmup=0):
    """The share of the peak learning rate at `step` (from 0): it rises over `warmup` steps, then follows the schedule."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown; known: {', '.join(SCHEDULES)}")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[schedule]((step - warmup) / max(1, steps - warmup))


def groups(model, lr, weight_decay=0.0, rates=None):
    """AdamW's parameter groups: what learns, by its learning rate and whether it decays (vectors, as biases and norms, do not).

    rates: {regular expression: factor}; a parameter whose name is matched from its start or after a dot learns at
    factor * lr. An expression that matches nothing that learns is an error.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("nothing in this model learns: every parameter is frozen (requires_grad is False)")
    factors = dict.fromkeys((name for name, _ in named), 1.0)
    for pattern, factor in (rates or {}).items():
        matching = [name for name in factors if re.search(rf"(?:^|\.)(?:{pattern})", name)]
        if not matching:
            raise ValueError(f"rates: {pattern!r} matches no parameter that learns; there are: {', '.join(list(factors)[:8])}")
        factors.update(dict.fromkeys(matching, factor))
    sets = {}
    for name, p in named:
        sets.setdefault((factors[name] * lr, weight_decay if p.dim() > 1 else 0.0), []).append(p)
    return [dict(params=params, lr=peak, peak=peak, weight_decay=decay) for (peak, decay), params in sets.items()]


def loss_sum(model, ids, labels, mask=None):
    """The summed cross-entropy over the learnt labels of a batch (b, t), for minillm's models and others."""
    ids, labels, mask = prepare(model, ids, labels, mask)
    if hasattr(model, "loss"):
        return model.loss(ids, labels, mask, reduction="sum")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"{type(model).__name__} has no mask for packed examples: give it the examples unpacked")
    output = model(ids) if mask is None else model(ids, attention_mask=mask)
    logits = getattr(output, "logits", output)  # (b, t, vocab)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")


def train(model, examples, *, steps, lr, batch_size=8, accumulate=1, schedule="cosine", warmup=0, weight_decay=0.0, betas=(0.9, 0.999),
          clip=1.0, rates=None, seed=0, pad=0, evaluate=None, every=None, patience=None, checkpoints=None, save_every=None, keep=2,
          resume=False, log=None, progress=True, name="train"):
    """Train what learns in the model on a list of `data.Example`; returns the log, a dict for each step.

    Each of the `steps` takes `accumulate` batches of `batch_size` examples, in an order that `seed` alone decides, clips the
    gradient's norm at `clip` (None: never), and steps AdamW at the rate of the schedule. `evaluate(model)` returns a number, lower being
    better, `every` so many steps; after `patience` of these without a better one the training ends. `checkpoints` is a
    directory that gets a file each `save_every` steps, of which the last `keep` stay; `log` a file of JSON lines.

    ValueError where nothing learns, or where the loss is no longer a number; the checkpoints before that stay.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(groups(model, lr, weight_decay, rates), betas=betas)
    batches = data.batches(examples, batch_size, seed, pad)
    rank, world = distributed.place()
    settings = dict(steps=steps, lr=lr, batch_size=batch_size, accumulate=accumulate, schedule=schedule, warmup=warmup,
                    weight_decay=weight_decay, clip=clip, seed=seed, examples=len(examples), processes=world)
    summed_loss = distributed.spread(model, loss_sum)
    history, best, waited = [], math.inf, 0
    was_training = model.training
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        torch.manual_seed(seed + rank)
        if checkpoints is not None:
            if rank == 0:
                stack.enter_context(files.lock(checkpoints))
                for half in pathlib.Path(checkpoints).glob(".step-*"):  # what a run was writing when it was killed
                    shutil.rmtree(half)
            if resume and (path := newest(checkpoints)):
                history = restore(path, model, optimizer, batches, settings)
        note = stack.enter_context(journal(log if rank == 0 else None, history))
        shown = progress and rank == 0
        bar = stack.enter_context(tqdm(total=steps, initial=len(history), desc=name, unit="step", disable=not shown, leave=False))
        values = [record["evaluation"] for record in history if "evaluation" in record]
        for value in values:
            best, waited = (value, 0) if value < best else (best, waited + 1)
        model.train()
        stream = iter(batches)
        for step in range(len(history), steps):
            if patience is not None and waited >= patience:
                break
            began = time.perf_counter()
            share = rate(step, steps, schedule, warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            micro = [tuple(None if t is None else t.to(device) for t in batch) for batch in itertools.islice(stream, accumulate)]
            learnt = sum(int((labels[:, 1:] != -100).sum()) for _, labels, _ in micro)
            total = 0.0
            for ids, labels, mask in micro:
                part = summed_loss(*distributed.rows((ids, labels, mask)))
                (part * (world / learnt)).backward()
                total += part.item()
            total = distributed.total(total, device)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = distributed.whole(torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)).item()
            if not math.isfinite(total) or not math.isfinite(norm):
                raise ValueError(f"step {step}: the loss is {total / learnt} and the gradient's norm {norm}; "
                                 f"a lower learning rate than {lr} may help")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            seconds = time.perf_counter() - began
            tokens = sum(ids.numel() if mask is None else int((mask > 0).sum()) for ids, _, mask in micro)
            record = dict(step=step, loss=total / learnt, rate=lr * share, norm=norm, tokens=tokens, seconds=seconds)
            if evaluate is not None and every and (step + 1) % every == 0:
                record["evaluation"] = value = distributed.total(float(evaluate(model)), device) / world
                model.train()
                best, waited = (value, 0) if value < best else (best, waited + 1)
            history.append(record)
            note(record)
            bar.set_postfix_str(f"loss {record['loss']:.3f}, {tokens / seconds:,.0f} tokens/s", refresh=False)
            bar.update()
            if checkpoints is not None and ((step + 1) % (save_every or steps) == 0 or step + 1 == steps):
                checkpoint(checkpoints, model, optimizer, batches, settings, history, keep)
    model.train(was_training)
    return history


# --- checkpoints ----------------------------------------------------------------------------------------------------------------


def learning(model, optimizer):
    """[(name, parameter)] of what the optimizer steps."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [(name, p) for name, p in model.named_parameters() if id(p) in stepped]


def checkpoint(directory, model, optimizer, batches, settings, history, keep):
    """Write `step-N.safetensors`, then remove all but the last `keep`. Of several processes the first writes."""
    tensors = {f"random.{rank}": state for rank, state in enumerate(distributed.gathered(torch.get_rng_state()))}
    if torch.cuda.is_available():
        tensors |= {f"random.cuda.{rank}": state for rank, state in enumerate(distributed.gathered(torch.cuda.get_rng_state()))}
    for name, p in learning(model, optimizer):
        tensors[f"model.{name}"] = distributed.whole(p.detach()).contiguous()
        for key, value in optimizer.state[p].items():
            tensors[f"optimizer.{key}.{name}"] = distributed.whole(value).contiguous()
    told = {"settings": settings, "history": history, "batches": batches.state_dict()}
    path = pathlib.Path(directory) / f"step-{len(history):08d}.safetensors"
    if distributed.place()[0] == 0:
        with files.atomic(path) as new:
            safetensors.torch.save_file(tensors, new, {"format": "pt", "training": json.dumps(told)})
        for old in saved(directory)[:-keep]:
            old.unlink()
    distributed.wait()


def saved(directory):
    """The checkpoints in a directory, oldest first."""
    return sorted(pathlib.Path(directory).glob("step-*.safetensors"))


def newest(directory):
    return next(reversed(saved(directory)), None)


@torch.no_grad()
def restore(path, model, optimizer, batches, settings):
    """Put everything back as it was when the checkpoint was written, once all of it is checked; returns the log up to there."""
    tensors, metadata = read(path)
    try:
        told = json.loads(metadata["training"])
        then, place, history = told["settings"], {key: int(told["batches"][key]) for key in ("epoch", "position")}, told["history"]
        differ = {key: (then.get(key), value) for key, value in settings.items() if then.get(key) != value}
        whole = all(isinstance(record["loss"], float) and record["step"] == i for i, record in enumerate(history))
        whole = whole and 0 <= place["position"] < len(batches.examples)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a checkpoint of minillm.train ({type(error).__name__}: {error})") from error
    if differ or not whole:
        listed = ", ".join(f"{key}={then!r} then, {now!r} now" for key, (then, now) in differ.items())
        raise ValueError(f"{path} was written with other settings: {listed}" if differ else f"{path}: its log is not whole")
    named, rank, moments = learning(model, optimizer), distributed.place()[0], ("exp_avg", "exp_avg_sq")
    ours = {f"random.{rank}": torch.get_rng_state()}
    for name, p in named:
        ours |= {f"model.{name}": p, f"optimizer.step.{name}": torch.zeros(()), **{f"optimizer.{key}.{name}": p for key in moments}}
    odd = [key for key, t in ours.items() if key not in tensors or (tensors[key].shape, tensors[key].dtype) != (t.shape, t.dtype)]
    odd += [key for key in tensors if key not in ours and not key.startswith("random.")]
    if odd:
        raise ValueError(f"{path} does not fit what learns in this model; {len(odd)} tensors differ, first {odd[0]!r}. "
                         "Wrap the model as it was wrapped then")
    try:
        torch.set_rng_state(tensors[f"random.{rank}"])
    except RuntimeError as error:
        raise ValueError(f"{path}: its random state is none ({error})") from error
    if f"random.cuda.{rank}" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"random.cuda.{rank}"])
    for name, p in named:
        p.copy_(distributed.like(tensors[f"model.{name}"], p))
        optimizer.state[p]["step"] = tensors[f"optimizer.step.{name}"]
        for key in moments:
            optimizer.state[p][key] = distributed.like(tensors[f"optimizer.{key}.{name}"], p)
    batches.load_state_dict(place)
    return history


@contextlib.contextmanager
def journal(path, history):
    """A function that adds a line to the log file, which holds those of the steps that are already done. Without a path it does nothing."""
    if path is None:
        yield lambda record: None
        return
    with files.atomic(path) as new:
        new.write_text("".join(json.dumps(record) + "\n" for record in history))
    with open(path, "a", buffering=1) as lines:
        yield lambda record: lines.write(json.dumps(record) + "\n")
