"""The parts of any model by their role, and who asks for them: freeze, gradual
unfreezing, adapters."""

import pytest
import torch
from conftest import hugging_face
from models import build, conv1d, two
from torch import nn

import minillm
from minillm.freeze.gradual import Unfreezing
from minillm.registry import roles


def hugging(config, model, **sizes):
    transformers = hugging_face()
    return getattr(transformers, model)(getattr(transformers, config)(vocab_size=24, **sizes))


SIZES = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
             max_position_embeddings=32)
FAMILIES = {
    "hf_qwen2": lambda: hugging("Qwen2Config", "Qwen2ForCausalLM", num_key_value_heads=2, **SIZES),
    "hf_mistral": lambda: hugging("MistralConfig", "MistralForCausalLM", num_key_value_heads=2,
                                  **SIZES),
    "hf_neox": lambda: hugging("GPTNeoXConfig", "GPTNeoXForCausalLM", **SIZES),
    "hf_neo": lambda: hugging("GPTNeoConfig", "GPTNeoForCausalLM", hidden_size=16, num_layers=2,
                              num_heads=2,
                              attention_types=[[["global", "local"], 1]], window_size=2,
                              max_position_embeddings=32),
    "hf_opt": lambda: hugging("OPTConfig", "OPTForCausalLM", hidden_size=16, num_hidden_layers=3,
                              num_attention_heads=2,
                              ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=32),
    "hf_mixtral": lambda: hugging("MixtralConfig", "MixtralForCausalLM", num_key_value_heads=2,
                                  num_local_experts=5, **SIZES),
}
EXPECTED = {  # embedding, blocks, attention, mlp, norms of a block, last norm, head
    "Linear": ("embed", "layers", None, "mlp", 0, None, "head"),
    "gpt2": ("embed_tokens", "layers", "self_attn", "mlp", 2, "norm", "lm_head"),
    "llama": ("embed_tokens", "layers", "self_attn", "mlp", 2, "norm", "lm_head"),
    "hf_gpt2": ("transformer.wte", "transformer.h", "attn", "mlp", 2, "transformer.ln_f",
                "lm_head"),
    "hf_llama": ("model.embed_tokens", "model.layers", "self_attn", "mlp", 2, "model.norm",
                 "lm_head"),
    "hf_qwen2": ("model.embed_tokens", "model.layers", "self_attn", "mlp", 2, "model.norm",
                 "lm_head"),
    "hf_mistral": ("model.embed_tokens", "model.layers", "self_attn", "mlp", 2, "model.norm",
                   "lm_head"),
    "hf_neox": ("gpt_neox.embed_in", "gpt_neox.layers", "attention", "mlp", 2,
                "gpt_neox.final_layer_norm", None),
    "hf_neo": ("transformer.wte", "transformer.h", "attn", "mlp", 2, "transformer.ln_f", "lm_head"),
    "hf_opt": ("model.decoder.embed_tokens", "model.decoder.layers", "self_attn", None, 2, None,
               "lm_head"),
    "hf_mixtral": ("model.embed_tokens", "model.layers", "self_attn", "mlp", 2, "model.norm",
                   "lm_head"),
}

INSIDE = {  # the leaves of a block that compute the keys and values, and the last of the MLP
    "Linear": ([], "mlp.2"),
    "hf_gpt2": (["attn.c_attn"], "mlp.c_proj"),
    "hf_neox": (["attention.query_key_value"], "mlp.dense_4h_to_h"),
    "hf_neo": (["attn.attention.k_proj", "attn.attention.v_proj"], "mlp.c_proj"),
    "hf_opt": (["self_attn.k_proj", "self_attn.v_proj"], "fc2"),
    "hf_mixtral": (["self_attn.k_proj", "self_attn.v_proj"], None),
}


def made(name):
    return FAMILIES[name]() if name in FAMILIES else build(name)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_parts_of_a_family(name, wrapped):
    model = made(name)
    if wrapped:
        minillm.lora.wrap(model, r=2)
        if name == "Linear":
            minillm.adapters.wrap(model, ["layers.1"], size=2)  # around a block
    embedding, blocks, attention, mlp, norms, last, head = EXPECTED[name]
    parts = roles.parts(model)
    assert parts.embedding.name == embedding and (head is None or parts.head.name == head)
    assert [block.site.name for block in parts.blocks] == [f"{blocks}.{i}"
                                                           for i in range(len(parts.blocks))]
    assert len(parts.blocks) == (2 if name == "hf_neo" else 3)
    for block in parts.blocks:
        for part, key in ((block.attention, attention), (block.mlp, mlp)):
            assert (part and part.name) == (key and f"{block.site.name}.{key}")
        assert len(block.norms) == norms and all(norm in parts.norms for norm in block.norms)
        assert [leaf.name.rpartition(".")[2]
                for leaf in block.loose] == (["fc1", "fc2"] if name == "hf_opt" else [])
        keys_values, end = INSIDE.get(name, (["self_attn.k_proj", "self_attn.v_proj"],
                                             "mlp.down_proj"))
        within = f"{block.site.name}."
        assert [leaf.name for leaf in block.keys_values] == [within + key for key in keys_values]
        assert (block.last and block.last.name) == (end and within + end)
    if last:
        assert parts.norms[-1].name == last
    assert roles.blocks(model) == [block.site for block in parts.blocks]


