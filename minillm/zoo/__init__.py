"""The models that have a name: "smollm2", downloaded once, and "tiny", trained on this machine.

    load("smollm2" | "tiny" | directory | file.gguf)  ->  (model, tokenizer)
    load(directory of save_all)                       ->  the same, with the techniques attached
    fetch("smollm2")                                  ->  the directory in the cache
"""

from minillm import checkpoints
from minillm.checkpoints import together
from minillm.zoo.fetching import fetch, fetched
from minillm.zoo.pretrain import tiny

__all__ = ["fetch", "load", "located", "tiny"]


def load(source, dtype=None, device=None):
    """(model, tokenizer) of a checkpoint; the model is in eval mode and has `source` as `.source`.

    source: "smollm2", "tiny", a path as for `checkpoints.load`, or a directory of
    `minillm.save_all`: then the base that it names is loaded, and the techniques onto it.
    dtype: a dtype of torch or its name: float32, float64, bfloat16 or float16; by default the
    checkpoint's own, and float32 for GGUF. The tokenizer is None if the checkpoint has none.
    FileNotFoundError if the source is missing, ValueError if it is not whole, or needs something
    that minillm does not implement.
    """
    device = checkpoints.placed(device)  # a wrong device is an error before any work
    directory = source if together.written(source) else None
    if directory is not None:
        source = together.read(directory).get("source")
        if source is None:
            raise ValueError(f"{directory} does not name its base, because minillm.load had not "
                             f"loaded that: minillm.load_all(model, {str(directory)!r})")
    model, tokenizer = checkpoints.load(located(source), dtype, device)
    model.source = str(source)
    if directory is not None:
        together.load_all(model, directory)
    return model, tokenizer


def located(source):
    """The path of a model, given its name or its path."""
    if source == "tiny":
        return tiny()
    return fetched("smollm2") if source == "smollm2" else source
