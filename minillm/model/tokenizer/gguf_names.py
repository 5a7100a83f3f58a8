"""The GGUF fields that both kinds of tokenizer read and write in the same way."""

IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
ENDS = ("eot", "eom")  # end of turn, end of message


def special(fields):
    """{"eos_token": id, ...} of the fields."""
    found = {name: fields.get(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in IDS.items()}
    found = {name: i for name, i in found.items() if i is not None}
    for name, i in found.items():
        if not 0 <= i < len(fields["tokenizer.ggml.tokens"]):
            raise ValueError(f"the GGUF's {name} is {i}, outside its vocabulary")
    return found


def ends(fields):
    """The ids besides eos that end a generation, a tuple."""
    found = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ENDS)
    return tuple(i for i in found if i is not None)


def chat_template(fields):
    """The default chat template, else the named ones, {name: text}."""
    if "tokenizer.chat_template" in fields:
        return fields["tokenizer.chat_template"]
    names = fields.get("tokenizer.chat_templates", [])
    return {name: fields[f"tokenizer.chat_template.{name}"] for name in names} or None


def written(tokenizer, own):
    """All fields of a tokenizer: its `own`, the special ids, the chat template."""
    ids = dict(bos=tokenizer.bos, eos=tokenizer.eos, unknown=tokenizer.unk, padding=tokenizer._pad)
    more = [i for i in tokenizer.stops if i != tokenizer.eos]
    if len(more) > len(ENDS):
        raise ValueError(f"the ids {', '.join(map(str, tokenizer.stops))} end a generation; a GGUF "
                         f"names {1 + len(ENDS)} at most")
    ids |= dict(zip(ENDS, more))
    found = {f"tokenizer.ggml.{name}": value for name, value in own.items()}
    found |= {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        found["tokenizer.chat_templates"] = list(template)
        found |= {f"tokenizer.chat_template.{name}": text for name, text in template.items()}
    elif template:
        found["tokenizer.chat_template"] = template
    return found
