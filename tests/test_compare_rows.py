"""A row of the comparison: the sweep, the seeds, all metrics of a task, the user's own file."""

import json

import pytest
import torch
from test_compare import figures, small

import minillm
from minillm import compare, data, measure
from minillm.compare import row


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small(tmp_path_factory.mktemp("model") / "small")


def test_a_sweep_moves_on_while_its_edge_is_best():
    found = row.sweep(0.002, lambda lr: abs(torch.tensor(lr).log()).item())
    assert len(found["sweep"]) == 6 and found["at_edge"]
    assert found["rate"] == pytest.approx(0.2), "0.002 times the square root of 10, four times over"
    inside = row.sweep(0.002, lambda lr: abs(lr - 0.001))
    assert (
        len(inside["sweep"]) == 4
        and not inside["at_edge"]
        and inside["rate"] == pytest.approx(0.002 / 10**0.5)
    )


def test_a_sweep_has_the_sign_of_its_metric_and_ties_take_the_smaller_rate():
    found = row.sweep(0.1, lambda lr: 0.75 if lr > 0.05 else 0.5, better=1)
    assert found["rate"] == pytest.approx(0.1) and max(found["sweep"].values()) == 0.75
    assert min(found["sweep"].values()) == 0.5 and len(found["sweep"]) == 3


def test_a_rate_that_diverges_is_worse_than_all():
    def quality(lr):
        if lr > 0.01:
            raise ValueError("step 3: the loss is nan")
        return 50.0

    found = row.sweep(0.02, quality)
    assert (
        found["sweep"]["0.02"] is None and found["rate"] < 0.01 and found["sweep"]["0.0063"] == 50
    )
    json.dumps(found, allow_nan=False)
    with pytest.raises(ValueError, match="at every learning rate tried"):
        row.sweep(1e9, quality)
    with pytest.raises(ValueError, match="what is this"):
        row.sweep(1.0, lambda lr: (_ for _ in ()).throw(ValueError("what is this")))
    line = compare.tried(
        figures("lora", None) | dict(sweep={"0.01": 0.5, "0.1": None}, at_edge=True)
    )
    assert (
        line
        == "lora: learning rate 0.01, the best of 0.01: 0.5, 0.1: nan on the validation split; "
        "the best is at the edge of the sweep"
    )


# --- whole rows -----------------------------------------------------------------------------------


def settings(model, **given):
    sizes = dict(steps=3, sweep_steps=2, seeds=2, batch_size=2, windows=5, limit=6)
    return (
        dict(
            model=model, task="language", data=None, length=32, seed=0, device=None, dtype=None,
            threads=None, progress=False,
        )
        | sizes
        | given
    )


def test_the_sweep_judges_by_fewer_windows_than_the_table(model, monkeypatch):
    """A number of windows that is asked for counts, and the settings' where none is."""
    given = settings(model, windows=5)
    _, tokenizer = minillm.load(model)
    bench = row.Bench("lora", given, row.parts(tokenizer, given))
    assert [bench.quality(bench.model, "test", n)["perplexity"].n for n in (2, 3)] == [2, 3]
    assert bench.quality(bench.model)["perplexity"].n == 5
    assert bench.attempt(1e-3)["perplexity"].n == 2


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "own.jsonl"
    lines = [
        dict(prompt=f"How much is {i} and {i}?", completion=f" It is {2 * i}.") for i in range(60)
    ]
    path.write_text("\n".join(map(json.dumps, lines + lines[:10])))
    return path


def with_parts(function, name, given):
    """function(name, given, the parts of its data), as `compare` calls it."""
    _, tokenizer = minillm.load(given["model"])
    return function(name, given, row.parts(tokenizer, given))


def test_a_row_is_measured_over_seeds(model, records):
    none, lora = (
        with_parts(row.make_row, name, settings(model, data=str(records), task=None))
        for name in ("none", "lora")
    )
    assert none["before"] == none["after"] == lora["before"] and none["after_change"]["value"] == 0
    assert len(lora["after_seeds"]) == 2 and lora["after_seeds"][0] != lora["after_seeds"][1]
    assert lora["after"]["value"] == pytest.approx(sum(lora["after_seeds"]) / 2)
    change = lora["after_change"]
    assert (
        change["low"] < change["value"] < change["high"] and change["n"] == none["before"]["n"] >= 6
    )
    assert lora["peak_bytes"] >= lora["bytes"] and lora["trainable"] > 0 and len(lora["sweep"]) >= 3
    assert lora["int8_bytes"] < lora["bytes"] and lora["pruned_change"]["low"] is not None
    assert json.dumps([none, lora], allow_nan=False)
    printed = compare.text([none, lora])
    assert (
        "against untuned" in printed
        and " examples and 2 seeds" in printed
        and "lora: learning rate" in printed
    )


@pytest.mark.parametrize(
    "task, names",
    [
        ("summary", {"ROUGE-L", "ROUGE-1", "ROUGE-2", "BLEU"}),
        ("package", {"accuracy", "F1 (macro)"}),
    ],
)
def test_the_other_tasks_have_all_their_metrics(model, task, names):
    m, tokenizer = minillm.load(model)
    part = data.task(task, tokenizer, "test", limit=5, length=100)
    found = compare.scores(m, tokenizer, part, 64, 2)
    assert set(found) == names and next(iter(found)) == part.metric
    assert (
        compare.score(m, tokenizer, part, 64, 2) == found[part.metric] and found[part.metric].n == 5
    )


def test_seeds_change_the_order_of_training_and_nothing_else_does(model, records):
    bench = with_parts(row.Bench, "full", settings(model, data=str(records), task=None))
    one, again, other = (bench.fit(0.01, 2, seed)[0].lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert not torch.equal(one, bench.model.lm_head.weight)


def test_a_file_of_the_user_is_split_by_hash(model, records, tmp_path):
    m, tokenizer = minillm.load(model)
    parts = row.own(records, tokenizer, 32)
    kept = {split: {str(example.ids) for example in part.examples} for split, part in parts.items()}
    assert {split: len(texts) for split, texts in kept.items()} == dict(
        train=48, validation=6, test=6
    )
    assert (
        len(set.union(*kept.values())) == 60
        and sum(len(part.examples) for part in parts.values()) == 70
    )
    none = with_parts(row.make_row, "none", settings(model, data=str(records), task=None))
    assert none["metric"] == "perplexity" and none["before"]["n"] == len(parts["test"].examples)
    assert none["before"]["value"] == measure.completions(m, parts["test"].examples)
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(records.read_text().splitlines()[:9]))
    with pytest.raises(ValueError, match="few.jsonl has 9 different examples"):
        compare.compare(model, data=few, length=32)


def test_a_text_is_measured_over_windows_of_twice_the_length(model):
    m, tokenizer = minillm.load(model)
    part = data.Task("perplexity", [], text="One line of text, and then another. " * 40)
    found = row.score(m, tokenizer, part, 16, None)
    assert found == measure.perplexity(m, tokenizer, part.text, length=32)
    assert found != measure.perplexity(m, tokenizer, part.text, length=512)


def test_a_task_has_all_three_splits_and_the_limit_is_of_what_is_measured(model):
    _, tokenizer = minillm.load(model)
    found = row.parts(tokenizer, dict(data=None, task="package", limit=5, length=200))
    assert list(found) == ["train", "validation", "test"]
    assert (
        len(found["validation"].examples)
        == len(found["test"].examples)
        == 5
        < len(found["train"].examples)
    )
