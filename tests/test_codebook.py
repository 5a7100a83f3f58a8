"""FP4 against bitsandbytes, and the scales that are quantized too (double quantization)."""

import copy
import json
import pickle

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from models import build, logits
from torch import nn

import minillm
from minillm.measure import report
from minillm.quant import fp4, nf4
from minillm.quant.grid import Levels
from minillm.registry import store, verbs

both = pytest.mark.parametrize("page", [nf4, fp4], ids=["nf4", "fp4"])


def stored(W, page=nf4, **options):
    """The Codebook of the matrix W (n, m)."""
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight.data = W.clone()
    return page.wrap(nn.Sequential(linear), **options)[0]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- FP4 ----------------------------------------------------------------------------------------


def test_the_levels_are_sign_exponent_and_mantissa():
    wanted = {0.0}
    for sign in (1, -1):
        for exponent in range(4):
            for mantissa in (0, 1):
                number = (2 ** (exponent - 1) * (1 + mantissa / 2) if exponent  # 1, 1.5, ..., 6
                          else mantissa / 32)  # E2M1's own is 1/2
                wanted.add(sign * number / 6)
    torch.testing.assert_close(torch.tensor(fp4.LEVELS), torch.tensor(sorted(wanted)))
    assert len(fp4.LEVELS) == 15 and fp4.LEVELS[7] == 0 and fp4.LEVELS[14] == 1


@pytest.mark.parametrize("name, levels", [("fp4", fp4.LEVELS), ("nf4", nf4.LEVELS)])
def test_the_levels_and_codes_are_those_of_bitsandbytes(name, levels):
    functional = pytest.importorskip("bitsandbytes.functional")
    W = normal(16, 256) * torch.logspace(-3, 1, 16)[:, None]
    codes, state = functional.quantize_4bit(W, blocksize=64, quant_type=name)
    assert state.code.unique().equal(torch.tensor(levels))
    grid = Levels(levels, 64)
    scale, _ = grid.fit(W)
    assert scale.flatten().equal(state.absmax)
    back = functional.dequantize_4bit(codes, state)
    ours = grid.dense(grid.round(W, scale), scale)
    odd = (ours - back).abs() > 1e-6 * scale.repeat_interleave(64, 1)
    assert odd.float().mean() < 1e-3, "only at a tie"


