"""Each technique against its paper's formula, and the ways it can be called wrongly."""

import pytest
import torch
import torch.nn.functional as F
from models import IDS, build, logits, two
from torch import nn

import minillm
from minillm.registry import CannotMerge, Site, roles


# --- adapters -----------------------------------------------------------------------------------


def test_adapters_compute_houlsbys_bottleneck():
    model = two()
    plain = model[0]
    patch = minillm.adapters.wrap(model, ["0"], size=3)[0].patches["adapters"]
    for p in patch.parameters():
        nn.init.normal_(p)
    x = torch.randn(7, 6)
    h = plain(x)
    expected = h + F.gelu(h @ patch.down.T + patch.b_down) @ patch.up.T + patch.b_up
    torch.testing.assert_close(model[0](x), expected)
    assert sum(p.numel() for p in patch.parameters()) == 2 * 3 * 5 + 3 + 5


def test_adapters_adapt_the_first_item_of_a_tuple():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.o_proj = nn.Linear(4, 4)

        def forward(self, x, *, factor=1):
            return self.o_proj(x) * factor, "weights"

    model = nn.ModuleDict({"attn": Attention()})
    x = torch.randn(2, 4)
    before = model["attn"](x, factor=2)[0]
    minillm.adapters.wrap(model, size=2)
    nn.init.ones_(model["attn"].patches["adapters"].b_up)
    h, other = model["attn"](x, factor=2)
    torch.testing.assert_close(h, before + 1)
    assert other == "weights"


def test_houlsbys_norms_learn_beside_the_adapters(tmp_path):
    """Let learn by the caller after wrap: trained, in the file, and they learn again."""
    model = minillm.adapters.wrap(build("gpt2"), size=2)
    sites = roles.parts(model).norms
    norms = [f"{site.name}.{key}" for site in sites for key in ("weight", "bias")]
    for site in sites:
        site.module.requires_grad_(True)
    logits(model).square().mean().backward()
    with torch.no_grad():
        for p in [p for p in model.parameters() if p.requires_grad]:
            p.sub_(0.1 * p.grad.sign())
    minillm.adapters.save(model, tmp_path / "a")
    again = minillm.adapters.load(build("gpt2"), tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    learns = [name for name, p in again.named_parameters() if p.requires_grad]
    assert len(norms) == 14 and [name for name in learns if "patches" not in name] == norms


def test_adapters_say_what_they_need():
    with pytest.raises(ValueError, match="no sublayer to wrap by default"):
        minillm.adapters.wrap(two())
    with pytest.raises(ValueError, match="size=0"):
        minillm.adapters.wrap(build("llama"), size=0)
    model = minillm.adapters.wrap(build("llama"), size=2)
    with pytest.raises(CannotMerge, match="adapters cannot be merged"):
        minillm.adapters.merge(model)


# --- soft prompts -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_soft_prompt_is_vectors_before_the_embedded_text(kind, monkeypatch):
    """model([P; embed(x)]), computed by handing the model the concatenation itself."""
    model = build(kind)
    patch = minillm.prompts.wrap(model, length=3).embed_tokens.patches["prompts"]
    nn.init.normal_(patch.P)
    ids, labels, mask = minillm.prepare(model, IDS, IDS, torch.ones_like(IDS, dtype=torch.bool))
    assert (ids.shape == (2, 9) and labels[:, :3].eq(-100).all() and mask.all()
            and labels[:, 3:].equal(IDS))
    ours = model(ids)
    plain = build(kind)
    table = plain.embed_tokens
    whole = torch.cat([patch.P.expand(2, -1, -1), table(IDS)], 1)
    monkeypatch.setattr(type(table), "forward", lambda self,
                        x: whole if self is table else F.embedding(x, self.weight))
    torch.testing.assert_close(ours, plain(torch.zeros(2, 9, dtype=torch.long)))


def test_a_soft_prompt_starts_from_rows_of_the_vocabulary():
    model = build("llama")
    rows = {tuple(row) for row in model.embed_tokens.weight.tolist()}
    patch = minillm.prompts.wrap(model, length=4).embed_tokens.patches["prompts"]
    assert all(tuple(row) in rows for row in patch.P.tolist())
    config = minillm.Config(49152, 576, 2, 9, kv_heads=3, ffn=64)
    big = minillm.prompts.wrap(minillm.Transformer(config), length=20)
    assert sum(p.numel() for p in big.parameters() if p.requires_grad) == 11_520


# --- freezing -----------------------------------------------------------------------------------


def test_freeze_leaves_the_last_blocks_and_what_follows():
    model = minillm.freeze.wrap(build("llama"), last=2)
    for name, p in model.named_parameters():
        assert p.requires_grad == name.startswith(("layers.1", "layers.2", "norm", "lm_head")), name
    minillm.freeze.wrap(model, ["layers.2"])
    assert not any(p.requires_grad for p in model.layers[2].parameters())
    minillm.freeze.unwrap(model)
    assert all(p.requires_grad for p in model.parameters())
    model.norm.weight.requires_grad_(False)
    minillm.freeze.unwrap(minillm.freeze.wrap(model, last=1))
    assert not model.norm.weight.requires_grad, "what the user froze stays frozen"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "hf_llama", "hf_gpt2"])
