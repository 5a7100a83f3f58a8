"""Structured pruning: what is left computes what the whole model does with the removed parts at
zero, is chosen by the formula, and is an ordinary model with a configuration that loads again."""

import json

import pytest
import torch
import torch.nn.functional as F
from models import IDS, build, logits

import minillm
from minillm.prune.structured import heads, layers, neurons
from minillm.registry import roles

TEXTS = torch.randint(24, (6, 9), generator=torch.Generator().manual_seed(3))
BLOCKS = ["Linear", "Conv1D", "gpt2", "llama", "hf_gpt2", "hf_llama"]


@torch.no_grad()
def zero(site, rows=None, columns=None):
    """Zero outputs or inputs of a leaf, in whatever layout it has."""
    W = site.module.weight.T if site.leaf.transposed else site.module.weight
    if rows is not None:
        W[rows] = 0
        if site.module.bias is not None:
            site.module.bias[rows] = 0
    if columns is not None:
        W[:, columns] = 0


def inputs_of(model, site, ids):
    """The inputs of a leaf in the whole model: (tokens, in)."""
    seen = []
    hook = site.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model, ids)
    hook.remove()
    return seen[0].flatten(0, -2).detach()


def gone(size, kept):
    return sorted(set(range(size)) - set(kept.tolist()))


# --- neurons ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("examples", [None, TEXTS])
def test_without_neurons_the_rest_computes_what_it_did(kind, examples):
    """The score by its formula in the first block, and the whole model with those at zero."""
    model, whole = build(kind), build(kind)
    neurons.remove(model, examples, share=0.3, progress=False)
    for i, block in enumerate(roles.in_blocks(whole)):
        W = block.last.stored()[0]
        small = roles.in_blocks(model)[i]
        if examples is None:
            a = torch.stack([site.stored()[0].norm(dim=1) for site in block.inner]).prod(0)
        else:  # the whole model's blocks before this one have their neurons at zero already
            a = inputs_of(whole, block.last, examples).norm(dim=0)
        scores = a * W.norm(dim=0)
        size = len(scores)
        count = round(0.7 * size)
        kept = scores.argsort(descending=True)[:count].sort().values
        assert torch.equal(small.last.stored()[0], W[:, kept]), i
        zero(block.last, columns=gone(size, kept))
        for site in block.inner:
            zero(site, rows=gone(size, kept))
    assert torch.allclose(logits(model), logits(whole), atol=1e-5)
    assert all(p.requires_grad for p in model.parameters())


def test_the_number_that_stays_is_rounded_up_to_a_multiple():
    model = neurons.remove(build("llama"), share=0.3, multiple=8)  # 22.4 of 32
    assert model.config.ffn == 24 and model.layers[2].mlp.down_proj.in_features == 24
    assert neurons.remove(build("llama"), share=0.3, multiple=4).config.ffn == 24
    assert neurons.remove(build("llama"), share=0.3, multiple=2).config.ffn == 22


# --- heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, groups, each",
                         [("llama", 2, 2), ("gpt2", 2, 1), ("hf_llama", 2, 2)])
@pytest.mark.parametrize("examples", [None, TEXTS])
def test_without_heads_the_rest_computes_what_it_did(kind, groups, each, examples):
    model, whole = build(kind), build(kind)
    heads.remove(model, examples, share=0.5, progress=False)
    for i, block in enumerate(roles.parts(whole).blocks):
        W = block.output.stored()[0]
        o = torch.ones(1, W.shape[1])
        if examples is not None:
            o = inputs_of(whole, block.output, examples)
        energy = (o.square().sum(0) * W.square().sum(0)).view(groups, -1).sum(1)
        lost = energy.argmin().item()
        size = W.shape[1] // groups  # columns of a group
        zero(block.output, columns=list(range(lost * size, (lost + 1) * size)))
    assert torch.allclose(logits(model), logits(whole), atol=1e-5)
    small = roles.parts(model).blocks[0]
    assert small.output.shape[1] == small.queries.shape[0] == each * small.keys_values[0].shape[0]
    head = 16 // (groups * each)
    assert [site.shape[0] for site in small.keys_values] == [head, head]


def test_the_first_leaf_of_each_head_is_the_right_one():
    """Three groups of which the middle one goes: rows and columns of the outer two stay."""
    torch.manual_seed(0)
    model = minillm.Transformer(minillm.Config(20, 12, 1, 6, kv_heads=3, head_size=4))
    attention = model.layers[0].self_attn
    with torch.no_grad():
        attention.o_proj.weight[:, 8:16] *= 0.01
    q, k, o = (getattr(attention, name).weight.clone() for name in ("q_proj", "k_proj", "o_proj"))
    heads.remove(model, share=0.3)
    assert torch.equal(attention.q_proj.weight, torch.cat([q[:8], q[16:]]))
    assert torch.equal(attention.k_proj.weight, torch.cat([k[:4], k[8:]]))
    assert torch.equal(attention.o_proj.weight, torch.cat([o[:, :8], o[:, 16:]], 1))


# --- layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "hf_llama", "hf_gpt2", "Linear"])
def test_influence_by_its_formula_with_padding(kind):
    model = build(kind)
    examples = [minillm.data.Example(row, row) for row in ([3, 1, 4, 1, 5], [2, 7])]
    states = []
    for example in examples:  # each alone: no padding
        here, hooks = [], []
        for block in roles.blocks(model):
            hooks.append(block.module.register_forward_hook(
                lambda m, a, kw, y: here.append((a[0], y[0] if isinstance(y, tuple) else y)),
                with_kwargs=True))
        logits(model, torch.tensor([example.ids]))
        [hook.remove() for hook in hooks]
        states.append([torch.cat([F.cosine_similarity(x, y, dim=-1).flatten()])
                       for x, y in here])
    expected = [1 - torch.cat([text[i] for text in states]).mean().item() for i in range(3)]
    if kind == "Linear":  # takes no mask, so its rows run one by one
        assert layers.influence(model, examples) == pytest.approx(expected, abs=1e-6)
    assert layers.influence(model, examples, batch_size=2) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "hf_llama", "hf_gpt2", "Linear"])