def test_bert_and_a_plain_encoder():
    bert = hugging("BertConfig", "BertModel", **SIZES)
    block = roles.blocks(bert)[0].name + "."
    (first, *_) = roles.in_blocks(bert)
    assert [leaf.name.removeprefix(block) for leaf in (*first.keys_values, first.last)] == [
        "attention.self.key", "attention.self.value", "output.dense"]
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    (first, *_) = roles.in_blocks(nn.TransformerEncoder(layer, 1))
    assert not first.keys_values and first.last.name == "layers.0.linear2"
    (whole,) = roles.in_blocks(two())
    assert whole.site is None and not whole.keys_values and whole.last is None
    assert len(roles.in_blocks(build("llama"))) == 3


def test_a_list_of_experts_has_no_last_leaf():
    block = nn.ModuleDict({"attn": nn.ModuleDict({"k_proj": nn.Linear(4, 4)}),
                           "mlp": nn.ModuleDict({"gate": nn.Linear(4, 2), "experts": nn.ModuleList(
                               nn.Sequential(nn.Linear(4, 4)) for _ in "12")})})
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    (found,) = roles.in_blocks(model)
    assert [leaf.name for leaf in found.keys_values] == ["layers.0.attn.k_proj"]
    assert found.mlp and found.last is None


def test_the_width_of_experts_is_that_of_the_norms_directly_in_a_block():
    """Not that of a norm within the attention, which is of one head (Qwen3)."""
    block = nn.ModuleDict({
        "attn": nn.ModuleDict({"k_proj": nn.Linear(8, 4), "k_norm": nn.LayerNorm(4)}),
        "norm": nn.LayerNorm(8),
        "mlp": nn.ModuleDict({"experts": nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8)) for _ in "12")})})
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    assert roles.width_of_experts(model) == 8
    assert roles.width_of_experts(build("llama")) is None


class Experts(nn.Module):
    """Two blocks, each with eight experts: the longest list is no list of blocks."""

    def __init__(self, at_root=False):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"experts": nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in "12345678")}
            )
            for _ in "12"
        )
        if at_root:
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in "12345678")
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in "123")


@pytest.mark.parametrize("at_root", [False, True])
def test_experts_and_heads_are_no_blocks(at_root):
    model = Experts(at_root)
    assert [site.name for site in roles.blocks(model)] == ["layers.0", "layers.1"]
    minillm.freeze.wrap(model, last=1)
    assert not any(p.requires_grad for p in model.layers[0].parameters())
    assert all(p.requires_grad for p in [*model.layers[1].parameters(), *model.heads.parameters()])
    alone = nn.Module()
    alone.experts = nn.ModuleList(nn.Linear(4, 4) for _ in "123")
    with pytest.raises(ValueError, match="this Module has no list of blocks.*targets="):
        roles.blocks(alone)


def test_a_stack_of_leaves_is_a_list_of_blocks_where_there_is_no_other():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(4, 4) for _ in "123")
    assert len(roles.blocks(model)) == 3


def test_an_encoder_decoder_is_refused():
    model = hugging("T5Config", "T5ForConditionalGeneration", d_model=16, d_kv=8, d_ff=32,
                    num_layers=2, num_heads=2)
    for call in (roles.parts, minillm.freeze.wrap, minillm.adapters.wrap,
                 lambda m: Unfreezing()(m, 0, 4)):
        with pytest.raises(
            ValueError,
            match=r"several lists of blocks, 'encoder.block' \(2\) and 'decoder.block' \(2\): "
                  r"name .*targets=",
        ):
            call(model)
    assert len(roles.blocks(model.encoder)) == 2
    assert all(p.requires_grad for p in model.parameters()) and not minillm.layers(model)


def test_an_adapter_follows_each_sublayer_once():
    found = {name: sorted(minillm.layers(minillm.adapters.wrap(made(name), size=2)))
             for name in ("hf_neo", "hf_opt", "Linear")}
    assert found["hf_neo"] == [f"transformer.h.{i}.{part}" for i in range(2)
                               for part in ("attn", "mlp")]
    assert found["hf_opt"] == [f"model.decoder.layers.{i}.{part}" for i in range(3)
                               for part in ("fc2", "self_attn")]
    assert found["Linear"] == [f"layers.{i}.mlp" for i in range(3)]
    with pytest.raises(ValueError, match="no sublayer to wrap by default"):
        minillm.adapters.wrap(two())
    minillm.adapters.wrap(two(), ["0"], size=2)
    assert list(minillm.layers(minillm.adapters.wrap(build("gpt2").layers[0], size=2))) == [
        "self_attn",
        "mlp",
    ]


