"""Adapters have names: several on one leaf add up, and each is switched, merged, saved
and loaded alone."""

import copy

import pytest
import torch
from models import IDS, build, learnt, logits, two
from torch import nn

import minillm
from minillm.registry import KINDS, Patch


def named(*names, kind="llama", **options):
    """A model with a LoRA of each name, and their outputs: {names: logits}."""
    model = build(kind)
    for i, name in enumerate(names):
        torch.manual_seed(i)
        minillm.lora.wrap(model, name=name, r=2, **options)
        for layer in minillm.layers(model).values():
            nn.init.normal_(layer.patches[name].B, std=0.3)
    return model


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "gpt2", "llama", "hf_gpt2", "hf_llama"])
def test_several_add_up_and_use_switches(kind):
    model = named("sql", "chat", kind=kind)
    plain, x = build(kind), torch.randn(3, 16)
    where, layer = next((w, one) for w, one in minillm.layers(model).items()
                        if one.patches["sql"].A.shape[1] == 16)
    y = dict(plain.named_modules())[where](x)
    each = {name: patch.scale * x @ patch.A.T @ patch.B.T for name, patch in layer.patches.items()}
    for names in (["sql", "chat"], ["chat"], ["sql"], [], ["chat", "sql"]):
        assert minillm.use(model, *names) is model
        assert torch.allclose(layer(x), y + sum(each[name] for name in names), atol=1e-5), names
        W, _ = layer.dense()
        assert torch.allclose(minillm.registry.leaf(layer).compute(x, W, layer.bias), layer(x),
                              atol=1e-5), names
    minillm.use(model)
    assert torch.equal(logits(model), logits(plain))


def test_use_of_an_unknown_name():
    with pytest.raises(ValueError, match="no adapter is called 'sq1'; there are: 'sql'"):
        minillm.use(named("sql", "chat"), "chat", "sq1")
    with pytest.raises(ValueError, match="no adapter is called 'sql'; the model has none"):
        minillm.use(build("llama"), "sql")
    with pytest.raises(ValueError, match="'prune'; the model has none"):  # a mask is no adapter
        minillm.use(minillm.prune.wrap(build("llama")), "prune")


def test_use_leaves_masks_and_changes_prompts():
    model = minillm.prompts.wrap(minillm.prune.wrap(named("sql")), length=2)
    minillm.use(model, "sql")
    assert minillm.prepare(model, IDS)[0].shape == IDS.shape
    layer = next(iter(minillm.layers(minillm.prune.wrap(two())).values()))
    assert layer.patches["prune"].active
    minillm.use(model, "sql", "prompts")
    assert minillm.prepare(model, IDS)[0].shape == (2, IDS.shape[1] + 2)


def test_two_prompts_both_stand_before_the_text():
    model = build("llama")
    for name, length in (("a", 2), ("b", 3)):
        minillm.prompts.wrap(model, name=name, length=length)
    layer = minillm.layers(model)["embed_tokens"]
    a, b = (layer.patches[name].P for name in "ab")
    ids = minillm.prepare(model, IDS)[0]
    expected = torch.cat([b, a, build("llama").embed_tokens.weight[IDS[0]]])
    assert torch.equal(layer(ids)[0], expected)
    minillm.use(model, "a")
    assert torch.equal(layer(minillm.prepare(model, IDS)[0])[0], expected[3:])
    with pytest.raises(IndexError):
        minillm.use(model, "a", "b"), layer(torch.tensor([[24 + 5]]))


@pytest.mark.parametrize("name", ["", "a.b", "a b", 3, "keys", "training", "forward"])
def test_a_name_that_cannot_be(name):
    with pytest.raises(ValueError, match=f"name={name!r}: a name has letters"):
        minillm.lora.wrap(two(), name=name)


