"""What a model costs: parameters, bytes, what training needs, and the time of a token; as table, JSON and picture.

Training a model holds four things beside the program: the weights; a gradient for each parameter that learns; AdamW's two states
for each of these; and what the forward pass keeps for the backward pass (the activations), which alone grows with the batch. The first
three are counted, the last is measured by listening to what autograd saves in one step.
"""

import collections
import dataclasses
import json
import pathlib
import statistics
import sys
import time

import torch

from minillm import files
from minillm.registry import Format


@dataclasses.dataclass
class Report:
    parameters: int
    trainable: int
    bytes_by_format: dict
    weights: int  # bytes, as the next three
    gradients: int
    optimizer: int
    activations: int
    seconds_per_token: float
    batch: int
    length: int

    def table(self):
        """Text, two columns."""
        mib = {"bytes, " + name: size for name, size in self.bytes_by_format.items()}
        mib |= {f"training: {name}": getattr(self, name) for name in ("weights", "gradients", "optimizer", "activations")}
        rows = [dict(what="parameters", figure=f"{self.parameters:,}"), dict(what="trainable", figure=f"{self.trainable:,}")]
        rows += [dict(what=name, figure=f"{size / 2**20:,.2f} MiB") for name, size in mib.items()]
        rows.append(dict(what=f"a token, forward, {self.batch} x {self.length}", figure=f"{self.seconds_per_token * 1e6:,.1f} µs"))
        return table(rows)

    def json(self):
        return json.dumps(dataclasses.asdict(self), indent=2)

    def picture(self, path):
        """A bar of what training needs, as PNG."""
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


def report(model, batch=1, length=128, repeats=5):
    """The Report of a model; activations and time are those of `batch` rows of `length` random ids."""
    learning = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in learning)
    vocabulary = model.config.vocab_size
    device = next(model.parameters()).device
    length = min(length, getattr(model.config, "positions", length))
    ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
    return Report(
        parameters=sum(p.numel() for p in model.parameters()), trainable=sum(p.numel() for p in learning),
        bytes_by_format=bytes_by_format(model), weights=total_bytes(model), gradients=gradients, optimizer=2 * gradients,
        activations=saved_bytes(model, ids) if learning else 0, seconds_per_token=seconds(model, ids, repeats) / ids.numel(),
        batch=batch, length=length)


def bytes_by_format(model):
    """{format: bytes} of all parameters and buffers, each storage once: the Format's name, else the dtype's."""
    found, seen = collections.Counter(), set()
    for module in model.modules():
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is not None and (t.is_meta or t.data_ptr() not in seen):
                seen.add(t.data_ptr())
                stored = isinstance(module, Format) and t is not module.bias
                found[module.format_name if stored else str(t.dtype).removeprefix("torch.")] += t.numel() * t.element_size()
    return dict(found)


def total_bytes(model):
    return sum(bytes_by_format(model).values())


def saved_bytes(model, ids):
    """The bytes that a forward pass of the loss keeps for the backward pass, parameters left out, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model.loss(ids, ids) if hasattr(model, "loss") else model(input_ids=ids, labels=ids).loss
        del loss
    return sum(saved.values())


@torch.inference_mode()
def seconds(model, ids, repeats):
    """The median time of a forward pass."""
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
        return "| " + " | ".join(t.ljust(w) if first else t.rjust(w) for t, w, first in zip(texts, widths, left)) + " |"

    rule = "|" + "|".join("-" * (w + 2) if first else "-" * (w + 1) + ":" for w, first in zip(widths, left)) + "|"
    return "\n".join([line(columns), rule, *map(line, cells)])


def figure(value):
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def peak_memory():
    """The most bytes that this process has held so far; with CUDA in use, the most on the device."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # getrusage would begin with the peak of the process that started this one
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
