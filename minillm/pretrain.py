"""The tiny model: a Llama of about a million parameters, pretrained once on this machine on Python's language reference.

It exists so that everything here can be tried in minutes on a model that was really trained, and never quantized: what
int8 or pruning costs it is the true cost. It has read `pydoc_data.topics` and nothing else, so the docstrings of the standard
library, which the tasks are made of, are a new domain to it.
"""

import hashlib
import json

import torch

from minillm import data, files, train
from minillm.tokenizer import SentencePiece
from minillm.transformer import Config, Transformer

RECIPE = dict(vocab_size=2048, width=128, layers=4, heads=4, kv_heads=2, ffn=352, positions=512, steps=450, lr=4e-3, batch_size=8,
              length=128, seed=0)


def tiny(progress=True):
    """The directory that holds the tiny model, in the cache; trains it first if it is not there (about a minute).

    The name of the directory tells the recipe and the text, so a change of either makes a new model.
    """
    from minillm import hub

    text = data.topics()
    key = hashlib.sha256(json.dumps([RECIPE, hashlib.sha256(text.encode()).hexdigest()]).encode()).hexdigest()[:12]
    path = files.cache() / f"tiny-{key}"
    if not (path / "config.json").exists():
        model, tokenizer = pretrain(text, progress=progress, **RECIPE)
        hub.save(model, path, tokenizer=tokenizer)
    return path


def pretrain(text, *, vocab_size, steps, lr, batch_size, length, seed, progress=True, **shape):
    """A tokenizer and a model from nothing but text; returns (model, tokenizer)."""
    tokenizer = SentencePiece.train([text], vocab_size=vocab_size, kind="bpe")
    ids = tokenizer.encode(text)
    examples = [data.Example(ids[i : i + length], ids[i : i + length]) for i in range(0, len(ids) - length, length)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(Config(vocab_size=tokenizer.vocab_size, **shape))
    train.train(model, examples, steps=steps, lr=lr, batch_size=batch_size, warmup=steps // 20, weight_decay=0.1, betas=(0.9, 0.95),
                seed=seed, pad=tokenizer.pad or 0, progress=progress, name="pretraining the tiny model")
    return model.eval(), tokenizer
