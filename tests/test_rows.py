"""A batch whose rows use different adapters computes what each row computes alone."""

import copy
import pickle

import pytest
import torch
from models import IDS, build, learnt, logits
from test_names import named

import minillm

NAMES = ["sql", ["sql", "chat"], None, "chat"]
BATCH = torch.cat([IDS, IDS.flip(1)])


def alone(model, ids, names):
    """The logits of each row by itself, with its adapters."""
    found = []
    for row, one in zip(ids, names):
        minillm.use(model, *([one] if isinstance(one, str) else one or []))
        row, _, mask = minillm.prepare(model, row[None])
        found.append(getattr(out := model(row), "logits", out)[0, -ids.shape[1] :])
    minillm.use(model, "sql", "chat")
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "gpt2", "llama", "hf_gpt2", "hf_llama"])
@pytest.mark.parametrize("form", [None, "quant"])
def test_each_row_has_its_own_lora(kind, form):
    model = named("sql", "chat", kind=kind)
    if form:
        minillm.quant.wrap(model)
    expected = alone(model, BATCH, NAMES)
    with minillm.rows(model, NAMES):
        y = logits(model, BATCH)
    assert torch.allclose(y, expected, atol=1e-5)
    # as before
    assert torch.equal(logits(model, BATCH), logits(minillm.use(model, "sql", "chat"), BATCH))


def test_gradients_are_those_of_its_rows():
    model = named("sql", "chat")
    with minillm.rows(model, NAMES):
        logits(model, BATCH).square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone(model, BATCH, NAMES).square().sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(found[name], p.grad, atol=1e-4), name


def test_bottlenecks_and_dora():
    model = named("sql", targets=["k_proj"])
    (
        minillm.adapters.wrap(model, name="wide", size=3),
        minillm.lora.dora.wrap(model, ["q_proj"], name="chat", r=2),
    )
    learnt(model)
    names = ["wide", "chat", ["sql", "wide"], None]
    expected = alone(model, BATCH, names)
    minillm.use(model, "sql", "wide", "chat")
    with minillm.rows(model, names):
        assert torch.allclose(logits(model, BATCH), expected, atol=1e-5)


def test_prompts_of_some_rows():
    model = learnt(minillm.prompts.wrap(build("llama"), name="p", length=3))
    minillm.use(model, "p")
    with minillm.rows(model, ["p", None]):
        ids, _, mask = minillm.prepare(model, IDS)
        y = model(ids, mask)[:, 3:]
    with_it, _, _ = minillm.prepare(model, IDS)
    assert torch.allclose(y[0], model(with_it)[0, 3:], atol=1e-5)
    assert torch.allclose(y[1], build("llama")(IDS)[1], atol=1e-5)


def test_generating_with_an_adapter_for_each_row():
    model = named("sql", "chat")
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [2]]
    expected = []
    for prompt, one in zip(prompts, NAMES):
        minillm.use(model, *([one] if isinstance(one, str) else one or []))
        expected.append(minillm.model.generate.generate(model, [prompt], 5)[0, -5:])
    minillm.use(model, "sql", "chat")
    with minillm.rows(model, NAMES):
        assert torch.equal(minillm.model.generate.generate(model, prompts, 5)[:, -5:],
                           torch.stack(expected))


@pytest.mark.parametrize("kept", [1, 4])
def test_the_loss_of_rows_with_adapters_on_the_head(kept):
    model = named("sql", "chat", targets=["lm_head", "q_proj"])
    labels = BATCH.clone()
    labels[:, :-kept] = -100  # with one label a row, there are as many labels as rows
    parts = []
    for row, label, one in zip(BATCH, labels, NAMES):
        minillm.use(model, *([one] if isinstance(one, str) else one or []))
        parts.append(model.loss(row[None], label[None], reduction="sum"))
    minillm.use(model, "sql", "chat")
    sum(parts).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with minillm.rows(model, NAMES):
        loss = model.loss(BATCH, labels, reduction="sum")
        loss.backward()
        negative, _ = minillm.measure.nll(model, BATCH, labels)
    assert torch.allclose(loss, sum(parts))
    assert torch.allclose(negative, torch.stack(parts))
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(expected[name], p.grad, atol=1e-4), name


