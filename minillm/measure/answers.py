"""A model's greedy answers, and every metric of them against the references."""

import dataclasses
import itertools

import torch

from minillm.measure.intervals import digits
from minillm.measure.likelihood import at_least
from minillm.measure.scores import accuracy, bleu, f1, listed, paired, rouge, token_f1
from minillm.model.generate import evaluating
from minillm.registry import prepare


def generate_text(model, tokenizer, prompts, max_new_tokens=32, batch=8, first_line=False):
    """The greedy continuation of each prompt, without the prompt and up to the end of the
    text; a list of str.

    prompts: texts, or lists of ids where a chat template has written them. first_line=True
    ends each text at the first newline after its first word. ValueError for an empty prompt,
    and for one that leaves no room for max_new_tokens in the model's positions. The model is
    minillm's Transformer.
    """
    at_least(1, batch=batch)
    most = room(model, max_new_tokens)
    rows = [tokenizer.encode(p) if isinstance(p, str) else list(p) for p in listed(prompts)]
    for number, row in enumerate(rows, 1):
        if not 0 < len(row) <= most:
            raise ValueError(
                f"prompt {number} of {len(rows)} has {len(row)} tokens: it may have 1 to {most}, "
                f"so that max_new_tokens={max_new_tokens} fit into the model's "
                f"{model.config.positions} positions"
            )
    texts = []
    for i in range(0, len(rows), batch):
        part = rows[i : i + batch]
        with evaluating(model):
            both = model.generate(part, max_new_tokens, stop=tokenizer.stops, pad=tokenizer.pad)
        new = both[:, max(map(len, part)) :].tolist()
        ended = [list(itertools.takewhile(lambda i: i not in tokenizer.stops, row)) for row in new]
        texts += [tokenizer.decode(row).strip() for row in ended]
    return [text.split("\n")[0] for text in texts] if first_line else texts


def room(model, max_new_tokens):
    """How many tokens a prompt may have, so that max_new_tokens fit after it.

    Soft prompts take their positions first. ValueError if not one token fits.
    """
    at_least(1, max_new_tokens=max_new_tokens)
    positions = model.config.positions
    before = prepare(model, torch.zeros(1, 1, dtype=torch.long))[0].shape[1] - 1  # soft prompts
    most = positions - before - max_new_tokens
    if most < 1:
        taken = f", of which a soft prompt takes {before}" if before else ""
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt: the model "
                         f"has {positions} positions{taken}")
    return most


@dataclasses.dataclass
class Answers:
    """A model's answers: three lists of one length, and {name of a metric: its Score}."""

    prompts: list
    references: list
    texts: list
    scores: dict

    def rows(self, n=5, width=40):
        """The first n answers beside their references, for `report.table`: the end of each
        prompt, and the start of each reference and answer.
        """

        def cell(text, end=False):
            flat = " ".join(text.split()).replace("|", "\\|")
            return (
                flat
                if len(flat) <= width
                else f"…{flat[1 - width :]}" if end else f"{flat[: width - 1]}…"
            )

        rows = zip(self.prompts[:n], self.references, self.texts)
        return [
            dict(prompt=cell(p, end=True), reference=cell(r), answer=cell(t)) for p, r, t in rows
        ]

    def summary(self):
        """One line for each metric: the figure, its interval, and n."""
        lines = []
        for name, one in self.scores.items():
            interval = (
                "no interval" if one.low is None else f"[{digits(one.low)}, {digits(one.high)}]"
            )
            lines.append(f"{name:<12} {digits(one):>8}  {interval:<18} n={one.n}")
        return "\n".join(lines)


def answers(
    model, tokenizer, prompts, references, *, ids=None, max_new_tokens=64, batch=8,
    first_line=False,
):
    """Generate a greedy answer to each prompt and score it against its reference;
    returns Answers.

    ids: the ids of the prompts, if `tokenizer.encode` would give others (a chat template
    writes BOS itself). `measures` lists the metrics. ValueError as in `generate_text`, and
    if the lists differ in length or are empty.
    """
    prompts, references = paired(prompts, references)
    texts = generate_text(model, tokenizer, ids or prompts, max_new_tokens, batch, first_line)
    return Answers(prompts, references, texts, measures(texts, references))


def measures(texts, references):
    """{name: Score}: exact match, F1 of tokens, BLEU, ROUGE-1, ROUGE-2 and ROUGE-L of
    texts against references.

    Exact match ignores white space at the ends of both texts. If at most half of the
    references are different, each different one is a class, and the macro F1 over these
    classes is one more metric.
    """
    texts, references = paired(texts, references)
    texts, references = [t.strip() for t in texts], [r.strip() for r in references]
    found = [
        accuracy(texts, references, "exact match"),
        token_f1(texts, references),
        bleu(texts, references),
    ]
    found += [rouge(texts, references, kind) for kind in ("rouge1", "rouge2", "rougeL")]
    if 1 < len(set(references)) <= len(references) / 2:
        found.append(f1(texts, references))
    return {one.name: one for one in found}
