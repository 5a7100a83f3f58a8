"""The user's files -> Examples to train on, or questions for an evaluation.

    .txt      one text
    .jsonl    one record per line, a JSON object
    .json     a list of records
    .csv      one record per row, under a header that names the fields

`records` describes the kinds of records. Files are UTF-8, with or without a byte order mark. A
bad record stops the reading with an error that names its line; with skip_bad=True it is left
out, and counted. .jsonl and .csv are read record by record, so that a large file is not in
memory beside its Examples.
"""

import collections
import csv
import dataclasses
import json
import os
import pathlib
import re

from minillm.data.example import check_length, learnt
from minillm.data.records import examples_of, fitting, plain, question, unread
from minillm.data.showing import Reason, summary


class Reading(list):
    """The Examples of a file: a list, with counts of what was read and what was not.

    path, length    the file, and the most tokens of an Example
    records         how many records the Examples come from
    skipped         "PATH, line N: the reason", a Reason for each bad record that was left out
    kinds           {kind: number of records read as it}; a kind is a tuple of field names
    unread          {kind: number of records that also fit it, but were read as another kind}
    ignored         {field: number of records in which it has a value that was not read}
    """

    def __init__(self, path, length):
        super().__init__()
        self.path, self.length, self.records, self.skipped = str(path), length, 0, []
        self.kinds, self.unread, self.ignored = (collections.Counter() for _ in range(3))

    @property
    def tokens(self):
        """How many ids all Examples have together."""
        return sum(len(e.ids) for e in self)

    @property
    def learnt(self):
        """How many of these ids are learnt."""
        return sum(learnt(e) for e in self)

    @property
    def cut(self):
        """How many Examples lost tokens to learn, because they lay beyond `length`."""
        return sum(e.cut > 0 for e in self)

    def summary(self):
        """The counts as a short text."""
        return summary(self)


@dataclasses.dataclass
class Questions:
    """The questions of a file: prompts, their ids, and references, three lists of one length.

    Generate from the ids: they begin and end as in the Examples of `read`, before the answer (a
    chat template writes its own BOS, other prompts get the tokenizer's).
    """

    prompts: list = dataclasses.field(default_factory=list)
    ids: list = dataclasses.field(default_factory=list)
    references: list = dataclasses.field(default_factory=list)
    texts: int = 0  # records of plain text, which ask nothing
    skipped: list = dataclasses.field(default_factory=list)  # as in Reading
    unanswered: list = dataclasses.field(default_factory=list)  # Reasons; see `most`


def read(path, tokenizer, length=256, skip_bad=False):
    """A .txt, .jsonl, .json or .csv file -> Reading, a list of Examples of at most `length` ids.

    An answer that ends beyond `length` is cut, and counted in `.cut`; a long text is split into
    pieces that lose nothing. ValueError, with the line, for a record that is not UTF-8, is not of
    a known kind, or has nothing to learn within `length`; with skip_bad only if no record is good.
    """
    check_length(length)
    reader = reader_of(path)
    if tokenizer.eos is None:
        raise ValueError("this tokenizer has no end-of-text id (eos), with which examples end")
    found = Reading(path, length)

    def use(record, where):
        found.extend(examples_of(record, tokenizer, length))
        kind, *others = fitting(record)
        found.kinds[kind] += 1
        found.unread.update(others)
        found.ignored.update(unread(record))

    found.records = each(path, reader, use, skip_bad, found.skipped)
    return found


def questions(path, tokenizer, skip_bad=False, most=None):
    """The Questions of a file that `read` reads, in its order.

    most: how many tokens a prompt may have (None: any number). A record whose prompt has none, or
    more than that, can be learnt but not answered: it is only in `.unanswered`.

    The prompt of a conversation is all that comes before the assistant's last turn, written by the
    chat template, and the reference is that turn. The prompt of an Alpaca record is what `read`
    puts before the output. A text asks nothing. Errors as in `read`, but a long answer is no error.
    """
    reader, found = reader_of(path), Questions()

    def use(record, where):
        asked = question(record, tokenizer)
        if asked is None:
            found.texts += 1
        elif most is not None and not 0 < len(asked[1]) <= most:
            found.unanswered.append(Reason.at(where, f"the prompt has {len(asked[1])} tokens: "
                                              f"1 to {most} leave room for an answer"))
        else:
            for row, value in zip((found.prompts, found.ids, found.references), asked):
                row.append(value)

    each(path, reader, use, skip_bad, found.skipped)
    return found


def check_file(path, skip_bad=False):
    """Raise the errors of `read` that need no tokenizer, before a model is loaded."""
    each(path, reader_of(path), lambda record, where: plain(record, None), skip_bad, [])


