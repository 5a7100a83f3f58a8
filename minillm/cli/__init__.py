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
    except KeyboardInterrupt:
        print(f"\nminillm {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `minillm show | head`
        sys.stderr.close()
        return 141
    except (ValueError, OSError, ImportError, RuntimeError, IndexError, CannotMerge) as error:
        print(f"minillm {args.command}: {said(error)}", file=sys.stderr)
        return 1


def said(error):
    """The error on one line, with the command line's words for arguments."""
    text = " ".join(str(error).split()) or type(error).__name__
    for argument, option in (("force=True (--force)", "--force"), ("force=True", "--force"),
                             ("resume=True", "--resume"), ("skip_bad=True", "--skip-bad"),
                             ("any_base=True", "--any-base"),
                             ("anyway=True", "--option anyway=true")):
        text = text.replace(argument, option)
    text = re.sub(r"\bmax_new_tokens=(?=\d)", "--max-new-tokens ", text)
    return text.encode("utf-8", "backslashreplace").decode()
