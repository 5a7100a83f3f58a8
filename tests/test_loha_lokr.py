"""LoHa and LoKr: the papers' formulas, peft's layers, and what the backward pass keeps."""

import copy
import warnings
import weakref

import pytest
import torch
from conftest import close, hugging_face
from models import IDS, build, learnt, logits, two
from torch import nn

import minillm
from minillm.lora import loha, lokr
from minillm.lora.loha import LoHa
from minillm.lora.lokr import LoKr, pair
from minillm.measure.report import saved_bytes


def one(technique, leaf, **options):
    """(a model of one wrapped leaf, its patch, its base), away from the birth."""
    torch.manual_seed(0)
    model = learnt(technique.wrap(nn.Sequential(leaf), ["0"], **options), std=0.5)
    return model, next(iter(model[0].patches.values())), model[0].base


def by_entry(patch, out, into):
    """The change of the weight, entry by entry, from the papers' sums."""
    t = {name: p.tolist() for name, p in patch.named_parameters()}

    def product(B, A, i, j):
        return sum(B[i][k] * A[k][j] for k in range(len(A)))

    def entry(i, j):
        if isinstance(patch, LoHa):
            return product(t["B1"], t["A1"], i, j) * product(t["B2"], t["A2"], i, j)
        q, n = len(t.get("D") or t["B2"]), len((t.get("D") or t["A2"])[0])
        C = t["C"][i // q][j // n] if "C" in t else product(t["B1"], t["A1"], i // q, j // n)
        D = t["D"][i % q][j % n] if "D" in t else product(t["B2"], t["A2"], i % q, j % n)
        return C * D

    return torch.tensor([[patch.alpha / patch.r * entry(i, j) for j in range(into)]
                         for i in range(out)])


OPTIONS = [(loha, dict(r=1)), (loha, dict(r=2, alpha=3.0)), (loha, dict(r=4)),
           (lokr, dict(r=1)), (lokr, dict(r=2, alpha=3.0, factor=2)), (lokr, dict(r=9)),
           (lokr, dict(r=1, decompose_both=True)), (lokr, dict(r=2, factor=1)),
           (lokr, dict(r=1, factor=8, decompose_both=True))]
every_option = pytest.mark.parametrize("technique, options", OPTIONS)


@every_option
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (16, 16)])
def test_the_formula_of_the_paper(technique, options, bias, shape):
    (out, into), r = shape, options["r"]
    model, patch, base = one(technique, nn.Linear(into, out, bias), **options)
    change = by_entry(patch, out, into)
    close("3 fold", patch.change(), change, "the change")
    close("3 fold", model[0].dense()[0], base.weight + change, "the folded weight")
    for x in (torch.randn(into), torch.randn(3, into), torch.randn(2, 3, into)):
        expected = x @ (base.weight + change).T + (base.bias if bias else 0)
        close("3 fold", model(x), expected, f"{technique.__name__} {options} on {tuple(x.shape)}")
        with torch.no_grad():
            close("3 fold", model(x), expected, "without gradients")
    learns = {name for name, p in patch.named_parameters() if p.requires_grad}
    if technique is loha:
        assert learns == {"A1", "B1", "A2", "B2"} and patch.A1.shape == patch.A2.shape == (r, into)
        assert torch.linalg.matrix_rank(patch.change()) == min(r**2, out, into)


@every_option
def test_gradients_are_those_of_the_formula(technique, options):
    model, patch, base = one(technique, nn.Linear(12, 8), **options)
    x, weight = torch.randn(5, 12, requires_grad=True), torch.randn(5, 8)
    plain = nn.functional.linear(x, base.weight + patch.change(), base.bias)
    learn = [x, *patch.parameters()]
    ours, theirs = (torch.autograd.grad((y * weight).sum(), learn) for y in (model(x), plain))
    for a, b in zip(ours, theirs):
        close("3 fold", a, b, f"{technique.__name__} {options}: gradient")


