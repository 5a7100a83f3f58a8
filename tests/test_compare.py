"""The comparison: rows that survive failures, kills and Ctrl-C, outputs that are
checked first, and the sweep.
"""

import json
import os

import pytest
import torch

import minillm
from minillm import compare, data, files
from minillm.compare import table
from minillm.model.tokenizer import SentencePiece

pytest.importorskip("matplotlib")


def small(path):
    """A small model in a directory of its own; the directory."""
    tokenizer = SentencePiece.train([data.topics()[:40000]], 500)
    torch.manual_seed(0)
    config = minillm.Config(500, 32, 3, 4, kv_heads=2, ffn=64, positions=512)
    minillm.save(minillm.Transformer(config), path, tokenizer=tokenizer)
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small(tmp_path_factory.mktemp("model") / "small")


def record(value, name="perplexity", half=1.0):
    return dict(name=name, value=value, n=8, low=value - half, high=value + half)


def figures(name, settings):
    """A row as `make_row` makes it, at once."""
    change = record(-0.1, "change of perplexity", 0.05)
    after = record(100.0 if name == "none" else 90.0)
    return dict(
        technique=name,
        metric="perplexity",
        rate=None if name == "none" else 0.01,
        sweep={"0.01": 90.0},
        at_edge=False,
        trainable=100,
        peak_bytes=10**7,
        seconds=1.0,
        before=record(100.0),
        after=after,
        after_change=change,
        after_seeds=[90.0],
        int8=record(91.0),
        int8_change=change,
        int8_bytes=10**6,
        pruned=record(120.0),
        pruned_change=change,
        pruned_bytes=10**6,
        bytes=4 * 10**6,
        scores=dict(perplexity=dict(before=record(100.0), after=after, after_change=change)),
    )


class Worker:
    """Stands in for the process of each technique; `failing` raises there, `interrupt`
    is Ctrl-C in it.
    """

    def __init__(self, monkeypatch, failing=None, interrupt=None):
        self.failing, self.interrupt, self.measured = failing, interrupt, []
        monkeypatch.setattr(compare, "apart", self)

    def __call__(self, function, name, settings, splits):
        if name == self.interrupt:
            raise KeyboardInterrupt
        if name == self.failing:
            raise ChildProcessError("ValueError: out of luck")
        self.measured.append(name)
        return figures(name, settings)


def run(model, out, names=("none", "lora", "prompts"), **given):
    return compare.compare(model, names=names, out=out, length=16, progress=False, **given)


def test_a_technique_that_fails_has_a_row_and_the_others_keep_theirs(model, tmp_path, monkeypatch):
    Worker(monkeypatch, failing="lora")
    rows = run(model, tmp_path / "r")
    assert [r["technique"] for r in rows] == ["none", "lora", "prompts"]
    assert compare.failed(rows) == [dict(technique="lora", error="ValueError: out of luck")]
    written = json.loads((tmp_path / "r" / "table.json").read_text())
    assert written["rows"] == rows
    text = (tmp_path / "r" / "table.md").read_text()
    assert "lora failed: ValueError: out of luck" in text and "-10.0% [-15.0, -5.0]" in text
    assert (tmp_path / "r" / "table.png").read_bytes().startswith(b"\x89PNG")
    again = Worker(monkeypatch)
    assert not compare.failed(run(model, tmp_path / "r")) and again.measured == ["lora"]
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert names == {"table.json", "table.md", "table.png"}
    with files.lock(tmp_path / "r"), pytest.raises(RuntimeError, match="another run is writing"):
        run(model, tmp_path / "r")


def test_an_interrupted_run_goes_on_where_it_was(model, tmp_path, monkeypatch):
    first = Worker(monkeypatch, interrupt="prompts")
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path)
    kept = json.loads((tmp_path / "table.json").read_text())
    assert [r["technique"] for r in kept["rows"]] == first.measured == ["none", "lora"]
    second = Worker(monkeypatch)
    assert len(run(model, tmp_path)) == 3 and second.measured == ["prompts"]


def test_rows_that_are_kept_are_named(model, tmp_path, monkeypatch, capsys):
    Worker(monkeypatch)
    run(model, tmp_path, ["none"])
    compare.compare(model, names=["none", "lora"], out=tmp_path, length=16)
    said = capsys.readouterr().err
    assert "has rows of the same settings, which are not measured again: 'none'\n" in said


def test_rows_of_other_settings_are_not_mixed(model, tmp_path, monkeypatch):
    worker = Worker(monkeypatch)
    run(model, tmp_path, ["none"])
    for given, message in (
        (dict(steps=7), "steps=40 then, 7 now"),
        (dict(seed=3), "seed=0 then, 3 now"),
    ):
        with pytest.raises(FileExistsError, match=message):
            run(model, tmp_path, ["none"], **given)
    monkeypatch.setattr(table, "versions", lambda threads: dict(torch="0.1"))
    with pytest.raises(FileExistsError, match="torch=.* then, '0.1' now"):
        run(model, tmp_path, ["none"])
    assert worker.measured == ["none"]
    run(model, tmp_path, ["none"], steps=7, force=True)
    assert json.loads((tmp_path / "table.json").read_text())["settings"]["steps"] == 7


