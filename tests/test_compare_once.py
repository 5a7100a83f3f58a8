"""The sweep of LoRA trains its first rates at once, and finds what it finds in turn."""

import copy

import pytest
from test_compare import model  # noqa: F401
from test_compare_rows import records, settings, with_parts  # noqa: F401

from minillm import train
from minillm.compare import row

RATES = [0.003, 0.01, 0.3]  # far apart, so that a wrong order shows


@pytest.fixture(scope="module")
def bench(model, records):  # noqa: F811
    given = settings(model, data=str(records), task=None, sweep_steps=6)
    return with_parts(row.Bench, "lora", given)


@pytest.fixture(scope="module")
def alone(bench):
    """{rate: the perplexity after training alone}."""
    return {lr: float(bench.attempt(lr)["perplexity"]) for lr in RATES}


def test_at_once_each_rate_ends_where_it_ends_alone(bench, alone):
    assert bench.together(RATES, "perplexity") == pytest.approx(alone, rel=1e-4)
    values = sorted(alone.values())
    assert all(high > 1.002 * low for low, high in zip(values, values[1:])), "or it sees nothing"


def test_a_rate_that_diverges_is_none_and_the_others_stay(bench, alone, monkeypatch):
    many = train.many

    def unclipped(base, runs, **how):
        for run in runs.values():
            if run["lr"] > 1:
                run["clip"] = None
        return many(base, runs, **how)

    monkeypatch.setattr(train, "many", unclipped)
    found = bench.together([RATES[0], 1e30, RATES[2]], "perplexity")
    assert found.pop(1e30) is None
    assert found == pytest.approx({lr: alone[lr] for lr in (RATES[0], RATES[2])}, rel=1e-4)


def test_a_rate_whose_perplexity_is_no_number_is_none(bench, monkeypatch):
    def measured(trained):
        raise ValueError("the logits are nan")

    monkeypatch.setattr(bench, "validated", measured)
    assert bench.together(RATES[:2], "perplexity") == dict.fromkeys(RATES[:2])


def test_the_base_is_copied_once_and_trained_once(bench, monkeypatch):
    copied, trained, many = [], [], train.many

    def once(base, runs, **how):
        trained.append(list(runs.values()))
        return many(base, runs, **how)

    deep = copy.deepcopy
    monkeypatch.setattr(row.copy, "deepcopy", lambda x: copied.append(x is bench.model) or deep(x))
    monkeypatch.setattr(train, "many", once)
    monkeypatch.setattr(bench, "fit", lambda *given: pytest.fail("a rate is trained alone"))
    bench.together(RATES, "perplexity")
    assert sum(copied) == 1 and trained == [[dict(lr=lr) for lr in RATES]]


def test_a_sweep_learns_three_rates_at_once_and_the_further_ones_alone():
    at_once, in_turn = [], []

    def together(rates):
        at_once.append(rates)
        return {lr: quality(lr) for lr in rates}

    def quality(lr):
        return abs(lr - 0.0001)

    found = row.sweep(0.002, lambda lr: in_turn.append(lr) or quality(lr), together=together)
    assert found == row.sweep(0.002, quality) and len(at_once) == 1 and len(at_once[0]) == 3
    assert len(in_turn) == len(found["sweep"]) - 3 > 0 and max(in_turn) < min(at_once[0])
    lost = row.sweep(1, quality, together=lambda rates: dict(zip(rates, (2.0, 1.0, None))))
    assert lost["rate"] == 1 and list(lost["sweep"].values()) == [2.0, 1.0, None]
    with pytest.raises(ValueError, match="at every learning rate tried"):
        row.sweep(1, lost_too, together=dict.fromkeys)


def lost_too(lr):
    raise ValueError("the loss is nan")


@pytest.mark.parametrize("name, times", [("lora", 1), ("pissa", 0), ("prompts", 0)])
def test_a_row_of_lora_alone_sweeps_at_once(
    name, times, model, records, monkeypatch  # noqa: F811
):
    calls, together = [], row.Bench.together
    monkeypatch.setattr(row.Bench, "together",
                        lambda *given: calls.append(given) or together(*given))
    given = settings(model, data=str(records), task=None, seeds=1)
    found = with_parts(row.make_row, name, given)
    assert len(calls) == times and len(found["sweep"]) >= 3
    if not times:
        return
    monkeypatch.setattr(row, "AT_ONCE", set())
    in_turn = with_parts(row.make_row, name, given)
    assert found["sweep"] == pytest.approx(in_turn["sweep"], rel=1e-4)
    assert found["rate"] == in_turn["rate"] and found["after_seeds"] == in_turn["after_seeds"]
