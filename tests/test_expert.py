"""What an expert broke: sequences of verbs, files, values and copies that no law covers."""

import copy
import gc
import pickle
import weakref

import pytest
import safetensors
import safetensors.torch
import torch
from models import build, learnt, logits, two
from torch import nn

import minillm
from minillm.lora import combine, dora, vera
from minillm.registry.store import over


@torch.no_grad()
def moved(model, name):
    """The parameters of one adapter away from where they are, as training would leave them."""
    for layer in minillm.layers(model).values():
        if name in layer.patches:
            for p in layer.patches[name].parameters():
                p.add_(torch.randn_like(p) * 0.3)
    return model


def test_two_veras_of_one_name_would_have_two_pairs_of_matrices():
    model = vera.wrap(two(), ["0"], r=3)
    with pytest.raises(ValueError, match="'vera' share A, B.*at '0'.*name='vera-2'"):
        vera.wrap(model, ["2"], r=3)
    assert list(minillm.layers(model)) == ["0"]
    vera.wrap(model, ["2"], r=3, name="vera-2")


@pytest.mark.parametrize("around", ["prune", "dora"])
def test_a_combination_lies_where_its_parts_lie(around):
    """Beneath the mask or the DoRA that was around them: the sum computes what they did."""
    model = two()
    for name in ("a", "b"):
        learnt(minillm.lora.wrap(model, name=name, r=2))
    if around == "prune":
        minillm.prune.wrap(model, sparsity=0.5)
    else:
        dora.wrap(model, r=2)
    x = torch.randn(3, 6)
    before = model(x)
    combine.wrap(model, {"a": 1.0, "b": 1.0}, name="ab")
    assert torch.allclose(model(x), before, atol=1e-4)
    assert list(model[0].patches)[0] == "ab"


def test_loras_on_both_sides_of_a_mask_are_no_sum():
    model = two()
    model[0].weight.data.normal_()
    learnt(minillm.lora.wrap(model, name="a", r=2))
    minillm.lora.dora.wrap(model, r=2, name="d")
    learnt(minillm.lora.wrap(model, name="b", r=2))
    with pytest.raises(ValueError, match="d lies between a and b"):
        combine.wrap(model, {"a": 1.0, "b": 1.0}, name="ab")
    assert "ab" not in model[0].patches


def test_a_combination_needs_what_its_parts_were_trained_over(tmp_path):
    model = dora.wrap(two(), r=2, name="d")
    moved(model, "d")
    minillm.lora.wrap(model, r=2, name="b")
    minillm.lora.wrap(model, r=2, name="c")
    moved(moved(model, "b"), "c")
    assert over("b", model) == {"d"}
    combine.wrap(model, {"b": 1.0, "c": 1.0}, name="bc")
    assert over("bc", model) == {"d"}
    minillm.lora.save(model, tmp_path / "bc", name="bc")
    with pytest.raises(ValueError, match="made over d"):
        minillm.lora.load(two(), tmp_path / "bc")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", [lambda model: model, minillm.quant.wrap])
def test_an_adapter_that_is_not_finite_is_not_merged(form, value):
    model = minillm.lora.wrap(form(two()), r=2)
    with torch.no_grad():
        model[0].patches["lora"].B[0, 0] = value
    W = model[0].base.weight.clone()
    with pytest.raises(ValueError, match="lora or the weight of '0' holds nan or infinity"):
        minillm.lora.merge(model, keep=False)
    assert torch.equal(model[0].base.weight, W)


def embedded():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(24, 16), nn.Linear(16, 16), nn.Linear(16, 24))


IDS = torch.randint(24, (4, 6), generator=torch.Generator().manual_seed(0))


def test_wanda_ranks_no_nan_and_no_infinity():
    model = embedded()
    model[0].weight.data[IDS[0, 0]] = torch.nan
    with pytest.raises(ValueError, match="the input of '1' holds nan"):
        minillm.prune.wanda.wrap(model, IDS, progress=False)
    model = embedded()
    model[0].weight.data *= 1e25  # finite, and its squares are not
    with pytest.raises(ValueError, match="so large that its square is infinity"):
        minillm.prune.wanda.wrap(model, IDS, progress=False)
    assert not minillm.layers(model)
    model = build("llama")
    model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="the input of 'lm_head' holds nan"):
        minillm.prune.wanda.wrap(model, IDS, r"lm_head|.*down_proj", progress=False)
    assert not minillm.layers(model)
    with pytest.raises(ValueError, match="'lm_head' holds nan"):
        minillm.quant.gptq.wrap(model, IDS, r"lm_head|.*down_proj", progress=False)
    assert all(isinstance(block.mlp.down_proj, nn.Linear) for block in model.layers)


