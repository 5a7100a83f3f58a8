"""Where synonyms come from: a file, a dictionary, or the model's own embedding.

A thesaurus file has one word a line, with its synonyms, separated by commas. Empty lines, and
lines that begin with #, are not read.

    # the word, then its synonyms
    quick, fast, rapid
    error, mistake, fault

`Nearest` takes the words whose rows of the embedding have the largest cosine with the row of the
word. Such words occur in like contexts. That makes many of them other forms (word, words),
and some of them opposites (first, last), so a thesaurus is safer where the meaning matters.
"""

import os
import re

import torch
import torch.nn.functional as F

from minillm import data, options
from minillm.registry import roles


def read(path):
    """A thesaurus file -> {word: [synonym, ...]}, all in small letters.

    ValueError, with the line, for a word without a synonym, an empty entry, a word that comes
    twice and bytes that are not UTF-8; and for a file without any word.
    """
    found, lines = {}, {}
    for number, line in enumerate(data.text(path).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where, entries = f"{path}, line {number}", [one.strip() for one in line.lower().split(",")]
        word, *others = entries
        if not others:
            raise ValueError(f"{where}: {line.strip()!r} is a word without a synonym; a line is "
                             "WORD, SYNONYM, SYNONYM, ...")
        if "" in entries:
            raise ValueError(f"{where}: {line.strip()!r} has an empty entry, number "
                             f"{entries.index('') + 1}")
        if word in lines:
            raise ValueError(f"{where}: {word!r} is in line {lines[word]} already")
        found[word], lines[word] = others, number
    if not found:
        raise ValueError(f"{path} has no word: each of its lines is empty or a comment")
    return found


def lookup(thesaurus):
    """A function from a word, in small letters, to a list of its synonyms."""
    if thesaurus is None:
        return lambda word: []
    if isinstance(thesaurus, (str, os.PathLike)):
        thesaurus = read(thesaurus)
    if callable(thesaurus):
        return thesaurus
    if not isinstance(thesaurus, dict):
        raise TypeError(f"thesaurus={thesaurus!r} is no dict, no path and no function")
    if not thesaurus:
        raise ValueError("thesaurus={} is empty")
    for word, others in thesaurus.items():
        right = isinstance(others, (list, tuple)) and others and all(
            isinstance(one, str) and one.strip() for one in others)
        if not isinstance(word, str) or not right:
            raise ValueError(f"thesaurus: {word!r} has {others!r}: each word needs a list of one "
                             "or more synonyms")
    thesaurus = {word.lower(): list(others) for word, others in thesaurus.items()}
    return lambda word: thesaurus.get(word, [])


class Nearest:
    """A function from a word to at most k words with the nearest rows of the embedding.

    Only a word that the tokenizer writes as one token (with the space before it) has neighbours,
    and only such words are neighbours. least: the smallest cosine that counts. The rows are those
    of the moment, with what LoRA and other patches of the weight add to them. ValueError for a
    model whose token embedding is not found, or another vocabulary.
    """

    @torch.no_grad()
    def __init__(self, model, tokenizer, k=5, least=0.3):
        self.k = options.whole("k", k)
        self.least = options.real("least", least, lambda x: -1 <= x <= 1, "a cosine, from -1 to 1")
        site = roles.embedding(model)
        if site is None:
            raise ValueError(f"this {type(model).__name__} has no token embedding")
        rows = site.dense()[0].T.float()  # (vocabulary, e)
        words = [(i, tokenizer.decode([i])) for i in range(min(len(rows), tokenizer.vocab_size))]
        words = {word[1:]: i for i, word in words if re.fullmatch(" [a-z]{3,}", word)}
        if not words:
            raise ValueError("no token of this tokenizer is a whole word after a space")
        self.words, self.places = list(words), {word: n for n, word in enumerate(words)}
        self.rows = F.normalize(rows[list(words.values())], dim=-1)  # (words, e)

    def __call__(self, word):
        place = self.places.get(word)
        if place is None:
            return []
        cosines = self.rows @ self.rows[place]  # (words,)
        cosines[place] = -torch.inf
        best, which = cosines.topk(min(self.k, len(cosines) - 1))
        return [self.words[i] for c, i in zip(best.tolist(), which.tolist()) if c >= self.least]
