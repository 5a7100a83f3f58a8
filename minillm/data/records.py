"""A record of a file -> Examples, or a question with its answer.

    kind                        fields                               what is learnt
    conversation                messages                             the assistant's messages
    ShareGPT conversation       conversations                        the assistant's messages
    prompt                      prompt, completion                   the completion
    Alpaca instruction          instruction, output                  the output
                                (and, where needed: input, system)
    text                        text                                 all of it

A record may have other fields, which are not read; the summary of the file names them. A record
that fits several kinds is read as the first of them in this table, and the summary says so.
Alpaca's own file, for instance, also has a field `text` that joins the others, and this text does
not show which part to learn.

Messages are {"role":, "content":} or, as ShareGPT writes them, {"from":, "value":}.
"""

import difflib

from minillm.data.example import clip, completion, learnt, only, pieces, spans, whole

KINDS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"),
         ("text",))
OPTIONAL = ("input", "system")  # of an Alpaca instruction
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant",
            "model": "assistant", **{role: role for role in ROLES}}

# The prompt that Alpaca and many later models without a chat template were trained on (Taori et
# al. 2023, github.com/tatsu-lab/stanford_alpaca); `system` replaces its first sentences.
WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that provides "
              "further context. Write a response that appropriately completes the request.")
WITHOUT_INPUT = ("Below is an instruction that describes a task. Write a response that "
                 "appropriately completes the request.")


def fitting(record):
    """The kinds whose fields the record has; the record is read as the first."""
    found = [kind for kind in KINDS if set(kind) <= set(record)]
    if not found:
        known = "; or ".join(" and ".join(map(repr, kind)) for kind in KINDS)
        raise ValueError(f"the fields are {', '.join(map(repr, record)) or 'none'}; known: {known}")
    return found


def unread(record):
    """The record's fields that belong to no kind and are not empty. They are not learnt."""
    kinds = fitting(record)
    read = {field for kind in kinds for field in kind}
    read |= set(OPTIONAL) if kinds[0] == ("instruction", "output") else set()
    return [field for field, value in record.items()
            if field not in read and value not in (None, "", [], {})]


def plain(record, tokenizer):
    """Any record -> one of three forms, each a tuple: (text,), (prompt, completion), or
    ([message, ...],) with messages {"role":, "content":}.

    Without a tokenizer (None) an instruction gets the form for models without a chat template.
    """
    kind = fitting(record)[0]
    if kind in (("messages",), ("conversations",)):
        return (conversation_of(record[kind[0]], kind[0]),)
    for field in kind:
        check_text(record, field)
    if not record[kind[-1]].strip():
        raise ValueError(f"{kind[-1]!r} is empty: there is nothing to learn")
    if kind == ("instruction", "output"):
        return alpaca(record, tokenizer)
    return tuple(record[field] for field in kind)


def check_text(record, field):
    value = record[field]
    if not isinstance(value, str):
        raise ValueError(f"{field!r} is {shown(value)}, not text")


def shown(value):
    """A value's type and the start of its repr, for an error of one line."""
    written = repr(value)
    return f"{type(value).__name__} ({written if len(written) <= 60 else written[:57] + '...'})"


def alpaca(record, tokenizer):
    """An instruction -> messages, if the tokenizer has a chat template; else Alpaca's prompt."""
    optional = {field: record[field] for field in OPTIONAL
                if record.get(field) not in (None, "")}
    for field in optional:
        check_text(optional, field)
    instruction, output = record["instruction"], record["output"]
    if not instruction.strip():
        raise ValueError("'instruction' is empty")
    context, system = optional.get("input"), optional.get("system")
    if tokenizer is not None and tokenizer.chat_template is not None:
        user = f"{instruction}\n\n{context}" if context else instruction
        turns = (("system", system), ("user", user), ("assistant", output))
        return ([{"role": role, "content": said} for role, said in turns if said],)
    parts = [system or (WITH_INPUT if context else WITHOUT_INPUT),
             f"### Instruction:\n{instruction}",
             *([f"### Input:\n{context}"] if context else []),
             "### Response:\n"]
    return "\n\n".join(parts), output


