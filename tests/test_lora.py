"""LoRA against the paper's equation, on its trainable counts, and what happens to
targets that are misspelt."""

import copy
import math

import pytest
import torch
import test_laws
from conftest import hugging_face
from models import build, learnt, two
from torch import nn

import minillm
from minillm.lora import LoRA


def test_the_equation():
    """h = W x + (alpha / r) B A x, with A and B of the paper's shapes (section 4.1)."""
    model = nn.Sequential(nn.Linear(6, 5))
    W, b = model[0].weight.clone(), model[0].bias.clone()
    patch = minillm.lora.wrap(model, r=2, alpha=6)[0].patches["lora"]
    assert patch.A.shape == (2, 6) and patch.B.shape == (5, 2)
    A, B, x = torch.randn(2, 6), torch.randn(5, 2), torch.randn(4, 6)
    patch.A.data, patch.B.data = A, B
    expected = torch.stack([W @ row + b + 6 / 2 * (B @ (A @ row)) for row in x])
    torch.testing.assert_close(model(x), expected)
    stable = minillm.lora.wrap(nn.Sequential(nn.Linear(6, 5)), r=4, alpha=6,
                               rank_stabilized=True)[0].patches["lora"]
    assert stable.scale == 6 / math.sqrt(4)


def test_the_start():
    """A is uniform within 1/sqrt(in), for every leaf type: a transposed A would read r as
    its fan-in."""
    for make, shape in ((lambda: nn.Linear(400, 30), (8, 400)),
                        (lambda: nn.Embedding(400, 30), (8, 400))):
        site = minillm.registry.Site("x", make(), None, [])
        patch = LoRA(site)
        patch.fill(site)
        assert patch.A.shape == shape and not patch.B.any()
        assert 0.95 / math.sqrt(400) < patch.A.abs().max() <= 1 / math.sqrt(400)
    hugging_face()
    from transformers.pytorch_utils import Conv1D

    site = minillm.registry.Site("x", Conv1D(30, 400), None, [])
    patch = LoRA(site)
    patch.fill(site)
    assert patch.A.shape == (8, 400) and 0.95 / 20 < patch.A.abs().max() <= 1 / 20


def test_smollm2_counts():
    """The figures of facts: 2,442,240 trainable on the seven projections of SmolLM2 at r=8,
    460,800 on q and v."""
    config = minillm.Config(49152, 576, 30, 9, kv_heads=3, ffn=1536, positions=8192)
    with torch.device("meta"):
        model = minillm.Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    for targets, count in ((None, 2_442_240), (["q_proj", "v_proj"], 460_800),
                           (r"[qv]_proj", 460_800)):
        minillm.lora.wrap(model, targets, r=8)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
        minillm.lora.unwrap(model)


@pytest.mark.parametrize("kind", ["Linear", "llama", "gpt2", "hf_llama", "hf_gpt2", "Sequential"])
def test_defaults_work(kind):
    model = (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        if kind == "Sequential"
        else build(kind)
    )
    minillm.lora.wrap(model, r=2)
    wrapped = minillm.layers(model)
    assert wrapped and not any("head" in name for name in wrapped if kind != "Linear"), (
        "the output head is left alone")


@pytest.mark.parametrize("targets, culprit, remedy", [
    (["q_proj", "v_porj"], "v_porj", "v_proj"),
    ("q_proj|v_porj", "v_porj", "v_proj"),
    (["attn.q_proj"], "attn.q_proj", "q_proj"),
    (r"layers\.9\..*", r"layers.*9", "q_proj"),
    (["mlp"], "mlp", "up_proj"),
    ([], r"\[\]", "q_proj"),
    (lambda name, module: False, "lambda", "q_proj"),
    ("(q_proj", r"\(q_proj", "regular expression"),
])
def test_a_wrong_target_is_an_error_and_changes_nothing(targets, culprit, remedy):
    model = build("llama")
    with pytest.raises(ValueError, match=f"(?s){culprit}.*{remedy}"):
        minillm.lora.wrap(model, targets)
    assert not minillm.layers(model) and all(p.requires_grad for p in model.parameters())


def test_wrong_numbers_are_errors():
    for options, culprit in ((dict(r=0), "r=0"), (dict(r=17), "r=17"),
                             (dict(dropout=1.0), "dropout=1.0")):
        with pytest.raises(ValueError, match=culprit):
            minillm.lora.wrap(build("llama"), **options)
    model = minillm.lora.wrap(build("llama"), r=2)
    with pytest.raises(ValueError, match="already wrapped with lora"):
        minillm.lora.wrap(model, r=2)
    with pytest.raises(ValueError, match="is itself a leaf"):
        minillm.lora.wrap(nn.Linear(4, 4), r=2)


