"""What a user has on a module stays there when the module is wrapped: hooks,
attributes, and the way to the weight."""

import copy

import pytest
import torch
from conftest import hugging_face
from models import build, learnt, logits, two
from torch import nn

import minillm

WRAPS = {
    "prune": lambda model: minillm.prune.wrap(model, ["0"], sparsity=0.0),
    "lora": lambda model: minillm.lora.wrap(model, ["0"], r=2),
    "quant": lambda model: minillm.quant.wrap(model, ["0"]),
    "sparse": lambda model: minillm.sparse.wrap(model, ["0"], anyway=True),
    "adapters": lambda model: minillm.adapters.wrap(model, ["0"], size=2),
}


@pytest.mark.parametrize("name", WRAPS)
@pytest.mark.parametrize("merge", [False, True])
def test_hooks_see_what_the_site_computes(name, merge):
    model, x, seen = two(), torch.randn(3, 6), []
    first = model[0].register_forward_hook(lambda module, args, y: 2 * y)
    model[0].register_forward_pre_hook(lambda module, args: seen.append("pre"))
    model[0].register_full_backward_hook(lambda module, *_: seen.append("back"))
    plain = two()
    plain.load_state_dict(model.state_dict())
    if merge and name in ("quant", "sparse", "adapters"):
        return
    learnt(WRAPS[name](model))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    wrapped = WRAPS[name](plain)
    wrapped.load_state_dict(before)
    if merge:
        minillm.techniques()[name].merge(model)
    y = model[0](x)
    assert torch.allclose(y, 2 * wrapped[0](x), atol=1e-5) and seen == ["pre"]
    model(x.requires_grad_()).sum().backward()
    assert seen == ["pre", "pre", "back"]
    first.remove()  # torch's own handle finds it where it is
    assert torch.allclose(model[0](x), wrapped[0](x), atol=1e-5)
    minillm.techniques()[name].unwrap(model)
    del seen[:]
    model(x).sum().backward()
    assert seen == ["pre", "back"] and type(model[0]) is nn.Linear
    assert len(model[0]._forward_pre_hooks) == 1 and not model[0]._forward_hooks


@pytest.mark.parametrize("name", WRAPS)
def test_a_hook_that_is_always_called_sees_a_call_that_fails(name):
    model, seen = two(), []
    model[0].register_forward_hook(lambda *_: seen.append(1), always_call=True)
    for verb, count in ((WRAPS[name], 1), (minillm.techniques()[name].unwrap, 2)):
        verb(model)
        with pytest.raises(RuntimeError):
            model[0](torch.ones(3, 7))  # the leaf takes 6
        assert len(seen) == count, verb


def test_hooks_through_a_stack_of_verbs():
    model, x = two(), torch.randn(3, 6)
    model[0].register_forward_hook(lambda module, args, y: 0 * y)
    for verb in (WRAPS["lora"], WRAPS["quant"], WRAPS["prune"], minillm.lora.unwrap,
                 minillm.prune.merge, minillm.prune.unmerge,
                 minillm.quant.unwrap, minillm.prune.unwrap):
        verb(model)
        assert not model[0](x).any(), verb
    assert type(model[0]) is nn.Linear and len(model[0]._forward_hooks) == 1


@pytest.mark.parametrize("name", WRAPS)
@pytest.mark.parametrize("training", [True, False])
def test_each_leaf_stays_in_the_mode_that_was_set(name, training):
    model = WRAPS[name](two().train(training))
    assert model[0].training == getattr(model[0], "base", model[0]).training == training
    minillm.techniques()[name].unwrap(model.train(not training))
    assert model[0].training != training


def test_attributes_set_on_a_layer_reach_the_base():
    model = build("llama")
    model.layers[0].mlp.up_proj.rank = 3
    minillm.lora.wrap(model, r=2)
    layer = model.layers[0].mlp.up_proj
    layer.rank, layer.in_features = 4, 99
    assert (layer.rank, layer.base.rank, layer.base.in_features) == (4, 4, 99)
    minillm.lora.unwrap(model)
    assert model.layers[0].mlp.up_proj.rank == 4


