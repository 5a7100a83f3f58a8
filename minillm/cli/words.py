"""Errors in the words of the command line: `warmup=5` becomes `--warmup 5`."""

import re

FLAGS = (("force=True (--force)", "--force"), ("force=True", "--force"),
         ("resume=True", "--resume"), ("skip_bad=True", "--skip-bad"),
         ("any_base=True", "--any-base"), ("anyway=True", "--option anyway=true"))
NAMES = {"lr": "--rate", "names": "--techniques"}  # arguments whose options have another name
NOT = ("model", "help")  # `model='Transformer' then` speaks of a checkpoint, not of --model
NO_CHAT = "its model was not tuned for conversations"
LONGER = "from the model that this one has made"
INSTEAD = (". Without one: `minillm generate` continues a plain prompt, and a record of prompt and "
           "completion, or of text, needs none; or put a template beside the model as "
           "chat_template.jinja")


def said(error, args, name=None):
    """The error and its notes on one line, with options in place of Python's arguments.

    args: the command's arguments. name: the text for an error without one (default: its type).
    """
    text = str(error) or name or type(error).__name__
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str):
        text = f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    text = " ".join("; ".join([text, *getattr(error, "__notes__", ())]).split())
    for argument, option in FLAGS:
        text = text.replace(argument, option)
    text = re.sub(r"\bcheckpoints='([^']*)', --resume", r"--checkpoints \1 --resume", text)
    text = in_options(text, args)
    text = text.replace(NO_CHAT, NO_CHAT + INSTEAD)
    text = text.replace(LONGER, f"{LONGER} (--adapter FILE)")
    return text.encode("utf-8", "backslashreplace").decode()


def in_options(text, args):
    """The text with `name=value` as `--name value`, for each option that the command has."""
    options = {action.dest: action.option_strings[0] for action in args.parser._actions
               if action.option_strings and action.dest not in NOT}
    options |= {name: option for name, option in NAMES.items() if option in options.values()}

    def written(found):
        option, value = options.get(found[1]), found.string[found.end():][:1]
        return found[0] if option is None else option + (" " if value.strip() else "")

    # A technique's own option stays as it is, and so does the list of their defaults.
    head, defaults, tail = text.partition("and their defaults:")
    return re.sub(r"(?<![\w.-])(?<!--option )([a-z_]+)=", written, head) + defaults + tail


def of_technique(error, keywords, option="--option"):
    """The text of an error of a technique's `wrap`: `r=0` becomes `--option r=0`."""
    for key in keywords:
        error = re.sub(rf"(?<![\w.-])(?<!{option} ){key}=", f"{option} {key}=", str(error))
    return str(error)
