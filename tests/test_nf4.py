"""NF4: the levels against their recipe, the codes against bitsandbytes and torchao, and QLoRA."""

import copy
import pickle
import statistics

import pytest
import torch
import torch.nn.functional as F
from models import build, logits, two
from torch import nn

import minillm
from minillm.measure import report
from minillm.quant.grid import Levels, unpack
from minillm.quant.nf4 import LEVELS
from minillm.registry import store, verbs

nf4 = minillm.quant.nf4


def leaf(into=128, out=6, group=64, dtype=torch.float32):
    """(the dense weight, the Codebook, x)"""
    linear = nn.Linear(into, out).to(dtype)
    return (
        linear.weight.detach().clone(),
        nf4.wrap(nn.Sequential(linear), group=group)[0],
        torch.randn(3, 5, into),
    )


# --- the grid -----------------------------------------------------------------------------------


def test_the_levels_are_quantiles_of_the_normal_distribution():
    Q, p = statistics.NormalDist().inv_cdf, 1 - (1 / 30 + 1 / 32) / 2
    above = [Q(0.5 + (p - 0.5) * i / 8) for i in range(1, 9)]
    below = [-Q(0.5 + (p - 0.5) * i / 7) for i in range(7, 0, -1)]
    wanted = torch.tensor([*below, 0.0, *above]) / above[-1]
    torch.testing.assert_close(torch.tensor(LEVELS), wanted, rtol=0, atol=1e-6)
    assert len(LEVELS) == 16 and LEVELS[7] == 0 and LEVELS[0] == -1 and LEVELS[15] == 1


@pytest.mark.parametrize("group", [None, 8])
def test_a_code_is_the_nearest_level_of_its_block(group):
    W, grid = (
        torch.randn(5, 24) * torch.tensor([[1.0], [1e-6], [1e4], [0.1], [2.0]]) + 0.1,
        Levels(LEVELS, group),
    )
    W[3, 8:16], W[2, 3] = 0, 0
    scale, zero = grid.fit(W)
    q, size = grid.round(W, scale), group or 24
    assert zero is None and scale.shape == (5, 24 // size)
    for i, row in enumerate(W.tolist()):
        for j, w in enumerate(row):
            block = row[j - j % size : j - j % size + size]
            s = max(map(abs, block)) or 1.0
            wanted = min(range(16), key=lambda k: abs(w / s - LEVELS[k]))
            assert q[i, j] == wanted
            torch.testing.assert_close(grid.dense(q, scale)[i, j].item(), s * LEVELS[wanted],
                                       rtol=1e-5, atol=0)
    assert (grid.dense(q, scale)[W == 0] == 0).all()
    assert (q.amin(), q.amax()) == grid.ends


def test_of_two_levels_as_near_the_lower():
    grid = Levels((-1.0, 0.0, 0.5, 1.0))
    assert grid.round(torch.tensor([[1.0, -0.5, 0.25, 0.75, 0.2501]]),
                      torch.ones(1, 1)).tolist() == [[3, 0, 1, 2, 2]]


@pytest.mark.parametrize("levels",
                         [(0.0, 1.0, 0.5), (-1.0, 1.0), (0.0, 0.5), (-1.0, 0.0, 0.0), (0.0, 2.0),
                          (0.0, float("nan"), 1.0), tuple(i / 256 for i in range(257))])
def test_levels_that_make_no_grid(levels):
    with pytest.raises(ValueError, match="are not at most 256 rising numbers, with 0 among them"):
        Levels(levels)


def test_the_codes_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    W = torch.randn(16, 256) * torch.logspace(-3, 1, 16)[:, None]
    codes, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
    assert state.code.cpu().equal(torch.tensor(LEVELS))
    grid = Levels(LEVELS, 64)
    scale, _ = grid.fit(W)
    assert scale.flatten().equal(state.absmax)
    # the first is in the high bits
    theirs = torch.stack([codes.view(16, 128) >> 4, codes.view(16, 128) & 15], -1).flatten(1)
    ours = grid.round(W, scale)
    assert (ours != theirs).float().mean() < 1e-3 and (ours - theirs).abs().max() <= 1, (
        "only at a tie, by an ulp")
    same = ours == theirs
    back = functional.dequantize_4bit(codes, state)
    torch.testing.assert_close(grid.dense(ours, scale)[same], back[same], rtol=1e-6, atol=0)


def test_the_codes_are_those_of_torchao():
    ao = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    W, grid = torch.randn(16, 1024) * torch.logspace(-3, 1, 16)[:, None], Levels(LEVELS, 64)
    stored = ao.to_nf4(W, 64, 256)
    # some of theirs have four digits
    torch.testing.assert_close(stored.nf4, torch.tensor(LEVELS), rtol=0, atol=1e-4)
    theirs = torch.stack([stored.quantized_data >> 4, stored.quantized_data & 15],
                         -1).view(16, 1024)
    off = (grid.round(W, grid.fit(W)[0]) != theirs).float().mean()
    assert off < 1e-3, "torchao rounds its scales too, but after the codes are found"


# --- stored -------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_leaf_computes_with_what_is_stored(group, dtype):
    W, form, x = leaf(group=group)
    grid = Levels(LEVELS, group)
    scale, _ = grid.fit(W)
    expected = grid.dense(grid.round(W, scale), scale)
    assert (form.dense().equal(expected)
            and unpack(form.q, 4).equal(grid.round(W, scale).to(torch.uint8)))
    assert ((form.dense() - W).abs() <= form.rounding() * 1.0001).all()
    form = form.to(dtype)
    assert (form.dense().dtype == dtype and form.scale.equal(scale)
            and form.levels.equal(torch.tensor(LEVELS)))
    y, near = form(x.to(dtype)), 1e-5 if dtype == torch.float32 else 0.03
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), F.linear(x, expected, form.bias.float()), rtol=near,
                               atol=near)
    with torch.autocast("cpu", torch.bfloat16):
        assert form(x).dtype == torch.bfloat16


