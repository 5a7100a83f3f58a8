"""The transformer against its definitions: causality, rotation, start, recomputation, errors."""

import pytest
import torch
from models import build

import minillm
from minillm.model import rope
from minillm.model.transformer import Cache, rope_table, rotate

families = pytest.mark.parametrize("kind", ["gpt2", "llama"])


@families
def test_a_token_sees_only_those_before_it(kind):
    model, ids = build(kind), torch.randint(24, (1, 8))
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % 24
    a, b = model(ids), model(other)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_rotation_keeps_lengths_and_depends_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def product(i, j):
        turn = [rotate(x, *rope_table(torch.tensor([[p]]), 8, 10000.0))
                for x, p in ((q, i), (k, j))]
        return (turn[0] * turn[1]).sum()

    torch.testing.assert_close(product(3, 1), product(13, 11), rtol=1e-4, atol=1e-5)
    assert (product(3, 1) - product(4, 1)).abs() > 1e-3
    x = torch.randn(1, 2, 5, 8)
    turned = rotate(x, *rope_table(torch.arange(5)[None], 8, 10000.0))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("call, message", [
    (lambda m: m(torch.tensor([[3, 24]])), "ids run from 3 to 24.*24 entries"),
    (lambda m: m(torch.tensor([[-1, 2]])), "ids run from -1 to 2"),
    (lambda m: m(torch.zeros(1, 33, dtype=torch.long)),
     "33 tokens is beyond this model's 32 positions"),
    (lambda m: minillm.Config(24, 16, 2, 3, kv_heads=2), "heads=3"),
    (lambda m: minillm.Config(24, 16, 2, 2, activation="swish"), "activation='swish'.*silu"),
    (lambda m: minillm.Config(24, 18, 2, 6), "head_size=3 is odd"),
])
@families
def test_errors_name_the_culprit(kind, call, message):
    with pytest.raises((ValueError, IndexError), match=message):
        call(build(kind))


def test_the_prompts_placeholders_stay_valid_and_other_ids_do_not():
    model = minillm.prompts.wrap(build("llama"), length=2)
    model(torch.tensor([[24, 25, 3]]))
    with pytest.raises(IndexError, match="26"):
        model(torch.tensor([[26, 3]]))


@families
def test_recomputed_activations_give_the_same_gradients(kind):
    """Also where the base is frozen, which a reentrant checkpoint would leave without any."""
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = minillm.lora.wrap(build(kind), r=2)
        for layer in minillm.layers(model).values():
            torch.nn.init.normal_(layer.patches["lora"].B)
        model.recompute = recompute
        ids = torch.arange(12).view(2, 6)
        model.loss(ids, ids).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert (grads[0]
            and all(g is not None and torch.allclose(f, g, atol=1e-6) for f, g in zip(*grads)))


@families
@pytest.mark.parametrize("recompute", [False, True])
def test_recomputing_runs_each_block_twice_and_keeps_its_input_alone(kind, recompute):
    model, ids, runs, kept = build(kind), torch.arange(12).view(2, 6), [], []
    model.recompute = recompute
    for block in model.layers:
        block.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(1) or t, lambda t: t):
        loss = model.loss(ids, ids)
    assert len(runs) == 3 and (len(kept) < 30) == recompute
    loss.backward()
    assert len(runs) == (6 if recompute else 3)
    runs.clear()
    with torch.no_grad():
        model(ids)
    model(ids, cache=minillm.Cache(model.config, 2, 6))
    assert len(runs) == 6


@families
def test_the_start_is_that_of_gpt2(kind):
    """N(0, 0.02); divided by sqrt(2 layers) where it adds to the residual stream."""
    make = {"gpt2": minillm.Config.gpt2, "llama": minillm.Config}[kind]
    model = minillm.Transformer(make(300, 64, 8, 4, positions=100, tied=False))
    found = dict(model.named_parameters())
    for name, p in found.items():
        if p.dim() == 2:
            expected = 0.02 / 4 if "o_proj" in name or "down_proj" in name else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.1), name
            assert abs(p.mean().item()) < 0.1 * expected, name
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
    with torch.no_grad():
        for p in found.values():
            p.fill_(3)
    model.reset_parameters()
    assert all((p != 3).all() for name, p in found.items() if p.dim() == 2 or name.endswith("bias"))


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)


