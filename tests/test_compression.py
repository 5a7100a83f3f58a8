"""What makes a model small: int8, pruning and CSR, each against its formula, and the
ways it can be called wrongly."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from models import build, learnt, two
from torch import nn

import minillm
from minillm.registry import CannotMerge


# --- int8 ---------------------------------------------------------------------------------------


def test_int8_is_absmax_by_output_channel():
    leaf = nn.Linear(64, 8)
    W = leaf.weight.detach().clone()
    W[3] = 0
    leaf.weight.data.copy_(W)
    model = minillm.quant.wrap(nn.Sequential(leaf))
    s = W.abs().amax(1) / 127
    q = (W / s.where(s > 0, 1)[:, None]).round()
    assert (
        model[0].q.equal(q.to(torch.int8))
        and model[0].q.abs().amax(1).eq(torch.tensor([127, 127, 127, 0, 127, 127, 127, 127])).all()
    )
    torch.testing.assert_close(model[0].dense(), q * s[:, None])
    x = torch.randn(3, 64)
    torch.testing.assert_close(model(x), F.linear(x, q * s[:, None], leaf.bias))
    assert minillm.report.bytes_by_format(model)["quant"] == 8 * 64 + 8 * 4


def test_int8_of_an_embedding_has_a_scale_for_each_token():
    model = nn.Sequential(nn.Embedding(10, 6))
    W = model[0].weight.detach().clone()
    minillm.quant.wrap(model, ["0"])
    assert model[0].scale.shape == (10, 1)
    assert (
        (model[0](torch.arange(10)) - W).abs() <= W.abs().amax(1, keepdim=True) / 254 * 1.001
    ).all()


def test_storing_again_what_was_stored_changes_nothing():
    model = minillm.quant.wrap(two())
    q = model[0].q.clone()
    minillm.quant.wrap(minillm.quant.unwrap(model))
    assert model[0].q.equal(q)


def test_formats_refuse_what_they_cannot_store():
    model = two()
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'0' holds nan"):
        minillm.quant.wrap(model)
    assert type(model[2]) is nn.Linear
    with pytest.raises(ValueError, match="'lm_head' shares its matrix with embed_tokens.*untie"):
        minillm.quant.wrap(build("gpt2"), ["lm_head"])
    with pytest.raises(CannotMerge, match="quant is a format.*unwrap"):
        minillm.quant.merge(minillm.quant.wrap(two()))
    with pytest.raises(ValueError, match="no quant in this model to unwrap; attached: lora"):
        minillm.quant.unwrap(minillm.lora.wrap(two(), r=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cast_first", [False, True])
def test_int8_in_half_precision_neither_overflows_nor_loses_small_rows(dtype, cast_first):
    """q x is far above 65,504, the largest float16, and the scale of row 1 far below the least."""
    leaf, x = nn.Linear(512, 4, bias=False), torch.full((3, 512), 10.0)
    leaf.weight.data.uniform_(0.5, 1).mul_(torch.tensor([[1.0], [4e-6], [1e-2], [-1.0]]))
    model = nn.Sequential(copy.deepcopy(leaf))
    model = (
        minillm.quant.wrap(model.to(dtype)) if cast_first else minillm.quant.wrap(model).to(dtype)
    )
    y = model(x.to(dtype))
    assert y.dtype == dtype and model[0].scale.dtype == torch.float32
    torch.testing.assert_close(y.float(), leaf(x), rtol=0.02, atol=0)
    W = minillm.quant.unwrap(model)[0].weight
    assert W.dtype == dtype
    torch.testing.assert_close(W.float(), leaf.weight, rtol=0.03, atol=0)


def test_int8_sums_float16_in_float32_and_bfloat16_as_a_dense_matrix_does():
    leaf, x = nn.Linear(1024, 64), torch.randn(32, 1024)
    model = minillm.quant.wrap(nn.Sequential(copy.deepcopy(leaf)))
    W, b = model[0].dense().double(), leaf.bias.double()
    for dtype, error in ((torch.float16, 3e-4), (torch.bfloat16, 3e-3)):
        half, rows = copy.deepcopy(model).to(dtype), x.to(dtype)
        right = rows.double() @ W.T + b
        assert (half(rows).double() - right).norm() < error * right.norm()


@pytest.mark.parametrize("cast, dtype", [
    (nn.Module.half, torch.float16), (nn.Module.bfloat16, torch.bfloat16),
    (nn.Module.double, torch.float64),
    (lambda m: m.to(torch.float16), torch.float16),
])
def test_a_cast_changes_what_int8_gives_back_and_not_what_it_stores(cast, dtype):
    model = minillm.quant.wrap(nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 5)), ["0", "1"])
    stored = {key: t.clone() for key, t in model.named_buffers()}
    cast(model)
    assert model[0].dense().dtype == model[1].dense().dtype == dtype
    assert model(torch.arange(3)).dtype == model[0](torch.arange(3)).dtype == dtype
    assert all(t.equal(stored[key]) and t.dtype == stored[key].dtype
               for key, t in model.named_buffers())
    assert model.float()[1].dense().equal(model[1].q * model[1].scale)


def test_int8_moves_with_its_model():
    model = minillm.quant.wrap(two()).half().to("meta")
    assert model[0].scale.is_meta and model[0].q.is_meta and model[0].dense().is_meta
    scale = model.to_empty(device="cpu")[0].scale
    assert scale.device.type == "cpu" and scale.dtype == torch.float32


# --- pruning ------------------------------------------------------------------------------------


def test_magnitude_pruning_zeroes_the_smallest():
    W = torch.tensor([[0.1, -0.5, 0.3, -0.2], [4.0, -3.0, 2.0, 1.0]])
    expected = {
        "row": [[0, 1, 1, 0], [1, 1, 0, 0]],
        "matrix": [[0, 0, 0, 0], [1, 1, 1, 1]],
        "model": [[0, 0, 0, 0], [1, 1, 1, 1]],
    }
    for group, mask in expected.items():
        model = nn.Sequential(nn.Linear(4, 2, bias=False))
        model[0].weight.data.copy_(W)
        minillm.prune.wrap(model, sparsity=0.5, group=group)
        assert model[0].patches["prune"].mask.int().tolist() == mask, group
        assert model[0].weight.equal(W * torch.tensor(mask))


def test_pruning_over_the_model_takes_more_from_smaller_matrices():
    model = two()
    model[0].weight.data.mul_(0.01)
    minillm.prune.wrap(model, sparsity=0.5, group="model")
    kept = [int(model[i].patches["prune"].mask.sum()) for i in (0, 2)]
    assert kept == [5, 20], "half of 30 + 20 weights are left, all of the second matrix among them"


def test_what_is_pruned_stays_pruned_in_training():
    model = minillm.prune.wrap(two(), sparsity=0.5)
    mask = model[0].patches["prune"].mask
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].weight.clone()
    model(torch.randn(9, 6)).square().sum().backward()
    optimizer.step()
    assert not model[0].weight[~mask].any() and (model[0].weight != before)[mask].all()


@pytest.mark.parametrize("options, message", [
    (dict(sparsity=1.0), "sparsity=1.0"),
    (dict(group="column"), "group='column'.*'row'"),
])
def test_prune_names_the_culprit(options, message):
    with pytest.raises(ValueError, match=message):
        minillm.prune.wrap(two(), **options)


def test_exactly_as_many_are_pruned_as_were_asked_for_also_among_equals():
    for group, sparsity in itertools.product(("row", "matrix", "model"), (0.0, 0.1, 0.5, 0.9)):
        model = two()
        for leaf in (model[0], model[2]):
            # nothing but ones and twos
            leaf.weight.data.copy_(torch.randint(1, 3, leaf.weight.shape))
        weights = [model[i].weight.detach().clone() for i in (0, 2)]
        masks = [layer.patches["prune"].mask for layer in minillm.layers(
            minillm.prune.wrap(copy.deepcopy(model), sparsity=sparsity, group=group)).values()]
        again = [layer.patches["prune"].mask for layer in minillm.layers(
            minillm.prune.wrap(model, sparsity=sparsity, group=group)).values()]
        assert all(a.equal(b) for a, b in zip(masks, again))
        groups = {"row": [rows for pair in zip(masks, weights) for rows in zip(*pair)],
                  "matrix": list(zip(masks, weights)),
                  "model": [[torch.cat([t.flatten() for t in part])
                             for part in (masks, weights)]]}[group]
        for mask, W in groups:
            mask, W = mask.flatten(), W.flatten()
            k = round(sparsity * W.numel())
            # a stable sort: of equals the first goes first
            order = sorted(range(W.numel()), key=lambda i: W[i].item())
            assert sorted(order[:k]) == (~mask).nonzero().flatten().tolist(), (group, sparsity)


def test_pruning_knows_every_dtype_and_refuses_nan():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        mask = minillm.prune.wrap(two().to(dtype), sparsity=0.5)[0].patches["prune"].mask
        assert mask.sum(1).tolist() == [3] * 5
    model = two()
    model[2].weight.data[1, 1] = float("nan")
    with pytest.raises(ValueError, match="'2' holds nan"):
        minillm.prune.wrap(model)
    assert not minillm.layers(model)


def test_a_mask_from_a_file_is_the_files(tmp_path):
    model, other = two(), two()
    minillm.prune.save(minillm.prune.wrap(model, sparsity=0.5), tmp_path / "a")
    minillm.prune.load(other, tmp_path / "a", any_base=True)
    for i in (0, 2):
        patch = other[i].patches["prune"]
        assert (patch.mask.equal(model[i].patches["prune"].mask)
                and patch.config() == dict(sparsity=0.5, group="row"))


def test_a_mask_reads_the_weight_with_what_lies_beneath():
    model = minillm.lora.wrap(two(), r=2)
    nn.init.constant_(model[0].patches["lora"].B, 5.0)
    W = model[0].weight.detach().abs()
    mask = minillm.prune.wrap(model, sparsity=0.5)[0].patches["prune"].mask
    assert (W[mask].view(5, 3).amin(1) >= W[~mask].view(5, 3).amax(1)).all()


# --- sparse -------------------------------------------------------------------------------------


def test_csr_is_the_compressed_rows_of_the_matrix():
    W = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 3.0]])
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight.data.copy_(W)
    bias = model[0].bias.clone()
    minillm.sparse.wrap(model, anyway=True)
    assert (model[0].crow.tolist() == [0, 1, 1, 3] and model[0].col.tolist() == [1, 0, 2]
            and model[0].values.tolist() == [2, 1, 3])
    for shape in ((3,), (1, 3), (5, 3), (2, 4, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(model(x), x @ W.T + bias)
    x = torch.randn(4, 3, requires_grad=True)
    (grad,) = torch.autograd.grad((model(x) * (g := torch.randn(4, 3))).sum(), x)
    torch.testing.assert_close(grad, g @ W)


def test_csr_that_would_be_larger_is_refused():
    with pytest.raises(ValueError, match="'0' has 0% zeros.*only above 50%.*anyway"):
        minillm.sparse.wrap(two())
    half = minillm.prune.merge(minillm.prune.wrap(build("llama")), keep=False)
    with pytest.raises(ValueError, match="50% zeros: CSR would take 1,092 bytes, and .* 1,024"):
        minillm.sparse.wrap(half)  # the rows take bytes too
    model = minillm.prune.merge(minillm.prune.wrap(build("llama"), sparsity=0.75), keep=False)
    dense_bytes = minillm.report.total_bytes(model)
    assert minillm.report.total_bytes(minillm.sparse.wrap(model)) < dense_bytes


def test_an_empty_matrix_is_still_a_matrix():
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].weight.data.zero_()
    minillm.sparse.wrap(model)
    torch.testing.assert_close(model(torch.randn(2, 3)), model[0].bias.expand(2, -1))


def test_csr_reads_only_rows_whose_columns_rise():
    """A column written twice would count once in the dense weight, and twice in the product."""
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].weight.data.copy_(torch.tensor([[0.0, 2, 3, 0], [1, 0, 0, 4]]))
    leaf = minillm.sparse.wrap(model, anyway=True)[0]
    right = {key: t.clone() for key, t in leaf.named_buffers()}
    leaf.take(right, "file")
    for col in ([1, 1, 0, 3], [2, 1, 0, 3], [1, 2, 3, 0], [1, 2, 0, 0]):
        with pytest.raises(ValueError, match="file: the columns of a row do not rise"):
            leaf.take({**right, "col": torch.tensor(col, dtype=torch.int32)}, "file")
    for wrong in (dict(crow=[0, 3, 2]), dict(crow=[1, 2, 4]), dict(crow=[0, 2, 3]),
                  dict(col=[0, 1, 2, 4]), dict(col=[-1, 1, 0, 3]),
                  dict(col=[0, 1, 3])):
        (key, value), = wrong.items()
        with pytest.raises(ValueError, match=r"contradict each other for a \(2, 4\)"):
            leaf.take({**right, key: torch.tensor(value, dtype=torch.int32)}, "file")


def test_a_merge_that_fills_the_zeros_of_csr_is_refused():
    model = build("llama")
    minillm.sparse.wrap(minillm.prune.merge(minillm.prune.wrap(model, sparsity=0.75), keep=False))
    learnt(minillm.lora.wrap(model, r=2))
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(
        ValueError, match="q_proj' .*only above 50%.*[Uu]nwrap sparse first.*anyway=True"
    ):
        minillm.lora.merge(model)
    assert all(t.equal(before[key]) for key, t in model.state_dict().items())
    minillm.lora.merge(minillm.sparse.unwrap(model))

    model = learnt(minillm.lora.wrap(minillm.sparse.wrap(two(), anyway=True), r=2))
    x = torch.randn(3, 6)
    expected = model(x)
    torch.testing.assert_close(minillm.lora.merge(model)(x), expected)


def test_anyway_goes_into_the_file(tmp_path):
    minillm.sparse.save(minillm.sparse.wrap(two(), anyway=True), tmp_path / "a")
    model = minillm.sparse.load(two(), tmp_path / "a", any_base=True)
    assert model[0].config() == dict(anyway=True)
    minillm.lora.merge(learnt(minillm.lora.wrap(model, r=2)))


@pytest.mark.parametrize("dtype, zeros",
                         [(torch.float32, 0.5), (torch.bfloat16, 2 / 3), (torch.float64, 1 / 3)])
def test_csr_breaks_even_where_the_bytes_say(dtype, zeros):
    for share, fits in ((zeros - 0.02, False), (zeros + 0.02, True)):
        model = nn.Sequential(nn.Linear(300, 300, dtype=dtype))
        model[0].weight.data[torch.rand(300, 300) < share] = 0
        dense = minillm.report.total_bytes(model)
        stored = minillm.report.total_bytes(minillm.sparse.wrap(copy.deepcopy(model), anyway=True))
        assert (stored < dense) == fits
        try:
            minillm.sparse.wrap(model)
            assert fits
        except ValueError:
            assert not fits
