"""The table of a comparison: written to table.json row by row, printed, and written as
Markdown with a picture.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import tempfile

import torch

from minillm import files, measure
from minillm.measure import report
from minillm.compare.picture import picture

FORMAT = "minillm.compare 1"
OUTPUTS = ("table.json", "table.md", "table.png")


class Table:
    """The rows so far, {technique: row}, and the directory that keeps them (None: no directory).

    `begin` and `on` take over the rows in the directory that have the same settings and
    model; `add` writes the table after each new row.
    """

    def __init__(self, directory, force=False):
        """Check that the directory can take the table, and change nothing before an error.

        FileExistsError for files that minillm did not write, OSError if nothing can be
        written or a directory has the name of a file, ImportError without matplotlib.
        """
        self.directory, self.rows, self.old = (
            None if directory is None else pathlib.Path(directory),
            {},
            None,
        )
        if directory is None:
            return
        files.need("matplotlib", "plot")
        if self.directory.exists() and not self.directory.is_dir():
            raise FileExistsError(f"{directory} is a file: the table needs a directory")
        for name in OUTPUTS:
            files.check_writable(self.directory / name, force=True)
        if not force:
            self.old = read(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.directory):
            pass

    @property
    def path(self):
        return self.directory / "table.json"

    def begin(self, settings):
        """Note the settings. FileExistsError, which names the differences, if the rows in
        the directory have others.
        """
        self.versions = versions(settings["threads"])
        self.settings = settings | dict(records=settings["data"] and contents(settings["data"]))
        self.same(self.settings | self.versions)

    def on(self, model):
        """Take over the rows in the directory; FileExistsError if they are of a model with
        other weights.
        """
        self.settings["weights"] = fingerprint(model)
        self.same(dict(weights=self.settings["weights"]))
        if self.old is not None:
            self.rows = {row["technique"]: row for row in self.old["rows"]}

    def same(self, now):
        """FileExistsError if the rows in the directory have another value for a key of `now`."""
        then = {} if self.old is None else self.old["settings"] | self.old["versions"]
        differ = ", ".join(
            f"{key}={then.get(key)!r} then, {value!r} now"
            for key, value in now.items()
            if then and then.get(key) != value
        )
        if differ:
            raise FileExistsError(
                f"{self.path} has rows with other settings ({differ}), which are not mixed: "
                "give another directory, or replace the table with force=True"
            )

    def done(self):
        """The techniques that have a row without an error."""
        return [name for name, row in self.rows.items() if "error" not in row]

    def add(self, row):
        self.rows[row["technique"]] = row
        if self.directory is not None:
            with files.atomic(self.path) as new:
                record = dict(
                    format=FORMAT,
                    settings=self.settings,
                    versions=self.versions,
                    rows=list(self.rows.values()),
                )
                new.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @contextlib.contextmanager
    def held(self):
        """Lock the directory against a second run: each would lose the other's rows."""
        if self.directory is None:
            yield
            return
        with files.lock(self.directory):
            try:
                yield
            finally:
                files.unlock(self.directory)

    def finish(self):
        """Write table.md and table.png."""
        if self.directory is None:
            return
        write(list(self.rows.values()), self.directory, title(self.settings))


def read(directory):
    """The table.json of an earlier run, or None. FileExistsError if it, table.md or
    table.png is a file of another program.
    """
    path = directory / "table.json"
    if not path.exists():
        for other in (directory / "table.md", directory / "table.png"):
            if other.exists():
                raise FileExistsError(
                    f"{other} exists without a table.json of minillm's compare, "
                    "and would be replaced: give another directory, or force=True"
                )
        return None
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["format"] == FORMAT and {"settings", "versions", "rows"} <= set(old):
            return old
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise FileExistsError(
        f"{path} is not a table of this version of minillm's compare, and would be replaced: "
        "give another directory, or force=True"
    )


def fingerprint(model):
    """A hash of all weights."""
    found = hashlib.sha256()
    for key, t in sorted(model.state_dict().items()):
        found.update(key.encode())
        found.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def contents(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:16]


