"""Count the bytes of a model, and measure the peak memory of a block of code."""

import collections
import ctypes
import gc
import pathlib
import sys

import torch

from minillm.registry import Format
from minillm.registry.past import Aside


def bytes_by_format(model):
    """{format: bytes} of all parameters and buffers, each storage once.

    The key is the name of the Format, else of the dtype; "kept by merge" holds the weights
    that `unmerge` would put back.
    """
    found, seen = collections.Counter(), set()

    def count(name, t):
        if t is not None and (t.is_meta or t.data_ptr() not in seen):
            seen.add(t.data_ptr())
            found[name] += t.numel() * t.element_size()

    for module in model.modules():
        for t in (*module._parameters.values(), *module._buffers.values()):
            stored = isinstance(module, Format) and t is not module.bias
            count(module.kind if stored else str(t.dtype).removeprefix("torch.")
                  if t is not None else "", t)
    for module in model.modules():
        for t in module.tensors() if isinstance(module, Aside) else ():
            count("kept by merge", t)
    return dict(found)


def total_bytes(model):
    return sum(bytes_by_format(model).values())


class Peak:
    """The most memory that a block of code needs for a model: `with Peak(model) as
    peak: train(...)`, then peak.bytes.

    bytes = the counted bytes of the model's parameters and buffers + the largest growth
    of the process during the block. For a training this is the weights, gradients, the
    optimizer's state, activations and the workspace of the operators. Memory that the
    process held before the block (the program, text, other copies of the model) does not
    count.

    On Linux, Peak first resets the kernel's record of the peak, and returns freed memory
    to the system, because reused memory would not show as growth. For a model on CUDA,
    torch's own count on the device is used. If the record cannot be reset (macOS), Peak
    sees only growth beyond the earlier peak, so the figure is too small if the process
    held more before.
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
    """Return the allocator's free memory to the system (only with glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # another libc or system
        pass


def reset_peak():
    """Reset the kernel's record of this process's peak (man 5 proc, clear_refs); False if
    the system cannot.
    """
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def status(field):
    """A field of /proc/self/status in bytes, or None on other systems."""
    path = pathlib.Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None
    )


def held():
    """The bytes of memory that this process holds now (Linux)."""
    return status("VmRSS")


def peak_memory():
    """The most bytes that this process has held since it began, or since `reset_peak`;
    with CUDA in use, the most on the device.

    This counts the whole process: the program, its libraries and text as well as the
    model. `Peak` measures what the training of a model needs.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # First VmHWM: getrusage would begin with the peak of the process that started this one.
    if (peak := status("VmHWM")) is not None:
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
