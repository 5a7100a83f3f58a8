"""The models that the laws are run on, each small and random: ids (b, t) of 0 .. 23 ->
logits (b, t, 24)."""

import os

import torch
from conftest import hugging_face
from torch import nn

import minillm


# With MINILLM_TEST_DEVICE=cuda, tests/test_laws.py and all that use `build` run there.
DEVICE = os.environ.get("MINILLM_TEST_DEVICE", "cpu")


class Block(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.mlp = nn.Sequential(linear(16, 32), nn.GELU(), linear(32, 16))

    def forward(self, x):
        return x + self.mlp(x)


class Plain(nn.Module):
    """Leaves of one kind in an ordinary model that knows nothing of minillm."""

    def __init__(self, linear):
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.layers = nn.ModuleList(Block(linear) for _ in range(3))
        self.head = linear(16, 24)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def conv1d():
    hugging_face()
    from transformers.pytorch_utils import Conv1D

    return Plain(lambda into, out: Conv1D(out, into))


def hf_gpt2():
    transformers = hugging_face()
    config = transformers.GPT2Config(vocab_size=24, n_embd=16, n_layer=3, n_head=2, n_positions=32,
                                     resid_pdrop=0, embd_pdrop=0,
                                     attn_pdrop=0, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def hf_llama():
    transformers = hugging_face()
    config = transformers.LlamaConfig(vocab_size=24, hidden_size=16, intermediate_size=32,
                                      num_hidden_layers=3, num_attention_heads=4,
                                      num_key_value_heads=2, max_position_embeddings=32,
                                      tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


MODELS = {
    "Linear": lambda: Plain(nn.Linear),
    "Conv1D": conv1d,
    "gpt2": lambda: minillm.Transformer(minillm.Config.gpt2(24, 16, 3, 2, positions=32)),
    "llama": lambda: minillm.Transformer(minillm.Config(24, 16, 3, 4, kv_heads=2, ffn=32,
                                                        positions=32, tied=False)),
    "hf_gpt2": hf_gpt2,
    "hf_llama": hf_llama,
}


def build(name):
    """The model called `name`, the same weights at every call, with biases and norms away
    from 0 and 1."""
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.to(DEVICE)


# the families whose models predict tokens
TOKENS = [name for name in minillm.techniques() if minillm.registry.METHODS[name].tokens]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def logits(model, ids=None):
    """The model's logits for ids, or for IDS as the attached techniques prepare them (soft
    prompts in front)."""
    device = next(iter(model.state_dict().values())).device
    if ids is None:
        ids, _, _ = minillm.prepare(model, IDS.to(device))
    output = model(ids.to(device))
    return getattr(output, "logits", output)


def two():
    """Two linear leaves, called "0" and "2": (..., 6) -> (..., 4)."""
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4))


@torch.no_grad()
def learnt(model, std=0.3):
    """Every patch's parameters away from their start, as training would leave them; returns
    the model."""
    for layer in minillm.layers(model).values():
        for p in layer.patches.parameters():
            nn.init.normal_(p, std=std)
    return model