def test_scaled_positions_turn_as_their_formulas_say():
    plain = rope.frequencies(32, 1000.0)
    assert rope.frequencies(32, 1000.0, dict(rope_type="linear", factor=4.0)).equal(plain / 4)
    factors = [float(i) for i in range(1, 17)]
    assert rope.frequencies(32, 1000.0, dict(rope_type="factors", factors=factors)).equal(
        plain / torch.tensor(factors)
    )
    turns = 64 * plain / (2 * torch.pi)  # in the original context
    scaled = rope.frequencies(32, 1000.0, LLAMA3)
    assert (scaled[turns >= 4].equal(plain[turns >= 4])
            and scaled[turns <= 1].equal(plain[turns <= 1] / 8))
    between = (turns > 1) & (turns < 4)
    assert (between.sum() > 2
            and bool((scaled < plain)[between].all() and (scaled > plain / 8)[between].all()))


@pytest.mark.parametrize("options, message", [
    (dict(rope_scaling=dict(LLAMA3, factor=0)), "numbers above 0"),
    (dict(rope_scaling=dict(LLAMA3, factor=True)), "numbers above 0"),
    (dict(rope_scaling=dict(LLAMA3, low_freq_factor=4.0)), "not below high_freq_factor"),
    (dict(rope_scaling=dict(rope_type="linear", factor=[4.0])), "numbers above 0"),
    (dict(rope_scaling=dict(rope_type="linear", factor="4")), "numbers above 0"),
    (dict(rope_scaling=dict(rope_type="linear")), "has the fields"),
    (dict(rope_scaling=dict(rope_type="longrope")), "known: linear, llama3, yarn, factors"),
    (dict(rope_scaling=dict(YARN, mscale=1.0)), "yarn has the fields .* and may have .*beta_fast"),
    (dict(rope_scaling=dict(YARN, beta_fast=1.0, beta_slow=2.0)), "beta_fast is below beta_slow"),
    (dict(rope_scaling=dict(YARN, attention_factor=0)), "numbers above 0"),
    (dict(rope_scaling=dict(YARN, truncate=1)), "truncate is neither true nor false"),
    (dict(rope_scaling=4.0), "no known rope_type"),
    (dict(rope_scaling=dict(rope_type="linear", factor=float("inf"))), "numbers above 0"),
    (dict(rope_scaling=dict(rope_type="factors", factors=[1.0])),
     "1 factors, and heads of 8 have 4 pairs"),
    (dict(rope_scaling=dict(rope_type="factors", factors=3.0)), "numbers above 0"),
    (dict(rope_scaling=LLAMA3, rope_base=None), "is for RoPE, and rope_base is None"),
    (dict(qk_norm=1), "qk_norm=1 is neither"),
])
def test_a_scaling_that_means_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        minillm.Config(24, 16, 1, 2, **options)


@pytest.mark.parametrize("options", [dict(qk_norm=True), dict(rope_scaling=LLAMA3)])
def test_the_cache_holds_what_norms_and_scaling_made(options):
    model = minillm.Transformer(minillm.Config(24, 16, 2, 2, positions=128, **options)).eval()
    ids = torch.randint(24, (1, 100))
    cache = Cache(model.config, 1, 100)
    parts = torch.cat([model(ids[:, :90], cache=cache),
                       *(model(ids[:, i : i + 1], cache=cache) for i in range(90, 100))], 1)
    torch.testing.assert_close(parts, model(ids), rtol=1e-5, atol=1e-5)


def test_untie_gives_the_head_a_matrix_of_its_own_and_says_so():
    model = minillm.Transformer(minillm.Config(24, 16, 1, 2))
    minillm.untie(model)
    assert model.lm_head.weight is not model.embed_tokens.weight and model.config.tied is False
    assert not hasattr(model.config, "tie_word_embeddings")
