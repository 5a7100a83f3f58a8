"""What a model costs: parameters, bytes, the memory of training and the time of a token,
as table, JSON and picture.

Training a model needs memory for four things beside the program: the weights; a gradient
for each parameter that learns; AdamW's two states for each of these; and the tensors that
the forward pass keeps for the backward pass (the activations). Only the last grows with
the batch. The first three are counted; the last is measured, by hooks on what autograd
saves in one step.
"""

import dataclasses
import json
import statistics
import time

import torch
import torch.nn.functional as F

from minillm import files
from minillm.calling import logits, native
from minillm.measure.memory import Peak, bytes_by_format, peak_memory, total_bytes
from minillm.registry import prepare, walk

__all__ = ["Peak", "Report", "bytes_by_format", "peak_memory", "report", "table", "total_bytes"]


@dataclasses.dataclass
class Report:
    parameters: int
    trainable: int
    bytes_by_format: dict
    weights: int  # bytes, as the next three
    gradients: int
    optimizer: int
    activations: int
    spared: int  # gradients and optimizer of what is frozen
    seconds_per_token: float
    batch: int
    length: int

    def table(self):
        """The report as a text of two columns."""
        mib = {"bytes, " + name: size for name, size in self.bytes_by_format.items()}
        mib |= {
            f"training: {name}": getattr(self, name)
            for name in ("weights", "gradients", "optimizer", "activations")
        }
        mib |= {"training: saved by what is frozen": self.spared} if self.spared else {}
        rows = [
            dict(what="parameters", figure=f"{self.parameters:,}"),
            dict(what="trainable", figure=f"{self.trainable:,}"),
        ]
        rows += [dict(what=name, figure=f"{size / 2**20:,.2f} MiB") for name, size in mib.items()]
        rows.append(
            dict(
                what=f"a token, forward, {self.batch} x {self.length}",
                figure=f"{self.seconds_per_token * 1e6:,.1f} µs",
            )
        )
        return table(rows)

    def json(self):
        return json.dumps(dataclasses.asdict(self), indent=2)

    def picture(self, path):
        """Draw the memory that training needs as one bar, a PNG."""
        files.need("matplotlib", "plot")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 1.8), layout="constrained")
        axes, left = figure.subplots(), 0.0
        for name in ("weights", "gradients", "optimizer", "activations"):
            width = getattr(self, name) / 2**20
            axes.barh([""], [width], left=left, label=name)
            left += width
        axes.set_xlabel(f"MiB to train with {self.batch} x {self.length} tokens")
        axes.legend(ncols=4, fontsize="small", loc="upper center")
        axes.set_ylim(-0.6, 1.2)
        with files.atomic(path) as new:
            figure.savefig(new, format="png", dpi=120)


def report(model, batch=1, length=128, repeats=5, vocabulary=None):
    """The Report of a model. Activations and time are measured on `batch` rows of `length`
    random ids below `vocabulary`.

    vocabulary: by default that of the configuration, or the rows of the first embedding.
    ValueError if there is neither, and for a batch below 1 or a length below 2, which has
    nothing to predict.
    """
    if batch < 1 or length < 2:
        raise ValueError(
            f"batch={batch}, length={length}: a report needs at least one row of two tokens"
        )
    learning = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    gradients, optimizer = state_of(learning)
    vocabulary = vocabulary or size_of_vocabulary(model)
    device = next(model.parameters()).device
    config = getattr(model, "config", None)
    length = min(
        length, getattr(config, "positions", getattr(config, "max_position_embeddings", length))
    )
    numbers = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(vocabulary, (batch, length), generator=numbers, device="cpu").to(device)
    return Report(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in learning),
        bytes_by_format=bytes_by_format(model),
        weights=total_bytes(model),
        gradients=gradients,
        optimizer=optimizer,
        activations=saved_bytes(model, ids) if learning else 0,
        spared=sum(state_of(frozen)),
        seconds_per_token=seconds(model, ids, repeats) / ids.numel(),
        batch=batch,
        length=length,
    )


def state_of(parameters):
    """(bytes of the gradients, bytes of AdamW's states) while these parameters learn.

    What is less than float32 has a float32 copy, which counts as state (see `train.masters`).
    """
    half = 4 * sum(p.numel() for p in parameters if p.element_size() < 4)
    gradients = half + sum(
        p.numel() * p.element_size() for p in parameters if p.element_size() >= 4
    )
    return gradients, 2 * gradients + half


def size_of_vocabulary(model):
    """How many ids a model takes."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    lookups = (
        site.shape[1] for site in walk(model) if site.leaf is not None and site.leaf.lookup
    )  # W is (width, vocabulary)
    size = size or next(lookups, None)
    if size is None:
        raise ValueError(
            f"{type(model).__name__} has no config.vocab_size and no embedding: give vocabulary="
        )
    return size


def saved_bytes(model, ids):
    """The bytes that a forward pass of the loss keeps for the backward pass, without the
    parameters and with each storage once.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        if native(model):
            loss = model.loss(*prepare(model, ids, ids))
        else:
            loss = F.cross_entropy(
                logits(model, ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
            )
        del loss
    return sum(saved.values())


@torch.inference_mode()
def seconds(model, ids, repeats):
    """The median time of a forward pass, in seconds."""
    was_training, times = model.training, []
    model.eval()
    for _ in range(repeats + 1):
        began = time.perf_counter()
        model(ids)
        if ids.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    model.train(was_training)
    return statistics.median(times[1:])  # the first warms up


def table(rows, columns=None):
    """Rows (dicts) as a Markdown table whose columns also line up in a terminal."""
    if not rows:
        return ""
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    cells = [[figure(row.get(name, "")) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    left = [i == 0 for i in range(len(columns))]

    def line(texts):
        return (
            "| "
            + " | ".join(
                t.ljust(w) if first else t.rjust(w) for t, w, first in zip(texts, widths, left)
            )
            + " |"
        )

    rule = (
        "|"
        + "|".join(
            "-" * (w + 2) if first else "-" * (w + 1) + ":" for w, first in zip(widths, left)
        )
        + "|"
    )
    return "\n".join([line(columns), rule, *map(line, cells)])


def figure(value):
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
