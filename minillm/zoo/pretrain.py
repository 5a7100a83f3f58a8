"""The tiny model: a Llama of half a million parameters, pretrained once on this machine
on text that Python brings along.

With it, everything here can be tried in minutes on a model that was really trained and
never quantized, so the measured cost of int8 or pruning is the true cost. It reads two
texts:

    the language reference    `pydoc_data.topics`
    comments                  the lines that are all comment, in the modules of the train split

It reads no docstring, so the docstrings of the tasks are a new domain to it, and it reads
no text of a module in the test split.
"""

import hashlib
import json
import pathlib
import re
import sys
import sysconfig

import torch

from minillm import checkpoints, data, files, train
from minillm.model.tokenizer import SentencePiece
from minillm.model.transformer import Config, Transformer

# Few parameters and two passes over the text: in this time, a larger model would learn so little
# that the loss of half of its weights would hardly show. An example is as long as the windows that
# `compare` measures (2 * 128). At twice this rate and a quarter of this warm-up, small changes of
# the recipe moved the perplexity of held-out text between 40 and 90.
RECIPE = dict(
    vocab_size=1024, width=96, layers=4, heads=4, kv_heads=2, ffn=256, positions=512,
    steps=1000, lr=3e-3, batch_size=4, length=256, seed=0,
)  # fmt: skip


def tiny(progress=True):
    """The directory of the tiny model in the cache; trains it first if it is not there
    (less than two minutes on two cores).

    The name of the directory depends on the recipe and on the version of Python, which
    brings the text, so a change of either makes a new model.
    """
    key = hashlib.sha256(json.dumps([RECIPE, sys.version]).encode()).hexdigest()[:12]
    path = files.cache() / f"tiny-{key}"
    if not (path / "config.json").exists():
        files.check_writable(path, directory=True)
        model, tokenizer = pretrain(reading(), progress=progress, **RECIPE)
        checkpoints.save(model, path, tokenizer=tokenizer)
    return path


def reading():
    """The text for the tiny model: the language reference, then each different block of
    comment lines once.
    """
    return "\n".join([data.topics(), *dict.fromkeys(comments())])


def comments(least=40):
    """Yield the blocks of comment lines, of at least `least` characters, in the modules of
    the train split that have a docstring.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    for module in sorted({d.module for d in data.texts("train")}):
        if module.startswith("encodings"):  # tables of characters
            continue
        stem = root.joinpath(*module.split("."))
        path = next(
            (p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.exists()), None
        )
        source = path.read_text(encoding="utf-8", errors="ignore") if path else ""
        for block in re.findall(r"(?:^[ \t]*#.*\n)+", source, re.MULTILINE):
            text = re.sub(r"^[ \t]*#+ ?|[ \t]+$", "", block, flags=re.MULTILINE).strip()
            if len(text) >= least:
                yield text


def pretrain(text, *, vocab_size, steps, lr, batch_size, length, seed, progress=True, **shape):
    """Train a tokenizer and a model on text alone; returns (model, tokenizer)."""
    tokenizer = SentencePiece.train([text], vocab_size=vocab_size, kind="bpe")
    ids = tokenizer.encode(text)
    examples = data.pieces(ids, length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(Config(vocab_size=tokenizer.vocab_size, **shape))
    train.train(
        model,
        examples,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        warmup=steps // 5,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        seed=seed,
        pad=tokenizer.pad or 0,
        progress=progress,
        name="pretraining the tiny model",
    )
    return model.eval(), tokenizer