def test_a_weight_that_is_set_through_a_layer():
    model = minillm.lora.wrap(two(), ["0"], r=2)
    new = nn.Parameter(torch.ones(5, 6))
    model[0].weight = new
    assert model[0].base.weight is new and "weight" not in model[0]._parameters
    minillm.quant.wrap(model, ["0"])
    with pytest.raises(AttributeError,
                       match=r"stored as quant and cannot be set: minillm.quant.unwrap\(model\)"):
        model[0].weight = new


def test_the_embeddings_of_a_hugging_face_model():
    """tie_weights and resize_token_embeddings read and set `.weight` of what is wrapped."""
    hugging_face()
    model = learnt(minillm.prompts.wrap(build("hf_llama")))
    y = logits(model)
    model.tie_weights()
    assert (torch.equal(logits(model), y)
            and model.get_input_embeddings().weight is model.lm_head.weight)
    with pytest.raises(ValueError, match="attached to the embedding or the output head"):
        model.resize_token_embeddings(30)
    model = learnt(minillm.lora.wrap(build("hf_llama"), ["embed_tokens"], r=2))
    # a folded weight cannot be tied
    with pytest.raises(AttributeError, match="embed_tokens.weight"):
        model.tie_weights()


def test_a_compiled_or_parallel_model_has_the_names_of_the_model(tmp_path):
    for around in (lambda model: torch.compile(model, backend="eager"), nn.DataParallel):
        model = build("Linear")
        outer = around(model)
        minillm.lora.wrap(outer, r=2)
        assert (
            set(minillm.layers(outer))
            == set(minillm.layers(model))
            == set(minillm.layers(minillm.lora.wrap(build("Linear"), r=2)))
        )
        minillm.lora.save(outer, tmp_path / 'a')
        again = minillm.lora.load(build("Linear"), tmp_path / 'a')
        assert torch.equal(logits(again), logits(model))
        minillm.freeze.wrap(outer, last=1)
        assert not model.layers[0].mlp[0].base.weight.requires_grad
        minillm.freeze.save(outer, tmp_path / "f")


@pytest.mark.parametrize("wrap", [minillm.quant.wrap, minillm.lora.wrap, minillm.adapters.wrap])
def test_save_pretrained_of_a_wrapped_model_is_an_error(wrap, tmp_path):
    transformers = hugging_face()
    model, plain = wrap(build("hf_llama")), build("hf_llama")
    with pytest.raises(
        ValueError,
        match="techniques of minillm are attached to this model.*merge or unwrap them first",
    ):
        model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="are attached"):
        copy.deepcopy(model).save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    family = wrap.__module__.split(".")[-1]
    minillm.techniques()[family].unwrap(model)
    model.save_pretrained(tmp_path / "a")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "a")
    assert family == "quant" or torch.equal(logits(again), logits(plain))
    minillm.freeze.wrap(plain, last=1).save_pretrained(tmp_path / "b")  # an ordinary model


def test_an_optimizer_of_before_takes_no_step_more():
    model = two()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.randn(3, 6)).sum().backward()
    minillm.lora.wrap(model, r=2)
    before = model[0].base.weight.clone()
    optimizer.step()
    assert torch.equal(model[0].base.weight, before)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"]])
def test_new_tokens_would_lose_a_technique_on_the_embedding_or_the_head(targets):
    model = minillm.lora.wrap(build("hf_llama"), ["q_proj"], r=2)
    assert len(model.resize_token_embeddings(30).weight) == 30
    minillm.lora.wrap(model, targets, name="ends", r=2)
    with pytest.raises(ValueError, match="attached to the embedding or the output head"):
        model.resize_token_embeddings(32)
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 30)
    minillm.lora.unwrap(model, name="ends")
    model.resize_token_embeddings(32)
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 32)
