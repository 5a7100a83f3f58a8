"""Prune a model, quantize it, and export it to llama.cpp.

    python examples/to_llama_cpp.py               the tiny model, which minillm pretrained here
    python examples/to_llama_cpp.py smollm2       after `minillm fetch smollm2`

Each step is measured twice: the bytes of the weights, and the perplexity of docstrings that no
model was trained on. llama.cpp runs the file where llama-cpp-python is installed.
"""

import os
import pathlib
import sys
import tempfile

import torch

import minillm
from minillm.measure.memory import total_bytes

SHORT = bool(os.environ.get("MINILLM_SHORT"))
KINDS = ("f16", "q8_0")


def opened(source):
    """(model, tokenizer); ends with one line, before any work, if llama.cpp could not have them."""
    try:
        model, tokenizer = minillm.load(source)
        with tempfile.TemporaryDirectory() as directory:
            for kind in KINDS:
                minillm.checkpoints.check_save(model, f"{directory}/a.gguf", tokenizer, type=kind)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    return model, tokenizer


def main(source="tiny"):
    model, tokenizer = opened(source)
    task = minillm.data.task("language", tokenizer, "validation")
    text = minillm.data.task("language", tokenizer, "test").text
    calibration = task.examples[: 2 if SHORT else 8]
    windows = 2 if SHORT else 12 if source == "tiny" else 4

    def line(what, size=None):
        found = minillm.measure.perplexity(model, tokenizer, text, length=256, windows=windows)
        size = total_bytes(model) if size is None else size
        print(f"{what:34}{size:>13,} bytes   perplexity {found:.2f}", flush=True)

    line("as it is")

    # Wanda: a quarter of each row becomes zero, by |weight| times the norm of the weight's input.
    minillm.prune.wanda.wrap(model, calibration, sparsity=0.25, progress=False)
    minillm.prune.merge(model, keep=False)
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    line(f"pruned: {zeros:,} zeros")

    # The zeros take as many bytes as before. int8 takes a quarter, and keeps each zero at zero.
    minillm.quant.wrap(model)
    line("and in int8, a scale for each row")
    minillm.quant.unwrap(model)  # a GGUF has a grid of its own; so: dense weights on the int8 grid

    with tempfile.TemporaryDirectory() as directory:
        for kind in KINDS:
            path = pathlib.Path(directory) / f"{kind}.gguf"
            minillm.save(model, path, tokenizer, type=kind)
            model, tokenizer = minillm.load(path)
            line(f"{kind}.gguf, read again", path.stat().st_size)
        run_llama_cpp(path, model, tokenizer)


def run_llama_cpp(path, model, tokenizer):
    """Continue one text with llama.cpp and with minillm, token by token, and compare."""
    try:
        import llama_cpp
    except ImportError:
        print("llama.cpp: pip install llama-cpp-python runs the file here")
        return
    ids = tokenizer.encode("Return a list of the files in the directory")
    other = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False)
    other.eval(ids)
    theirs = torch.tensor(other.scores[len(ids) - 1])
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0, -1]
    gap = float((theirs.softmax(-1) - ours.softmax(-1)).abs().max())
    print(f"llama.cpp's next token: {tokenizer.decode([int(theirs.argmax())])!r}; "
          f"minillm's: {tokenizer.decode([int(ours.argmax())])!r}; "
          f"the probabilities differ by at most {gap:.4f}")
    other.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
