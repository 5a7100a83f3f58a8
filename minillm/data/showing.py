"""Show what is learnt from a list of Examples, so that a user can check it before training."""

import collections
import itertools

from minillm.data.example import NOT_LEARNT, learnt

LEARNT, DIM, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
MOST = 600  # the most characters of a run to show


def summary(examples):
    """The number of examples and tokens, and what was cut or skipped, as a short text.

    examples: a list of Example, or a Reading, which has more to show.
    """
    tokens, taught = sum(len(e.ids) for e in examples), sum(map(learnt, examples))
    cut, lost = sum(e.cut > 0 for e in examples), sum(e.cut for e in examples)
    longest = max((len(e.ids) for e in examples), default=0)
    lines = [f"{count(len(examples), 'example')}, {count(tokens, 'token')}, {taught:,} of them "
             f"learnt; the longest example has {longest:,}"]
    for kind, n in getattr(examples, "kinds", {}).items():
        lines.append(f"{count(n, 'record')} of {' and '.join(kind)}")
    for kind, n in getattr(examples, "unread", {}).items():
        lines.append(f"not read: {' and '.join(kind)}, beside another kind in {count(n, 'record')}")
    fields = [f"{field!r} in {count(n, 'record')}"
              for field, n in getattr(examples, "ignored", collections.Counter()).most_common()]
    if fields:
        more = f", and {len(fields) - 8} more" if len(fields) > 8 else ""
        lines.append(f"not read: {', '.join(fields[:8])}{more}")
    if cut:
        lines.append(f"cut: {count(cut, 'example')} that would be too long; a larger length= keeps "
                     f"{count(lost, 'token')} more to learn")
    lines += skips(getattr(examples, "skipped", []))
    return "\n".join(lines)


def count(n, what):
    return f"{n:,} {what}" + ("" if n == 1 else "s")


class Reason(str):
    """Why a record was left out: "PATH, line N: the reason". `where` is its start."""

    @classmethod
    def at(cls, where, reason):
        self = cls(f"{where}: {reason}")
        self.where = where
        return self


def skips(skipped, most=5, title="skipped", what="bad record"):
    """Lines with the number of skipped records, and the reasons of the first `most` of them."""
    if not skipped:
        return []
    more = [f"  and {len(skipped) - most:,} more"] if len(skipped) > most else []
    first = [f"  {reason}" for reason in skipped[:most]]
    return [f"{title}: {count(len(skipped), what)}", *first, *more]


def preview(examples, tokenizer, n=3, color=True):
    """The summary, and the first n Examples: the learnt text in green, the rest dimmed.

    Returns text. Without color, the learnt text is in [[double brackets]]. Special tokens appear
    by name, line ends and other control characters as \\n or \\x1b (so that no text can control
    the terminal), and long parts without their middle. A line of its own begins each document of
    a packed example.
    """
    blocks = [summary(examples)]
    for i, example in enumerate(examples[:n], 1):
        title = f"example {i}: {count(len(example.ids), 'token')}, {learnt(example):,} learnt"
        if example.cut:
            title += f", {example.cut:,} cut off"
        blocks.append(title + "\n" + painted(example, tokenizer, color))
    return "\n\n".join(blocks)


def painted(example, tokenizer, color):
    """The example's text with its runs of learnt and other tokens marked."""
    documents = example.documents or [1] * len(example.ids)
    marks = [i > 0 and label != NOT_LEARNT for i, label in enumerate(example.labels)]
    out, before, document = [], None, 1
    tokens = zip(documents, marks, example.ids)
    for (number, taught), run in itertools.groupby(tokens, lambda token: token[:2]):
        ids = [i for *_, i in run]
        if number != document:
            before, document = None, number
            out.append(f"\n--- document {number}\n")
        text = shorten(decoded(tokenizer, ids, before))
        before = ids[-1]
        start, end = ((LEARNT if taught else DIM, PLAIN) if color
                      else ("[[", "]]") if taught else ("", ""))
        out.append(start + text + end)
    return "".join(out)


def decoded(tokenizer, ids, before=None):
    """The visible text of a run of ids; `before` is the id before it, None at a text's start.

    The ids between two special ones are decoded together, because one character may take several.
    The id before is decoded with them, because a tokenizer may drop the first space of a text.
    """
    parts = []
    for special, run in itertools.groupby(ids, lambda i: is_special(tokenizer, i)):
        run = list(run)
        if special:
            parts += [visible(tokenizer.text_of(i)) for i in run]
        else:
            led = before is not None and not is_special(tokenizer, before)
            start = tokenizer.decode([before]) if led else ""
            text = tokenizer.decode([before, *run] if led else run)
            parts.append(visible(text.removeprefix(start) if text.startswith(start)
                                 else tokenizer.decode(run)))
        before = run[-1]
    return "".join(parts)


def is_special(tokenizer, i):
    """Whether decoding leaves out the text of an id, as for the end of the text."""
    name = tokenizer.text_of(i)
    return tokenizer.decode([i]) == "" and bool(name) and name.strip(" \u2581") != ""


def visible(text):
    """The text with unprintable characters escaped as in Python; a line end also stays."""
    return "".join(c if c.isprintable() else "\\n\n" if c == "\n" else ascii(c)[1:-1] for c in text)


def shorten(text):
    if len(text) <= MOST:
        return text
    half = MOST // 2
    return f"{text[:half]} ...{len(text) - 2 * half:,} characters... {text[-half:]}"