class Pieces(nn.Module):
    """Computes its leaf in pieces of four tokens: longer rows call it more often."""

    def __init__(self):
        super().__init__()
        self.embed, self.leaf = nn.Embedding(24, 8), nn.Linear(8, 24)

    def forward(self, ids):
        return torch.cat([self.leaf(x) for x in self.embed(ids).split(4, 1)], 1)


def test_a_leaf_that_a_longer_batch_calls_again_is_calibrated_with_all_tokens():
    counts, examples = [], [[1, 2, 3, 4], list(range(12))]
    minillm.calibrate.stream(Pieces(), examples, lambda site, gram: counts.append(gram.count),
                             batch_size=1, progress=False)
    assert counts == [16]


def test_a_file_that_lost_a_learned_tensor_is_refused(tmp_path):
    model = minillm.freeze.wrap(two(), ["0"])
    model[2].weight.data += 1
    minillm.freeze.save(model, tmp_path / "whole")
    with safetensors.safe_open(tmp_path / "whole", "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    some = {key: t for key, t in tensors.items() if key != "learned:2.weight"}
    safetensors.torch.save_file(some, tmp_path / "some", metadata)
    with pytest.raises(ValueError, match="lacks the learned parameter '2.weight'"):
        minillm.freeze.load(two(), tmp_path / "some")
    tensors["learned:2.weight"][0, 0] = torch.nan
    safetensors.torch.save_file(tensors, tmp_path / "nan", metadata)
    with pytest.raises(ValueError, match="'2.weight' holds nan or infinity"):
        minillm.freeze.load(two(), tmp_path / "nan")
    masked = minillm.prune.wrap(two())
    masked[2].base.weight.data += 1
    minillm.prune.save(masked, tmp_path / "mask")
    with safetensors.safe_open(tmp_path / "mask", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if "learned:2.w" not in key}
        safetensors.torch.save_file(tensors, tmp_path / "mask2", file.metadata())
    with pytest.raises(ValueError, match="lacks the learned parameter '2.weight'"):
        minillm.prune.load(two(), tmp_path / "mask2")


def test_dora_in_half_precision_has_rows_of_any_norm():
    model = nn.Sequential(nn.Linear(64, 4))
    nn.init.constant_(model[0].weight, 40.0)  # the square of a row's norm is 102,400
    x = torch.randn(3, 64) / 8
    dora.wrap(model, r=2)
    before = model(x)
    assert torch.allclose(model.half()(x.half()).float(), before, rtol=0.02, atol=0.5)


def test_a_matrix_that_also_has_another_name_is_not_left_apart():
    model = embedded()
    model.out = model[0].weight
    with pytest.raises(ValueError, match="'out' is the weight of '0' too.*untie"):
        minillm.quant.wrap(model, ["0"])
    assert model[0].weight is model.out


@pytest.mark.parametrize("verb", ["merge", "unwrap", "look"])
def test_what_a_verb_replaces_is_freed_at_once(verb):
    gc.collect()
    gc.disable()
    try:
        model = two()
        if verb == "look":
            gone = weakref.ref(model)
            minillm.layers(model)
            del model
        elif verb == "merge":
            gone = weakref.ref(model[0].weight)
            minillm.lora.merge(learnt(minillm.lora.wrap(model, r=2)), keep=False)
        else:
            minillm.quant.wrap(model)
            gone = weakref.ref(model[0].q)
            minillm.quant.unwrap(model)
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_no_training(twin, tmp_path):
    model = minillm.lora.wrap(minillm.lora.wrap(build("llama"), name="a", r=2), name="b", r=2)
    minillm.use(model, "b")
    moved(model, "b")
    minillm.use(model, "a", "b")
    assert over("b", model) == set()
    again = twin(model)
    minillm.lora.save(again, tmp_path / "b", name="b")
    minillm.lora.load(build("llama"), tmp_path / "b")
    moved(again, "b")  # but training a copy is
    assert over("b", twin(again)) == {"a"}


def test_a_model_of_inference_mode_is_wrapped():
    with torch.inference_mode():
        model = build("llama")
        expected = logits(minillm.quant.wrap(model))
    minillm.lora.wrap(model, r=2)
    with torch.inference_mode():
        assert torch.equal(logits(model), expected)
