"""`minillm compare`: measure all techniques and write the table."""

import os

from minillm import compare
from minillm.cli.paths import check_paths
from minillm.cli.adapters import place
from minillm.cli.using import refuse_second


def run(args):
    """Print and write the table. Returns the exit code, 1 if a technique failed."""
    refuse_second(args, "--task", "--data")
    written = [os.path.join(args.out, name) for name in ("table.json", "table.md", "table.png")]
    for path in written:
        check_paths(args, {"--out": path})
    rows = compare.compare(
        args.model, args.task or "language", args.techniques, data=args.data, out=args.out,
        force=args.force, length=args.length or 128, seed=args.seed, device=str(place(args.device)),
        dtype=args.dtype, steps=args.steps, seeds=args.seeds, batch_size=args.batch_size,
        windows=args.windows)
    print(compare.text(rows))
    print(f"wrote table.json, table.md and table.png to {args.out}")
    return 1 if compare.failed(rows) else 0
