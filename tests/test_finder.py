"""The range test: its rates, its smoothing, its end, and a model that stays as it was."""
# flake8: noqa: F811  (fixtures)

import inspect
import math

import pytest
import torch
from models import build
from small_model import model, run  # noqa: F401
from test_nothing_lost import FAST
from test_schedules import plain_loop
from test_train import examples, losses, quiet
from torch import nn

import minillm
from minillm.train import find_rate, finder


def found(model, rows=None, **options):
    usual = dict(low=1e-4, high=10.0, steps=30, batch_size=4, progress=False)
    return find_rate(model, rows or examples(), **{**usual, **options})


def test_the_rates_and_losses_are_those_of_a_plain_loop():
    rows = examples(32)
    result = found(build("llama"), rows, steps=8, high=0.1, explode=99, weight_decay=0.3)
    rates = [1e-4 * 1000 ** (s / 7) for s in range(8)]
    assert [r["rate"] for r in result.history] == pytest.approx(rates)
    assert [r["step"] for r in result.history] == list(range(8))
    expected = plain_loop(build("llama"), rows, 8, 4, 1.0, rates, lambda name: 1)
    assert [r["loss"] for r in result.history] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_the_smoothed_loss_is_a_weighted_mean(beta):
    """The loss of k steps ago has a weight of beta^k."""
    history = found(build("llama"), smooth=beta, explode=99).history
    for n in range(1, len(history) + 1):
        weights = [beta ** (n - 1 - i) for i in range(n)]
        mean = sum(w * r["loss"] for w, r in zip(weights, history)) / sum(weights)
        assert history[n - 1]["smooth"] == pytest.approx(mean)


def test_it_ends_when_the_loss_explodes():
    result = found(build("llama"))
    smooth = [r["smooth"] for r in result.history]
    assert len(smooth) < 30 and result.ended == result.history[-1]["rate"]
    assert smooth[-1] > 1.5 * min(smooth)
    for i in range(finder.FIRST, len(smooth) - 1):
        assert smooth[i] <= 1.5 * min(smooth[: i + 1])
    longer = found(build("llama"), explode=1.9)
    assert len(longer.history) >= len(smooth)
    assert found(build("llama"), explode=99, high=0.01).ended is None


def test_the_suggestion_is_a_tenth_of_the_lowest():
    result = found(build("llama"))
    lowest = min(result.history[finder.FIRST:], key=lambda r: r["smooth"])
    assert result.lowest == lowest and result.rate == pytest.approx(lowest["rate"] / 10)
    assert 1e-4 < result.rate < 0.1 and lowest["smooth"] < result.history[0]["smooth"]
    text = str(result)
    assert f"{len(result.history)} rates from 0.0001 to {result.ended:.2g}" in text
    assert text.endswith(f"it exploded at {result.ended:.2g}\nsuggested rate: {result.rate:.2g}")
    assert "has not exploded: train.find_rate(..., high=) in Python" in str(found(build("llama"), high=0.01))


def test_the_suggested_rate_learns_and_the_exploded_one_does_not():
    result = found(build("llama"), steps=60)
    good, bad = (losses(quiet(build("llama"), steps=30, lr=lr, schedule="constant"))
                 for lr in (result.rate, result.ended))
    assert sum(good[-5:]) < 0.6 * sum(good[:5]) and max(bad) > 1.5 * bad[0]
    assert sum(good[-5:]) < sum(bad[-5:])