def test_the_patterns_of_freezing(kind):
    """The first blocks, the embedding and the head, and all but the norms, by the page's lines."""
    def learning(model):
        return {name for name, p in model.named_parameters() if p.requires_grad}

    n = len(roles.blocks(build(kind)))
    for first in range(1, n):
        expected = learning(minillm.freeze.wrap(build(kind), last=n - first))
        assert learning(minillm.freeze.wrap(build(kind), first=first)) == expected
    assert learning(minillm.freeze.wrap(build(kind))) == learning(
        minillm.freeze.wrap(build(kind), last=2))
    every = learning(build(kind))
    for part in ("head", "embedding"):
        model = build(kind)
        module = model.get_output_embeddings() if part == "head" else next(
            m for m in model.modules() if isinstance(m, torch.nn.Embedding))
        name = next(name for name, m in model.named_modules() if m is module)
        held = {id(p) for p in module.parameters()}
        frozen = {key for key, p in model.named_parameters() if id(p) in held}
        assert frozen and learning(minillm.freeze.wrap(model, [name])) == every - frozen
    norms = minillm.freeze.wrap(build(kind), lambda name, module: (
        not list(module.children()) and "norm" not in name and "ln_" not in name))
    assert learning(norms) == {name for name in every if "norm" in name or "ln_" in name} != set()


@pytest.mark.parametrize("call, message", [
    (lambda m: minillm.freeze.wrap(m, last=3), "last=3.*3 blocks"),
    (lambda m: minillm.freeze.wrap(m, first=3), "first=3.*3 blocks, so first is from 1 to 2"),
    (lambda m: minillm.freeze.wrap(m, first=0), "first=0.*so first is from 1 to 2"),
    (lambda m: minillm.freeze.wrap(m, first=1.5), "first=1.5.*so first is from 1 to 2"),
    (lambda m: minillm.freeze.wrap(m, first=1, last=1), "last=1 and first=1: each says what is fr"),
    (lambda m: minillm.freeze.wrap(m, ["lm_head"], last=2),
     r"targets=\['lm_head'\] and last=2: each says"),
    (lambda m: minillm.freeze.wrap(m, ["layer"]), "'layer' matches no module.*'layers'"),
    (lambda m: minillm.freeze.wrap(m, ".*"), "every parameter"),
    (lambda m: minillm.freeze.unwrap(m), "nothing is frozen"),
    (lambda m: minillm.freeze.wrap(minillm.freeze.wrap(m, last=1), last=2),
     "'embed_tokens.weight' is frozen already.*unwrap"),
    (lambda m: minillm.freeze.merge(m), "the model itself"),
    (lambda m: minillm.freeze.wrap(two()), "no list of blocks"),
])
def test_freeze_names_the_culprit(call, message):
    with pytest.raises((ValueError, CannotMerge), match=message):
        call(build("llama"))


# --- the shared half ----------------------------------------------------------------------------


def test_a_module_used_twice_is_wrapped_once_and_everywhere():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.GELU(), shared)
    minillm.lora.wrap(model, r=2)
    assert model[0] is model[2] and len(minillm.layers(model)) == 1
    minillm.lora.unwrap(model)
    assert model[0] is shared and model[2] is shared