def each(path, reader, use, skip_bad, skipped):
    """Call use(record, where) for every record; returns the number of good records."""
    good = 0
    for place, record in reader(path):
        where = f"{path}, {place}"
        try:
            if isinstance(record, ValueError):
                raise record
            use(record, where)
            good += 1
        except ValueError as error:
            skipped.append(Reason.at(where, error))
            if not skip_bad:
                raise ValueError(skipped[-1]) from error
    if not good and skipped:
        raise ValueError(f"no record is good, {len(skipped)} are bad; the first: {skipped[0]}")
    if not good:
        raise ValueError(f"{path} is empty: it has no record")
    return good


def reader_of(path):
    """The function that reads a file with this ending; ValueError for an unknown ending."""
    ending = pathlib.Path(path).suffix
    if ending.lower() not in READERS:
        raise ValueError(f"{path}: the ending {ending!r} is unknown; known: {', '.join(READERS)}")
    return READERS[ending.lower()]


# --- from bytes to records -----------------------------------------------------------------------
# A reader yields (place, record). For a record that cannot be read it yields the error instead,
# because a generator that raises cannot go on. It raises an error that concerns the whole file.

ODD = re.compile("[\udc80-\udcff]")  # `opened` decodes the bytes 0x80 to 0xff as these


def opened(path, newline):
    """The file as text. A byte that is not UTF-8 becomes half a character, and `utf8` finds it."""
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def utf8(text):
    """ValueError if the text of an `opened` file was not UTF-8."""
    odd = ODD.search(text)
    if odd:
        raise ValueError(f"not UTF-8 (the byte 0x{ord(odd[0]) - 0xDC00:02x})")


def text(path):
    """The text of a file, for training and for measuring, with \\n at the end of each line.

    ValueError for an empty file, and, with the line, for bytes that are not UTF-8.
    """
    with opened(path, None) as file:
        whole = file.read()
    try:
        utf8(whole)
    except ValueError as error:
        line = whole.count("\n", 0, ODD.search(whole).start()) + 1
        raise ValueError(f"{path}, line {line}: {error}") from error
    if not whole.strip():
        raise ValueError(f"{path} is empty")
    return whole


def read_txt(path):
    yield "all of it", {"text": text(path)}


def read_jsonl(path):
    with opened(path, "\n") as file:  # only \n ends a line; JSON may hold other line ends
        for line, row in enumerate(file, 1):
            if row.strip():
                yield f"line {line}", json_object(row)


def json_object(row):
    """The object in a line, or a ValueError if there is none (returned, not raised)."""
    try:
        utf8(row)
    except ValueError as error:
        return error
    try:
        return an_object(json.loads(row.rstrip()))
    except json.JSONDecodeError as error:  # its own text counts lines within the row
        return ValueError(f"not JSON ({error.msg}: column {error.colno})")
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON ({error})")


def an_object(record):
    if isinstance(record, dict):
        return record
    return ValueError(f"a record is an object, this is {type(record).__name__}")


def read_json(path):
    whole = text(path)
    try:
        records = json.loads(whole)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); the name of a file with one record per "
                         "line has to end in .jsonl") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: a .json file has to be a list of records, this is "
                         f"{type(records).__name__}")
    del whole  # it may be large
    for i, record in enumerate(records, 1):
        yield f"record {i}", an_object(record)


def read_csv(path):
    longest = os.path.getsize(path)
    with opened(path, "") as file:  # csv itself finds the line ends: a field may hold some
        rows, header = csv.reader(file, strict=True), None
        while True:
            first, row = rows.line_num + 1, None
            try:
                row = next_row(rows, longest)
                utf8("".join(row))
            except StopIteration:
                return
            except ValueError as error:
                row = error
            lines = f"line {first}" if rows.line_num <= first else f"lines {first}-{rows.line_num}"
            if header is None and row:
                header = checked(row, f"{path}, {lines}")
            elif row:
                yield lines, fields(header, row)


def next_row(rows, longest):
    """The next row; a field may have up to `longest` characters, in this call only.

    The csv module has one limit for the whole program, by default 131,072 characters.
    """
    before = csv.field_size_limit()
    csv.field_size_limit(min(max(before, longest), 2**31 - 1))
    try:
        return next(rows)
    except csv.Error as error:
        raise ValueError(f"not CSV ({error})") from error
    finally:
        csv.field_size_limit(before)


def checked(header, where):
    """The header; ValueError, for the whole file, if it is bad."""
    if isinstance(header, ValueError):
        raise ValueError(f"{where}: {header}") from header
    if len(set(header)) < len(header):
        raise ValueError(f"{where}: the header names a field twice: {', '.join(header)}")
    return header


def fields(header, row):
    """{field: text} of a row, or a ValueError if it is bad (returned, not raised)."""
    if isinstance(row, ValueError):
        return row
    if len(row) != len(header):
        return ValueError(f"{len(row)} fields, the header has {len(header)}")
    return dict(zip(header, row))


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv}
