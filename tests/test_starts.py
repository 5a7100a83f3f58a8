"""PiSSA takes a part out of the base: what is done around it gives the original back, or is an
error before anything changes."""

import copy

import pytest
import torch
from models import IDS, build, logits, two
from torch import nn

import minillm
from minillm.lora import pissa

x = torch.arange(18.0).view(3, 6).sin()


def started(**options):
    torch.manual_seed(0)
    model = two()
    before = model(x)
    pissa.wrap(model, ["0"], r=2, **options)
    torch.testing.assert_close(model(x), before)
    return model, before


def learn(patch):
    with torch.no_grad():
        for p in (patch.A, patch.B):
            p += torch.randn_like(p)


def test_without_it_the_model_is_the_original():
    model, before = started(name="sql")
    learn(model[0].patches["sql"])
    tuned, original = model(x), copy.deepcopy(model)
    minillm.lora.unwrap(original)
    assert (tuned - before).abs().max() > 0.1
    minillm.use(model)
    torch.testing.assert_close(model(x), original(x))
    torch.testing.assert_close(model[0].weight, original[0].weight)
    minillm.use(model, "sql")
    torch.testing.assert_close(model(x), tuned)
    with minillm.rows(model, ["sql", None, "sql"]):
        y = model(x)
    torch.testing.assert_close(y[1], original(x)[1])
    torch.testing.assert_close(y[[0, 2]], tuned[[0, 2]])


def test_left_out_of_an_embedding_and_beneath_a_mask():
    for padding in (None, 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(24, 8, padding_idx=padding), nn.Linear(8, 4))
        ids = torch.tensor([[1, 3, 5]])
        before, W = model(ids), model[0].weight.clone()
        minillm.prune.wrap(pissa.wrap(model, ["0", "1"], r=2), ["1"], sparsity=0.25)
        masked = model(ids)
        minillm.use(model)
        torch.testing.assert_close(model(ids), masked)
        minillm.prune.unwrap(model)
        torch.testing.assert_close(model(ids), before)
        assert minillm.lora.unwrap(model)[0].weight.equal(W)


def test_another_merge_does_not_hide_the_original(tmp_path):
    model, before = started(name="a")
    minillm.lora.wrap(model, ["0"], r=2, name="b")
    learn(model[0].patches["b"])
    y = model(x)
    with pytest.raises(ValueError, match="a took a part out of '0', and keep=False would lose"):
        minillm.lora.merge(model, name="b", keep=False)
    minillm.lora.merge(model, name="b")
    torch.testing.assert_close(model(x), y)
    with pytest.raises(ValueError, match="b was merged into '0' after a: unmerge b first"):
        minillm.lora.unwrap(model, name="a")
    with pytest.raises(ValueError, match="another adapter was merged into '0' after a took"):
        minillm.lora.save(model, tmp_path / "a", name="a")
    torch.testing.assert_close(model(x), y)
    minillm.lora.unmerge(model, name="b")
    minillm.lora.save(model, tmp_path / "a", name="a")
    minillm.lora.unwrap(model, name="a")
    minillm.lora.unwrap(model, name="b")
    assert model(x).equal(before)
    minillm.lora.merge(started(name="a")[0], keep=False)  # its own merge needs no record


