"""The loop beside one of plain torch; schedules, groups, losses, evaluation, the log."""

import functools
import json
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from models import TOKENS, build
from torch import nn

import minillm
from minillm import data
from minillm.train import groups, held_out_loss, loss_sum, picture, rate, summary, train


def examples(n=12, seed=0):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (n,), generator=draw).tolist()
    rows = [torch.randint(24, (length,), generator=draw).tolist() for length in lengths]
    return [data.Example(row, [-100, *row[1:]]) for row in rows]


def losses(history):
    return [record["loss"] for record in history]


def quiet(model, rows=None, **options):
    usual = dict(steps=6, lr=1e-2, batch_size=4, progress=False)
    return train(model, rows or examples(), **{**usual, **options})


def test_schedules():
    assert [rate(s, 10, "constant", 2) for s in (0, 1, 2, 9)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert [rate(s, 10, "linear", 2) for s in (2, 6, 10)] == [1, 0.5, 0]
    assert [rate(s, 10, "cosine", 0) for s in (0, 5, 10)] == pytest.approx([1, 0.5, 0])
    assert rate(4, 12, "cosine", 0) == pytest.approx((1 + math.cos(math.pi / 3)) / 2)
    with pytest.raises(ValueError, match="'cosin' is unknown; known: constant, linear, cosine"):
        rate(0, 1, "cosin")


def test_groups():
    model = build("llama")
    found = groups(model, 1.0, 0.1, {r"layers\.0\.": 0.5, "embed_tokens": 0.1})
    by_id = {id(p): g for g in found for p in g["params"]}
    named = dict(model.named_parameters())
    assert by_id[id(named["layers.0.mlp.up_proj.weight"])]["lr"] == 0.5
    assert by_id[id(named["layers.1.mlp.up_proj.weight"])]["lr"] == 1
    assert by_id[id(named["embed_tokens.weight"])]["lr"] == 0.1
    assert by_id[id(named["norm.weight"])]["weight_decay"] == 0
    assert by_id[id(named["lm_head.weight"])]["weight_decay"] == 0.1
    with pytest.raises(ValueError, match="'layer_9' matches no parameter that learns"):
        groups(model, 1.0, rates={"layer_9": 2})
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing in this model learns"):
        groups(model, 1.0)


def test_training_learns_what_it_may_and_nothing_else():
    for name in TOKENS:
        options = {"sparse": dict(anyway=True), "freeze": dict(last=1)}.get(name, {})
        model = minillm.techniques()[name].wrap(build("llama"), **options)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        losses_of_epochs = torch.tensor(losses(quiet(model, steps=30))).view(-1, 6).mean(1)
        assert losses_of_epochs[-1] < losses_of_epochs[0], name
        for n, p in model.named_parameters():
            assert p.equal(before[n]) != p.requires_grad, f"{name}: {n}"


def test_accumulated_micro_batches_are_one_batch():
    """Also where they learn different numbers of tokens: a mean of means would fail here."""
    one, two = build("llama"), build("llama")
    rows = examples(16)
    a = quiet(one, rows, batch_size=8, accumulate=1, steps=2, clip=None)
    b = quiet(two, rows, batch_size=2, accumulate=4, steps=2, clip=None)
    assert losses(a) == pytest.approx(losses(b), rel=1e-5)
    for p, q in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_log_has_a_line_a_step(tmp_path):
    history = quiet(build("llama"), log=tmp_path / "log.jsonl", evaluate=lambda model: 2.0, every=3)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == history and [r["step"] for r in lines] == list(range(6))
    assert [r.get("evaluation") for r in lines] == [None, None, 2.0, None, None, 2.0]


# --- the whole loop, beside one of plain torch ------------------------------------------------


PLAIN = dict(lr=3e-3, accumulate=2, schedule="linear", warmup=3, weight_decay=0.3,
             betas=(0.8, 0.95), clip=0.5, rates={"lm_head": 3.0, r"layers\.1\.": 0.5}, seed=7)


def by_hand(model, rows, steps, batch_size, *, lr, accumulate, schedule, warmup, weight_decay,
            betas, clip, rates, seed):
    """The same training with every formula written out: (losses, rates, norms)."""
    named, (b1, b2) = dict(model.named_parameters()), betas
    m = {name: torch.zeros_like(p) for name, p in named.items()}
    v = {name: torch.zeros_like(p) for name, p in named.items()}
    order, log = [], []
    for epoch in range(99):
        stream = data.batches(rows, batch_size, seed)
        stream.epoch = epoch
        each = stream.order()
        order += [each[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    for step in range(steps):
        share = (step + 1) / (warmup + 1)
        if step >= warmup:
            x = (step - warmup) / (steps - warmup)
            cosine = 0.5 + 0.5 * math.cos(math.pi * x)
            share = {"constant": 1, "linear": 1 - x, "cosine": cosine}[schedule]
        model.zero_grad()
        nll, n = 0.0, 0
        for _ in range(accumulate):
            for i in order.pop(0):  # one by one: there is no padding
                ids = torch.tensor(rows[i].ids)
                log_p = model(ids[None])[0, :-1].log_softmax(-1)
                nll = nll - log_p.gather(1, ids[1:, None]).sum()
                n += len(ids) - 1
        (nll / n).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in named.values()))
        scale = 1.0 if clip is None else min(1.0, clip / norm)
        with torch.no_grad():
            for name, p in named.items():
                g, now = scale * p.grad, lr * share
                for part, factor in rates.items():
                    now *= factor if part.replace("\\", "") in name else 1
                m[name] = b1 * m[name] + (1 - b1) * g
                v[name] = b2 * v[name] + (1 - b2) * g * g
                m_hat, v_hat = m[name] / (1 - b1 ** (step + 1)), v[name] / (1 - b2 ** (step + 1))
                p *= 1 - now * (weight_decay if p.dim() > 1 else 0)
                p -= now * m_hat / (v_hat.sqrt() + 1e-8)
        log.append((nll.item() / n, lr * share, norm))
    return zip(*log)


def run_by_hand(**changed):
    model = build("llama")
    losses_, rates_, norms = by_hand(model, examples(), 6, 4, **{**PLAIN, **changed})
    return losses_, rates_, norms, nn.utils.parameters_to_vector(model.parameters()).detach()


plain = functools.cache(run_by_hand)


def distance(a, b):
    """The largest relative difference of two trainings' losses, rates, norms and parameters."""
    numbers = [abs(x - y) / abs(y) for i in range(3) for x, y in zip(a[i], b[i])]
    return max(*numbers, float((a[3] - b[3]).norm() / b[3].norm()))


@pytest.mark.parametrize("changed", [{}, dict(schedule="cosine"), dict(clip=None),
                                     dict(accumulate=1, seed=1)])
def test_the_loop_beside_one_of_plain_torch(changed):
    model = build("llama")
    history = quiet(model, steps=6, **{**PLAIN, **changed})
    ours = [[r[key] for r in history] for key in ("loss", "rate", "norm")]
    ours.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert distance(ours, run_by_hand(**changed)) < 2e-4


@pytest.mark.parametrize("key, value", dict(
    lr=1.5e-3, schedule="constant", warmup=0, weight_decay=0.0, betas=(0.9, 0.95), clip=None,
    rates={}, seed=8, accumulate=1).items())
def test_the_plain_loop_notices_each_setting(key, value):
    """So the comparison above fails where the loop ignores one."""
    assert distance(run_by_hand(**{key: value}), plain()) > 2e-3


class Watched(nn.Module):
    """Logits from a table, and a list of all rows that it saw."""

    def __init__(self):
        super().__init__()
        self.table, self.seen = nn.Embedding(24, 24), []

    def forward(self, ids, attention_mask=None):
        self.seen += [tuple(row[:3].tolist()) for row in ids]
        return self.table(ids)


def test_every_epoch_has_every_example_once_in_an_order_of_its_own():
    rows = [data.Example([i, i + 1, i + 2], [i, i + 1, i + 2]) for i in range(12)]
    seen = {}
    for seed in (0, 1):
        model = Watched()
        quiet(model, rows, steps=9, seed=seed)
        epochs = [tuple(model.seen[i : i + 12]) for i in (0, 12, 24)]
        assert all(set(epoch) == {tuple(row.ids) for row in rows} for epoch in epochs)
        assert len(set(epochs)) == 3
        seen[seed] = epochs
    assert seen[0] != seen[1]


def test_gradients_from_before_are_not_of_this_training():
    fresh, stale = build("llama"), build("llama")
    for p in stale.parameters():
        p.grad = torch.ones_like(p)
    assert losses(quiet(fresh)) == losses(quiet(stale))
    assert all(p.equal(q) for p, q in zip(fresh.parameters(), stale.parameters()))


def test_recompute_keeps_fewer_activations_and_the_same_losses():
    kept, found = {}, {}
    for recompute in (False, True):
        model = build("llama")
        model.recompute, kept[recompute] = recompute, 0

        def pack(t):
            kept[recompute] += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            found[recompute] = losses(quiet(model, steps=2))
    assert found[True] == pytest.approx(found[False], rel=1e-6) and kept[True] < kept[False] / 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # as it loads its compiler
def test_a_compiled_model_is_compiled_or_refused():
    calls = []

    def backend(graph, inputs):
        calls.append(0)

        def run(*args):
            calls[-1] += 1
            return graph.forward(*args)

        return run

    plain, other = build("Linear"), build("Linear")
    rows = [data.Example(row, row) for row in torch.randint(24, (8, 6)).tolist()]
    expected = quiet(plain, rows, steps=3)
    history = quiet(torch.compile(other, backend=backend, dynamic=False), rows, steps=3)
    assert losses(history) == pytest.approx(losses(expected), rel=1e-5) and sum(calls) >= 3
    for compiled in (torch.compile(build("llama")), build("llama")):
        compiled.compile()
        with pytest.raises(TypeError, match=r"nothing would be compiled. minillm.compile\(model\)"):
            quiet(compiled)


# --- the loss ---------------------------------------------------------------------------------


def test_the_first_token_is_not_learnt_so_all_methods_learn_the_same_tokens():
    rows = [data.Example(e.ids, list(e.ids)) for e in examples(8)]  # their first labels too
    plain, model = build("llama"), minillm.prompts.wrap(build("llama"), length=3)
    history = quiet(model, rows, steps=1, batch_size=8)
    nll, n = 0.0, 0
    fresh = minillm.prompts.wrap(build("llama"), length=3)  # the same start: `build` sets the seed
    with torch.no_grad():
        for e in rows:
            ids = torch.tensor([[24, 25, 26, *e.ids]])
            labels = torch.tensor(e.ids[1:])
            nll += F.cross_entropy(fresh(ids)[0, 3:-1], labels, reduction="sum").item()
            n += len(e.ids) - 1
    assert history[0]["loss"] == pytest.approx(nll / n, rel=1e-5) and history[0]["learnt"] == n
    first = quiet(plain, rows, steps=1, batch_size=8)[0]
    assert (first["learnt"], first["tokens"]) == (n, history[0]["tokens"])


def test_packed_examples_have_the_loss_of_their_documents():
    rows = examples(8)
    alone = quiet(build("llama"), rows, steps=1, batch_size=8)[0]
    together = quiet(build("llama"), data.pack(rows, 16), steps=1, batch_size=8)[0]
    assert (together["learnt"], together["tokens"]) == (alone["learnt"], alone["tokens"])
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_a_model_without_a_mask_takes_no_padding():
    with pytest.raises(ValueError, match="Plain takes no attention_mask.*of one length, or batch"):
        quiet(build("Linear"))
    assert len(quiet(build("Linear"), batch_size=1)) == 6


def test_the_held_out_loss_is_a_mean_over_tokens_without_dropout():
    model, rows = minillm.lora.wrap(build("llama"), r=2, dropout=0.5).train(), examples(7)
    for layer in minillm.layers(model).values():
        nn.init.normal_(layer.patches["lora"].B)
    value = held_out_loss(model, rows, batch_size=3)
    assert model.training
    model.eval()
    nll = sum(loss_sum(model, *data.collate([e])).item() for e in rows)
    assert value == pytest.approx(nll / sum(len(e.ids) - 1 for e in rows), rel=1e-5)
    with pytest.raises(ValueError, match="none of the 1 held-out examples has anything to learn"):
        held_out_loss(model, [data.Example([1, 2], [1, -100])])


# --- evaluation -------------------------------------------------------------------------------


def values_of(history, key="evaluation"):
    return {r["step"]: r[key] for r in history if key in r}


def test_held_out_examples_are_measured_by_default_ten_times():
    held, model = examples(5, seed=3), build("llama")
    history = quiet(model, steps=25, held_out=held, restore_best=False)
    assert list(values_of(history, "held_out")) == [*range(1, 25, 2), 24]
    assert history[-1]["held_out"] == held_out_loss(model, held, batch_size=4)


def test_evaluating_changes_nothing_in_the_training():
    def evaluate(model):
        assert not model.training
        return float(torch.rand(()))

    found = []
    for options in ({}, dict(evaluate=evaluate, every=1, restore_best=False)):
        model = minillm.lora.wrap(build("llama"), r=2, dropout=0.5)
        found.append(losses(quiet(model, **options)))
    assert found[0] == found[1]


def test_the_model_ends_as_after_the_best_step():
    values, states = iter([3.0, 2.0, 2.5, 2.0, 4.0]), []

    def evaluate(model):
        states.append({name: t.clone() for name, t in model.state_dict().items()})
        return next(values)

    def count(norm, args, output):
        model.count += 1

    model = build("llama")
    model.register_buffer("count", torch.zeros(()))
    model.norm.register_forward_hook(count)
    history = quiet(model, steps=5, evaluate=evaluate, every=1)
    assert [r["best"] for r in history] == [dict(step=0, value=3.0)] + [dict(step=1, value=2.0)] * 4
    assert all(t.equal(states[1][name]) for name, t in model.state_dict().items())
    assert float(model.count) == 2
    last = build("llama")
    values = iter([1.0, 2.0])
    quiet(last, steps=2, evaluate=lambda model: next(values), every=1, restore_best=False)
    other = build("llama")
    quiet(other, steps=2)
    assert all(p.equal(q) for p, q in zip(last.parameters(), other.parameters()))


def test_early_stopping():
    values = iter([5.0, 4.0, 4.5, 4.2, 1.0])
    options = dict(evaluate=lambda model: next(values), every=1, patience=2)
    history = quiet(build("llama"), steps=9, **options)
    assert len(history) == 4 and history[-1]["best"] == dict(step=1, value=4.0)


def test_an_evaluation_that_is_no_number_is_an_error():
    with pytest.raises(ValueError, match="step 0: the evaluation is nan, which cannot be compared"):
        quiet(build("llama"), evaluate=lambda model: math.nan)


def test_a_loss_that_is_no_number_stops_at_once():
    model = build("llama")
    model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="step 0: the loss is nan.*lower learning rate than 0.01"):
        quiet(model)


