"""RoPE scaling: the formulas of YaRN and NTK, and models stretched to longer texts."""

import dataclasses
import math

import pytest
import torch
from test_gguf import tokenizer  # noqa: F401

import minillm
from minillm import checkpoints, measure, zoo
from minillm.model import rope

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)


def small(**options):
    torch.manual_seed(0)
    shape = dict(vocab_size=24, width=64, layers=2, heads=2, ffn=32, positions=64, rope_base=500.0)
    return minillm.Transformer(minillm.Config(**{**shape, **options}))


def test_yarn_turns_as_its_formula_says():
    """Pair by pair: the turns in the original context decide between f and f / factor."""
    d, base, original, factor = 32, 500.0, 64, 4.0
    found = rope.frequencies(d, base, YARN)

    def pair(turns):  # the i whose wavelength fits `turns` times into the original context
        return d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), d - 1)
    assert (low, high) == (0, 6)
    for i in range(d // 2):
        f, ramp = base ** (-2 * i / d), min(max((i - low) / (high - low), 0), 1)
        assert found[i].item() == pytest.approx(f * (1 - ramp) + f / factor * ramp, rel=1e-5), i
    cos, sin = rope.rope_table(torch.tensor([[0, 5]]), d, base, YARN)
    m = 0.1 * math.log(4.0) + 1
    assert cos[0, 0, 0].allclose(torch.tensor(m)) and not sin[0, 0, 0].any()
    torch.testing.assert_close((cos**2 + sin**2).sqrt(), torch.full_like(cos, m))
    for changed, m in ((dict(attention_factor=1.5), 1.5), (dict(factor=0.5), 1.0)):
        given = rope.rope_table(torch.tensor([[0]]), d, base, YARN | changed)
        assert given[0].eq(m).all()


@pytest.mark.parametrize("original, slow", [(4096, 17), (10**7, 31)])
def test_yarn_of_a_long_context_stretches_the_slowest_pair_in_part(original, slow):
    """With d = 32 there are 16 pairs, and none turns as little as once: `slow` is beyond them.

    The authors' code bounds it by d - 1, and not by the last pair.
    """
    scaling = YARN | dict(original_max_position_embeddings=original)
    fast = math.floor(32 * math.log(original / (64 * math.pi)) / (2 * math.log(500.0)))
    found, plain = rope.frequencies(32, 500.0, scaling), rope.frequencies(32, 500.0)
    ramp = ((torch.arange(16) - fast) / (slow - fast)).clamp(0, 1)
    torch.testing.assert_close(found, plain * (1 - ramp) + plain / 4 * ramp)


def test_yarn_with_one_bound_has_a_step_and_no_ramp():
    """Between two whole pairs, too: `truncate` would round the bound."""
    one = YARN | dict(beta_fast=4.0, beta_slow=4.0, truncate=False)
    ratio = rope.frequencies(32, 500.0) / rope.frequencies(32, 500.0, one)
    bound = 32 * math.log(64 / (2 * math.pi * 4.0)) / (2 * math.log(500.0))
    assert bound % 1 > 0.1
    torch.testing.assert_close(ratio, torch.where(torch.arange(16) < bound, 1.0, 4.0))


@pytest.mark.parametrize("kind", ["none", "linear", "ntk", "llama3", "yarn"])
def test_stretch_gives_a_model_for_longer_texts(tmp_path, kind):
    model, ids = small(), torch.randint(24, (1, 256))
    with pytest.raises(ValueError, match="256"):
        model(ids)
    assert rope.stretch(model, kind, 4) is model and model.config.positions == 256
    plain, f = rope.frequencies(32, 500.0), rope.frequencies(
        32, model.config.rope_base, model.config.rope_scaling)
    torch.testing.assert_close(f[-1], plain[-1] / (1 if kind == "none" else 4))  # the slowest pair
    assert f[0] == (plain[0] / 4 if kind == "linear" else plain[0])
    assert model(ids).isfinite().all()
    checkpoints.save(model, tmp_path / "m")
    again, _ = zoo.load(tmp_path / "m")
    assert again.config == model.config and again(ids).equal(model(ids))


def test_stretch_goes_by_the_length_of_the_training():
    """It may be shorter than the positions: those say what is allowed, not what was learnt."""
    model = rope.stretch(small(positions=512), "yarn", 4, original=64)
    assert model.config.positions == 512 and model.config.rope_scaling == YARN
    assert rope.stretch(small(positions=100), "linear", 4, original=64).config.positions == 256


def test_stretch_says_what_it_cannot():
    model = small()
    config = dataclasses.replace(model.config)
    for kind, factor, message in (("yarns", 2, "kind='yarns' is unknown; known: none, ntk, linear"),
                                  ("yarn", 1, "factor=1 is not a number above 1"),
                                  ("yarn", float("inf"), "factor=inf is not a number"),
                                  (None, 2, "kind=None is unknown")):
        with pytest.raises(ValueError, match=message):
            rope.stretch(model, kind, factor)
    assert model.config == config
    rope.stretch(model, "yarn", 2)
    with pytest.raises(ValueError, match="has rope_scaling=.*yarn.* already"):
        rope.stretch(model, "linear", 2)
    with pytest.raises(ValueError, match="original=0 is not a whole number"):
        rope.stretch(small(), "yarn", 2, original=0)
    with pytest.raises(ValueError, match="head_size=2 is one pair"):
        rope.stretch(small(head_size=2), "ntk", 2)
    with pytest.raises(ValueError, match="learned positions"):
        rope.stretch(minillm.Transformer(minillm.Config.gpt2(24, 16, 1, 2)), "linear", 2)
    with pytest.raises(TypeError, match="this is a Linear"):
        rope.stretch(torch.nn.Linear(2, 2), "linear", 2)


@pytest.mark.parametrize("more", [{}, dict(beta_fast=20.0, beta_slow=0.5)], ids=["usual", "bounds"])
def test_yarn_goes_through_gguf(tmp_path, tokenizer, more):  # noqa: F811
    pytest.importorskip("gguf")
    model = small(vocab_size=tokenizer.vocab_size, positions=256, rope_scaling={**YARN, **more})
    checkpoints.save(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    again, _ = zoo.load(tmp_path / "m.gguf")
    ids = torch.randint(24, (1, 200))
    assert again.config.rope_scaling == model.config.rope_scaling
    torch.testing.assert_close(again(ids), model(ids))
    model.config.rope_scaling = dict(YARN, truncate=False)
    with pytest.raises(ValueError, match="llama.cpp computes yarn's attention_factor and rounds"):
        checkpoints.save(model, tmp_path / "n.gguf", tokenizer=tokenizer)


@pytest.mark.parametrize("prompted", [False, True])
def test_perplexity_by_position_is_that_of_each_token(tokenizer, prompted):  # noqa: F811
    """One forward pass for all parts; beside it the tokens one by one, by hand."""
    model = small(vocab_size=tokenizer.vocab_size).eval()
    if prompted:
        minillm.prompts.wrap(model, length=3)
    text = "a model reads a text, and the text goes on and on. " * 30
    ids = torch.tensor(tokenizer.encode(text))
    found = measure.by_position(model, tokenizer, text, 40, parts=3, windows=4)
    assert [(first, end) for first, end, _ in found] == [(0, 13), (13, 27), (27, 40)]
    losses = []
    for i in range(4):
        row = ids[None, 40 * i : 40 * i + 40]
        full = minillm.prepare(model, row)[0]
        logp = model(full)[0, -40:-1].log_softmax(-1)
        losses.append(-logp.gather(1, row[0, 1:, None])[:, 0])
    losses = torch.stack(losses)
    for (first, end, value) in found:
        part = losses[:, max(first - 1, 0) : end - 1]
        assert value == pytest.approx(part.mean().exp().item(), rel=1e-5)
        assert value.n == 4
    (whole,) = measure.by_position(model, tokenizer, text, 40, parts=1, windows=4)
    assert whole[2] == pytest.approx(measure.perplexity(model, tokenizer, text, 40, 4), rel=1e-5)


@pytest.mark.parametrize("options, message", [
    (dict(length=1), "length=1: the least is 2"), (dict(length=9, parts=9), "parts=9 is not"),
    (dict(length=60), "a text of .* tokens is shorter than a window of 60"),
    (dict(length=9, windows=0), "windows=0: the least is 1"),
    (dict(length=65, text="word " * 100), "64")])
def test_perplexity_by_position_says_what_it_cannot(tokenizer, options, message):  # noqa: F811
    options = dict(text="one text, and that is all") | options
    with pytest.raises(ValueError, match=message):
        measure.by_position(small(vocab_size=tokenizer.vocab_size), tokenizer, **options)
