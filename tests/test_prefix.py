"""Prefix tuning: keys and values in front of each layer, wherever a call begins, and beside
all that changes a batch."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import hugging_face
from models import IDS, build, learnt, logits, two
from torch import nn

import minillm
from minillm.model.rope import rope_table, rotate
from minillm.prompts import prefix
from minillm.registry import CannotMerge

NATIVE = ["llama", "gpt2"]
KINDS = [*NATIVE, "hf_llama", "hf_gpt2"]
TEXT = [7, 8, 9, 10]


def prefixed(kind="llama", **options):
    return learnt(prefix.wrap(build(kind), **dict(dict(length=3), **options)))


def plain_prefix(model):
    """[(keys, values)] of each layer, each (p, g*d), from the patches' own parameters, by hand."""
    front = model.embed_tokens.patches["prefix"]
    found = []
    for block in model.layers:
        pair = []
        for leaf in (block.self_attn.k_proj, block.self_attn.v_proj):
            one = leaf.patches["prefix"]
            pair.append(one.P if one.hidden is None else
                        torch.tanh(front.E @ front.W1.T + front.b1) @ one.W2.T + one.b2)
        found.append(pair)
    return found


def by_cache(model, ids, p):
    """The logits of the bare model whose cache begins with the prefix of `model`."""
    plain, c = build("llama" if model.config.rope_base else "gpt2"), model.config
    cache = minillm.Cache(c, len(ids), p + ids.shape[1])
    with torch.no_grad():
        plain(torch.zeros(len(ids), p, dtype=torch.long), cache=cache)
        for i, pair in enumerate(plain_prefix(model)):
            k, v = (x.unflatten(-1, (-1, c.head_size)).transpose(0, 1) for x in pair)  # (g, p, d)
            if c.rope_base:
                k = rotate(k, *(t[0] for t in rope_table(torch.arange(p)[None], c.head_size,
                                                         c.rope_base)))
            cache.k[i, :, :, :p], cache.v[i, :, :, :p] = k, v
        return plain(ids, cache=cache)


@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("kind", NATIVE)
def test_the_keys_and_values_of_each_layer(kind, hidden):
    model = prefixed(kind, hidden=hidden)
    ids, labels, mask = minillm.prepare(model, IDS, IDS, torch.ones_like(IDS, dtype=torch.bool))
    assert ids.shape == (2, 9) and labels[:, :3].eq(-100).all() and mask.all()
    y = model(ids)[:, 3:]
    assert torch.allclose(y, by_cache(model, IDS, 3), atol=1e-5)
    assert not torch.allclose(y, build(kind)(IDS), atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_at_birth_it_is_the_text_that_it_started_from(kind):
    model = prefix.wrap(build(kind), length=4, start=TEXT)
    whole = torch.cat([torch.tensor([TEXT, TEXT]), IDS], 1)
    assert torch.allclose(logits(model)[:, 4:], logits(build(kind), whole)[:, 4:], atol=1e-5)
    with torch.no_grad():  # the bare model, as it is called without placeholders
        assert torch.equal(logits(model, IDS), logits(build(kind), IDS))


def test_the_parameters():
    config = minillm.Config(49152, 576, 2, 9, kv_heads=3, ffn=64)
    network = 20 * 576 + 577 * 10 + 2 * 2 * 192 * 11
    for hidden, expected in ((None, 20 * 2 * 2 * 192), (10, network)):
        model = prefix.wrap(minillm.Transformer(config), hidden=hidden)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    patch = prefix.wrap(build("hf_gpt2"), length=3).transformer.h[0].attn.c_attn.patches["prefix"]
    assert patch.P.shape == (3, 32), "the queries of c_attn have no part in it"
    model = prefix.wrap(minillm.Transformer(config), hidden=400)
    W1, W2 = (model.get_submodule(where).patches["prefix"].get_parameter(key) for where, key in
              (("embed_tokens", "W1"), ("layers.0.self_attn.k_proj", "W2")))
    for W in (W1, W2):
        assert W.abs().max() <= W.shape[1] ** -0.5 and W.std() > 0.5 * W.shape[1] ** -0.5


# --- calls ----------------------------------------------------------------------------------------


ROWS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]


@pytest.mark.parametrize("stacked", ["", "prompt", "prompt first"])
@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("kind", NATIVE)
def test_generation_with_a_cache_and_padding_on_the_left(kind, hidden, stacked):
    model = build(kind)
    if stacked == "prompt first":
        minillm.prompts.wrap(model, length=2)
    prefix.wrap(model, length=3, hidden=hidden)
    if stacked == "prompt":
        minillm.prompts.wrap(model, length=2)
    learnt(model)
    found = model.generate(ROWS, 6)
    for row, line in zip(ROWS, found):
        ids = torch.tensor([row])
        for _ in range(6):  # without a cache
            ids = torch.cat([ids, model(minillm.prepare(model, ids)[0])[:, -1:].argmax(-1)], 1)
        assert torch.equal(ids[0, -6:], line[-6:]), row