def versions(threads=None):
    """The versions and the machine: what a figure may depend on beside the settings."""
    found = {}
    for package in ("minillm", "torch", "numpy", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | dict(
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        cuda=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        threads_used=threads or torch.get_num_threads(),
    )


def title(settings):
    what = (
        f"--data {pathlib.Path(settings['data']).name}"
        if settings["data"]
        else f"--task {settings['task']}"
    )
    return f"minillm compare --model {settings['model']} {what}"


# --- as text --------------------------------------------------------------------------------------


def failed(rows):
    """The rows that have an error in place of figures."""
    return [row for row in rows if "error" in row]


def shown(rows):
    """The rows as they are printed."""
    lines = []
    for r in rows:
        if "error" in r:
            lines.append({"technique": r["technique"], "error": " ".join(r["error"].split())[:100]})
            continue
        trains = r["technique"] != "none"
        lines.append(
            {
                "technique": r["technique"],
                "rate": f"{r['rate']:.1g}" if trains else "",
                "trainable": f"{r['trainable']:,}",
                "peak MB": f"{r['peak_bytes'] / 1e6:,.0f}" if trains else "",
                "seconds": f"{r['seconds']:.1f}" if trains else "",
                r["metric"]: measure.digits(r["after"]["value"]),
                "against untuned": interval(r["after_change"]) if trains else "",
                "int8": interval(r["int8_change"]),
                "half pruned": interval(r["pruned_change"]),
                "MB": f"{r['bytes'] / 1e6:,.1f}",
                "int8 MB": f"{r['int8_bytes'] / 1e6:,.1f}",
            }
        )
    return lines


def interval(change):
    """A change with its 95% interval: of perplexity in percent, of other metrics as it is."""
    percent = change["name"].endswith("perplexity")
    ends = [change[key] for key in ("value", "low", "high") if change[key] is not None]
    ends = [100 * x if percent else x for x in ends]
    places = 3 if not percent else 1 if max(map(abs, ends)) >= 1 else 2
    value, *interval = (f"{x:+.{places}f}" for x in ends)
    return value + ("%" if percent else "") + (f" [{', '.join(interval)}]" if interval else "")


def text(rows):
    """The table, with the notes that a reader needs, as Markdown."""
    whole = [row for row in rows if "error" not in row]
    lines = [report.table(shown(rows))]
    if whole:
        before, seeds = whole[0]["before"], max(len(row["after_seeds"]) for row in whole)
        untuned = measure.Score(**before)
        lines += [
            "",
            f"Untuned: {untuned!r}. "
            f"Changes are paired, with their 95% interval over {before['n']} examples"
            + (f" and {seeds} seeds" if seeds > 1 else ", of one training")
            + "; those of int8 and of half pruned are against the row's own model.",
            "",
        ]
        lines += [
            f"- {line}" for row in whole if row["rate"] for line in (tried(row), *others(row))
        ]
    lines += [f"- {row['technique']} failed: {row['error']}" for row in failed(rows)]
    return "\n".join(lines)


def tried(row):
    """The result of a row's learning rate sweep, as one line."""
    values = ", ".join(
        f"{rate}: {'nan' if value is None else measure.digits(value)}"
        for rate, value in row["sweep"].items()
    )
    edge = "; the best is at the edge of the sweep" if row["at_edge"] else ""
    rate = f"{row['technique']}: learning rate {row['rate']:.2g}"
    return f"{rate}, the best of {values} on the validation split{edge}"


def others(row):
    """The task's other metrics, as lines."""
    found = [
        f"{name} {measure.digits(one['after']['value'])} ({interval(one['after_change'])})"
        for name, one in row["scores"].items()
        if name != row["metric"]
    ]
    return [f"{row['technique']}: " + ", ".join(found)] if found else []


def write(rows, directory, title=""):
    """Write table.md and table.png (quality against cost) to the directory."""
    directory = pathlib.Path(directory)
    with files.atomic(directory / "table.md") as new:
        new.write_text((f"{title}\n\n" if title else "") + text(rows) + "\n", encoding="utf-8")
    if any("error" not in row for row in rows):
        picture(rows, directory / "table.png", title)