def test_a_tied_head_is_wrapped_only_by_name_and_never_merged():
    model = build("gpt2")
    assert "lm_head" not in minillm.layers(minillm.lora.wrap(model, r=2))
    minillm.lora.unwrap(model)
    minillm.lora.wrap(model, ["lm_head"], r=2)
    nn.init.normal_(model.lm_head.patches["lora"].B)
    expected = test_laws.logits(model)
    with pytest.raises(ValueError, match="lm_head.*embed_tokens.*untie"):
        minillm.lora.merge(model)
    minillm.lora.merge(minillm.untie(model))
    torch.testing.assert_close(test_laws.logits(model), expected, rtol=1e-4, atol=1e-4)


def test_a_merge_that_rounding_would_erase_is_refused():
    model = minillm.lora.wrap(minillm.quant.wrap(build("llama")), r=2)
    for layer in minillm.layers(model).values():
        nn.init.normal_(layer.patches["lora"].B, std=1e-4)
    before = test_laws.state(model)
    with pytest.raises(ValueError, match="would lose it.*dense base"):
        minillm.lora.merge(model)
    assert test_laws.same(test_laws.state(model), before)


# --- dropout ------------------------------------------------------------------------------------


def dropped(model, x):
    """What LoRA adds to the first leaf's output in 2,000 draws: (2000, *output)."""
    layer = model[0]
    return torch.stack([layer(x) - layer.base(x) for _ in range(2000)]).detach()