def test_loha_takes_the_cheaper_of_two_ways():
    """P (Q x) where r^2 (in + out) < in * out: 4 * 40 < 384, and 16 * 40 is not."""
    for r, shapes in ((2, [(4, 16), (24, 4)]), (4, [(24, 16)])):
        _, patch, _ = one(loha, nn.Linear(16, 24), r=r)
        assert [tuple(M.shape) for M in patch.chain()] == shapes
    _, patch, _ = one(loha, nn.Linear(8, 8), r=2)  # 4 * 16 = 64: as many, so the plain way
    assert len(patch.chain()) == 1


@pytest.mark.parametrize("technique, bounds", [
    (loha, dict(B1=4**-0.5, B2=4**-0.5, A1=40**-0.5, A2=0)),
    (lokr, dict(C=0, A2=8**-0.5, B2=4**-0.5))])
def test_at_birth(technique, bounds):
    """Uniform within a bound, zero in one matrix: no output changes, and one step moves it."""
    r = dict(r=4) if technique is loha else dict(r=4, factor=5)
    leaf = nn.Linear(40, 4000 if technique is loha else 5000)
    model = technique.wrap(nn.Sequential(leaf), ["0"], **r)
    patch = next(iter(model[0].patches.values()))
    for name, p in patch.named_parameters():
        bound = bounds[name] if name != "A2" or technique is loha else 8**-0.5
        assert p.abs().max() <= bound and p.abs().max() >= 0.9 * bound, name
        assert p.mean().abs() <= 0.2 * bound, name
    x = torch.randn(3, 40)
    assert torch.equal(model(x), leaf(x))
    model(x).square().sum().backward()
    zero = patch.A2 if technique is loha else patch.C
    assert zero.grad.abs().max() > 0


# --- the shapes of LoKr -----------------------------------------------------------------------


def test_pair():
    assert pair(576) == (24, 24) and pair(1536) == (32, 48) and pair(127) == (1, 127)
    assert pair(128, 4) == (4, 32) and pair(16, 8) == (8, 2) and pair(30, 4) == (3, 10)
    assert pair(1) == (1, 1) and pair(49, 7) == (7, 7)


@pytest.mark.parity
def test_pair_is_pefts():
    factorization = pytest.importorskip("peft.tuners.lokr.layer").factorization
    for size in [*range(1, 200), 576, 768, 1536, 4096, 49152, 50257]:
        assert pair(size) == factorization(size, -1), size
        for factor in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 31, 64, 199, 1000):
            assert pair(size, factor) == factorization(size, factor), (size, factor)


def test_what_is_whole_and_what_has_a_rank():
    def names(**options):
        _, patch, _ = one(lokr, nn.Linear(36, 16), **options)  # (4, 4), (6, 6)
        return {name: tuple(p.shape) for name, p in patch.named_parameters()}

    assert names(r=2) == dict(C=(4, 6), B2=(4, 2), A2=(2, 6))
    assert names(r=3) == dict(C=(4, 6), D=(4, 6)) == names(r=100)
    assert names(r=2, decompose_both=True) == dict(B1=(4, 2), A1=(2, 6), B2=(4, 2), A2=(2, 6))
    assert names(r=3, decompose_both=True) == dict(C=(4, 6), D=(4, 6))
    assert names(r=3, factor=2) == dict(C=(2, 2), B2=(8, 3), A2=(3, 18))


def test_with_sides_of_one_lokr_is_lora_with_a_factor():
    _, patch, _ = one(lokr, nn.Linear(12, 8), r=3, factor=1)
    assert patch.C.shape == (1, 1)
    close("3 fold", patch.change(), patch.C * 16 / 3 * patch.B2 @ patch.A2, "factor=1")


def test_the_rank_is_the_product_of_the_ranks():
    _, patch, _ = one(lokr, nn.Linear(36, 36), r=2)
    assert torch.linalg.matrix_rank(patch.change()) == 6 * 2


# --- peft -------------------------------------------------------------------------------------

NAMES = {"loha": dict(B1="hada_w1_a", A1="hada_w1_b", B2="hada_w2_a", A2="hada_w2_b"),
         "lokr": dict(C="lokr_w1", B1="lokr_w1_a", A1="lokr_w1_b", D="lokr_w2", B2="lokr_w2_a",
                      A2="lokr_w2_b")}


