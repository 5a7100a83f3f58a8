"""Text that stands on every machine, three tasks made of it, and the user's own files.

Python brings its documentation along: the language reference (`pydoc_data.topics`) and the docstrings of the standard library. The
docstrings are read from the source files with `ast`: importing the modules would run them. They are split by module, once and for
all, by a hash of the module's name, so no text of a test module is ever trained on.

    language    continue a docstring                                            perplexity
    summary     a docstring without its first line -> that line                 BLEU, ROUGE
    package     a docstring -> which of 8 packages it comes from                accuracy, F1

An Example is ids and labels of one length; a label of -100 is not learnt. Labels stand where their ids stand: the shift by one
happens in the model's loss. Which part is learnt comes from the structure of the record (its prompt, its messages) and the tokenizer's
offsets; libraries that search the tokens for a marker string miss it as soon as the text before it changes how it is tokenized.
"""

import ast
import collections
import csv
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import pathlib
import re
import sysconfig
import warnings

import torch

SPLITS = ("train", "validation", "test")
TASKS = ("language", "summary", "package")
NOT_LEARNT = -100


@dataclasses.dataclass(frozen=True)
class Docstring:
    module: str  # dotted
    name: str  # of the class or function, "" for the module's own
    text: str

    @property
    def package(self):
        return self.module.split(".")[0]


@dataclasses.dataclass
class Example:
    ids: list
    labels: list
    documents: list | None = None  # of a packed example: the number of each id's document, from 1


@dataclasses.dataclass
class Task:
    """One split of a task: `examples` to train on, and what its metric needs."""

    metric: str
    examples: list
    text: str = ""  # language: the held-out text
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
    """Every docstring of the standard library's Python files, cleaned, each text once, sorted by module and name."""
    root, found = pathlib.Path(sysconfig.get_path("stdlib")), {}
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "__pycache__", "_bundled"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if skip & set(parts) or parts[0].startswith("config-"):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # old escapes in old files
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
                if text:
                    found.setdefault(text, Docstring(module, getattr(node, "name", ""), text))
    return sorted(found.values(), key=lambda d: (d.module, d.name, d.text))


def split(module):
    """"train", "validation" or "test": 8, 1 and 1 of 10 modules, by the hash of the name."""
    digit = hashlib.sha256(module.encode()).digest()[0] % 10
    return "validation" if digit == 8 else "test" if digit == 9 else "train"


def texts(which):
    """The docstrings of one split."""
    if which not in SPLITS:
        raise ValueError(f"split {which!r} is unknown; known: {', '.join(SPLITS)}")
    return [d for d in docstrings() if split(d.module) == which]


