"""A batch whose rows use different adapters computes what each row computes alone."""

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
