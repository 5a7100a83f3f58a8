"""(IA)3: the paper's formula, the leaves it takes, and peft's layer: outputs, gradients, merges."""

import pytest
import torch
import torch.nn.functional as F
from models import IDS, build, learnt, logits, two
from test_parity import with_peft
from torch import nn

import minillm
from minillm.adapters import ia3

PAPERS = {  # the leaves in a block, and whether the input of each is scaled
    "llama": {"self_attn.k_proj": False, "self_attn.v_proj": False, "mlp.down_proj": True},
    "gpt2": {"self_attn.k_proj": False, "self_attn.v_proj": False, "mlp.down_proj": True},
    "hf_llama": {"self_attn.k_proj": False, "self_attn.v_proj": False, "mlp.down_proj": True},
    "hf_gpt2": {"attn.c_attn": False, "mlp.c_proj": True},
    "Linear": {"mlp.2": True},
    "Conv1D": {"mlp.2": True},
}


def taken(model):
    """{leaf in the first block: whether its input is scaled}"""
    first = minillm.registry.roles.blocks(model)[0].name + "."
    return {name.removeprefix(first): layer.patches["ia3"].inner
            for name, layer in minillm.layers(model).items() if name.startswith(first)}


@pytest.mark.parametrize("kind", PAPERS)
def test_the_default_is_the_keys_the_values_and_the_inner_activations(kind):
    model = ia3.wrap(build(kind))
    assert taken(model) == PAPERS[kind] and len(minillm.layers(model)) == 3 * len(PAPERS[kind])
    for layer in minillm.layers(model).values():
        patch, (W, _) = layer.patches["ia3"], layer.dense()
        assert torch.equal(patch.factor, torch.ones(W.shape[1 if patch.inner else 0]))
    assert taken(ia3.wrap(build(kind), list(PAPERS[kind]))) == PAPERS[kind]  # by role, named too