def check(name):
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, 1)
        raise ValueError(f"task {name!r} is unknown; " + (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(TASKS)}")


def task(name, tokenizer, which, limit=None, length=256):
    """One split of a task, a Task. `limit`: at most so many records; `length`: the most tokens of an example.

    The records come in an order of their own (by the hash of their text), so a limit takes a fair sample.
    """
    check(name)
    records = sorted(texts(which), key=lambda d: hashlib.sha256(d.text.encode()).digest())
    if tokenizer.eos is None:
        raise ValueError("this tokenizer has no end-of-text id (eos), which the tasks end their texts with")
    if name == "language":
        return language(tokenizer, records, length)
    pairs = summaries(records) if name == "summary" else packages(records)
    pairs = [(prompt, answer) for prompt, answer in pairs if len(tokenizer.encode(prompt + answer)) < length][:limit]
    examples = [completion(tokenizer, prompt, answer, length) for prompt, answer in pairs]
    prompts, references = [prompt for prompt, _ in pairs], [answer.strip() for _, answer in pairs]
    if name == "summary":
        return Task("ROUGE-L", examples, prompts=prompts, references=references)
    return Task("accuracy", examples, prompts=prompts, references=references, choices=most_documented())


def language(tokenizer, records, length):
    ids = [i for record in records for i in (*tokenizer.encode(record.text), tokenizer.eos)]
    examples = [Example(ids[i : i + length], ids[i : i + length]) for i in range(0, len(ids) - 1, length)]
    examples = [e for e in examples if len(e.ids) > 1]
    return Task("perplexity", examples, text="\n\n".join(record.text for record in records))


def summaries(records):
    """(the docstring without its summary line, the line), where both are there."""
    for record in records:
        first, _, rest = record.text.partition("\n")
        if len(rest.strip()) >= 80 and 10 <= len(first) <= 100:
            yield f"{rest.strip()}\n\nSummary:", f" {first.strip()}"


@functools.cache
def most_documented(n=8):
    """The n packages with the most docstrings."""
    return sorted(name for name, _ in collections.Counter(d.package for d in docstrings()).most_common(n))


def packages(records):
    """(the docstring with the package's own name masked, the package)."""
    for record in records:
        if record.package in most_documented() and len(record.text) >= 40:
            masked = re.sub(rf"(?i)\b{re.escape(record.package)}\b", "...", record.text)
            yield f"{masked}\n\nPackage:", f" {record.package}"


def completion(tokenizer, prompt, answer, length):
    """The Example of which only the answer and the end of the text are learnt."""
    ids, offsets = tokenizer.spans(prompt + answer)
    labels = only(ids, offsets, [(len(prompt), len(prompt + answer))])
    return clip(ids + [tokenizer.eos], labels + [tokenizer.eos], length)


def only(ids, offsets, turns):
    """The ids as labels where they stand for a part of one of the (start, end) turns, else NOT_LEARNT."""

    def inside(start, end):  # a first byte of a character is an empty span at its start
        return any(start < last and (end > first or start >= first) for first, last in turns)

    return [i if inside(*span) else NOT_LEARNT for i, span in zip(ids, offsets)]


def clip(ids, labels, length):
    return Example(ids[:length], labels[:length])


# --- the user's own files ---------------------------------------------------------------------------------------------------


def read(path, tokenizer, length=256):
    """A .txt, .jsonl or .csv file -> list of Example, none longer than `length` tokens.

    .txt is one text to be continued. A record of the others has `text`, or `prompt` and `completion` (the completion alone is
    learnt), or in .jsonl `messages`, [{"role":, "content":}, ...] (what the assistant says is learnt). ValueError, with the
    line, for what is not such a record, and for one in which nothing is left to learn.
    """
    path = pathlib.Path(path)
    if path.suffix not in READERS:
        raise ValueError(f"{path}: the ending {path.suffix!r} is unknown; known: {', '.join(READERS)}")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason})") from error
    if not text.strip():
        raise ValueError(f"{path} is empty")
    if tokenizer.eos is None:
        raise ValueError("this tokenizer has no end-of-text id (eos), which every example ends with")
    examples = []
    for line, record in READERS[path.suffix](path, text):
        examples += parse(record, tokenizer, length, f"{path}, line {line}")
    return examples


def read_text(path, text):
    yield 1, {"text": text}


def read_jsonl(path, text):
    for line, row in enumerate(text.split("\n"), 1):
        if row.strip():
            try:
                record = json.loads(row)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {line}: not JSON ({error})") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {line}: a record is an object, this is {type(record).__name__}")
            yield line, record


def read_csv(path, text):
    rows = csv.reader(text.splitlines(keepends=True), strict=True)
    try:
        header = next(rows)
        if len(set(header)) < len(header):
            raise ValueError(f"{path}, line 1: the header names a field twice: {', '.join(header)}")
        for row in rows:
            if row and len(row) != len(header):
                raise ValueError(f"{path}, line {rows.line_num}: {len(row)} fields, the header has {len(header)}")
            if row:
                yield rows.line_num, dict(zip(header, row))
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from error


READERS = {".txt": read_text, ".jsonl": read_jsonl, ".csv": read_csv}
KINDS = (("text",), ("prompt", "completion"), ("messages",))


def parse(record, tokenizer, length, where):
    """The Examples of one record."""
    kind = next((kind for kind in KINDS if set(kind) <= set(record)), None)
    if kind is None:
        known = "; or ".join(" and ".join(map(repr, kind)) for kind in KINDS)
        raise ValueError(f"{where}: the fields are {', '.join(map(repr, record)) or 'none'}; known: {known}")
    for field in kind:
        if not isinstance(record[field], list if field == "messages" else str):
            raise ValueError(f"{where}: {field!r} is {type(record[field]).__name__}, not {'a list' if field == 'messages' else 'text'}")
    if re.search("[\ud800-\udfff]", str([record[field] for field in kind])):  # JSON can say it, UTF-8 cannot
        raise ValueError(f"{where}: half a character, such as '\\ud800', is no text")
    if kind == ("text",):
        ids = tokenizer.encode(record["text"]) + [tokenizer.eos]
        pieces = [ids[i : i + length] for i in range(0, len(ids), length)]
        examples = [Example(piece, list(piece)) for piece in pieces if len(piece) > 1]
    elif kind == ("messages",):
        examples = [conversation(record["messages"], tokenizer, length, where)]
    else:
        examples = [completion(tokenizer, record["prompt"], record["completion"], length)]
    for example in examples or [Example([], [])]:
        if all(label == NOT_LEARNT for label in example.labels[1:]):
            raise ValueError(f"{where}: nothing is left to learn within {length} tokens; a larger length= may keep it")
    return examples


