"""What an error says, in the command line's words: `warmup=5` is `--warmup 5` there."""

import re

FLAGS = (("force=True (--force)", "--force"), ("force=True", "--force"),
         ("resume=True", "--resume"), ("skip_bad=True", "--skip-bad"),
         ("any_base=True", "--any-base"), ("anyway=True", "--option anyway=true"))
NAMES = {"lr": "--rate", "names": "--techniques"}  # arguments that have another name here
NOT = ("model", "help")  # `model='Transformer' then`: of a checkpoint, and not the option
NO_CHAT = "its model was not tuned for conversations"
LONGER = "from the model that this one has made"
INSTEAD = (". Without one: `minillm generate` continues a plain prompt, and a record of prompt and "
           "completion, or of text, is learnt as it is; or put a template beside the model as "
           "chat_template.jinja")


def said(error, args, name=None):
    """The error and its notes on one line, with the command line's words for arguments.

    args: the command's. name: what to call an error that says nothing; by default its type.
    """
    text = str(error) or name or type(error).__name__
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

    # Not of a technique's own option, and not of the list of their defaults.
    head, defaults, tail = text.partition("and their defaults:")
    return re.sub(r"(?<![\w.-])(?<!--option )([a-z_]+)=", written, head) + defaults + tail


def of_technique(error, keywords):
    """The text of an error of a technique's `wrap`: `r=0` is `--option r=0` there."""
    for key in keywords:
        error = re.sub(rf"(?<![\w.-])(?<!--option ){key}=", f"--option {key}=", str(error))
    return str(error)