def test_one_part_of_a_leaf(tmp_path):
    model, before = started(name="a")
    y = model(x)
    with pytest.raises(ValueError, match="lora takes a part out of the weight of '0', and a has"):
        pissa.wrap(model, ["0"], r=2)
    minillm.lora.save(model, tmp_path / "a")
    with pytest.raises(ValueError, match="a took a part out of '0': minillm.lora.unwrap"):
        minillm.lora.load(model, tmp_path / "a", replace=True)
    assert model(x).equal(y)
    minillm.lora.load(minillm.lora.unwrap(model), tmp_path / "a")
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("wrap", [minillm.quant.wrap, minillm.quant.nf4.wrap])
def test_the_file_of_a_format_over_it_needs_it(wrap, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    plain = copy.deepcopy(model)
    options = dict(group=4) if wrap is minillm.quant.nf4.wrap else {}
    wrap(pissa.wrap(model, ["0"], r=2), ["0"], **options)
    minillm.quant.save(model, tmp_path / "q"), minillm.lora.save(model, tmp_path / "l")
    with pytest.raises(ValueError, match="made over lora.*Load the file of each technique in"):
        minillm.quant.load(copy.deepcopy(plain), tmp_path / "q")
    again = minillm.lora.load(plain, tmp_path / "l")
    minillm.quant.load(again, tmp_path / "q")
    z = torch.randn(2, 8)
    assert again(z).equal(model(z))


@pytest.mark.parametrize("form", ["quant", "sparse"])
def test_what_learns_beside_a_format_over_an_adapter_needs_it(form, tmp_path):
    model = minillm.lora.wrap(build("llama"), ["q_proj"], r=2)
    with torch.no_grad():
        for layer in minillm.layers(model).values():
            layer.patches["lora"].B.normal_()
    minillm.lora.save(model, tmp_path / "lora")
    family = minillm.techniques()[form]
    family.wrap(model, ["up_proj"], **dict(anyway=True) if form == "sparse" else {})
    model.norm.weight.requires_grad_(True).data += 1
    family.save(model, tmp_path / "form")
    with pytest.raises(ValueError, match="made over lora"):
        family.load(build("llama"), tmp_path / "form")
    again = family.load(minillm.lora.load(build("llama"), tmp_path / "lora"), tmp_path / "form")
    ids = torch.arange(6)[None]
    assert again(ids).equal(model(ids))


def test_an_adapter_that_takes_no_part_is_no_reason_to_merge_around_it():
    model = minillm.lora.wrap(two(), ["0"], r=2, name="a")
    learn(model[0].patches["a"])
    minillm.prune.wrap(model, ["0"])
    minillm.use(model)
    with pytest.raises(ValueError, match="prune cannot be merged into '0' while a lies beneath"):
        minillm.prune.merge(model)
    minillm.prune.unwrap(model)
    minillm.quant.qat.wrap(model, ["0"], bits=8)
    with pytest.raises(ValueError, match="'0' has a beneath the fake-quantization"):
        minillm.quant.qat.convert(model)
    minillm.use(model, "a")
    with minillm.rows(model, ["a", None, None]):
        with pytest.raises(ValueError, match="a has its own rows of the batch here"):
            minillm.lora.merge(model, name="a")


def test_names_of_kinds_are_taken():
    for name in ("freeze", "bitfit", "quant", "dora"):
        with pytest.raises(ValueError, match=f"name='{name}' is the name of another kind"):
            minillm.lora.wrap(two(), name=name)


@pytest.mark.parametrize("model", [None, "tiny", (two(), None)])
def test_what_is_no_model(model):
    for verb in (minillm.lora.wrap, minillm.lora.merge, minillm.quant.wrap, minillm.quant.unwrap,
                 minillm.prune.wrap, minillm.freeze.wrap, minillm.untie):
        with pytest.raises(TypeError, match="no nn.Module"):
            verb(model)


def test_a_parallel_model_is_asked_itself():
    model = build("hf_llama")
    inside = minillm.lora.wrap(nn.DataParallel(model), r=2).module
    assert "lm_head" not in minillm.layers(inside)
    tied = build("gpt2")
    minillm.untie(nn.DataParallel(tied))
    assert not tied.config.tied


def test_a_taken_name_is_not_replaced():
    from minillm.registry import KINDS, METHODS, Patch, method, register

    class Mine(Patch):
        def fold(self, W, b):
            return W, b

    class Nothing(Patch):
        pass

    with pytest.raises(ValueError, match="the kind 'lora' is minillm.lora.LoRA already"):
        register("lora", Mine)
    with pytest.raises(TypeError, match="Nothing has neither a forward nor a fold"):
        register("nothing", Nothing)
    with pytest.raises(ValueError, match="the method 'lora' is minillm.lora.wrap already"):
        method("lora", started, does="", paper="")
    with pytest.raises(ValueError, match="'tniy' is none of the models"):
        method("mine", started, does="", paper="", rates=dict(tniy=1))
    assert "mine" not in METHODS and KINDS["lora"] is minillm.lora.LoRA


def trained(model):
    """One step of everything that learns; then the logits."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    logits(model, IDS).logsumexp(-1).sum().backward()
    optimizer.step()
    model.zero_grad()
    return logits(model, IDS)


@pytest.mark.parametrize("kind", ["llama", "hf_gpt2"])
@pytest.mark.parametrize("first", ["freeze", "prune"])
@pytest.mark.parametrize("form", [False, True])
def test_a_weight_learns_and_pissa_takes_its_part_afterwards(kind, first, form, tmp_path):
    """The file of the first technique holds the whole weight, and fits alone and beneath."""
    targets = r".*\.(q_proj|c_attn)"
    model, module = build(kind), getattr(minillm, first)
    if first == "freeze":
        minillm.freeze.wrap(model, last=1)
    else:
        minillm.prune.wrap(model, r".*\.(o_proj|attn\.c_proj)")
    alone = trained(model)
    minillm.lora.pissa.wrap(model, targets, r=2)
    both = trained(model)
    if form:
        minillm.quant.wrap(model, targets)
        both = logits(model, IDS)
    module.save(model, tmp_path / "first.safetensors")
    minillm.lora.save(model, tmp_path / "pissa.safetensors")
    other = module.load(build(kind), tmp_path / "first.safetensors")
    assert torch.equal(logits(other, IDS), alone)
    minillm.lora.load(other, tmp_path / "pissa.safetensors")
    if form:
        minillm.quant.wrap(other, targets)
    assert torch.allclose(logits(other, IDS), both, atol=1e-5)


def test_freezing_after_pissa_keeps_what_is_left_of_the_weight(tmp_path):
    model = minillm.lora.pissa.wrap(build("llama"), ["q_proj"], r=2)
    minillm.freeze.wrap(model, last=1)
    for p in model.layers[2].parameters():
        p.requires_grad_(True)  # the rest of the last block too
    y = trained(model)
    minillm.freeze.save(model, tmp_path / "freeze.safetensors")
    minillm.lora.save(model, tmp_path / "pissa.safetensors")
    other = minillm.lora.load(build("llama"), tmp_path / "pissa.safetensors")
    minillm.freeze.load(other, tmp_path / "freeze.safetensors")
    assert torch.allclose(logits(other, IDS), y, atol=1e-5)


def test_what_is_left_of_a_weight_may_learn(tmp_path):
    model = minillm.freeze.wrap(build("llama"), last=1)
    minillm.lora.pissa.wrap(model, ["q_proj"], r=2)
    model.layers[2].self_attn.q_proj.base.weight.requires_grad_(True)
    trained(model)
    minillm.freeze.save(model, tmp_path / "freeze.safetensors")
    other = minillm.freeze.load(build("llama"), tmp_path / "freeze.safetensors")
    assert torch.allclose(logits(other, IDS), logits(minillm.use(model), IDS), atol=1e-5)


def test_a_shared_bias_stays_one():
    also = "the bias of '0' is also 2.bias: a merge of"
    for wrap, message in [(minillm.lora.wrap, f"{also} lora"),
                          (minillm.prune.wrap, f"{also} prune"),
                          (pissa.wrap, "the weight of '0', and 2.bias is its bias too")]:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        model[2].bias = model[0].bias
        family = minillm.prune if wrap is minillm.prune.wrap else minillm.lora
        with pytest.raises(ValueError, match=f"{message}.*minillm.untie"):
            family.merge(wrap(model, ["0"]))
        if "0" not in minillm.layers(model):
            wrap(minillm.untie(model), ["0"])
        family.merge(minillm.untie(model))
        assert model[2].bias is not model[0].bias