def kept(model):
    """All of a model that a training could change, as it is."""
    every = [*model.named_parameters(), *model.named_buffers()]
    return ([(name, id(t), t._version, t.detach().clone()) for name, t in every],
            [(id(p.grad), p.grad.clone()) for p in model.parameters() if p.grad is not None],
            [module.training for module in model.modules()],
            [p.requires_grad for p in model.parameters()])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Normed(nn.Module):
    """With BatchNorm, whose buffers move."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(24, 8), nn.BatchNorm1d(8), nn.Linear(8, 24)

    def forward(self, ids, attention_mask=None):
        return self.head(self.norm(self.embed(ids).transpose(1, 2)).transpose(1, 2))


def stacked(kind):
    """A model with techniques whose state a training might touch."""
    model = build("llama")
    match kind:
        case "lora over int8 over a mask":
            minillm.prune.wrap(model, sparsity=0.5)
            minillm.quant.wrap(model)
            minillm.lora.wrap(model, r=2, dropout=0.5)
        case "qat":
            minillm.quant.qat.wrap(model)
        case "prompts":
            minillm.prompts.wrap(model, length=2)
        case "vera":
            minillm.lora.vera.wrap(model, r=2)
        case "normed":
            model = Normed().train()
        case "tied":
            model = build("gpt2")
        case "bfloat16":
            model = model.to(torch.bfloat16)
    return model


KINDS = ["plain", "lora over int8 over a mask", "qat", "prompts", "vera", "normed", "tied",
         "bfloat16"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_stays_as_it_was_to_the_last_bit(kind):
    model = stacked(kind)
    learning = [p for p in model.parameters() if p.requires_grad]
    learning[0].grad = torch.ones_like(learning[0])
    before, numbers = kept(model), torch.get_rng_state()
    result = found(model, high=100.0)
    assert same(kept(model), before) and torch.get_rng_state().equal(numbers)
    assert len(result.history) > finder.FIRST
    assert result.history == found(model, high=100.0).history, "and so the test repeats itself"


def test_a_training_after_it_is_the_one_without_it():
    model, other = stacked("lora over int8 over a mask"), stacked("lora over int8 over a mask")
    found(model)
    assert losses(quiet(model)) == losses(quiet(other))


def test_an_error_or_ctrl_c_within_it_changes_nothing_either():
    def fail(model, ids, labels, mask):
        fail.calls += 1
        if fail.calls == 4:
            raise KeyboardInterrupt
        return minillm.train.loss_sum(model, ids, labels, mask)

    fail.calls, model = 0, build("llama")
    before = kept(model)
    with pytest.raises(KeyboardInterrupt):
        found(model, loss=fail)
    assert same(kept(model), before)


def test_the_copy_shares_what_does_not_learn():
    model = stacked("lora over int8 over a mask")
    twin = finder.copied(model)
    ours, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())}
                    for m in (model, twin))
    assert ours.keys() == theirs.keys()
    shared = {name for name, t in ours.items() if t is theirs[name]}
    assert {name for name in ours if "lora" in name}.isdisjoint(shared)
    assert {name for name in ours if "lora" not in name and "norm" in name} <= shared
    assert any(ours[name].dtype == torch.int8 for name in shared)
    assert any(name.endswith("mask") for name in shared)


def test_compiled_models_are_tried_as_they_are_without():
    model = build("llama")
    expected = found(build("llama")).history
    assert found(torch.compile(model, backend="eager")).history == expected


def test_a_loss_that_is_no_number_is_an_end_too():
    def loss(model, ids, labels, mask):
        loss.calls += 1
        whole = minillm.train.loss_sum(model, ids, labels, mask)
        return whole * (math.nan if loss.calls == 20 else 1)

    loss.calls = 0
    result = found(build("llama"), loss=loss, explode=1e9)
    assert len(result.history) == 19
    assert result.ended == pytest.approx(1e-4 * 1e5 ** (19 / 29))
    assert f"it exploded at {result.ended:.2g}" in str(result)


def test_the_first_steps_are_not_the_lowest():
    """One lucky batch at the start says nothing of its rate."""
    def loss(model, ids, labels, mask):
        loss.calls += 1
        return minillm.train.loss_sum(model, ids, labels, mask) * (0.1 if loss.calls == 2 else 1)

    loss.calls = 0
    result = found(build("llama"), loss=loss, explode=1e9, smooth=0.0)
    assert result.history[1]["smooth"] == min(r["smooth"] for r in result.history)
    assert result.lowest["step"] >= finder.FIRST


@pytest.mark.parametrize("options, message", [
    (dict(low=0), "low=0 is not a number above 0"),
    (dict(high=math.inf), "high=inf is not a number above 0"),
    (dict(low=1.0, high=0.1), "low=1, high=0.1: the rates grow, so low is below high"),
    (dict(low=1.0, high=1.0), "low=1, high=1: the rates grow"),
    (dict(steps=5), "steps=5 is not a whole number of at least 6"),
    (dict(smooth=1), r"smooth=1 is not a number from 0 up to \(but not\) 1"),
    (dict(explode=1), "explode=1 is not a number above 1"),
    (dict(batch_size=0), "batch_size=0 is not a whole number from 1"),
    (dict(rates={"layer_9": 2}), "'layer_9' matches no parameter that learns"),
    (dict(low=1e3, high=1e4), "the loss exploded after .* steps, at the rate .*: begin with a "
                              "lower low="),
])
def test_errors(options, message):
    model = build("llama")
    before = kept(model)
    with pytest.raises(ValueError, match=message):
        found(model, **options)
    assert same(kept(model), before)


def test_other_errors_are_no_explosion():
    with pytest.raises(ValueError, match="loss= gives a float: it has to be one number"):
        found(build("llama"), loss=lambda *batch: 1.0)
    with pytest.raises(ValueError, match="nothing in this model learns"):
        found(build("llama").requires_grad_(False))


def test_one_process_only(monkeypatch):
    monkeypatch.setattr(minillm.distributed, "place", lambda: (0, 2))
    with pytest.raises(ValueError, match="in one process: find the rate without torchrun"):
        found(build("llama"))


def test_rates_are_factors_of_the_growing_rate():
    plain, slower = build("llama"), build("llama")
    one = found(plain, steps=10, high=1.0, explode=99).history
    two = found(slower, steps=10, low=1e-3, high=10.0, explode=99, rates={"": 0.1}).history
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], rel=1e-4)


# --- the picture and the command line -------------------------------------------------------------


def test_the_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: (
        drawn.append(figure), save(figure, *args, **options)))
    result = found(build("llama"))
    result.picture(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", "learning rate")
    each, smooth, lowest, suggested = axes.lines
    assert each.get_xydata().tolist() == [[r["rate"], r["loss"]] for r in result.history]
    assert smooth.get_xydata().tolist() == [[r["rate"], r["smooth"]] for r in result.history]
    assert lowest.get_xydata().tolist() == [[result.lowest["rate"], result.lowest["smooth"]]]
    assert set(suggested.get_xdata()) == {result.rate}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "loss of each step", "smoothed", f"lowest: {result.lowest['rate']:.2g}",
        f"suggested: {result.rate:.2g}"]
    result.picture(tmp_path / "a.png")  # minillm drew it, so it is replaced
    (tmp_path / "mine.png").write_text("mine")
    with pytest.raises(FileExistsError, match="mine.png' is a file that minillm did not draw"):
        result.picture(tmp_path / "mine.png")
    with pytest.raises(ValueError, match="a.jpg': a picture ends in .png, .svg or .pdf"):
        result.picture(tmp_path / "a.jpg")


def test_the_command_line(run, tmp_path):
    said = run("train", *FAST, "--find-rate", "--steps", 20, "--picture", "rates.png")
    assert "20 rates from 1e-06 to 1" in said and "suggested rate: " in said
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.safetensors*")) and not list(tmp_path.glob("*.interrupted"))
    said = run("train", *FAST, "--technique", "full", "--find-rate", "--preview", 1, "--steps", 9)
    assert "suggested rate: " in said and said.index("example") < said.index("suggested")


@pytest.mark.parametrize("options", [
    ["--out", "x.safetensors"], ["--rate", 0.1], ["--epochs", 2], ["--schedule", "linear"],
    ["--schedule-option", "floor=0.1"], ["--warmup", 3], ["--eval-share", 0.1], ["--resume"],
    ["--checkpoints", "c"], ["--log", "l.jsonl"], ["--shard"]])
def test_options_that_it_would_ignore(options, run):
    said = run("train", *FAST, "--find-rate", *options, code=2)
    assert f"{options[0]} has no effect on it" in said


def test_too_few_steps(run):
    assert "--steps 5: --find-rate needs more than 5" in run("train", "--find-rate", "--steps", 5,
                                                             code=2)


def test_what_is_not_given_is_as_in_train():
    of_train = inspect.signature(minillm.train.train).parameters
    of_find = inspect.signature(find_rate).parameters
    shared = of_find.keys() & of_train.keys() - {"steps", "progress"}
    assert {"clip", "betas", "weight_decay", "batch_size", "accumulate", "seed"} <= shared
    for name in shared:
        assert of_find[name].default == of_train[name].default, name
