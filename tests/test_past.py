"""What a merge replaced: it follows the model, is counted, and comes back as it was."""

import copy
import pickle

import pytest
import torch
from models import build, learnt, two

import minillm
from minillm.measure import report
from minillm.registry.past import Past, past


def merged(model=None, **options):
    return minillm.lora.merge(learnt(minillm.lora.wrap(model or two(), r=2)), **options)


def test_a_kept_merge_is_in_no_state_dict_and_learns_nothing():
    plain, model = two(), merged()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert isinstance(past(model[0]), Past) and "lora is merged" in repr(model)
    minillm.lora.unmerge(model)
    assert not any(isinstance(m, Past) for m in model.modules())


@pytest.mark.parametrize("back", ["unmerge", "unwrap"])
@pytest.mark.parametrize("stored", [False, True])
def test_a_cast_between_merge_and_its_undoing_casts_all(back, stored):
    model = merged(minillm.quant.wrap(two()) if stored else None)
    model.bfloat16()
    patch, old = past(model[0]).kept
    assert patch.A.dtype == torch.bfloat16 and old.bias.dtype == torch.bfloat16
    getattr(minillm.lora, back)(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.ones(1, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_what_is_kept_moves_with_the_model():
    model = merged().to("meta")
    assert all(t.is_meta for t in past(model[0]).tensors())
    assert all(t.is_meta for t in minillm.lora.unmerge(model).parameters())


def test_what_is_kept_goes_into_copies_and_pickles():
    plain, x = two(), torch.randn(2, 6)
    model = merged(copy.deepcopy(plain))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert past(again[0]).kept[1] is not past(model[0]).kept[1]
        assert minillm.lora.unwrap(again)(x).equal(plain(x))


def test_what_is_kept_is_counted():
    dense, lora = (
        report.total_bytes(two()),
        report.total_bytes(minillm.lora.wrap(two(), r=2)) - report.total_bytes(two()),
    )
    found = report.bytes_by_format(merged())
    assert found == {"float32": dense, "kept by merge": dense + lora}
    assert report.bytes_by_format(merged(keep=False)) == {"float32": dense}
    twice = minillm.prune.merge(minillm.prune.wrap(merged()))
    masks = 5 * 6 + 4 * 5
    assert report.bytes_by_format(twice)["kept by merge"] == 2 * dense + lora + masks


def test_what_trains_after_a_merge_leaves_the_old_base_alone():
    torch.manual_seed(3)
    model = two()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    merged(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    minillm.lora.unwrap(model)
    assert all(t.equal(before[key]) for key, t in model.state_dict().items())


def test_a_merge_without_keep_frees_what_earlier_ones_kept():
    model = minillm.prune.wrap(merged())
    minillm.prune.merge(model, keep=False)
    assert past(model[0]) is None
    with pytest.raises(ValueError, match="no lora is merged"):
        minillm.lora.unmerge(model)


def test_a_merge_that_changes_nothing_keeps_weights_of_its_own():
    model = build("llama")
    before = {name: p.clone() for name, p in model.named_parameters()
              if name.endswith("_proj.weight")}
    minillm.lora.merge(minillm.lora.wrap(model, r=2))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    after = dict(minillm.lora.unwrap(model).named_parameters())
    assert all(after[name].equal(p) for name, p in before.items())


def test_a_format_gives_its_own_bias_back():
    """Merging over int8 makes a bias of its own, which may train before the format is unwrapped."""
    model = merged(minillm.quant.wrap(two()))
    with torch.no_grad():
        model[0].bias.add_(1.0)
    bias = model[0].bias.clone()
    assert minillm.quant.unwrap(model)[0].bias.equal(bias)


def test_a_small_change_that_the_dtype_rounds_away_is_not_merged():
    """A change of 1/10,000 of each weight is less than bfloat16's rounding, which is 1/512."""
    model = minillm.lora.wrap(two().bfloat16(), ["0"], r=1, alpha=1.0)
    patch = model[0].patches["lora"]
    with torch.no_grad():
        model[0].base.weight.fill_(1.0)
        patch.A.fill_(1.0), patch.B.fill_(1e-4)
    with pytest.raises(ValueError, match="would lose it: the rounding is 1.00 of the change"):
        minillm.lora.merge(model)
    assert list(model[0].patches) == ["lora"] and past(model[0].base) is None