@pytest.mark.parity
@pytest.mark.parametrize("technique, options", [
    (loha, dict(r=2)), (loha, dict(r=5, alpha=3.0)),
    (lokr, dict(r=1)), (lokr, dict(r=1, alpha=4.0, decompose_both=True)), (lokr, dict(r=3)),
    (lokr, dict(r=3, factor=2)), (lokr, dict(r=2, factor=16)), (lokr, dict(r=2, factor=5))])
def test_peft(technique, options):
    """The same shapes at birth; with the same tensors, outputs, gradients and merged outputs."""
    hugging_face()
    peft = pytest.importorskip("peft")
    plain, targets = build("hf_llama"), ["q_proj", "k_proj", "down_proj", "up_proj"]
    kind = technique.__name__.rpartition(".")[2]
    config = dict(r=options["r"], alpha=options.get("alpha", 16.0), target_modules=targets)
    if kind == "lokr":
        config |= dict(decompose_factor=options.get("factor", -1),
                       decompose_both=options.get("decompose_both", False))
    cls = peft.LoHaConfig if kind == "loha" else peft.LoKrConfig
    with warnings.catch_warnings(action="ignore"):
        theirs = peft.get_peft_model(copy.deepcopy(plain), cls(**config)).eval()
    ours, pairs = technique.wrap(plain, targets, **options), []
    for name, module in theirs.base_model.model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        patch = minillm.layers(ours)[name].patches[kind]
        here = {key: dict(getattr(module, their)).get("default")
                for key, their in NAMES[kind].items()}
        here = {key: p for key, p in here.items() if p is not None}
        assert {key: p.shape for key, p in here.items()} == {
            key: p.shape for key, p in patch.named_parameters()}
        for key, q in here.items():
            p = patch.get_parameter(key)
            assert (q == 0).all() == (p == 0).all()  # the same matrix is zero at birth
            with torch.no_grad():
                p.copy_(q.normal_(std=0.3))
            pairs.append((p, q))
    assert len(pairs) >= 4 * 3 * 2
    a, b = logits(ours), logits(theirs)
    close("parity", a, b, f"{kind} {options}: outputs", 1e-5)
    weight = torch.randn_like(a)
    for out in (a, b):
        (out * weight).sum().backward()
    for p, q in pairs:
        close("parity", p.grad, q.grad, f"{kind} {options}: gradients", 1e-4)
    merged = theirs.merge_and_unload()
    close("parity", logits(minillm.lora.merge(ours)), logits(merged), f"{kind} {options}: merged")


# --- leaves -----------------------------------------------------------------------------------


@every_option
@pytest.mark.parametrize("padding", [None, 3])
def test_an_embedding(technique, options, padding, tmp_path):
    model, patch, base = one(technique, nn.Embedding(24, 8, padding_idx=padding), **options)
    ids = torch.arange(24).view(4, 6)
    change = by_entry(patch, 8, 24).T
    if padding is not None:
        change[padding] = 0
        assert torch.equal(model(torch.tensor([padding]))[0], base.weight[padding])
    y = model(ids)
    close("3 fold", y, (base.weight + change)[ids], "an embedding")
    close("3 fold", model[0].dense()[0].T, base.weight + change, "its folded weight")
    ours = torch.autograd.grad(y.square().sum(), list(patch.parameters()))
    folded = model[0].dense()[0].T[ids]
    for a, b in zip(ours, torch.autograd.grad(folded.square().sum(), list(patch.parameters()))):
        close("3 fold", a, b, "its gradients", 1e-4)
    minillm.lora.save(model, tmp_path / "a")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Embedding(24, 8, padding_idx=padding))
    assert torch.equal(minillm.lora.load(plain, tmp_path / "a")(ids), y)
    close("5 merge", minillm.lora.merge(model)(ids), y, "merged")


