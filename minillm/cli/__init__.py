"""The command line: `minillm compare | train | eval | generate | chat | show | export | fetch`."""

import sys

from minillm.cli.arguments import parser
from minillm.cli.words import said
from minillm.registry import CannotMerge
from minillm.train import Interrupted


def main(argv=None):
    """Run one command and return the exit code. Expected errors are one line, no traceback."""
    args = parser().parse(argv)
    try:
        return args.run(args) or 0
    except Interrupted as error:
        print(f"\nminillm {args.command}: {said(error, args)}", file=sys.stderr)
        return 130
    except KeyboardInterrupt as error:
        print(f"\nminillm {args.command}: {said(error, args, 'interrupted')}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `minillm show | head`
        sys.stderr.close()
        return 141
    except (ValueError, OSError, ImportError, RuntimeError, IndexError, CannotMerge) as error:
        print(f"minillm {args.command}: {said(error, args)}", file=sys.stderr)
        return 1
