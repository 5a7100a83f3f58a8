"""The models that have a name: "smollm2", fetched once, and "tiny", trained on the spot.

    load("smollm2" | "tiny" | directory | file.gguf)  ->  (model, tokenizer)
    fetch("smollm2")                                  ->  the directory in the cache
"""

from minillm import checkpoints
from minillm.zoo.fetching import fetch, fetched
from minillm.zoo.pretrain import tiny

__all__ = ["fetch", "load", "located", "tiny"]


def load(source, dtype=None, device=None):
    """(model, tokenizer) of a checkpoint; the model is in eval mode and has `source` as `.source`.

    source: "smollm2" or "tiny", or a path, as `checkpoints.load` takes it. dtype: as torch has it,
    or its name: float32, float64, bfloat16 or float16; by default the checkpoint's own, of a GGUF
    float32. The tokenizer is None where the checkpoint has none. FileNotFoundError where the source
    is missing, ValueError where it is not whole, or is something that minillm does not compute.
    """
    device = checkpoints.placed(device)  # an error comes before a model is trained or fetched
    model, tokenizer = checkpoints.load(located(source), dtype, device)
    model.source = str(source)
    return model, tokenizer


def located(source):
    """The path of a model that has a name, or of one that is a path already."""
    if source == "tiny":
        return tiny()
    return fetched("smollm2") if source == "smollm2" else source
