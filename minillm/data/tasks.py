"""Three tasks made of the documentation that comes with Python, so nothing is downloaded.

The texts are the language reference (`pydoc_data.topics`) and the docstrings of the standard
library. The docstrings are read from the source files with `ast`, because an import would run the
modules. A hash of the module's name decides the split of all its docstrings, so no training ever
sees a text of a module in the test split.

    language    continue a docstring                                      perplexity
    summary     a docstring without its first line -> that line           BLEU, ROUGE
    package     a docstring -> which of 8 packages it comes from          accuracy, F1
"""

import ast
import collections
import dataclasses
import difflib
import functools
import hashlib
import inspect
import itertools
import pathlib
import re
import sysconfig
import warnings

from minillm.data.example import at_least, check_length, completion, pieces, spans

SPLITS = ("train", "validation", "test")
TASKS = ("language", "summary", "package")
LEFT_OUT = {  # directories of tests, of old code and of other packages
    "site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "lib2to3",
    "turtledemo", "__pycache__", "_bundled",
}


@dataclasses.dataclass(frozen=True)
class Docstring:
    module: str  # dotted
    name: str  # of the class or function, "" for the module's own
    text: str

    @property
    def package(self):
        return self.module.split(".")[0]


@dataclasses.dataclass
class Task:
    """One split of a task: `examples` to train on, and what its metric needs."""

    metric: str
    examples: list
    text: str = ""  # language: the split's text
    prompts: list = dataclasses.field(default_factory=list)  # summary, package
    references: list = dataclasses.field(default_factory=list)
    choices: list = dataclasses.field(default_factory=list)  # package


@functools.cache
def topics():
    """The language reference: all of pydoc_data.topics, sorted by name, joined by a newline."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


@functools.cache
def docstrings():
    """Every docstring of the standard library's Python files: cleaned, each text once, sorted
    by module and name.
    """
    root, found = pathlib.Path(sysconfig.get_path("stdlib")), {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if LEFT_OUT & set(parts) or parts[0].startswith("config-"):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # old escapes in old files
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for name, text in documented(tree):
            found.setdefault(text, Docstring(module, name, text))
    return sorted(found.values(), key=lambda d: (d.module, d.name, d.text))


def documented(tree):
    """Yield (name, docstring) of the module, classes and functions in a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
            if text:
                yield getattr(node, "name", ""), text


def split(module):
    """"train", "validation" or "test": 8, 1 and 1 of 10 modules, by a hash of the name."""
    digit = hashlib.sha256(module.encode()).digest()[0] % 10
    return "validation" if digit == 8 else "test" if digit == 9 else "train"


def texts(which):
    """The docstrings of one split. ValueError for an unknown split."""
    if which not in SPLITS:
        raise ValueError(f"split {which!r} is unknown; known: {', '.join(SPLITS)}")
    return [d for d in docstrings() if split(d.module) == which]


def check(name):
    """ValueError for an unknown task."""
    if name not in TASKS:
        close = difflib.get_close_matches(str(name), TASKS, 1)
        raise ValueError(f"task {name!r} is unknown; "
                         + (f"did you mean {close[0]!r}? " if close else "")
                         + f"known: {', '.join(TASKS)}")


def task(name, tokenizer, which, limit=None, length=256):
    """One split of a task, a Task.

    limit: the most prompts of summary or package (language keeps its whole text, which its
    metric cuts into windows). length: the most tokens of an example; prompts that are longer
    with their answer are left out.

    The records are sorted by a hash of their text, so a limit takes a fair sample. ValueError
    for an unknown name or split, for a limit or length that leaves nothing, and for a tokenizer
    without an end-of-text id.
    """
    check(name)
    check_length(length)
    if limit is not None:
        at_least("limit", limit, 1, "a task has at least one prompt (None: all of them)")
    if tokenizer.eos is None:
        raise ValueError("this tokenizer has no end-of-text id (eos), with which the tasks end "
                         "their texts")
    records = sorted(texts(which), key=lambda d: hashlib.sha256(d.text.encode()).digest())
    if name == "language":
        return language(tokenizer, records, length)
    pairs = summaries(records) if name == "summary" else packages(records)
    short = ((prompt, answer) for prompt, answer in pairs
             if len(tokenizer.encode(prompt + answer)) < length)
    pairs = list(itertools.islice(short, limit))
    if not pairs:
        raise ValueError(f"length={length}: the task {name!r} has no record of fewer tokens")
    examples = [completion(tokenizer, prompt, answer, length) for prompt, answer in pairs]
    prompts = [prompt for prompt, _ in pairs]
    references = [answer.strip() for _, answer in pairs]
    if name == "summary":
        return Task("ROUGE-L", examples, prompts=prompts, references=references)
    return Task("accuracy", examples, prompts=prompts, references=references,
                choices=most_documented())


def language(tokenizer, records, length):
    """All records as one text, each ended by eos."""
    ids = [i for r in records for i in (*spans(tokenizer, r.text)[0], tokenizer.eos)]
    text = "\n\n".join(record.text for record in records)
    return Task("perplexity", pieces(ids, length), text=text)


def summaries(records):
    """Yield (the docstring without its summary line, the line) of records that have both."""
    for record in records:
        first, _, rest = record.text.partition("\n")
        if len(rest.strip()) >= 80 and 10 <= len(first) <= 100:
            yield f"{rest.strip()}\n\nSummary:", f" {first.strip()}"


@functools.cache
def most_documented(n=8):
    """The n packages with the most docstrings."""
    counts = collections.Counter(d.package for d in docstrings())
    return sorted(name for name, _ in counts.most_common(n))


def packages(records):
    """Yield (the docstring with the package's own name masked, the package)."""
    for record in records:
        if record.package in most_documented() and len(record.text) >= 40:
            masked = re.sub(rf"(?i)\b{re.escape(record.package)}\b", "...", record.text)
            yield f"{masked}\n\nPackage:", f" {record.package}"