def test_a_name_is_of_one_kind():
    model = minillm.lora.wrap(two(), ["0"], name="sql", r=2)
    with pytest.raises(
        ValueError,
        match="name='sql' is the name of a lora in this model: choose another one for prune",
    ):
        minillm.prune.wrap(model, name="sql")
    with pytest.raises(ValueError,
                       match="'0' is already wrapped with sql: unwrap or merge it first$"):
        minillm.lora.wrap(model, name="sql", r=2)
    with pytest.raises(
        ValueError,
        match=r"already wrapped with lora: .*give the new one a name: wrap\(model, name='lora-2'\)",
    ):
        minillm.lora.wrap(minillm.lora.wrap(two(), r=2), r=2)
    minillm.lora.wrap(model, ["2"], name="sql", r=2)  # more sites of the same adapter
    assert list(minillm.layers(model)["2"].patches) == ["sql"]


@pytest.mark.parametrize("first", ["sql", "chat"])
@pytest.mark.parametrize("keep", [True, False])
def test_merged_one_by_one_in_any_order(first, keep):
    model = named("sql", "chat")
    second = {"sql": "chat", "chat": "sql"}[first]
    expected, bits = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    minillm.lora.merge(model, first, keep=keep)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert {n for layer in minillm.layers(model).values() for n in layer.patches} == {second}
    minillm.lora.merge(model, name=second, keep=keep)
    assert torch.allclose(logits(model), expected, atol=1e-5) and not minillm.layers(model)
    if not keep:
        with pytest.raises(ValueError, match="no lora is merged"):
            minillm.lora.unmerge(model)
        return
    with pytest.raises(ValueError,
                       match=f"{second} was merged into .* after {first}: unmerge {second} first"):
        minillm.lora.unmerge(model, first)
    with pytest.raises(
        ValueError, match=f"{second} was merged into .* after {first}: unmerge {second} first"
    ):
        minillm.lora.unwrap(model, first)
    minillm.lora.unmerge(model)
    assert torch.equal(logits(model), expected)
    after = model.state_dict()
    assert list(after) == list(bits) and all(torch.equal(after[k], bits[k]) for k in bits)


def test_unmerge_puts_an_adapter_back_around_all_that_lay_beneath_it():
    model = named("a", "b", "c")
    minillm.lora.unmerge(minillm.lora.merge(model, "c"))
    assert all(list(layer.patches) == ["a", "b", "c"] for layer in minillm.layers(model).values())


def test_all_of_a_technique_at_once():
    model, plain = named("sql", "chat"), build("llama")
    expected = logits(model)
    minillm.lora.merge(model)
    assert torch.allclose(logits(model), expected, atol=1e-5) and not minillm.layers(model)
    minillm.lora.unwrap(model)
    assert torch.equal(logits(model), logits(plain))
    model = minillm.lora.unwrap(named("sql", "chat"), "sql")
    assert {n for layer in minillm.layers(model).values() for n in layer.patches} == {"chat"}
    with pytest.raises(
        ValueError, match="there is no lora called 'sql' in this model to unwrap; attached: chat"
    ):
        minillm.lora.unwrap(model, "sql")


def test_only_what_takes_part_is_merged():
    model = minillm.use(named("sql", "chat"), "chat")
    expected = logits(model)
    with pytest.raises(
        ValueError, match=r"sql takes no part in the model now: minillm.use\(model, 'sql'\) first"
    ):
        minillm.lora.merge(model, "sql")
    minillm.lora.merge(model)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    with pytest.raises(ValueError, match="sql takes no part"):
        minillm.lora.merge(model)
    minillm.use(model, "sql")
    minillm.lora.merge(model)
    assert torch.allclose(logits(model), logits(named("sql", "chat")), atol=1e-5)