@pytest.mark.parametrize("window", [3, 5])
def test_a_prefix_that_a_call_cuts(window):
    """With a window the cache takes the prompt in pieces, and one may begin within the prefix."""
    config = minillm.Config(24, 16, 2, 4, kv_heads=2, ffn=32, positions=64, window=window)
    torch.manual_seed(0)
    model = learnt(prefix.wrap(minillm.Transformer(config).eval(), length=7))
    ids = torch.randint(24, (2, 9))
    expected = ids
    for _ in range(5):
        expected = torch.cat([expected, model(minillm.prepare(model, expected)[0])[:, -1:]
                              .argmax(-1)], 1)
    assert torch.equal(model.generate(ids, 5), expected)


@pytest.mark.parametrize("kind", ["hf_llama", "hf_gpt2"])
def test_generation_of_hugging_face(kind):
    model = prefixed(kind)
    ids = minillm.prepare(model, IDS)[0]
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4,
                           do_sample=False, pad_token_id=0)
    for _ in range(4):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)


@pytest.mark.parametrize("hidden", [None, 5])
def test_recompute_and_another_batch_before_the_backward_pass(hidden):
    model, found = prefixed(hidden=hidden), []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        ids, labels, mask = minillm.prepare(model, IDS, IDS)
        loss = model.loss(ids, labels, mask)
        with torch.no_grad():
            model(IDS[:1])  # no placeholders
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) == (6 if hidden is None else 15)
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-6) for n in found[0])


@pytest.mark.parametrize("hidden", [None, 5])
def test_rows_of_a_batch_with_their_own(hidden):
    model = build("llama")
    for name in ("a", "b"):
        prefix.wrap(model, name=name, length=3, hidden=hidden)
    minillm.lora.wrap(model, ["q_proj"], name="c", r=2)
    learnt(model)
    batch = torch.cat([IDS, IDS.flip(1)])
    names = ["a", ["b", "c"], None, ["a", "b"]]
    with minillm.rows(model, names):
        ids, _, mask = minillm.prepare(model, batch)
        y = model(ids, mask)[:, -6:]
        made = model.generate(batch, 4)[:, -4:]
    for i, one in enumerate(names):
        minillm.use(model, *([one] if isinstance(one, str) else one or []))
        ids = minillm.prepare(model, batch[i : i + 1])[0]
        assert torch.allclose(y[i], model(ids)[0, -6:], atol=1e-5), one
        assert torch.equal(made[i], model.generate(batch[i : i + 1], 4)[0, -4:]), one


def test_use_switches_all_of_it():
    model = prefixed(hidden=None)
    learned = logits(model)
    assert minillm.prepare(minillm.use(model), IDS)[0].equal(IDS)
    assert torch.equal(model(IDS), build("llama")(IDS))
    assert torch.equal(logits(minillm.use(model, "prefix")), learned)


def test_a_copy_keeps_no_call():
    model = prefixed(hidden=5)
    learned = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        facts = {id(layer.patches["prefix"].facts) for layer in minillm.layers(twin).values()}
        assert len(facts) == 1 and facts != {id(model.embed_tokens.patches["prefix"].facts)}
        assert twin.embed_tokens.patches["prefix"].facts.now is None
        assert torch.isfinite(twin.layers[0](torch.randn(1, 4, 16))).all()  # before any call
        assert torch.equal(logits(twin), learned)
    assert not any("facts" in key for key in model.state_dict())


@pytest.mark.parametrize("hidden", [pytest.param(None, marks=pytest.mark.slow), 5])
def test_compiled_blocks_and_lengths_that_vary(hidden):
    model = prefixed(hidden=hidden)
    batches = [torch.randint(24, (2, t)) for t in range(4, 16)]
    with torch.no_grad():
        expected = [logits(model, minillm.prepare(model, ids)[0]) for ids in batches]
        words = model.generate(ROWS, 5)
    torch._dynamo.reset()
    for module in (*model.layers, model.lm_head):
        module.compile(backend="aot_eager")
    model.compiled = True
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for ids, y in zip(batches, expected):
            assert torch.allclose(logits(model, minillm.prepare(model, ids)[0]), y, atol=1e-5)
        assert torch.equal(model.generate(ROWS, 5), words)
    torch._dynamo.reset()


def test_calibration_keeps_what_each_batch_is():
    """Block by block, each batch has its own placeholders: as with one example in each batch."""
    examples = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8]]
    found = []
    for size in (1, 2, 3):
        model, seen = prefixed(hidden=5), {}
        minillm.calibrate.stream(model, examples, lambda site, gram: seen.update(
            {site.name: gram.H / gram.count}), batch_size=size, progress=False)
        found.append(seen)
    for other in found[1:]:
        for name, H in other.items():
            assert torch.allclose(H, found[0][name], atol=1e-4), name
    model, whole = prefixed(hidden=5), []
    hook = model.layers[2].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: whole.append(args[0].flatten(0, 1)))
    for ids in examples:
        model(minillm.prepare(model, torch.tensor([ids]))[0])
    hook.remove()
    x = torch.cat(whole)
    assert torch.allclose(found[0]["layers.2.mlp.down_proj"], x.T @ x / len(x), atol=1e-4)