def conversation_of(messages, field):
    """The list of messages, checked, as [{"role":, "content":}, ...]."""
    if not isinstance(messages, list):
        raise ValueError(f"{field!r} is {shown(messages)}, not a list of messages")
    turns = [turn(message, f"message {i}") for i, message in enumerate(messages, 1)]
    said = [t["content"] for t in turns if t["role"] == "assistant"]
    if not said:
        raise ValueError(f"none of the {len(turns)} messages is the assistant's: there is nothing "
                         "to learn")
    return turns


def turn(message, where):
    """One message as {"role":, "content":}; other fields stay, as a chat template may read them."""
    known, fields = ROLES, ("role", "content")
    if isinstance(message, dict) and not set(fields) <= set(message) and "from" in message:
        known, fields = SHAREGPT, ("from", "value")
    if not isinstance(message, dict) or any(not isinstance(message.get(f), str) for f in fields):
        raise ValueError(f"{where} needs the texts 'role' and 'content' (or 'from' and 'value'), "
                         f"it is {shown(message)}")
    role, content = (message[field] for field in fields)
    if role not in known:
        close = difflib.get_close_matches(role, known, 1)
        raise ValueError(f"{where}: the role {role!r} is unknown; "
                         + (f"did you mean {close[0]!r}? " if close else "")
                         + f"known: {', '.join(known)}")
    role = SHAREGPT[role]
    if role == "assistant" and not content.strip():
        raise ValueError(f"{where}: the assistant says nothing, so there is nothing to learn")
    rest = {key: value for key, value in message.items() if key not in fields}
    return {"role": role, "content": content, **rest}


def parse(record, tokenizer, length, where=None):
    """The Examples of one record, none longer than `length` ids; `where` begins an error's text.

    ValueError for a record of no known kind, and if nothing is left to learn.
    """
    try:
        return examples_of(record, tokenizer, length)
    except ValueError as error:
        if where is None:
            raise
        raise ValueError(f"{where}: {error}") from error


def examples_of(record, tokenizer, length):
    match plain(record, tokenizer):
        case [str(text)]:
            examples = pieces(spans(tokenizer, text)[0] + [tokenizer.eos], length)
            if not examples:
                raise ValueError("the tokenizer makes no token of this text")
            return examples
        case [list(messages)]:
            example = conversation(messages, tokenizer, length)
        case prompt, answer:
            example = completion(tokenizer, prompt, answer, length)
    if not learnt(example):
        raise ValueError(f"what comes before the answer fills the {length} tokens of length="
                         f"{length}, so nothing is left to learn; a larger length= keeps it")
    return [example]


def conversation(messages, tokenizer, length):
    """The Example of a conversation. It learns each turn of the assistant, with the text by
    which the chat template ends the turn.

    messages: [{"role":, "content":}, ...]. ValueError if the turns cannot be found in the text
    that the template writes.
    """
    text = tokenizer.chat(messages)
    turns = [find(text, messages, i, tokenizer) for i, message in enumerate(messages)
             if message["role"] == "assistant"]
    # special=False: the template itself writes the tokens that end a turn
    ids, offsets = tokenizer.spans(text, special=False)
    return clip(ids, only(ids, offsets, turns), length)


def find(text, messages, i, tokenizer):
    """(start, end) of message i, the assistant's, in the text of the whole conversation."""
    before = tokenizer.chat(messages[:i], generate=True)
    after = tokenizer.chat(messages[: i + 1])
    if text.startswith(before) and after.startswith(before):
        said = after[len(before) :]
        # Some templates put a text before the last turn only (Qwen3: an empty thought).
        tail = said[max(0, said.rfind(messages[i]["content"].strip())) :]
        for found in (said, tail):
            if text.startswith(found, len(before)):
                return len(before), len(before) + len(found)
    raise ValueError("the chat template writes earlier messages another way when message "
                     f"{i + 1} is added, so what the assistant says cannot be found")


def question(record, tokenizer):
    """(the prompt, its ids, the reference answer) of a record; None for a text, which asks
    nothing.

    The prompt of a conversation is all that comes before the assistant's last turn, with the
    text by which the chat template starts that turn.
    """
    match plain(record, tokenizer):
        case [list(messages)]:
            last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
            asked = tokenizer.chat(messages[:last], generate=True)
            ids, answer = tokenizer.spans(asked, special=False)[0], messages[last]["content"]
        case [str()]:
            return None
        case asked, answer:
            ids = spans(tokenizer, asked)[0]
    return asked, ids, whole(answer).strip()
