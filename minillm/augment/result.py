"""What an augmentation returns, and where its random numbers come from."""

import collections
import dataclasses
import hashlib
import json
import random

from minillm import options


@dataclasses.dataclass
class Report:
    """What an augmentation did; `str()` gives it as text.

    before, after    how many samples there were, and are
    made             {operation: copies made}
    unchanged        {operation: copies left out, because nothing in them changed}
    units            {operation: words or tokens that it changed}
    """

    before: int = 0
    after: int = 0
    made: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unchanged: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    units: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def __str__(self):
        lines = [f"{self.before} samples -> {self.after}"]
        for name in sorted({*self.made, *self.unchanged}):
            units = f", {self.units[name]} changes" if name in self.units else ""
            lines.append(f"{name}: {self.made[name]} copies{units}; {self.unchanged[name]} left "
                         "out, as nothing changed")
        return "\n".join(lines)


class Augmented(list):
    """The samples, the originals first, with a `report`."""

    def __init__(self, samples):
        super().__init__(samples)
        self.report = Report(len(self), len(self))

    def keep(self, operation, old, new, units=None):
        """Add the copy `new` of `old`, unless nothing changed; count it."""
        if new == old:
            self.report.unchanged[operation] += 1
            return
        self.append(new)
        self.report.made[operation] += 1
        self.report.after += 1
        if units is not None:
            self.report.units[operation] += units


def check(records, copies, seed):
    """ValueError or TypeError for a wrong number, and for records that are no list of dicts."""
    numbers(copies, seed)
    if not isinstance(records, (list, tuple)):
        raise TypeError(f"records: this is a {type(records).__name__}, not a list of records")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise TypeError(f"records: number {i} is a {type(record).__name__}, not a record "
                            "(a dict of fields, such as {'prompt':, 'completion':})")


def numbers(copies, seed):
    options.whole("copies", copies)
    options.whole("seed", seed, least=0)


def digest(seed, copy, content):
    """A whole number of 63 bits that depends on the seed, the copy and a sample's content."""
    text = json.dumps([seed, copy, content], sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed, copy, content):
    """The random.Random of one copy of one sample."""
    return random.Random(digest(seed, copy, content))