def test_every_module_has_its_own_mode_again():
    model = build("llama").train()
    model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    quiet(model, steps=1, held_out=examples(2))
    assert [m.training for m in model.modules()] == modes

    def fail(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet(model, evaluate=fail, every=1)
    assert [m.training for m in model.modules()] == modes


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    (dict(lr=0), "lr=0 is not a number above 0"),
    (dict(lr=-1.0), "lr=-1.0 is not a number above 0"),
    (dict(lr=math.nan), "lr=nan is not a number above 0"),
    (dict(lr="1"), "lr='1' is not a number above 0"),
    (dict(steps=0), "steps=0 is not a whole number from 1"),
    (dict(steps=2.5), "steps=2.5 is not a whole number from 1"),
    (dict(steps=True), "steps=True is not a whole number from 1"),
    (dict(epochs=1), "steps=6 and epochs=1: give exactly one"),
    (dict(steps=None), "steps=None and epochs=None: give exactly one"),
    (dict(steps=None, epochs=0), "epochs=0 is not a number above 0"),
    (dict(batch_size=0), "batch_size=0 is not a whole number from 1"),
    (dict(accumulate=0), "accumulate=0 is not a whole number from 1"),
    (dict(warmup=-1), "warmup=-1 is not a whole number of steps from 0 to 6, or a share of"),
    (dict(warmup=7), "warmup=7 is not a whole number of steps from 0 to 6"),
    (dict(warmup=1.5), "warmup=1.5 is not a whole number of steps from 0 to 6"),
    (dict(weight_decay=-0.1), "weight_decay=-0.1 is not a number from 0"),
    (dict(clip=0), "clip=0 is not a number above 0, or None: never clip"),
    (dict(betas=(0.9, 1)), r"betas\[1\]=1 is not a number from 0 up to \(but not\) 1"),
    (dict(betas=0.9), "betas=0.9: AdamW takes two numbers"),
    (dict(rates={"norm": -1}), r"rates\['norm'\]=-1 is not a factor from 0"),
    (dict(rates={"(": 1}), r"rates: '\(' is not a regular expression"),
    (dict(schedule="cosin"), "schedule='cosin' is unknown; known: constant, linear, cosine"),
    (dict(seed=0.5), "seed=0.5 is not a whole number"),
    (dict(pad=-1), "pad=-1 is not a whole number from 0"),
    (dict(every=2), "every=2 needs something to evaluate: give held_out="),
    (dict(patience=2), "patience=2 needs something to evaluate: give held_out="),
    (dict(held_out=examples(1), every=0), "every=0 is not a whole number from 1"),
    (dict(held_out=examples(1), patience=0), "patience=0 is not a whole number from 1"),
    (dict(held_out=[]), "held_out: there are no examples"),
    (dict(held_out=examples(1), evaluate=float),
     "held_out= and evaluate= both choose the evaluation"),
    (dict(evaluate=3), "evaluate=3 is not a function of the model"),
    (dict(save_every=2), "save_every=2 needs a directory: give checkpoints="),
    (dict(resume=True), "resume=True needs a directory to go on from: give checkpoints="),
    (dict(checkpoints="here", save_every=-1), "save_every=-1 is not a whole number from 0"),
    (dict(checkpoints="here", keep=0), "keep=0 is not a whole number from 1"),
    (dict(checkpoints="log"), "checkpoints='log' is a file, not a directory"),
])
def test_settings_that_make_no_sense(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log").touch()
    model = build("llama")
    model.forward = model.loss = None  # it is never called
    with pytest.raises(ValueError, match=message):
        quiet(model, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_epochs_are_steps_and_a_warm_up_can_be_a_share():
    rows = examples(12)
    for options, steps in ((dict(epochs=2), 6), (dict(epochs=1, accumulate=2), 2),
                           (dict(epochs=0.1), 1), (dict(epochs=1.3), 4)):
        assert len(quiet(build("llama"), rows, steps=None, **options)) == steps
    a, b = (quiet(build("llama"), steps=8, warmup=w) for w in (0.25, 2))
    assert [r["rate"] for r in a] == [r["rate"] for r in b] and a[0]["rate"] < a[1]["rate"] < 1e-2


@pytest.mark.parametrize("epochs, batches", [(1, 5), (2, 10), (0.5, 3), (1.4, 7), (1.5, 8)])
def test_the_last_step_takes_what_is_left_of_the_epochs(epochs, batches, tmp_path):
    rows = [data.Example([i, i + 1, i + 2], [i, i + 1, i + 2]) for i in range(10)]
    options = dict(steps=None, epochs=epochs, batch_size=2, accumulate=2)
    history = quiet(Watched(), rows, checkpoints=tmp_path, **options)
    assert sum(record["tokens"] for record in history) == batches * 2 * 3
    assert all(record["tokens"] == 12 for record in history[:-1])
    if batches % 2:
        options = {**options, "steps": len(history), "epochs": None}
        with pytest.raises(ValueError, match="last_accumulate=1 then, None now"):
            quiet(Watched(), rows, checkpoints=tmp_path, resume=True, **options)


# --- the log ----------------------------------------------------------------------------------


def test_a_log_replaces_a_log_and_nothing_else(tmp_path):
    path = tmp_path / "log.jsonl"
    for text in ("", '{"st', json.dumps(record(0)) + "\n"):
        path.write_text(text)
        quiet(build("llama"), steps=2, log=path)
        assert len(path.read_text().splitlines()) == 2
    for mine in ("my notes", '{"step": 1, "what": "open the door"}\n',
                 '{"step": 0, "loss": 1.0}\n', "[1]\n"):
        path.write_text(mine)
        with pytest.raises(FileExistsError,
                           match="log.jsonl' is a file, but not the log of a training"):
            quiet(build("llama"), steps=2, log=path)
        assert path.read_text() == mine


def record(step, **more):
    return dict(step=step, loss=4.0 - step / 10, rate=0.1, norm=1.0, learnt=1 + step, tokens=10,
                seconds=0.5, **more)


def test_the_summary_is_of_many_batches():
    history = [record(i) for i in range(20)]
    assert str(summary(history)).splitlines() == [
        "loss 3.933 over the first 2 of 20 steps, 2.149 over the last 2",
        "200 tokens in 10.0 s: 20 tokens/s"]
    history[9] |= dict(held_out=2.5, best=dict(step=9, value=2.5))
    history[19] |= dict(held_out=3.0, best=dict(step=9, value=2.5))
    found = summary(history)
    weighted = statistics.fmean([4.0, 3.9], weights=[1, 2])
    assert (found.steps, found.first, found.tokens) == (20, pytest.approx(weighted), 200)
    assert found.best == dict(step=9, value=2.5) and found.tokens_per_second == 20
    assert "best held-out loss 2.5, after step 10" in str(found)
    with pytest.raises(ValueError, match="the log is empty"):
        summary([])


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    history = [record(i, **({"held_out": 3.0} if i % 5 == 4 else {})) for i in range(20)]
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")):
        picture(history, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(ValueError, match="a.jpg': a picture ends in .png, .svg or .pdf"):
        picture(history, tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="the log is empty"):
        picture([], tmp_path / "b.png")


def test_the_picture_says_what_it_shows(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: (
        drawn.append(figure), save(figure, *args, **options)))
    log = [record(i, **({"held_out": 3.0 - i / 10} if i % 5 == 4 else {})) for i in range(20)]
    log[-1]["best"] = dict(step=19, value=1.1)
    picture(log, tmp_path / "a.png")
    above, below = drawn[0].axes
    assert tuple(above.get_gridspec().get_height_ratios()) == (4, 1)
    assert (above.get_ylabel(), above.get_xlabel()) == ("nats per learnt token", "")
    assert (below.get_xlabel(), below.get_ylabel()) == ("step", "learning rate")
    assert [text.get_text() for text in above.get_legend().get_texts()] == [
        "loss of each step", "smoothed", "held-out loss", "best: 1.1 after step 20"]
    each, smooth, held, best = (line.get_xydata().tolist() for line in above.lines)
    assert each == [[r["step"] + 1, r["loss"]] for r in log] and len(smooth) == 20
    assert [x for x, _ in held] == [5, 10, 15, 20] and best == [held[-1]]
    assert below.lines[0].get_xydata().tolist() == [[r["step"] + 1, r["rate"]] for r in log]
    picture([record(0, evaluation=2.0)], tmp_path / "a.png")
    assert drawn[1].axes[0].get_legend().get_texts()[2].get_text() == "evaluation"


def test_the_smoothed_loss_is_a_mean_of_neighbours():
    values = [float(i % 2) for i in range(80)]
    found = minillm.train.history.smoothed(values)
    assert found[0] == 0 and found[40] == pytest.approx(2 / 5) and found[41] == pytest.approx(3 / 5)
    assert minillm.train.history.smoothed([1.0, 2.0, 6.0]) == [1.0, 3.0, 6.0]
