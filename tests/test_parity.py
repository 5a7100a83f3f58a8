"""Side by side with peft: the same tensors, the same logits, the same losses."""

import pytest
import torch
from conftest import hugging_face
from models import IDS, build, logits
from torch import nn

import minillm

pytestmark = pytest.mark.parity


def with_peft(kind, config):
    import warnings

    hugging_face()
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings(action="ignore"):
        model = peft.get_peft_model(build(kind),
                                    getattr(peft, config.pop("class"))(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def lora_tensors(theirs):
    """{site: (A, B)} of a peft model."""
    found = {}
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            found[name.removeprefix("base_model.model.")] = (
                module.lora_A["default"].weight,
                module.lora_B["default"].weight,
            )
    return found


@pytest.mark.parametrize("kind, targets",
                         [("hf_llama", ["q_proj", "v_proj", "down_proj"]),
                          ("hf_gpt2", ["c_attn", "c_fc"])])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_lora_is_pefts(kind, targets, rank_stabilized):
    theirs = with_peft(kind,
                       {"class": "LoraConfig", "r": 4, "lora_alpha": 10, "target_modules": targets,
                        "use_rslora": rank_stabilized,
                        "fan_in_fan_out": kind == "hf_gpt2"})
    ours = minillm.lora.wrap(build(kind), targets, r=4, alpha=10, rank_stabilized=rank_stabilized)
    for name, (A, B) in lora_tensors(theirs).items():
        patch = minillm.layers(ours)[name].patches["lora"]
        patch.A.data.copy_(A)
        patch.B.data.copy_(B)
    expected = theirs(IDS).logits
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(minillm.lora.merge(ours)),
                               theirs.merge_and_unload()(IDS).logits, rtol=0, atol=1e-5)


def test_lora_trains_as_pefts():
    """20 AdamW steps from the same tensors on the same batches give the same losses."""
    theirs = with_peft("hf_llama",
                       {"class": "LoraConfig", "r": 4, "lora_alpha": 8,
                        "target_modules": "all-linear"})
    ours = minillm.lora.wrap(build("hf_llama"), r=4, alpha=8)
    for name, (A, B) in lora_tensors(theirs).items():
        patch = minillm.layers(ours)[name].patches["lora"]
        patch.A.data.copy_(A)
        patch.B.data.copy_(B)
    assert len(lora_tensors(theirs)) == len(minillm.layers(ours))
    runs = []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        draw, run = torch.Generator().manual_seed(3), []
        for _ in range(20):
            ids = torch.randint(24, (2, 8), generator=draw)
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(loss.item())
        runs.append(run)
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)


@pytest.mark.parametrize("kind", ["hf_llama", "hf_gpt2"])
def test_soft_prompts_are_pefts(kind):
    theirs = with_peft(kind,
                       {"class": "PromptTuningConfig", "task_type": "CAUSAL_LM",
                        "num_virtual_tokens": 5})
    ours = minillm.prompts.wrap(build(kind), length=5)
    patch = next(iter(minillm.layers(ours).values())).patches["prompts"]
    patch.P.data.copy_(theirs.prompt_encoder["default"].embedding.weight)
    torch.testing.assert_close(logits(ours),
                               theirs(IDS, attention_mask=torch.ones_like(IDS)).logits, rtol=0,
                               atol=1e-5)


def test_masks_are_those_of_torchs_own_pruning():
    from torch.nn.utils import prune

    ours, theirs = nn.Linear(10, 6), nn.Linear(10, 6)
    theirs.load_state_dict(ours.state_dict())
    prune.l1_unstructured(theirs, "weight", amount=0.4)
    model = minillm.prune.wrap(nn.Sequential(ours), sparsity=0.4, group="matrix")
    assert model[0].patches["prune"].mask.equal(theirs.weight_mask.bool())
