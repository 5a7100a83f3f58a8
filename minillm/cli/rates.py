"""The learning rate of `minillm train`: --schedule, --schedule-option and --find-rate."""

from minillm import train
from minillm.cli.using import given
from minillm.cli.words import of_technique


def check_find(args):
    """Exit with one line if --find-rate would ignore an option."""
    if not args.find_rate:
        return
    for option in ("--out", "--rate", "--epochs", "--schedule", "--schedule-option", "--warmup",
                   "--eval-data", "--eval-share", "--every", "--patience", "--checkpoints",
                   "--save-every", "--keep", "--resume", "--log", "--shard"):
        usual = args.parser.get_default(option.removeprefix("--").replace("-", "_"))
        if given(args, option) != usual:
            args.parser.error(f"--find-rate trains a copy with growing rates and saves nothing: "
                              f"{option} has no effect on it")
    if args.steps and args.steps <= train.finder.FIRST:
        args.parser.error(f"--steps {args.steps}: --find-rate needs more than "
                          f"{train.finder.FIRST} steps")


def steps_of(args):
    """The number of steps; None if --epochs decides it."""
    return args.steps or (None if args.epochs else 100)


def schedule_of(args):
    """The schedule of --schedule and --schedule-option, as `train` takes it."""
    texts, steps = pairs(args, "--schedule-option", "floor=0.1"), steps_of(args)
    try:
        schedule = train.schedules.with_options(args.schedule, texts)
        if steps:
            warmup = args.warmup if args.warmup >= 1 else round(args.warmup * steps)
            train.schedules.checked(schedule, steps, warmup)
        return schedule
    except ValueError as error:
        raise ValueError(of_technique(error, texts, "--schedule-option")) from error


def pairs(args, option, example):
    """{key: text} of an option that takes KEY=VALUE and is repeatable."""
    texts = {}
    for pair in given(args, option):
        key, equals, text = pair.partition("=")
        if not equals:
            args.parser.error(f"{option} {pair!r} is not KEY=VALUE, such as {example}")
        if key in texts:
            args.parser.error(f"{option} {key}={texts[key]} and {option} {pair}: "
                              "give one of them")
        texts[key] = text
    return texts


def find_rate(model, examples, tokenizer, args):
    """Print the suggested rate, and draw the picture."""
    found = train.find_rate(
        model, examples, steps=args.steps or 100, batch_size=args.batch_size,
        accumulate=args.accumulate, weight_decay=args.weight_decay, clip=args.clip,
        pad=tokenizer.pad or 0, seed=args.seed)
    print(found)
    if args.picture:
        found.picture(args.picture, args.force)