def test_code_that_reads_weight_sees_the_folded_one():
    """nn.MultiheadAttention never calls its out_proj; it reads its weight."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    x = torch.randn(3, 1, 8)
    before = model["attention"](x, x, x)[0]
    minillm.lora.wrap(model, ["out_proj"], r=2)
    nn.init.normal_(model["attention"].out_proj.patches["lora"].B)
    after = model["attention"](x, x, x)[0]
    assert not torch.allclose(after, before)
    minillm.lora.merge(model)
    torch.testing.assert_close(model["attention"](x, x, x)[0], after)


def test_only_the_innermost_patch_is_merged():
    model = minillm.lora.wrap(minillm.prune.wrap(two(), sparsity=0.5), r=2)
    nn.init.normal_(model[0].patches["lora"].B)
    x = torch.randn(3, 6)
    expected = model(x)
    with pytest.raises(ValueError, match="prune lies beneath it: merge or unwrap prune first"):
        minillm.lora.merge(model)
    minillm.lora.merge(minillm.prune.merge(model))
    torch.testing.assert_close(model(x), expected)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError,
                       match="lora was merged into '0' after prune: unmerge lora first"):
        minillm.prune.unmerge(model)
    minillm.prune.unmerge(minillm.lora.unmerge(model))
    assert list(model[0].patches) == ["prune", "lora"] and model(x).equal(expected)


def test_a_merge_without_keep_lets_the_old_base_go():
    model = minillm.lora.merge(minillm.lora.wrap(two(), r=2), keep=False)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="no lora is merged.*keep=False"):
        minillm.lora.unmerge(model)


def test_the_soft_prompt_stays_outermost():
    model = minillm.lora.wrap(minillm.prompts.wrap(build("llama"), length=2), ["embed_tokens"], r=2)
    assert list(model.embed_tokens.patches) == ["lora", "prompts"]
    logits(model)


def test_files_that_do_not_fit_are_refused_and_change_nothing(tmp_path):
    path = tmp_path / "lora.safetensors"
    minillm.lora.save(minillm.lora.wrap(build("llama"), r=2), path)
    other = minillm.Transformer(minillm.Config(24, 32, 3, 4, kv_heads=2, ffn=32, positions=32))
    with pytest.raises(ValueError, match=r"q_proj' does not fit.*\(2, 32\).*\(2, 16\)"):
        minillm.lora.load(other, path)
    with pytest.raises(ValueError, match="'layers.0.self_attn.q_proj', which this model lacks"):
        minillm.lora.load(two(), path)
    with pytest.raises(ValueError,
                       match="not a file of adapters; it holds lora: use minillm.lora.load"):
        minillm.adapters.load(build("llama"), path)
    with pytest.raises(ValueError, match="which .* lacks: unwrap it first"):
        minillm.lora.load(minillm.lora.wrap(build("llama"), ".*", r=2), path, replace=True)
    assert not minillm.layers(other)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        minillm.lora.load(build("llama"), path)
    (tmp_path / "x.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="other formats are not opened"):
        minillm.lora.load(build("llama"), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no lora in this model to save"):
        minillm.lora.save(build("llama"), tmp_path / "none")


def test_loading_over_what_is_there_replaces_it(tmp_path):
    model = minillm.lora.wrap(build("llama"), r=4)
    for layer in minillm.layers(model).values():
        nn.init.normal_(layer.patches["lora"].B)
    minillm.lora.save(model, tmp_path / "a")
    other = minillm.lora.wrap(build("llama"), r=2)
    with pytest.raises(ValueError,
                       match="has lora already, at 'layers.0.self_attn.q_proj'.*replace=True"):
        minillm.lora.load(other, tmp_path / "a")
    minillm.lora.load(other, tmp_path / "a", replace=True)
    assert logits(other).equal(logits(model)) and [p for p in other.parameters() if p.requires_grad]


def test_a_file_whose_rows_and_columns_lie_is_refused(tmp_path):
    torch.manual_seed(0)
    model = minillm.sparse.wrap(minillm.prune.merge(minillm.prune.wrap(two(), sparsity=0.75)))
    model[0].col[0] = 99
    minillm.sparse.save(model, tmp_path / "a")
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="contradict each other"):
        minillm.sparse.load(two(), tmp_path / "a")


def test_half_precision_bases_get_float32_patches():
    patch = minillm.lora.wrap(two().bfloat16(), r=2)[0].patches["lora"]
    assert patch.A.dtype == torch.float32
    model = minillm.lora.wrap(build("llama").bfloat16(), r=2)
    assert logits(model).dtype == torch.bfloat16
    assert Site("x", nn.Linear(2, 2).double(), None, []).new(1).dtype == torch.float64


def test_show_tells_what_is_where():
    model = minillm.quant.wrap(build("llama"), r"layers\.[01]\..*")
    minillm.prompts.wrap(minillm.lora.wrap(model, ["q_proj"], r=2), length=2)
    text = minillm.show(model)
    assert ("0-1" in text and "[quant(bits=8)] + lora(r=2, alpha=16.0)" in text
            and "prompts(length=2" in text)
    total = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{learn:,} of {total:,}" in text.splitlines()[0]
    assert "(shared)" in minillm.show(build("gpt2"))
    assert repr(text) == text
    assert len({len(line) for line in text.splitlines()}) == 1, "the columns are straight"
