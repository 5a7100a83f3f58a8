"""Which texts of a record are changed: never what it learns, unless the caller asks for it.

    record                          changed by default
    messages, conversations         the user's messages
    prompt, completion              the prompt
    instruction, input, output      the instruction and the input
    text                            the text, which is all there is
"""

import copy
import difflib

from minillm.data.records import SHAREGPT, fitting

DEFAULT = {("prompt", "completion"): ("prompt",), ("instruction", "output"):
           ("instruction", "input"), ("text",): ("text",)}


def check_fields(records, fields):
    """A tuple of the fields, or None; ValueError for a field that no record has."""
    if fields is None:
        return None
    fields = (fields,) if isinstance(fields, str) else tuple(fields)
    known = sorted({str(name) for record in records for name in record})
    for field in fields:
        if records and not any(field in record for record in records):
            close = difflib.get_close_matches(str(field), known) or known
            raise ValueError(f"fields={fields!r}: no record has the field {field!r}; there are: "
                             f"{', '.join(map(repr, close))}")
        for i, record in enumerate(records):
            if not isinstance(record.get(field, ""), str):
                raise ValueError(f"fields={fields!r}: {field!r} of record {i} is no text; the "
                                 "messages of a conversation are changed without fields=")
    return fields


def changed(record, fields, change, where):
    """A copy of the record in which change(text) is in the place of each of its texts.

    ValueError, which begins with `where`, for a record of no known kind.
    """
    new = copy.deepcopy(record)
    try:
        kind = fitting(record)[0] if fields is None else ()
    except ValueError as error:
        raise ValueError(f"{where}: {error}; fields= names what to change") from error
    if kind in (("messages",), ("conversations",)):
        for message in new[kind[0]]:
            role = "role" if "role" in message else "from"
            text = "content" if "content" in message else "value"
            if SHAREGPT.get(message.get(role)) == "user":
                message[text] = change(message[text])
        return new
    for field in fields or DEFAULT[kind]:
        if new.get(field):
            new[field] = change(new[field])
    return new