def test_the_blocks_with_the_least_influence_go(kind):
    model, whole = build(kind), build(kind)
    order = layers.influence(whole, TEXTS)
    least = min(range(3), key=lambda i: order[i])
    layers.remove(model, TEXTS, count=1)
    names = [block.name for block in roles.blocks(model)]
    assert len(names) == 2
    stays = [i for i in range(3) if i != least]
    for block, i in zip(roles.blocks(model), stays):
        ours, theirs = block.module.state_dict(), roles.blocks(whole)[i].module.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    both = layers.remove(build(kind), which=[2, 0])
    ours, theirs = (roles.blocks(m)[i].module.state_dict() for m, i in ((both, 0), (whole, 1)))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# --- an ordinary model ----------------------------------------------------------------------------


def shrunk(kind):
    model = neurons.remove(build(kind), TEXTS, share=0.5, progress=False)
    if "gpt2" not in kind:  # no configuration of transformers has fewer heads for it
        heads.remove(model, TEXTS, share=0.5, progress=False)
    return layers.remove(model, which=[1])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_small_model_is_saved_and_loads_again(kind, tmp_path):
    model = shrunk(kind)
    minillm.save(model, tmp_path / "small")
    again, _ = minillm.load(tmp_path / "small")
    assert torch.equal(logits(again), logits(model)) and again.config.ffn == model.config.ffn


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["hf_llama", "hf_gpt2"])
def test_the_small_hugging_face_model_is_saved_and_loads_again(kind, tmp_path):
    model = shrunk(kind)
    model.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small").eval()
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    greedy = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)  # with a cache
    assert torch.equal(model.generate(IDS, **greedy), again.generate(IDS, **greedy))
    told = json.loads((tmp_path / "small" / "config.json").read_text())
    assert told.get("num_hidden_layers", told.get("n_layer")) == 2


@pytest.mark.parametrize("kind", ["llama", "hf_llama"])
def test_the_small_model_is_wrapped_and_trained_as_any_other(kind):
    model = shrunk(kind)
    minillm.lora.wrap(minillm.quant.wrap(model), r=2)
    examples = [minillm.data.Example(row, row) for row in TEXTS.tolist()]
    history = minillm.train.train(model, examples, steps=20, lr=1e-2, progress=False)
    assert history[-1]["loss"] < history[0]["loss"]


def test_minillm_generates_with_the_small_model():
    model = shrunk("llama")
    ids = IDS[:1]
    for _ in range(3):  # without a cache
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    out = minillm.model.generate.generate(model, IDS[:1], 3, temperature=0)
    assert torch.equal(torch.as_tensor(out), ids)


# --- what is wrong --------------------------------------------------------------------------------


def test_errors_come_before_any_change():
    model = build("llama")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    for remove, options, says in [
        (neurons.remove, dict(share=0.01), "share=0.01 of 32 neurons leaves 32: nothing"),
        (neurons.remove, dict(share=0.3, multiple=32), "leaves 32: nothing would be removed"),
        (neurons.remove, dict(share=0.999), "leaves 0: no model"),
        (neurons.remove, dict(share=1.5), "share"),
        (heads.remove, dict(share=0.1), "share=0.1 of 2 key/value heads leaves 2"),
        (layers.remove, dict(which=[3]), "which=3"),
        (layers.remove, dict(which=[0, 1, 2]), "removes 3 of 3 blocks"),
        (layers.remove, dict(which=[]), "removes 0 of 3 blocks"),
        (layers.remove, dict(), "give examples and count="),
        (layers.remove, dict(count=1), "give examples and count="),
        (layers.remove, dict(examples=TEXTS, count=3), "count=3"),
    ]:
        with pytest.raises(ValueError, match=says):
            remove(model, **options)
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3] = torch.nan
    with pytest.raises(ValueError, match="nan"):
        neurons.remove(model, share=0.5)
    model.load_state_dict(before)
    assert model.config == build("llama").config


@pytest.mark.parametrize("page", [neurons, heads, layers])
def test_attached_techniques_are_named(page):
    model = minillm.lora.wrap(build("llama"), r=2)
    options = dict(which=[1]) if page is layers else dict(share=0.5)
    with pytest.raises(ValueError, match="has lora.*unwrap or merge"):
        page.remove(model, **options)
    minillm.lora.merge(model, keep=False)
    page.remove(model, **options)


def test_models_that_cannot_lose_heads_say_why():
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no number of key/value heads"):
        heads.remove(build("hf_gpt2"), share=0.5)
    with pytest.raises(ValueError, match="no configuration with its heads"):
        heads.remove(build("Linear"), share=0.5)
    tied = build("llama")
    tied.layers[1].mlp.up_proj.weight = tied.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match="shares its matrix.*minillm.untie"):
        neurons.remove(tied, share=0.5)


@pytest.mark.parametrize("page", [heads, neurons])
def test_calibration_has_the_callers_batches(page, monkeypatch):
    given, stream = {}, page.calibrate.stream
    monkeypatch.setattr(page.calibrate, "stream",
                        lambda *args, **more: given.update(more) or stream(*args, **more))
    page.remove(build("llama"), TEXTS.tolist(), share=0.5, batch_size=3, progress=False)
    assert (given["batch_size"], given["progress"]) == (3, False)