def test_the_rounding_is_half_of_a_gap_and_no_wider_than_it_has_to_be():
    form, W = leaf(into=64)[1], torch.linspace(-1, 1, 6 * 64).view(6, 64).sin()
    form.pack(W)
    levels, off = torch.tensor(LEVELS), (form.dense() - W).abs()
    gaps = levels.diff() / 2
    for i in range(16):
        wider = max(gaps[max(i - 1, 0)], gaps[min(i, 14)])
        here = form.codes() == i
        torch.testing.assert_close(form.rounding()[here], (wider * form.scale).expand(6, 64)[here])
    assert (off <= form.rounding() * 1.0001).all() and not (off <= form.rounding() * 0.5).all()
    form.pack(torch.zeros(6, 64))
    assert (form.rounding() == 0).all() and (form.dense() == 0).all()


def test_an_embedding_gives_rows_of_what_is_stored():
    model = nf4.wrap(nn.Sequential(nn.Embedding(10, 16)), ["0"], group=8)
    W, ids = model[0].dense().T, torch.tensor([[3, 1, 4], [1, 5, 9]])
    assert model(ids).equal(W[ids]) and model[0].scale.shape == (10, 2)
    assert model[0].rounding().shape == (16, 10)
    with pytest.raises(IndexError):
        model(torch.tensor([[10]]))


def test_a_product_keeps_no_dense_matrix():
    _, form, x = leaf()
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t,
                                                  lambda t: t):
        y = form(x)
    assert (6, 128) not in kept and (128, 6) not in kept, kept
    y.square().sum().backward()
    z = x.detach().clone().requires_grad_()
    F.linear(z, form.dense(), form.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_bytes_are_half_a_byte_and_a_scale_for_each_block():
    model = nf4.wrap(nn.Sequential(nn.Linear(256, 64, bias=False)))
    assert report.total_bytes(model) == 64 * 256 / 2 + 4 * 64 * 4 + 4 * 16


def test_nf4_is_nearer_than_int4_to_normal_weights():
    W = torch.randn(64, 256)
    _, form, _ = leaf(256, 64)
    form.pack(W)
    int4 = minillm.quant.wrap(nn.Sequential(nn.Linear(256, 64)), bits=4, group=64)[0]
    int4.pack(W)
    assert (form.dense() - W).norm() < 0.95 * (int4.dense() - W).norm()


@pytest.mark.parametrize("options, message", [
    ({}, "bits=4, group=64 at '0': a row has 6 weights"), (dict(group=1), "group=1 is not"),
    (dict(group=3), "group=3 at '2'"),
    (dict(group=2.0), "group=2.0 is not a whole number of at least 2"),
])
def test_what_cannot_be_stored_is_named(options, message):
    model = two()
    with pytest.raises(ValueError, match=message):
        nf4.wrap(model, **options)
    assert type(model[0]) is nn.Linear


def test_copies_state_and_files(tmp_path):
    import safetensors.torch

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    plain, x = copy.deepcopy(model), torch.randn(3, 16)
    y = nf4.wrap(model, group=8)(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin(x).equal(y)
    other = nf4.wrap(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), group=8)
    other.load_state_dict(model.state_dict())
    assert other(x).equal(y)
    store.save("quant", model, tmp_path / "a")
    again = store.load("quant", copy.deepcopy(plain), tmp_path / "a")
    assert again(x).equal(y) and again[0].config() == dict(group=8, double=False)
    tensors, metadata = store.read(tmp_path / "a")
    for key, value, message in (("0.scale", 0.0, "'0': a scale is not"),
                                ("0.levels", 1.0, "'0': levels=.* are not")):
        broken = {k: torch.full_like(t, value) if k == key else t for k, t in tensors.items()}
        safetensors.torch.save_file(broken, tmp_path / "b", metadata)
        with pytest.raises(ValueError, match=message):
            store.load("quant", copy.deepcopy(plain), tmp_path / "b")
    dense = [model[i].dense().clone() for i in (0, 2)]
    verbs.unwrap("quant", model)
    assert (type(model[0]) is nn.Linear and model[0].weight.equal(dense[0])
            and model[2].weight.equal(dense[1]))


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "gpt2", "llama", "hf_gpt2", "hf_llama"])
def test_qlora(kind):
    """LoRA over NF4 learns; NF4 keeps every bit; the order of the two does not matter."""
    options = dict(group=8, double=kind == "llama")
    model = minillm.lora.wrap(nf4.wrap(build(kind), **options), r=4)
    other = nf4.wrap(minillm.lora.wrap(build(kind), r=4), **options)
    before = {name: b.clone() for name, b in model.named_buffers()}
    learn = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learn) == sum(p.numel()
                                                for layer in minillm.layers(model).values()
                                                for p in layer.patches.parameters())
    optimizer, losses = torch.optim.AdamW(learn, lr=0.02), []
    for _ in range(6):
        losses.append(logits(model).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert all(b.equal(before[name]) for name, b in model.named_buffers())
    other.load_state_dict(model.state_dict())
    assert logits(other).equal(logits(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("rows", [1, 3])
def test_it_compiles(rows):
    _, form, _ = leaf(into=64, group=16)
    x = torch.randn(rows, 64, requires_grad=True)
    compiled = torch.compile(form, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), form(x), rtol=1e-4, atol=1e-5)
    y, z = (
        torch.autograd.grad(form(x).square().sum(), x)[0],
        torch.autograd.grad(compiled(x).square().sum(), x)[0],
    )
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
