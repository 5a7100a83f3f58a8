"""What a model costs: parameters, bytes, what training needs, and the time of a token; as table, JSON and picture.

Training a model holds four things beside the program: the weights; a gradient for each parameter that learns; AdamW's two states
for each of these; and what the forward pass keeps for the backward pass (the activations), which alone grows with the batch. The first
three are counted, the last is measured by listening to what autograd saves in one step.
"""

import collections
import ctypes
import dataclasses
import gc
import json
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from minillm import files
from minillm.evaluate import logits
from minillm.registry import Format, prepare, walk


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


def report(model, batch=1, length=128, repeats=5, vocabulary=None):
    """The Report of a model; activations and time are those of `batch` rows of `length` random ids below `vocabulary`.

    vocabulary: by default the configuration's, or the rows of the first embedding. ValueError where there is neither, and for
    a batch below 1 or a length below 2, in which nothing is predicted.
    """
    if batch < 1 or length < 2:
        raise ValueError(f"batch={batch}, length={length}: at least one row of two tokens")
    learning = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in learning)
    vocabulary = vocabulary or size_of_vocabulary(model)
    device = next(model.parameters()).device
    config = getattr(model, "config", None)
    length = min(length, getattr(config, "positions", getattr(config, "max_position_embeddings", length)))
    ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
    return Report(
        parameters=sum(p.numel() for p in model.parameters()), trainable=sum(p.numel() for p in learning),
        bytes_by_format=bytes_by_format(model), weights=total_bytes(model), gradients=gradients, optimizer=2 * gradients,
        activations=saved_bytes(model, ids) if learning else 0, seconds_per_token=seconds(model, ids, repeats) / ids.numel(),
        batch=batch, length=length)


def size_of_vocabulary(model):
    """How many ids a model takes."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    lookups = (site.shape[1] for site in walk(model) if site.leaf is not None and site.leaf.lookup)  # W is (width, vocabulary)
    size = size or next(lookups, None)
    if size is None:
        raise ValueError(f"{type(model).__name__} has no config.vocab_size and no embedding: give vocabulary=")
    return size


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
        if hasattr(model, "hidden") and hasattr(model, "lm_head"):
            loss = model.loss(*prepare(model, ids, ids))
        else:
            loss = F.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
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


# --- the peak of memory -----------------------------------------------------------------------------------------------------


class Peak:
    """The most memory that a block of code needs for a model: `with Peak(model) as peak: train(...)`, then peak.bytes.

    bytes = the model's parameters and buffers, counted, + the most that the process grew by during the block. Of training this is the
    weights, gradients, the optimizer's state, activations and what the operators work in. What the process held before the block
    (the program, text, other copies of the model) is not in it. On Linux the kernel's record of the peak is reset first, and
    memory that was freed earlier goes back to the system, for reused memory would not show as growth. With the model on
    CUDA it is torch's own count on the device. Where a record cannot be reset (macOS), only growth beyond
    the earlier peak is seen, and the figure is too small if the process has held more before.
    """

    def __init__(self, model):
        self.model, self.bytes = model, 0

    def __enter__(self):
        self.cuda = next(self.model.parameters()).is_cuda
        self.weights = total_bytes(self.model)
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        give_back()
        self.before = held() if reset_peak() else peak_memory()
        return self

    def __exit__(self, *_):
        peak = torch.cuda.max_memory_allocated() if self.cuda else peak_memory()
        self.bytes = self.weights + max(0, peak - self.before)


def give_back():
    """Return memory that is free in the allocator to the system, where it is glibc's."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # another libc or system
        pass


def reset_peak():
    """Let the kernel's record of this process's peak begin anew; False where it cannot (man 5 proc, clear_refs)."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def status(field):
    """A field of /proc/self/status in bytes, or None on other systems."""
    path = pathlib.Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def held():
    """The bytes of memory that this process holds now (Linux)."""
    return status("VmRSS")


def peak_memory():
    """The most bytes that this process has held since it began, or since `reset_peak`; with CUDA in use, the most on the device.

    The whole process: the program, its libraries and text as well as the model. `Peak` has what training a model needs.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if (peak := status("VmHWM")) is not None:  # getrusage would begin with the peak of the process that started this one
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