def test_a_merge_beneath_a_mask_and_not_across_it():
    model = named("sql")
    minillm.prune.wrap(model)
    minillm.lora.wrap(model, name="chat", r=2)
    with pytest.raises(ValueError,
                       match="chat cannot be merged into .* while prune lies beneath it"):
        minillm.lora.merge(model, "chat")
    # sql would do, and nothing is half done
    with pytest.raises(ValueError, match="while prune lies beneath it"):
        minillm.lora.merge(model)
    expected = logits(learnt(model))
    minillm.lora.merge(model, "sql")
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_files_go_by_name(tmp_path):
    model = build("llama")
    for name in ("sql", "chat"):
        minillm.use(minillm.lora.wrap(model, name=name, r=2), name)
        for layer in minillm.layers(model).values():
            with torch.no_grad():
                layer.patches[name].B.normal_()
    with pytest.raises(
        ValueError,
        match=r"lora under 2 names, 'chat', 'sql', and a file holds one: save\(model, path, "
              r"name='chat'\)",
    ):
        minillm.lora.save(model, tmp_path / "a")
    minillm.use(model, "chat", "sql")
    for name in ("sql", "chat"):
        minillm.lora.save(model, tmp_path / name, name)
    expected = logits(model)
    for order in (["sql", "chat"], ["chat", "sql"]):  # each was trained alone
        again = build("llama")
        for name in order:
            minillm.lora.load(again, tmp_path / name)
        assert torch.allclose(logits(again), expected, atol=1e-5), order
        minillm.use(again, "chat"), minillm.use(model, "chat")
        assert torch.allclose(logits(again), logits(model), atol=1e-6)
        minillm.use(again, "sql", "chat"), minillm.use(model, "sql", "chat")
    with pytest.raises(ValueError, match="the model has sql already.*load it under another name="):
        minillm.lora.load(again, tmp_path / "sql")
    minillm.lora.load(again, tmp_path / "sql", name="more")
    assert not torch.allclose(logits(again), expected, atol=1e-3)
    minillm.use(again, "more", "chat")
    assert torch.allclose(logits(again), expected, atol=1e-5)


def test_an_adapter_that_was_trained_over_another_needs_it(tmp_path):
    model = named("sql", "chat")  # chat learned while sql took part
    (
        minillm.lora.save(model, tmp_path / "sql", "sql"),
        minillm.lora.save(model, tmp_path / "chat", "chat"),
    )
    with pytest.raises(ValueError, match="made over sql .* and this model has none"):
        minillm.lora.load(build("llama"), tmp_path / "chat")
    again = minillm.lora.load(build("llama"), tmp_path / "sql", name="other")
    minillm.lora.load(again, tmp_path / "chat")  # beneath it, under another name
    assert torch.equal(logits(again), logits(model))
    minillm.lora.save(again, tmp_path / "again", "chat")
    with pytest.raises(ValueError, match="made over other"):
        minillm.lora.load(build("llama"), tmp_path / "again")


def test_trained_alone_and_then_together(tmp_path):
    model = named("sql")
    minillm.lora.wrap(model, name="chat", r=2)
    minillm.use(model, "chat")
    learn(model, "chat")
    minillm.lora.save(model, tmp_path / "alone", "chat")
    minillm.lora.load(build("llama"), tmp_path / "alone")
    minillm.use(model, "chat", "sql")
    minillm.lora.save(model, tmp_path / "still", "chat")  # nothing changed since
    minillm.lora.load(build("llama"), tmp_path / "still")
    learn(model, "chat")
    minillm.lora.save(model, tmp_path / "together", "chat")
    with pytest.raises(ValueError, match="made over sql"):
        minillm.lora.load(build("llama"), tmp_path / "together")


def test_trained_together_and_then_alone(tmp_path):
    """What it learned over another one stays in it: it is over both."""
    model = minillm.lora.wrap(named("a"), name="b", r=2)
    learn(model, "b")  # over a
    minillm.use(model, "b")
    learn(model, "b")  # alone
    minillm.lora.save(model, tmp_path / "b", "b")
    assert all(layer.patches["b"].over == {"a"} for layer in minillm.layers(model).values())
    with pytest.raises(ValueError, match="made over a .* and this model has none"):
        minillm.lora.load(build("llama"), tmp_path / "b")