@pytest.mark.parametrize("technique", [loha, lokr])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "gpt2", "llama", "hf_gpt2"])
def test_merge_and_back_beside_other_adapters(technique, kind):
    """Each is a sum, so it merges in any order with LoRA and with another of its kind."""
    model = build(kind)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    technique.wrap(minillm.lora.wrap(technique.wrap(model, r=2), r=2), r=1, name="second")
    learnt(model, std=0.2)
    y, name = logits(model), technique.__name__.rpartition(".")[2]
    assert not torch.allclose(y, logits(build(kind)), atol=1e-2)
    for one_name in (name, "second", "lora"):
        minillm.lora.merge(model, one_name)
        close("5 merge", logits(model), y, f"{one_name} on {kind}", 2e-5)
    minillm.lora.unmerge(model)
    assert torch.equal(logits(model), y)
    minillm.lora.unwrap(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("technique, options", [(loha, dict(r=2)), (loha, dict(r=16)),
                                                (lokr, dict(r=2)), (lokr, dict(r=64))])
def test_the_backward_keeps_no_dense_change_and_no_products(technique, options):
    """Only x, so less than LoRA, which keeps A x too."""
    def model(wrap, **options):
        torch.manual_seed(0)
        return wrap(minillm.Transformer(minillm.Config(24, 64, 2, 4, kv_heads=2, ffn=128,
                                                       positions=64, tied=False)), **options)

    lora = saved_bytes(model(minillm.lora.wrap, r=8), IDS)
    assert saved_bytes(model(technique.wrap, **options), IDS) < lora


@pytest.mark.parametrize("technique", [loha, lokr])
def test_the_backward_keeps_no_output_of_the_leaf(technique):
    model, patch, base = one(technique, nn.Linear(16, 16), r=2)
    outputs = []
    base.register_forward_hook(lambda *args: outputs.append(weakref.ref(args[-1])))
    y = model(torch.randn(3, 16))
    assert y.requires_grad and outputs[0]() is None


@pytest.mark.parametrize("technique", [loha, lokr])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(technique, dtype):
    model = learnt(technique.wrap(build("llama"), r=2), std=0.2)
    y = logits(model)
    y.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        z = logits(model)
    assert z.dtype == dtype and (z - y).norm() < 0.03 * y.norm()
    z.float().square().mean().backward()
    for name, p in model.named_parameters():
        if name in grads:
            assert (p.grad - grads[name]).norm() < 0.2 * grads[name].norm(), name


@pytest.mark.parametrize("technique", [loha, lokr])
def test_compiled_training_is_eager_training(technique):
    torch._dynamo.reset()
    model = learnt(technique.wrap(build("Linear"), r=1), std=0.2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    runs = []
    for run in (model, compiled):
        model.zero_grad()
        run(IDS).square().mean().backward()
        runs.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert runs[0]
    for a, b in zip(*runs):
        close("7 compile", b, a, technique.__name__)


# --- options ------------------------------------------------------------------------------------


def test_options_are_kept_and_shown():
    model = loha.wrap(two(), r=3, alpha=5)
    patch = model[0].patches["loha"]
    assert patch.config() == dict(r=3, alpha=5.0) and patch.scale == 5 / 3
    assert "r=3, alpha=5.0" in repr(patch) and type(patch) is LoHa
    assert loha.wrap(two(), r=5)[2].patches["loha"].r == 4  # the smaller side
    patch = lokr.wrap(two(), r=3, factor=2, decompose_both=True)[0].patches["lokr"]
    assert patch.config() == dict(r=3, alpha=16.0, factor=2, decompose_both=True)
    assert "factor=2" in repr(patch) and type(patch) is LoKr


@pytest.mark.parametrize("technique, options, message", [
    (loha, dict(r=7), r"r=7 at '0': the rank of a \(5, 6\) matrix is from 1 to 5"),
    (loha, dict(r=0), "r=0 is not a whole number of at least 1"),
    (loha, dict(r=2, alpha=0), "alpha=0 is not a number above 0"),
    (lokr, dict(r=1.5), "r=1.5 is not a whole number of at least 1"),
    (lokr, dict(alpha=-1), "alpha=-1 is not a number above 0"),
    (lokr, dict(factor=0), "factor=0 is not a whole number of at least 1"),
    (lokr, dict(factor=-1), "factor=-1 is not a whole number of at least 1"),
    (lokr, dict(decompose_both=1), "decompose_both=1 is neither True nor False")])
def test_wrong_options_change_nothing(technique, options, message):
    model = two()
    with pytest.raises(ValueError, match=message):
        technique.wrap(model, **options)
    assert not minillm.layers(model)
