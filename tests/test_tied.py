"""A tied matrix in a format is stored once: the embedding and the head are two leaves
over the same buffers."""

import copy

import pytest
import torch
from models import IDS, build, learnt, logits

import minillm
from minillm.measure import report
from minillm.quant import Integer

BOTH = {"llama": ["embed_tokens", "lm_head"], "gpt2": ["embed_tokens", "lm_head"],
        "hf_llama": ["embed_tokens", "lm_head"],
        "hf_gpt2": ["wte", "lm_head"]}


def tied(kind):
    if kind != "llama":
        return build(kind)
    torch.manual_seed(1)
    return minillm.Transformer(minillm.Config(24, 16, 3, 4, kv_heads=2, ffn=32, positions=32,
                                              tied=True)).eval()


def forms(model):
    return [site.module for site in minillm.registry.walk(model)
            if isinstance(site.module, Integer)]


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("options", [{}, dict(bits=4, group=4), dict(bits=4, zero_point=True)])
def test_stored_once_through_everything(kind, options, tmp_path):
    model = minillm.quant.wrap(tied(kind), BOTH[kind], **options)
    one, other = forms(model)
    assert torch.equal(one.weight, other.weight) and one.q.data_ptr() == other.q.data_ptr()
    apart = minillm.quant.wrap(minillm.untie(tied(kind)), BOTH[kind], **options)
    assert torch.equal(logits(model), logits(apart))
    assert report.total_bytes(apart) - report.total_bytes(model) == sum(
        b.numel() * b.element_size() for b in one.buffers()
    )
    twin = copy.deepcopy(model).to(torch.bfloat16)
    a, b = forms(twin)
    assert a.q.data_ptr() == b.q.data_ptr() != one.q.data_ptr() and a.scale.dtype == torch.float32
    assert a.scale.data_ptr() == b.scale.data_ptr()
    learnt(minillm.lora.wrap(model, ["lm_head", "q_proj" if "gpt2" != kind[3:] else "c_attn"], r=2))
    with pytest.raises(ValueError, match="'lm_head' shares its matrix with .*untie"):
        minillm.lora.merge(model)
    minillm.quant.save(model, tmp_path / "q"), minillm.lora.save(model, tmp_path / "l")
    again = minillm.lora.load(minillm.quant.load(tied(kind), tmp_path / "q"), tmp_path / "l")
    assert torch.equal(logits(again), logits(model))
    assert forms(again)[0].q.data_ptr() == forms(again)[1].q.data_ptr()
    minillm.lora.unwrap(model)
    dense = logits(model)
    minillm.quant.unwrap(model)
    assert torch.allclose(logits(model), dense, atol=1e-4)
    weights = {id(p) for name, *_, p in minillm.registry.parameters(model)
               if name.endswith((BOTH[kind][0] + ".weight", "lm_head.weight"))}
    assert len(weights) == 1 and minillm.registry.ties(model)


def test_one_of_two_is_refused_and_untied_each_has_its_own():
    with pytest.raises(
        ValueError,
        match="'lm_head' shares its matrix with embed_tokens: .*Name all of them as targets.*untie",
    ):
        minillm.quant.wrap(tied("llama"), ["lm_head"])
    model = minillm.untie(minillm.quant.wrap(tied("llama"), BOTH["llama"]))
    one, other = forms(model)
    assert one.q.data_ptr() != other.q.data_ptr() and torch.equal(one.q, other.q)
    minillm.lora.merge(learnt(minillm.lora.wrap(model, ["lm_head"], r=2)))
    one, other = forms(model)
    assert not torch.equal(one.q, other.q)


def test_freezing_and_learning_of_a_tied_format():
    model = minillm.quant.wrap(minillm.freeze.wrap(tied("llama"), ["lm_head"]), BOTH["llama"])
    minillm.quant.unwrap(model)
    assert (not model.embed_tokens.weight.requires_grad
            and model.embed_tokens.weight is model.lm_head.weight)
    assert minillm.freeze.unwrap(model).embed_tokens.weight.requires_grad


def test_decoding_with_both_in_integers():
    one, two = (minillm.quant.wrap(model, lambda name, module: True)
                for model in (tied("llama"), minillm.untie(tied("llama"))))
    ids = minillm.model.generate.generate(one, IDS, 5)
    assert torch.equal(ids, minillm.model.generate.generate(two, IDS, 5))