@torch.no_grad()
def learn(model, name):
    for layer in minillm.layers(model).values():
        layer.patches[name].B.add_(0.1)


def test_a_copy_keeps_who_takes_part():
    model = minillm.use(named("sql", "chat"), "chat")
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    minillm.use(twin, "sql")
    assert not torch.allclose(logits(twin), logits(model), atol=1e-3)


def test_switching_back_compiles_nothing_again():
    model = named("sql", "chat", kind="Linear")
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    outputs = {}
    for name in ("sql", "chat", "sql", "chat"):
        minillm.use(model, name)
        y = compiled(IDS)
        assert torch.equal(outputs.setdefault(name, y), y)
    assert len(graphs) == 2 and not torch.equal(outputs["sql"], outputs["chat"])


def test_an_adapter_that_takes_no_part_gets_no_gradient():
    model = minillm.use(named("sql", "chat"), "chat")
    logits(model).square().mean().backward()
    for layer in minillm.layers(model).values():
        assert layer.patches["sql"].A.grad is None and layer.patches["chat"].A.grad is not None


def test_a_change_of_the_output_lies_outside():
    class Double(Patch):
        touches = "output"

        def forward(self, below, x):
            return 2 * below(x)

        def fold(self, W, b):
            return 2 * W, 2 * b

    KINDS["twice"], Double.kind, Double.family = Double, "twice", "twice"
    try:
        from minillm.registry.attach import attach

        model = attach(Double, two())
        minillm.prune.wrap(model)
        layer = minillm.layers(model)["0"]
        assert list(layer.patches) == ["prune", "twice"]
        x = torch.randn(2, 6)
        W, b = layer.base.weight * layer.patches["prune"].mask, layer.base.bias
        assert torch.allclose(layer(x), 2 * (x @ W.T + b))
    finally:
        del KINDS["twice"]


@pytest.mark.parametrize("above", ["prune", "qat", "dora", "adapters"])
def test_what_is_wrapped_around_an_idle_adapter_stays_around_it(above, tmp_path):
    """Its file needs no adapter, but where the adapter is, it lies beneath."""
    wraps = dict(prune=minillm.prune.wrap, qat=minillm.quant.qat.wrap,
                 dora=minillm.lora.dora.wrap, adapters=minillm.adapters.wrap)
    family = minillm.registry.table.KINDS[above].family
    model = build("llama")
    if above == "adapters":
        minillm.adapters.wrap(model, name="sql", size=2)
    else:
        minillm.lora.wrap(model, name="sql", r=2)
    learnt(model)
    under = getattr(minillm, "adapters" if above == "adapters" else "lora")
    under.save(model, tmp_path / "sql.safetensors", name="sql")
    minillm.use(model)
    name = "qat" if above == "qat" else "wide"
    wraps[above](model, **({} if above == "qat" else dict(name=name)))
    verbs = getattr(minillm, family)
    verbs.save(model, tmp_path / "wide.safetensors", name=name)
    minillm.use(model, "sql")
    y = logits(model, IDS)

    other = under.load(build("llama"), tmp_path / "sql.safetensors")
    verbs.load(other, tmp_path / "wide.safetensors")
    assert torch.equal(logits(minillm.use(other, "sql"), IDS), y)

    other = verbs.load(build("llama"), tmp_path / "wide.safetensors")
    wide = logits(other, IDS)
    assert torch.equal(wide, logits(minillm.use(model, "wide") if above in ("dora", "adapters")
                                    else minillm.use(model), IDS))
    for again in (False, True):  # also from a file that was saved without the adapter
        with pytest.raises(ValueError, match=f"sql lay beneath {name}.*would now lie around it"):
            under.load(other, tmp_path / "sql.safetensors")
        if not again:
            verbs.save(other, tmp_path / "again.safetensors", name=name)
            other = verbs.load(build("llama"), tmp_path / "again.safetensors")
    under.load(other, tmp_path / "sql.safetensors", any_base=True)
    under.load(build("llama"), tmp_path / "sql.safetensors")