def test_beside_lora_and_a_mask_on_the_same_leaves():
    """The prefix replaces what these make of a placeholder, in any order of the wraps."""
    found = []
    for order in ((prefix, minillm.lora, minillm.prune), (minillm.lora, minillm.prune, prefix)):
        model = build("llama")
        for one in order:
            torch.manual_seed(1)
            one.wrap(model, **({"length": 3, "start": TEXT} if one is prefix else {}))
        for layer in minillm.layers(model).values():
            for i, (key, p) in enumerate(sorted(layer.patches.named_parameters())):
                nn.init.constant_(p, 0.1 * (i + 1))
        found.append(logits(model))
        y = model.layers[0].self_attn.v_proj(torch.randn(2, 9, 16))
        assert torch.equal(y[0, :3], model.layers[0].self_attn.v_proj.patches["prefix"].P)
    assert torch.allclose(*found, atol=1e-6)
    with pytest.raises(CannotMerge, match="prefix cannot be merged"):
        minillm.prompts.merge(prefixed())


def test_two_of_different_names_and_their_files(tmp_path):
    model = build("llama")
    for name, hidden in (("a", None), ("b", 4)):
        minillm.use(prefix.wrap(model, name=name, length=2, hidden=hidden), name)
        torch.manual_seed(len(name))
        learnt(model)
    minillm.use(model, "a", "b")
    expected = logits(model)
    with pytest.raises(ValueError, match="prompts under 2 names, 'a', 'b'"):
        minillm.prompts.save(model, tmp_path / "a")
    for name in "ab":
        minillm.prompts.save(model, tmp_path / name, name)
    other = build("llama")
    for name in "ab":
        minillm.prompts.load(other, tmp_path / name)
    assert torch.equal(logits(other), expected)
    assert "E" in dict(other.embed_tokens.patches["b"].named_parameters())  # training can go on
    minillm.prompts.unwrap(other, "a")
    assert torch.allclose(logits(other), logits(minillm.use(model, "b")), atol=1e-6)


# --- errors ---------------------------------------------------------------------------------------


def neox():
    transformers = hugging_face()
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32))


@pytest.mark.parametrize("call, message", [
    (lambda: prefix.wrap(build("llama"), length=0), "length=0 is not a whole number"),
    (lambda: prefix.wrap(build("llama"), length=32),
     "length=32: the model has 32 positions, and the text needs one, so length is at most 31"),
    (lambda: prefix.wrap(minillm.prompts.wrap(build("llama"), length=20), length=12),
     "length=12 and 20 placeholders of other prompts.*at most 11"),
    (lambda: prefix.wrap(build("llama"), hidden=0), "hidden=0 is not a whole number"),
    (lambda: prefix.wrap(build("llama"), hidden=4, start=[1]),
     r"start=\[1\] with hidden=4: a network starts at random"),
    (lambda: prefix.wrap(build("llama"), start=[]), r"start=\[\] is empty"),
    (lambda: prefix.wrap(build("llama"), start=[24]), "start has the id 24.*has 0 to 23"),
    (lambda: prefix.wrap(build("llama"), start="random"), "none of 'vocabulary' or a list of ids"),
    (lambda: prefix.wrap(build("llama"), ["k_prj"]), "'k_prj' matches no leaf.*'k_proj'"),
    (lambda: prefix.wrap(build("Linear")),
     "'layers.0' is a Block, in which a prefix does not find .*name them in targets="),
    (lambda: prefix.wrap(two()), "no embedding to wrap by default in this Sequential"),
    (lambda: prefix.wrap(neox()), "query_key_value' computes queries, keys and values in an ord"),
    (lambda: prefix.wrap(prefixed(), length=3), "is already wrapped with prefix"),
])
def test_a_wrong_call_says_what_is_possible(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_call_changes_nothing():
    model = build("llama")
    with pytest.raises(ValueError):
        prefix.wrap(model, start=[99])
    assert not minillm.layers(model) and all(p.requires_grad for p in model.parameters())


def test_packed_rows_are_refused():
    model = prefixed()
    with pytest.raises(ValueError, match="comes before one text, and these rows hold several"):
        minillm.prepare(model, IDS, None, torch.tensor([[1, 1, 2, 2, 2, 2]] * 2))


def test_training_lowers_the_loss_and_half_precision_computes_in_it():
    for hidden in (None, 5):
        model = prefix.wrap(build("llama"), length=3, hidden=hidden)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(60):
            loss = F.cross_entropy(logits(model)[:, 3:-1].flatten(0, 1), IDS[:, 1:].flatten())
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
    half = prefix.wrap(build("llama").bfloat16(), length=3)
    assert half.layers[0].self_attn.k_proj.patches["prefix"].P.dtype == torch.float32
    assert logits(half).dtype == torch.bfloat16
