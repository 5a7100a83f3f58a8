"""The command line: `minillm compare | train | eval | generate | chat | show | export | fetch`."""

import re
import sys

from minillm.cli.arguments import parser
from minillm.registry import CannotMerge
from minillm.train import Interrupted


def main(argv=None):
    """Run one command; returns the exit code. An error of ours is one line, without a traceback."""
    args = parser().parse(argv)
    try:
        return args.run(args) or 0
    except Interrupted as error:
        print(f"\nminillm {args.command}: {said(error)}", file=sys.stderr)
        return 130
    except KeyboardInterrupt as error:
        print(f"\nminillm {args.command}: {said(error, 'interrupted')}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `minillm show | head`
        sys.stderr.close()
        return 141
    except (ValueError, OSError, ImportError, RuntimeError, IndexError, CannotMerge) as error:
        print(f"minillm {args.command}: {said(error)}", file=sys.stderr)
        return 1


def said(error, name=None):
    """The error and its notes on one line, with the command line's words for arguments.

    name: what to call an error that says nothing; by default its type.
    """
    text = str(error) or name or type(error).__name__
    text = " ".join("; ".join([text, *getattr(error, "__notes__", ())]).split())
    for argument, option in (("force=True (--force)", "--force"), ("force=True", "--force"),
                             ("resume=True", "--resume"), ("skip_bad=True", "--skip-bad"),
                             ("any_base=True", "--any-base"),
                             ("anyway=True", "--option anyway=true")):
        text = text.replace(argument, option)
    text = re.sub(r"\bcheckpoints='([^']*)', --resume", r"--checkpoints \1 --resume", text)
    text = re.sub(r"\bmax_new_tokens=(?=\d)", "--max-new-tokens ", text)
    return text.encode("utf-8", "backslashreplace").decode()
