"""Paraphrase: the model itself writes a text again, and the record keeps what it learns.

    prompt    INSTRUCTION + the text        as a user's message, where the tokenizer has a chat
                                            template; else as plain text
    answer    sampled (see `minillm.model.generate`); what comes after an empty line is cut off

The quality is that of the model: a model that was not trained on instructions continues the text
instead. So read some of the copies before a training. Each text is sampled alone, with a
generator of its own: a batch would make a record depend on its neighbours.
"""

import torch

from minillm import options
from minillm.augment.fields import changed, check_fields
from minillm.augment.result import Augmented, check, digest
from minillm.calling import native

INSTRUCTION = "Say the same in other words. Answer with the new text alone."


def paraphrase(records, model, tokenizer, *, copies=1, temperature=0.8, top_p=0.95,
               max_new_tokens=128, instruction=INSTRUCTION, fields=None, seed=0):
    """Records -> Augmented, with up to `copies` paraphrases of each record.

    fields: as for `eda`. An empty answer leaves the text as it is, and a copy in which nothing
    changed is left out. TypeError for a model that is not minillm's; ValueError for a number out
    of range, or a text that does not fit the model's positions beside its answer.
    """
    check(records, copies, seed)
    options.positive("temperature", temperature)
    options.whole("max_new_tokens", max_new_tokens)
    if not native(model):
        raise TypeError(f"{type(model).__name__} has no minillm generate: paraphrase needs a model "
                        "of minillm.load")
    fields, found = check_fields(records, fields), Augmented(records)
    given = dict(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens,
                 stop=tokenizer.stops)
    for i, record in enumerate(records):
        for k in range(copies):
            draw = torch.Generator(next(model.parameters()).device)
            draw.manual_seed(digest(seed, k, ["paraphrase", record]))
            new = changed(record, fields, lambda text: written(
                model, tokenizer, text, instruction, draw, given), f"record {i}")
            found.keep("paraphrase", record, new)
    return found


def written(model, tokenizer, text, instruction, draw, given):
    """The model's version of the text; the text itself if the answer is empty."""
    if not text.strip():
        return text
    if tokenizer.chat_template is not None:
        message = {"role": "user", "content": f"{instruction}\n\n{text}"}
        ids = tokenizer.encode(tokenizer.chat([message], generate=True), special=False)
    else:
        ids = tokenizer.encode(f"{instruction}\n\nText: {text}\n\nIn other words:")
    new = model.generate([ids], generator=draw, **given)[0, len(ids):].tolist()
    stop = next((n for n, i in enumerate(new) if i in given["stop"]), len(new))
    return tokenizer.decode(new[:stop]).strip().split("\n\n")[0].strip() or text