class Shared(nn.Module):
    """A root parameter, and a module that two blocks share."""

    def __init__(self):
        super().__init__()
        self.position, shared = nn.Parameter(torch.zeros(4)), nn.Linear(4, 4)
        self.body = nn.Module()
        self.body.token = nn.Parameter(torch.zeros(4))
        self.body.layers = nn.ModuleList(nn.ModuleDict(dict(shared=shared, own=nn.Linear(4, 4)))
                                         for _ in "123")
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = x + self.position + self.body.token
        for layer in self.body.layers:
            x = layer["own"](layer["shared"](x))
        return x * self.scale


def learning(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_freeze_sees_root_parameters_and_modules_of_two_parents():
    model = minillm.freeze.wrap(Shared(), last=1)
    assert learning(model) == {"body.layers.2.own.weight", "body.layers.2.own.bias"}
    model = minillm.freeze.wrap(Shared(), ["layers.2"])  # its name in the tree begins with layers.0
    assert learning(model) == learning(Shared()) - {f"body.layers.{i}.{key}" for i in (0, 2)
                                                    for key in (
        ("shared.weight", "shared.bias") if i == 0 else ("own.weight", "own.bias"))}
    minillm.freeze.unwrap(model)
    assert learning(model) == learning(Shared())
    model = minillm.lora.wrap(Shared(), ["shared"], r=2)
    minillm.freeze.wrap(model, ["layers.1"])
    minillm.lora.unwrap(model)
    assert "body.layers.0.shared.weight" not in learning(model)


def test_a_block_that_occurs_twice_is_refused():
    model = Shared()
    model.body.layers[2] = model.body.layers[0]
    for last in (1, 2):
        with pytest.raises(ValueError, match="a block of 'body.layers' occurs twice.*targets="):
            minillm.freeze.wrap(model, last=last)
    with pytest.raises(ValueError, match="occurs twice"):
        Unfreezing()(model, 0, 8)
    assert learning(model) == {name for name, _ in model.named_parameters()}
    minillm.freeze.wrap(model, ["layers.1"])
    assert "body.layers.1.own.weight" not in learning(model)


def test_what_waits_has_no_gradient():
    model = minillm.lora.wrap(Shared(), ["own"], r=2)
    for p in model.parameters():
        p.requires_grad_(True)
    for step, waits in ((0, 2), (2, 1), (4, 0)):
        model(torch.randn(2, 4)).sum().backward()
        Unfreezing(until=0.75)(model, step, 8)
        waiting = {name for name, p in model.named_parameters() if p.grad is None}
        assert waiting == {name for name, _ in model.named_parameters() if waits and (
            name.startswith(("position", "scale", "body.token"))
            or name.startswith(tuple(f"body.layers.{i}." for i in range(waits))))}
        model.zero_grad()


def test_conv1d_has_the_same_parts():
    assert [block.mlp.name
            for block in roles.parts(conv1d()).blocks] == [f"layers.{i}.mlp" for i in range(3)]


@pytest.mark.parametrize("layers, last, message", [
    (1, 1, "last=1: 'layers' has one block, and none below it to freeze"),
    (3, 0, "last=0: 'layers' has 3 blocks, so last is from 1 to 2"),
    (3, 3, "last=3: 'layers' has 3 blocks, so last is from 1 to 2"),
])
def test_how_many_blocks_can_learn(layers, last, message):
    model = minillm.Transformer(minillm.Config(24, 16, layers, 2))
    with pytest.raises(ValueError, match=message):
        minillm.freeze.wrap(model, last=last)


def qwen_moe():
    return hugging("Qwen2MoeConfig", "Qwen2MoeForCausalLM", num_key_value_heads=2, num_experts=4,
                   num_experts_per_tok=2, moe_intermediate_size=8,
                   shared_expert_intermediate_size=12, **SIZES)


@pytest.mark.parametrize("make", [FAMILIES["hf_mixtral"], qwen_moe])
def test_a_mixture_of_experts(make, caplog):
    """An adapter has the width of the residual stream, and what is not wrapped is named."""
    ids = torch.tensor([[1, 2, 3]])
    model = make().eval()
    before = model(ids).logits
    minillm.adapters.wrap(model, size=2)
    assert torch.equal(model(ids).logits, before)
    assert sorted(minillm.layers(model)) == sorted(f"model.layers.{i}.{part}" for i in range(3)
                                                   for part in ("mlp", "self_attn"))
    assert not caplog.records, "a sublayer may hold any weights"
    model = minillm.quant.wrap(make())
    (record,) = caplog.records
    text = record.getMessage()
    assert "6 weights of three dimensions stay as they are" in text
    assert "'model.layers.0.mlp.experts.gate_up_proj'" in text
    assert f"{sum(p.numel() for p in model.parameters() if p.dim() == 3):,} numbers" in text
