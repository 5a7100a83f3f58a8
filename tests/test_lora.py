"""LoRA against the paper's equation, on its trainable counts, and what happens to targets that are misspelt."""

import math

import pytest
import torch
import test_laws
from conftest import hugging_face
from models import build
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
    stable = minillm.lora.wrap(nn.Sequential(nn.Linear(6, 5)), r=4, alpha=6, rank_stabilized=True)[0].patches["lora"]
    assert stable.scale == 6 / math.sqrt(4)


def test_the_start():
    """A is uniform within 1/sqrt(in), for every leaf type: a transposed A would read r as its fan-in."""
    for make, shape in ((lambda: nn.Linear(400, 30), (8, 400)), (lambda: nn.Embedding(400, 30), (8, 400))):
        patch = LoRA(minillm.registry.Site("x", make(), None, []))
        assert patch.A.shape == shape and not patch.B.any()
        assert 0.95 / math.sqrt(400) < patch.A.abs().max() <= 1 / math.sqrt(400)
    hugging_face()
    from transformers.pytorch_utils import Conv1D

    patch = LoRA(minillm.registry.Site("x", Conv1D(30, 400), None, []))
    assert patch.A.shape == (8, 400) and 0.95 / 20 < patch.A.abs().max() <= 1 / 20


def test_smollm2_counts():
    """The figures of facts: 2,442,240 trainable on the seven projections of SmolLM2 at r=8, 460,800 on q and v."""
    config = minillm.Config(49152, 576, 30, 9, kv_heads=3, ffn=1536, positions=8192)
    with torch.device("meta"):
        model = minillm.Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    for targets, count in ((None, 2_442_240), (["q_proj", "v_proj"], 460_800), (r"[qv]_proj", 460_800)):
        minillm.lora.wrap(model, targets, r=8)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
        minillm.lora.unwrap(model)


@pytest.mark.parametrize("kind", ["Linear", "llama", "gpt2", "hf_llama", "hf_gpt2", "Sequential"])
def test_defaults_work(kind):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)) if kind == "Sequential" else build(kind)
    minillm.lora.wrap(model, r=2)
    wrapped = minillm.layers(model)
    assert wrapped and not any("head" in name for name in wrapped if kind != "Linear"), "the output head is left alone"


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
    for options, culprit in ((dict(r=0), "r=0"), (dict(r=17), "r=17"), (dict(dropout=1.0), "dropout=1.0")):
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
        monkeypatch.setattr(LoRA, "forward", lambda self, below, x: below(x) + self.scale * x @ self.A @ self.B.T)
        monkeypatch.setattr(LoRA, "fold", lambda self, W, b: (W + self.scale * (self.A @ self.B.T).T, b))
        with pytest.raises(AssertionError):  # consistent with itself, and still caught: the start is too large
            test_the_start()
