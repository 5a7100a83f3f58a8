"""`minillm compare`: the table of all techniques, row by row."""

from minillm import compare
from minillm.cli.using import place


def run(args):
    """Print and write the table; the exit code is 1 where a technique failed."""
    rows = compare.compare(
        args.model, args.task, args.techniques, data=args.data, out=args.out, force=args.force, length=args.length or 128,
        seed=args.seed, device=str(place(args.device)), dtype=args.dtype, steps=args.steps, seeds=args.seeds,
        batch_size=args.batch_size, windows=args.windows)
    print(compare.text(rows))
    print(f"wrote table.json, table.md and table.png to {args.out}")
    return 1 if compare.failed(rows) else 0
