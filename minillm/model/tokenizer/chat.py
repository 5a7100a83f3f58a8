"""Chat templates: Jinja programs that turn messages into the one text a model was tuned on.

They render as in transformers' `apply_chat_template(..., tokenize=False)`. A template comes with a
checkpoint and may be hostile, so it runs in Jinja's sandbox. The sandbox does not stop an endless
loop.
"""

import datetime
import functools
import json

from minillm import files


def render(text, messages, generate, special):
    """The text of the messages.

    text: the template. special: {"bos_token": "<s>", ...}, variables of the template.
    ValueError where there is no template, and where the template is no valid Jinja,
    refuses the messages or fails on them.
    """
    if text is None:
        raise ValueError("this tokenizer has no chat template: its model was not tuned for "
                         "conversations")
    if isinstance(text, dict):
        raise ValueError("this tokenizer's chat templates have the names "
                         f"{', '.join(map(repr, text))}, and none is the 'default': choose one by "
                         "tokenizer.chat_template = tokenizer.chat_template[name]")
    if not isinstance(text, str):
        raise ValueError(f"the chat template is {text!r}, not a text")
    compiled = template(text)
    try:
        return compiled.render(messages=messages, tools=None, documents=None,
                               add_generation_prompt=generate, **special)
    except Refused as error:
        raise ValueError(f"the chat template refuses these messages: {one_line(error)}") from error
    except Exception as error:  # a template is a program, and fails in as many ways
        raise ValueError("the chat template fails on these messages "
                         f"({type(error).__name__}: {one_line(error)})") from error


class Refused(Exception):
    """What a template raises by `raise_exception`."""


def one_line(error):
    return " ".join(str(error).split())


@functools.lru_cache(maxsize=8)
def template(text):
    """The compiled template, with what transformers offers to its chat templates."""
    jinja2 = files.need("jinja2", "hub")
    sandbox = files.need("jinja2.sandbox", "hub")
    ext = files.need("jinja2.ext", "hub")

    class Generation(ext.Extension):
        """{% generation %} ... {% endgeneration %} marks the assistant's words for a mask.

        minillm takes the mask from the messages, so the block renders as its own
        content.
        """

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise Refused(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    env = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    env.filters["tojson"] = tojson
    env.globals.update(raise_exception=raise_exception,
                       strftime_now=lambda form: datetime.datetime.now().strftime(form))
    try:
        return env.from_string(text)
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        raise ValueError(f"the chat template is no valid Jinja: {one_line(error)}") from error