def test_fp4_rounds_to_the_nearest_of_its_levels():
    W = normal(5, 24)
    form = stored(W, fp4, group=8)
    for row, codes, scales, back in zip(W.tolist(), form.codes(), form.scale.tolist(),
                                        form.dense().tolist()):
        for j, w in enumerate(row):
            wanted = min(range(15), key=lambda k: abs(w / scales[j // 8] - fp4.LEVELS[k]))
            assert codes[j] == wanted
            assert back[j] == pytest.approx(scales[j // 8] * fp4.LEVELS[wanted], rel=1e-6)
    assert form.levels.shape == (15,) and form.codes().amax() == 14
    assert ((form.dense() - W).abs() <= form.rounding() * 1.0001).all()


def test_on_normal_weights_nf4_is_nearest_then_int4_then_fp4():
    W, errors = normal(64, 512), []
    int4 = minillm.quant.wrap(nn.Sequential(nn.Linear(512, 64)), bits=4, group=64)[0]
    int4.pack(W)
    for form in (stored(W), int4, stored(W, fp4)):
        errors.append(((form.dense() - W).norm() / W.norm()).item())
    assert errors == sorted(errors) and errors[0] < 0.95 * errors[1], errors


# --- the scales ---------------------------------------------------------------------------------


def by_hand(scales):
    """The scales (n, groups) rounded up, block after block, number by number in float64."""
    flat, found = scales.double().flatten().tolist(), []
    mean = sum(flat) / len(flat)
    for i in range(0, len(flat), 256):
        block = flat[i : i + 256]
        step = max(abs(s - mean) for s in block) / 127
        for s in block:
            k = next(k for k in range(-127, 128) if mean + step * k >= s * (1 - 1e-6))
            found.append(mean + step * k)
    return torch.tensor(found).view(scales.shape).float()


@both
@pytest.mark.parametrize("n, groups", [(3, 5), (64, 4), (40, 16)])  # less than, one, some blocks
def test_scales_are_rounded_up_in_blocks(page, n, groups):
    W = normal(n, 8 * groups) * torch.logspace(-1, 0, n)[:, None]
    exact, form = stored(W, page, group=8).scale, stored(W, page, group=8, double=True)
    odd = (form.scales() - by_hand(exact)).abs() > 1e-5 * exact
    assert odd.sum() <= form.step.numel(), "the least of a block lies at a step, up to float32"
    assert form.scale.dtype == torch.int8 and form.step.numel() == -(-n * groups // 256)
    assert (form.scales() >= exact * (1 - 1e-6)).all()
    steps = form.step.repeat_interleave(256)[: n * groups].view(n, groups)
    assert (form.scales() <= exact + steps * 1.001).all()
    grid = Levels(page.LEVELS, 8)  # the codes are those of the scale that is stored
    assert form.codes().equal(grid.round(W, form.scales()))
    assert form.dense().equal(grid.dense(form.codes(), form.scales()))
    assert ((form.dense() - W).abs() <= form.rounding() * 1.0001).all()


def test_it_costs_4_127_bits_a_weight_and_hardly_any_error():
    W = normal(256, 1024)
    single, double = stored(W), stored(W, double=True)
    bits = [8 * report.total_bytes(form) / W.numel() for form in (single, double)]
    table = 8 * 4 * 16 / W.numel()  # the levels
    assert bits[0] == 4.5 + table
    assert bits[1] == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + table + 32 / W.numel())
    assert round(bits[1] - table, 3) == 4.127
    errors = [(form.dense() - W).norm().item() for form in (single, double)]
    assert errors[1] < 1.01 * errors[0]


def test_tiny_scales_stay_above_zero_and_groups_of_zeros_do_not_count():
    W = normal(8, 64)
    plain = stored(W, group=8, double=True)
    W[3, 16:40] = 0
    W[5, 8:16] *= 1e-9
    form = stored(W, group=8, double=True)
    assert (form.scales() > 0).all() and (form.dense()[3, 16:40] == 0).all()
    assert form.step.amax() < 1.5 * plain.step.amax(), "a scale of 1 for zeros would double it"
    assert ((form.dense() - W).abs() <= form.rounding() * 1.0001).all()
    for seed in range(30):  # c + d k of a tiny scale may be 0 or less in float32
        tiny = normal(4, 64, seed=seed)
        tiny[0, :8] *= 1e-9
        assert (stored(tiny, group=8, double=True).scales() > 0).all(), seed
    small = 1e-3 * W
    torch.testing.assert_close(stored(small, group=8, double=True).dense(), 1e-3 * form.dense(),
                               rtol=0, atol=1e-4, msg="zeros have no scale of 1")
    empty = stored(torch.zeros(4, 16), group=8, double=True)
    assert (empty.dense() == 0).all() and (empty.scales() > 0).all()
    same = stored(torch.ones(4, 16), group=8, double=True)
    assert (same.dense() == 1).all()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cast_leaves_codes_scales_and_levels(page, dtype):
    form, x = stored(normal(6, 128), page, double=True), normal(3, 128)
    before = {name: t.clone() for name, t in form.named_buffers()}
    W = form.dense()
    form = form.to(dtype)
    assert {name: t.dtype for name, t in form.named_buffers()} == {
        name: t.dtype for name, t in before.items()}
    assert all(t.equal(before[name]) for name, t in form.named_buffers())
    assert form.dense().dtype == dtype and form(x.to(dtype)).dtype == dtype
    near = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(form(x.to(dtype)).float(), F.linear(x, W), rtol=near, atol=near)


@both
def test_an_embedding_reads_its_own_scales(page):
    model = page.wrap(nn.Sequential(nn.Embedding(100, 32)), ["0"], group=8, double=True)
    ids = torch.tensor([[3, 99, 4], [64, 5, 0]])  # 4 scales a row: 64 rows a block
    assert model(ids).equal(model[0].dense().T[ids]) and model[0].step.shape == (2,)


@both
def test_copies_state_and_files_bit_for_bit(page, tmp_path):
    import safetensors.torch

    plain, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), normal(3, 16)
    model = page.wrap(copy.deepcopy(plain), group=8, double=True)
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin(x).equal(y)
        assert twin.bfloat16()[0].step.dtype == torch.float32
    store.save("quant", model, tmp_path / "a")
    again = store.load("quant", copy.deepcopy(plain), tmp_path / "a")
    assert again[0].config() == dict(group=8, double=True)
    ours, theirs = dict(model.named_buffers()), dict(again.named_buffers())
    assert ours.keys() == theirs.keys() and all(t.equal(theirs[name]) for name, t in ours.items())
    assert again[0].levels.equal(torch.tensor(page.LEVELS))
    tensors, metadata = store.read(tmp_path / "a")
    for key, value, message in (("0.mean", -1.0, "'0': a scale is not a number above 0"),
                                ("0.levels", 1.0, "'0': levels=.* are not"),
                                ("0.q", 255, "'0': a code is 15, and there are 15 levels")):
        if key == "0.q" and page is nf4:
            continue
        broken = {k: torch.full_like(t, value) if k == key else t for k, t in tensors.items()}
        safetensors.torch.save_file(broken, tmp_path / "b", metadata)
        with pytest.raises(ValueError, match=message):
            store.load("quant", copy.deepcopy(plain), tmp_path / "b")
    dense = model[0].dense()
    verbs.unwrap("quant", model, "codebook")
    assert type(model[0]) is nn.Linear and model[0].weight.equal(dense)


def test_an_adapter_over_nf4_is_none_over_fp4(tmp_path):
    """The two have the same kind and settings, and other levels."""
    torch.manual_seed(1)
    plain = build("llama")
    one, other = (minillm.lora.wrap(page.wrap(copy.deepcopy(plain), group=8), r=2)
                  for page in (nf4, fp4))
    names = {site.module.called() for model in (one, other)
             for site in minillm.registry.walk(model)
             if isinstance(site.module, minillm.Format)}
    assert len(names) == 2 and all(name.startswith("codebook {'group': 8") for name in names)
    minillm.lora.save(one, tmp_path / "a")
    minillm.lora.load(minillm.lora.unwrap(one), tmp_path / "a")


@both
def test_what_cannot_be_stored_is_named(page):
    rows = nn.Sequential(nn.Linear(96, 8))
    for options, message in ((dict(), "group=64 at '0': a row has 96.*group=48 or 96 would fit"),
                             (dict(group=48, double=1), "double=1 is neither True nor False"),
                             (dict(group=1), "group=1 is not a whole number")):
        with pytest.raises(ValueError, match=message):
            page.wrap(rows, **options)
    page.wrap(rows, group=48)
    with pytest.raises(ValueError, match="'0' is already stored as codebook: minillm.quant.unwrap"):
        page.wrap(rows, group=48)
    rows = nn.Sequential(nn.Linear(96, 8))
    rows[0].weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match="the weight of '0' holds nan or infinity"):
        page.wrap(rows, group=48)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_double_compiles():
    form, x = stored(normal(6, 64), fp4, group=16, double=True), normal(1, 64)
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), form(x), rtol=1e-4, atol=1e-5)


def test_a_model_in_fp4_trains_an_adapter():
    model = minillm.lora.wrap(fp4.wrap(build("llama"), group=8, double=True), r=4)
    learn = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(learn, lr=0.02), []
    for _ in range(6):
        losses.append(logits(model).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


def test_a_file_of_an_earlier_minillm(tmp_path):
    """There the kind was called nf4, and a file named no `double`."""
    torch.manual_seed(0)
    model = minillm.quant.nf4.wrap(nn.Sequential(nn.Linear(128, 8)))
    minillm.quant.save(model, tmp_path / "now")
    tensors, metadata = store.read(tmp_path / "now")
    metadata |= dict(kind="nf4", name="nf4", sites=json.dumps({"0": {"group": 64}}))
    safetensors.torch.save_file(tensors, tmp_path / "then", metadata)
    torch.manual_seed(0)
    other = minillm.quant.load(nn.Sequential(nn.Linear(128, 8)), tmp_path / "then")
    assert torch.equal(other[0].dense(), model[0].dense())
    assert store.holds(tmp_path / "then") == ("quant", "codebook")