def conversation(messages, tokenizer, length, where):
    """The Example of a conversation: what the assistant says, up to where its turn ends in the template, is learnt."""
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: a message has the texts 'role' and 'content', this is {message!r}")
    text, turns = tokenizer.chat(messages), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = tokenizer.chat(messages[:i], generate=True), tokenizer.chat(messages[: i + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(f"{where}: the chat template writes earlier messages another way when message {i + 1} is added, so what "
                                 "the assistant says cannot be told apart")
            turns.append((len(before), len(after)))
    ids, offsets = tokenizer.spans(text, special=False)  # the template writes BOS itself
    return clip(ids, only(ids, offsets, turns), length)


# --- packing ----------------------------------------------------------------------------------------------------------------


def pack(examples, length):
    """Several examples to a row of at most `length` ids, so that little is padded: first fit, the longest first.

    A packed row gives the loss of its documents one by one: each sees only itself, from position 0 on, and its first token, which
    nothing foretells, is not learnt. ValueError for an example longer than a row.
    """
    rows = []
    for example in sorted(examples, key=lambda e: -len(e.ids)):
        if len(example.ids) > length:
            raise ValueError(f"an example has {len(example.ids)} ids, more than a row's length={length}")
        row = next((row for row in rows if len(row.ids) + len(example.ids) <= length), None)
        if row is None:
            rows.append(row := Example([], [], []))
        row.documents += [row.documents[-1] + 1 if row.documents else 1] * len(example.ids)
        row.ids += example.ids
        row.labels += [NOT_LEARNT, *example.labels[1:]]
    return rows


# --- batches ----------------------------------------------------------------------------------------------------------------


class Batches:
    """An endless iterator of (ids, labels, mask): each (b, t), padded on the right to the longest; mask None if nothing is.

    The order of an epoch follows from the seed and its number alone, so the state is where it stands: (epoch, position).
    """

    def __init__(self, examples, batch_size, seed=0, pad=0):
        if not examples:
            raise ValueError("there are no examples to train on")
        for i, example in enumerate(examples):
            if len(example.ids) != len(example.labels):
                raise ValueError(f"example {i} has {len(example.ids)} ids and {len(example.labels)} labels")
            if all(label == NOT_LEARNT for label in example.labels[1:]):
                raise ValueError(f"example {i} has nothing to learn: all its labels are {NOT_LEARNT}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a batch has at least one example")
        self.examples, self.batch_size, self.seed, self.pad = examples, batch_size, seed, pad
        self.epoch = self.position = 0

    def state_dict(self):
        return dict(epoch=self.epoch, position=self.position)

    def load_state_dict(self, state):
        self.epoch, self.position = state["epoch"], state["position"]

    def order(self):
        """The epoch's permutation of the examples."""
        key = int.from_bytes(hashlib.sha256(f"{self.seed} {self.epoch}".encode()).digest()[:8], "big") >> 1
        return torch.randperm(len(self.examples), generator=torch.Generator().manual_seed(key)).tolist()

    def __iter__(self):
        return self

    def __next__(self):
        chosen = self.order()[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        if self.position >= len(self.examples):
            self.epoch, self.position = self.epoch + 1, 0
        return collate([self.examples[i] for i in chosen], self.pad)


def collate(examples, pad=0):
    """Examples -> (ids, labels, mask), each (b, t); the mask numbers the documents where any example is packed."""
    t = max(len(e.ids) for e in examples)
    ids = torch.tensor([e.ids + [pad] * (t - len(e.ids)) for e in examples])
    labels = torch.tensor([e.labels + [NOT_LEARNT] * (t - len(e.ids)) for e in examples])
    if any(e.documents for e in examples):
        return ids, labels, torch.tensor([(e.documents or [1] * len(e.ids)) + [0] * (t - len(e.ids)) for e in examples])
    if all(len(e.ids) == t for e in examples):
        return ids, labels, None
    return ids, labels, torch.arange(t) < torch.tensor([[len(e.ids)] for e in examples])


batches = Batches