def test_contexts_within_each_other():
    model = named("sql", "chat")
    minillm.use(model, "chat")
    one, plain = copy.deepcopy(model), logits(model, BATCH)
    with minillm.rows(model, NAMES):
        outer = logits(model, BATCH)
        with minillm.rows(model, ["chat", None, "sql", "sql"]):
            inner = logits(model, BATCH)
            twin = copy.deepcopy(model)
        assert torch.equal(logits(model, BATCH), outer) and not torch.equal(inner, outer)
        assert torch.equal(logits(twin, BATCH), plain), "a copy lies outside of both"
        assert torch.equal(logits(pickle.loads(pickle.dumps(model)), BATCH), plain)
        with pytest.raises(ValueError, match="use.'sql',.*each row has its own adapter here"):
            minillm.use(model, "sql")
    assert torch.equal(logits(model, BATCH), plain)
    assert torch.equal(logits(one, BATCH), plain)


def test_adapters_that_train_in_different_rows_are_loaded_alone(tmp_path):
    model = build("llama")
    for name in ("sql", "chat"):
        minillm.lora.wrap(model, name=name, r=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for names in (["sql", "chat"], ["chat", "sql"]):
        with minillm.rows(model, names):
            model.loss(IDS, IDS).backward()
            optimizer.step()
    minillm.lora.save(model, tmp_path / "chat.safetensors", name="chat")
    other = minillm.lora.load(build("llama"), tmp_path / "chat.safetensors")
    assert torch.equal(logits(other, IDS), logits(minillm.use(model, "chat"), IDS))
    minillm.use(model, "sql", "chat")
    with minillm.rows(model, [["sql", "chat"], None]):
        model.loss(IDS, IDS).backward()
        optimizer.step()
    minillm.lora.save(model, tmp_path / "chat.safetensors", name="chat")
    with pytest.raises(ValueError, match="it was made over sql"):
        minillm.lora.load(build("llama"), tmp_path / "chat.safetensors")


@pytest.mark.parametrize("mask, recompute", [(False, True), (True, False), (True, True)])
def test_the_backward_pass_uses_the_adapters_of_the_forward_pass(mask, recompute):
    model = named("sql", "chat")
    if mask:
        minillm.prune.wrap(model)
    model.recompute = recompute
    found = []
    for later in ("sql", "chat"):
        loss = minillm.use(model, "sql").loss(IDS, IDS)
        minillm.use(model, later)
        model.zero_grad()
        loss.backward()
        assert model.layers[0].self_attn.q_proj.patches["sql"].active == (later == "sql")
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_an_idle_adapter_on_the_head_gets_no_gradient():
    model = named("sql", "chat", targets=["lm_head"])
    minillm.use(model, "chat").loss(IDS, IDS).backward()
    head = model.lm_head.patches
    assert all(p.grad is None for p in head["sql"].parameters())
    assert all(p.grad is not None for p in head["chat"].parameters())


def test_what_is_refused():
    model = named("sql", "chat")
    with pytest.raises(ValueError, match="no adapter is called 'sq1'; there are: 'sql'"):
        with minillm.rows(model, ["sq1", "chat"]):
            pass
    with minillm.rows(model, ["sql", "chat"]):
        with pytest.raises(ValueError,
                           match="names an adapter for each of 2 rows, and this batch has 4"):
            model(BATCH)
    minillm.prune.wrap(model)
    with minillm.rows(model, ["sql", "chat"]):
        with pytest.raises(ValueError,
                           match="sql is not in all rows of this batch .*one folded weight"):
            model(IDS)
    model(IDS)