def test_an_attention_with_the_papers_three_vectors():
    """softmax(q (l_k * k)^T) (l_v * v), and (l_ff * f(W_1 x)) W_2, written out."""
    config = minillm.Config(24, 16, 1, 2, ffn=32, positions=32, tied=False, qkv_bias=True)
    model = minillm.Transformer(config).eval()
    learnt(ia3.wrap(model))
    block, x = model.layers[0], torch.randn(1, 1, 16)
    mlp = block.mlp
    l_ff = mlp.down_proj.patches["ia3"].factor
    inner = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    expected = (l_ff * inner) @ mlp.down_proj.base.weight.T
    assert torch.allclose(mlp(x), expected, atol=1e-6)
    for leaf in (block.self_attn.k_proj, block.self_attn.v_proj):
        l, base = leaf.patches["ia3"].factor, leaf.base  # noqa: E741
        assert torch.allclose(leaf(x), l * (x @ base.weight.T + base.bias), atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_the_formula_and_its_fold(inner, bias):
    model = nn.Sequential(nn.Linear(6, 5, bias=bias))
    ia3.wrap(model, ["0"], feedforward=["0"] if inner else [])
    learnt(model)
    layer = model[0]
    patch, W, x = layer.patches["ia3"], layer.base.weight, torch.randn(4, 6, requires_grad=True)
    b = layer.base.bias if bias else torch.zeros(5)
    expected = (x * patch.factor) @ W.T + b if inner else patch.factor * (x @ W.T + b)
    y, weight = model(x), torch.randn(4, 5)
    assert torch.allclose(y, expected, atol=1e-6)
    for p, q in zip(*(torch.autograd.grad((out * weight).sum(), [x, patch.factor])
                      for out in (y, expected))):
        assert torch.allclose(p, q, atol=1e-5)
    folded, shift = layer.dense()
    assert torch.allclose(folded, torch.diag(patch.factor) @ W if not inner
                          else W @ torch.diag(patch.factor), atol=1e-6)
    assert (shift is None) == (not bias)
    old = {name: t.clone() for name, t in model.state_dict().items()}
    assert torch.allclose(minillm.adapters.merge(model)(x), y, atol=1e-6)
    assert type(model[0]) is nn.Linear
    minillm.adapters.unmerge(model)
    assert all(torch.equal(t, old[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("feedforward", [[], ["0"]])
def test_over_a_half_precision_base_the_factors_are_float32_and_the_output_is_not(feedforward):
    model = ia3.wrap(two().to(torch.bfloat16), ["0"], feedforward=feedforward)
    assert model[0].patches["ia3"].factor.dtype == torch.float32
    assert model[0](torch.randn(3, 6).bfloat16()).dtype == torch.bfloat16
    assert model[0].dense()[0].dtype == torch.bfloat16


def test_a_factor_of_zero_comes_back_from_a_merge():
    """peft divides by it."""
    model = ia3.wrap(two(), ["0"])
    W = model[0].base.weight.clone()
    nn.init.zeros_(model[0].patches["ia3"].factor)
    assert not minillm.adapters.merge(model)[0].weight.any()
    assert torch.equal(minillm.adapters.unwrap(model)[0].weight, W)


def test_an_idle_one_scales_nothing_and_two_multiply():
    model, x = two(), torch.randn(3, 6)
    plain = model(x)
    ia3.wrap(model, ["0"], name="a")
    ia3.wrap(model, ["0"], name="b")
    nn.init.constant_(model[0].patches["a"].factor, 2.0)
    nn.init.constant_(model[0].patches["b"].factor, 0.5)
    assert torch.allclose(model(x), plain, atol=1e-6)
    assert not torch.allclose(minillm.use(model, "a")(x), plain, atol=1e-3)
    assert torch.equal(minillm.use(model)(x), plain)


@pytest.mark.parametrize("call, message", [
    (lambda: ia3.wrap(build("llama"), ["k_proj"], feedforward=["down_proj"]),
     r"feedforward=\['down_proj'\] names 'layers.0.mlp.down_proj', which is none of the targets"),
    (lambda: ia3.wrap(build("llama"), ["k_proj"], feedforward=["down"]),
     "'down' matches no leaf.*'down_proj'"),
    (lambda: ia3.wrap(build("llama"), ["k_proj"], feedforward=""), "'' matches no leaf"),
    (lambda: ia3.wrap(build("llama"), ["k_prj"]), "'k_prj' matches no leaf.*'k_proj'"),
    (lambda: ia3.wrap(build("llama"), ["embed_tokens"]), "Embedding, no leaf that can be wrapped"),
    (lambda: ia3.wrap(two()), "no leaf to wrap by default in this Sequential.*'0', '2'"),
    (lambda: ia3.wrap(ia3.wrap(build("llama"), ["down_proj"])),
     "'layers.0.mlp.down_proj' is already wrapped with ia3"),
    (lambda: ia3.wrap(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1,
                                            enable_nested_tensor=False)),
     "'layers.0.self_attn' is a MultiheadAttention, in which .IA.3 does not find its leaf: name "
     "the leaves in targets= and feedforward="),
    (lambda: ia3.IA3(minillm.registry.Site("x", nn.Linear(4, 4), None, []), inner=1),
     "inner=1 is neither True nor False"),
])
def test_a_wrong_call_says_what_is_possible(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_call_changes_nothing():
    model = ia3.wrap(build("llama"), ["down_proj"])
    with pytest.raises(ValueError, match="already"):
        ia3.wrap(model)
    assert sorted(minillm.layers(model)) == [f"layers.{i}.mlp.down_proj" for i in range(3)]


def test_a_mixture_of_experts_and_an_encoder_decoder_need_names():
    from test_roles import hugging, made

    with pytest.raises(ValueError, match="'model.layers.0.mlp' is a MixtralSparseMoeBlock, in whi"):
        ia3.wrap(made("hf_mixtral"))
    assert len(minillm.layers(ia3.wrap(made("hf_mixtral"), ["k_proj", "v_proj"]))) == 6
    t5 = hugging("T5Config", "T5ForConditionalGeneration", d_model=16, d_kv=8, d_ff=32,
                 num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="'encoder.block'.*; with targets=, give feedforward= too"):
        ia3.wrap(t5, ["k", "v", "wo"])
    ia3.wrap(t5, ["k", "v", "wo"], feedforward=["wo"])
    inner = {name.rpartition(".")[2]: layer.patches["ia3"].inner
             for name, layer in minillm.layers(t5).items()}
    assert inner == {"k": False, "v": False, "wo": True}


# --- beside peft --------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("kind, feedforward", [("hf_llama", ["down_proj"]),
                                               ("hf_gpt2", ["mlp.c_proj"]), ("hf_llama", [])])
def test_peft(kind, feedforward):
    """The same leaves by default; outputs within 1e-5, the gradients of all factors, merged."""
    targets = {"hf_llama": ["k_proj", "v_proj", "down_proj"], "hf_gpt2": ["c_attn", "mlp.c_proj"]}
    theirs = with_peft(kind, {"class": "IA3Config", "target_modules": targets[kind],
                              "feedforward_modules": feedforward,
                              "fan_in_fan_out": kind == "hf_gpt2"})
    ours = (ia3.wrap(build(kind)) if feedforward
            else ia3.wrap(build(kind), targets[kind], feedforward=[]))
    pairs = {}
    for name, module in theirs.base_model.model.named_modules():
        if hasattr(module, "ia3_l"):
            p, q = minillm.layers(ours)[name].patches["ia3"].factor, module.ia3_l["default"]
            assert not torch.equal(q, torch.ones_like(q))
            p.data.copy_(q.detach().flatten())
            pairs[name] = p, q
    assert pairs.keys() == minillm.layers(ours).keys() and len(pairs) == 3 * len(targets[kind])
    outputs = logits(ours), theirs(IDS).logits
    assert torch.allclose(*outputs, rtol=0, atol=1e-5)
    weight = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weight).sum().backward()
    for p, q in pairs.values():
        assert torch.allclose(p.grad, q.grad.flatten(), rtol=0,
                              atol=1e-5 * max(1.0, q.grad.abs().max().item()))
    merged = theirs.merge_and_unload()(IDS).logits
    assert torch.allclose(logits(minillm.adapters.merge(ours)), merged, rtol=0, atol=1e-5)