def test_the_table_keeps_settings_and_versions(model, tmp_path, monkeypatch):
    Worker(monkeypatch)
    run(model, tmp_path, ["none"], seed=5, threads=1)
    written = json.loads((tmp_path / "table.json").read_text())
    expected = dict(
        model=model,
        task="language",
        data=None,
        length=16,
        seed=5,
        seeds=1,
        steps=40,
        sweep_steps=40,
        batch_size=4,
        windows=8,
        limit=32,
        threads=1,
        records=None,
    )
    assert {key: written["settings"][key] for key in expected} == expected
    assert len(written["settings"]["weights"]) == 16
    assert (
        written["versions"]["torch"] == torch.__version__
        and written["versions"]["threads_used"] == 1
    )
    assert {"minillm", "numpy", "python", "machine", "transformers"} < set(written["versions"])


def test_outputs_are_checked_before_the_work(model, tmp_path, monkeypatch):
    monkeypatch.setattr(compare.zoo, "load", lambda model: pytest.fail("work before the check"))
    (tmp_path / "file").write_text("mine")
    for name in ("json", "md", "png"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"table.{name}").write_text("[]")
    for name, message in (
        ("file", "is a file"),
        ("json", "is not a table"),
        ("md", "table.md exists"),
        ("png", "table.png exists"),
    ):
        with pytest.raises(FileExistsError, match=message):
            run(model, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine" and (
        tmp_path / "json" / "table.json"
    ).read_text() == "[]"
    monkeypatch.setattr(
        table.tempfile, "TemporaryFile", lambda dir: (_ for _ in ()).throw(PermissionError("no"))
    )
    with pytest.raises(PermissionError):
        run(model, tmp_path / "new")
    for given, message in (
        (dict(names=["lroa"]), "'lroa' is not one.*'lora'"),
        (dict(steps=0), "steps=0"),
        (dict(windows=-1), "windows=-1"),
        (dict(windows=2, task="package"), "windows=2 would be ignored"),
        (dict(limit=2), "limit=2 would be ignored"),
        (dict(task="sumary"), "sumary"),
        (dict(stepz=3), "stepz: unknown; known: steps"),
    ):
        with pytest.raises(ValueError, match=message):
            compare.compare(model, **given)


def test_an_error_in_another_process_comes_back_as_text():
    with pytest.raises(ChildProcessError, match="ValueError: invalid literal for int.*'x'"):
        compare.apart(int, "x")


def test_a_process_that_is_killed_is_a_row(model, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "make_row", os.abort)
    monkeypatch.setattr(
        compare, "apart", lambda function, *arguments, apart=compare.apart: apart(function)
    )
    rows = run(model, tmp_path, ["none"])
    assert "signal 6" in rows[0]["error"] and "error" in (tmp_path / "table.md").read_text()
    assert not (tmp_path / "table.png").exists()


def test_the_picture_shows_intervals_of_the_change(tmp_path):
    rows = [
        figures("none", None),
        figures("lora", None),
        figures("prompts", None) | dict(error="lost"),
    ]
    rows[1]["after"] |= dict(low=None, high=None)
    compare.picture(rows, tmp_path / "a.png", "a title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_says_what_it_shows(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k))
    )
    rows = [figures(name, None) for name in ("none", "lora", "prompts")]
    rows[1]["after"] |= dict(value=80.0, low=79.0, high=83.0)
    compare.picture(rows, tmp_path / "a.png", "a title")
    left, right = drawn[0].axes
    assert (left.get_xlabel(), left.get_xscale()) == ("trainable parameters", "log")
    assert (right.get_xlabel(), right.get_xscale()) == (
        "peak memory of training, MB",
        "linear",
    )
    assert left.get_ylabel() == "perplexity, held-out text" and right.get_ylabel() == ""
    assert left.get_ylim() == right.get_ylim() and drawn[0].get_size_inches().tolist() == [11, 4.5]
    named = [text.get_text() for text in right.get_legend().get_texts()]
    assert set(named) == {"untuned", "after int8", "lora", "prompts"} and len(named) == 4
    assert drawn[0].get_suptitle() == "a title: 95% intervals of the change"
    for axes, x in ((left, 100), (right, 10)):
        dots = [line for line in axes.lines if line.get_marker() == "o"]
        assert [tuple(line.get_xydata()[0]) for line in dots] == [(x, 80.0), (x, 90.0)]
        bar = axes.containers[0].lines[2][0].get_segments()[0]
        assert bar.tolist() == [[x, 79.0], [x, 83.0]]
        ends = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "v"]
        assert [[x, 91.0]] in ends
        level = next(line for line in axes.lines if line.get_linestyle() == ":")
        assert set(level.get_ydata()) == {100.0}
    compare.picture(rows, tmp_path / "a.png")
    assert drawn[1].get_suptitle() == "95% intervals of the change"


def test_every_model_has_all_sizes():
    for model in ("tiny", "smollm2", "a directory"):
        settings = compare.check(["none"], model, "language", None, {"length": 128}, {})
        assert set(compare.SIZES["smollm2"]) <= set(settings)