def test_dropout_is_of_the_branchs_input_while_training_only():
    model = learnt(minillm.lora.wrap(two(), ["0"], r=2, dropout=0.25).train(), std=1)
    patch, x = model[0].patches["lora"], torch.randn(6)
    change = patch.scale * patch.B @ patch.A * x  # (out, in): what each input adds
    draws = dropped(model, x)
    assert len(draws.unique(dim=0)) > 10
    # every choice of what is dropped
    kept = torch.cartesian_prod(*[torch.tensor([0.0, 1 / 0.75])] * 6)
    possible = (kept @ change.T).detach()
    far = torch.cdist(draws, possible, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    assert far.max() < 1e-4
    torch.testing.assert_close(draws.mean(0), change.sum(1), rtol=0.1, atol=0.1)
    model.eval()
    torch.testing.assert_close(model[0](x), model[0].base(x) + change.sum(1))
    assert model[0](x).equal(model[0](x))


def test_dropout_of_an_embedding_drops_the_branch_of_whole_tokens():
    model = learnt(minillm.lora.wrap(nn.Sequential(nn.Embedding(9, 6)), ["0"], r=2,
                                     dropout=0.25).train(), std=1)
    patch, x = model[0].patches["lora"], torch.tensor([[3, 3, 5]])
    change = patch.scale * (patch.B @ patch.A).T[x]  # (1, 3, width)
    draws = dropped(model, x)
    share = draws / change
    gone, kept = share.abs() < 1e-4, (share - 1 / 0.75).abs() < 1e-4
    assert (gone.all(-1) | kept.all(-1)).all() and (gone[:, 0, 0] != gone[:, 0, 1]).any()
    assert 0.2 < gone.float().mean() < 0.3
    torch.testing.assert_close(model.eval()(x), model[0].base(x) + change)


def test_dropout_beneath_a_mask_is_an_error_and_a_merge_is_not():
    model = learnt(minillm.lora.wrap(two(), r=2, dropout=0.1))
    x = torch.randn(3, 6)
    expected = model.eval()(x)
    with pytest.raises(ValueError, match="lora has a dropout.*mask.*wrap lora with dropout=0"):
        minillm.prune.wrap(model.train(), sparsity=0.5)
    assert list(model[0].patches) == ["lora"]
    minillm.prune.wrap(model.eval(), sparsity=0.5)(x)
    with pytest.raises(ValueError, match="lora has a dropout"):
        model.train()(x)
    minillm.prune.unwrap(model)
    torch.testing.assert_close(minillm.lora.merge(copy.deepcopy(model).train())(x), expected)
    torch.testing.assert_close(minillm.lora.merge(model.eval())(x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_new_patch_trains_if_its_model_does(training):
    model = minillm.lora.wrap(two().train(training), r=2, dropout=0.5)
    assert model[0].training == model[0].patches["lora"].training == training
    second = minillm.prune.wrap(minillm.lora.wrap(two(), r=2).train(training), sparsity=0.5)
    assert second[0].patches["prune"].training == training


# --- the padding of an embedding ------------------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True])
def test_the_row_of_the_padding_neither_changes_nor_learns(stored):
    model = nn.Sequential(nn.Embedding(9, 6, padding_idx=7))
    ids = torch.tensor([[1, 7, 3]])
    if stored:
        minillm.quant.wrap(model, ["0"])
    before = model(ids).detach()
    learnt(minillm.lora.wrap(model, ["0"], r=2))
    after = model(ids)
    assert after[:, 1].equal(before[:, 1]) and (after[:, [0, 2]] != before[:, [0, 2]]).all()
    patch = model[0].patches["lora"]
    (after * torch.randn(3, 6)).sum().backward()
    assert not patch.A.grad[:, 7].any() and patch.A.grad[:, [1, 3]].all()
    W, _ = model[0].dense()
    torch.testing.assert_close(W.T[ids], after)
    torch.testing.assert_close(minillm.lora.merge(minillm.quant.unwrap(model) if stored
                                                  else model)(ids), after)


# --- its settings and its merge -------------------------------------------------------------------


def test_a_file_brings_every_setting_back(tmp_path):
    settings = dict(r=3, alpha=5.0, rank_stabilized=True, dropout=0.25)
    model = learnt(minillm.lora.wrap(build("llama"), **settings)).eval()
    minillm.lora.save(model, tmp_path / "a")
    other = minillm.lora.load(build("llama"), tmp_path / "a")
    assert test_laws.logits(other).equal(test_laws.logits(model))
    for layer in minillm.layers(other).values():
        assert layer.patches["lora"].config() == settings | dict(start=False)
        assert (layer.patches["lora"].r, layer.patches["lora"].dropout) == (3, 0.25)


def test_a_merge_is_computed_in_float32_and_rounded_once():
    for dtype in (torch.bfloat16, torch.float16):
        model = learnt(minillm.lora.wrap(two().to(dtype), r=2), std=0.1)
        wanted = [model[i].base.weight.float() + 8 * patch.B @ patch.A
                  for i in (0, 2) for patch in [model[i].patches["lora"]]]
        minillm.lora.merge(model)
        assert all(model[i].weight.equal(W.to(dtype)) for i, W in zip((0, 2), wanted))
    model = learnt(minillm.lora.wrap(minillm.quant.wrap(two().bfloat16()), r=2), std=1)
    W = model[0].base.dense().float() + 8 * model[0].patches["lora"].B @ model[0].patches["lora"].A
    s = W.abs().amax(1, keepdim=True) / 127
    minillm.lora.merge(model)
    torch.testing.assert_close(model[0].scale, s, rtol=1e-6, atol=0)
    assert (model[0].q.equal((W / s).round().to(torch.int8))
            and model[0].dense().dtype == torch.bfloat16)


def test_a_merge_that_a_dense_bfloat16_would_round_away_is_refused():
    model = learnt(minillm.lora.wrap(build("llama").bfloat16(), r=2), std=1e-3)
    before = test_laws.state(model)
    with pytest.raises(ValueError, match=r"\(bfloat16\) would lose it"):
        minillm.lora.merge(model)
    assert test_laws.same(test_laws.state(model), before)
    minillm.lora.merge(model, tolerance=1e9)


def test_merging_what_has_not_learnt_changes_nothing():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = minillm.quant.wrap(two().to(dtype))
        before = {key: t.clone() for key, t in model.state_dict().items()}
        minillm.lora.merge(minillm.lora.wrap(model, r=2))
        assert test_laws.same(model.state_dict(), before)


@pytest.mark.parametrize("mutation", ["fold forgets alpha/r", "A is (in, r)"])
def test_the_laws_bite(monkeypatch, mutation):
    """Break LoRA, and the suite fails."""
    if mutation == "fold forgets alpha/r":
        monkeypatch.setattr(LoRA, "fold", lambda self, W, b: (W + self.B @ self.A, b))
        with pytest.raises(AssertionError, match="law 3 fold"):
            test_laws.test_fold_equals_forward("Linear")
    else:
        build_right = LoRA.__init__

        def build_transposed(self, site, **options):
            build_right(self, site, **options)
            wrong = torch.empty(self.A.shape[::-1])
            nn.init.kaiming_uniform_(wrong, a=math.sqrt(5))
            self.A = nn.Parameter(wrong)

        monkeypatch.setattr(LoRA, "__init__", build_transposed)
        with pytest.raises((AssertionError, RuntimeError)):
            test_laws.test_fold_equals_forward("Linear")
        with pytest.raises(AssertionError):
            test_the_start()
        monkeypatch.setattr(LoRA, "forward", lambda self, below,
                            x: below(x) + self.scale * x @ self.A @ self.B.T)
        monkeypatch.setattr(LoRA, "fold", lambda self, W,
                            b: (W + self.scale * (self.A @ self.B.T).T, b))
        # consistent with itself, and still caught: the start is too large
        with pytest.raises(AssertionError):
            test_the_start()
