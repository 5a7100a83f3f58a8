"""Scores and patterns against a stable sort, Wanda against its formula."""

import copy

import numpy as np
import pytest
import torch
from models import MODELS, build, logits
from test_train import quiet
from torch import nn

import minillm
from minillm import prune
from minillm.prune import patterns, smallest, wanda
from minillm.prune.gradual import Gradual

ROWS = torch.randint(24, (6, 12), generator=torch.Generator().manual_seed(3))


def draw(kind, *shape, seed=0):
    made = torch.Generator().manual_seed(seed)
    s = torch.randn(shape, generator=made)
    return {"distinct": s.abs(), "negative": s,
            "few": torch.randint(0, 4, shape, generator=made).float(), "equal": torch.ones(shape),
            "half": s.abs().bfloat16(), "float16": s.abs().half(), "double": s.double().abs(),
            "infinite": s.abs().masked_fill(s > 1, torch.inf)}[kind]


def by_hand(rows, k):
    """The mask of each row: a stable sort, and the first k go."""
    mask = torch.ones(rows.shape, dtype=torch.bool)
    for row, kept in zip(rows, mask):
        kept[row.double().sort(stable=True).indices[:k]] = False
    return mask


KINDS = ["distinct", "negative", "few", "equal", "half", "float16", "double", "infinite"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.77, 0.999])
def test_patterns_are_a_stable_sort(kind, share, monkeypatch):
    monkeypatch.setattr(smallest, "PIECE", 64)  # many pieces
    monkeypatch.setattr(smallest, "SAMPLE", 50)
    a, b = draw(kind, 9, 24), draw(kind, 5, 16, seed=1)
    pairs = {"a": a, "b": b}
    found = prune.row.masks(pairs.items(), share)
    for name, s in pairs.items():
        assert found[name].equal(by_hand(s, round(share * s.shape[1]))), name
    found = prune.matrix.masks(pairs.items(), share)
    for name, s in pairs.items():
        assert found[name].equal(by_hand(s.view(1, -1), round(share * s.numel())).view(s.shape))
    found = prune.model.masks(pairs.items(), share)
    whole = torch.cat([a.flatten(), b.flatten()])[None]
    assert torch.cat([mask.flatten() for mask in found.values()])[None].equal(
        by_hand(whole, round(share * whole.numel()))
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (1, 2), (3, 8), (4, 8), (15, 16), (24, 48)])
def test_neighbours_are_a_stable_sort_of_each_few(kind, n, m, monkeypatch):
    monkeypatch.setattr(smallest, "PIECE", 64)
    s = draw(kind, 7, 48)
    pattern = prune.n_m(n, m)
    mask = pattern.masks([("a", s)], 1 - n / m)["a"]
    assert (mask.equal(by_hand(s.view(-1, m), m - n).view(7, 48))
            and mask.view(-1, m).sum(1).eq(n).all())
    assert pattern.name == f"{n}:{m}" and patterns.named(pattern.name) == pattern


@pytest.mark.parametrize("n, m", [(256, 512), (1, 257), (255, 256)])
def test_more_neighbours_than_a_byte_counts(n, m):
    s = draw("few", 2, m)
    assert prune.n_m(n, m).masks([("a", s)], 1 - n / m)["a"].equal(by_hand(s, m - n))


@pytest.mark.parametrize("k", [1, 7, 5000, 9999, 10000])
def test_a_bracket_that_misses_the_threshold_is_found_out(k, monkeypatch):
    """Every place of the sample holds a large number, and no other place does."""
    monkeypatch.setattr(smallest, "SAMPLE", 100)
    s = torch.rand(10000).numpy()
    s[::100] += 5
    assert smallest.threshold([s[:5000], s[5000:]], k) == np.sort(s)[k - 1]
    s = torch.rand(10000).numpy()
    looked = []
    real = np.partition
    monkeypatch.setattr(np, "partition", lambda a, k: looked.append(len(a)) or real(a, k))
    assert smallest.threshold([s], k) == np.sort(s)[k - 1] and looked[-1] < 9000


def test_threads_change_nothing():
    s = draw("half", 300, 2048)
    masks, before = [], torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            masks.append([pattern.masks([("a", s)], 0.3)["a"]
                          for pattern in (prune.row, prune.matrix)])
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for a, b in zip(*masks))


def test_a_score_and_a_pattern_are_arguments():
    model = prune.wrap(build("llama"), pattern=prune.n_m(2, 4), score=prune.Random(3))
    for layer in minillm.layers(model).values():
        patch = layer.patches["prune"]
        assert (patch.mask.unflatten(1, (-1, 4)).sum(-1).eq(2).all() and patch.group == "2:4"
                and patch.sparsity == 0.5)
    masks = [{name: layer.patches["prune"].mask
              for name, layer in minillm.layers(prune.wrap(build("llama"), score=score)).items()}
             for score in (prune.Random(3), prune.Random(3), prune.Random(4), prune.magnitude)]
    names = list(masks[0])
    assert all(masks[0][name].equal(masks[1][name]) for name in names)
    assert (not masks[0][names[0]].equal(masks[2][names[0]])
            and not masks[0][names[0]].equal(masks[3][names[0]]))
    assert not masks[0]["layers.0.mlp.up_proj"].equal(masks[0]["layers.1.mlp.up_proj"]), (
        "each site draws its own")
    assert repr(prune.magnitude) == "magnitude" and repr(prune.n_m(1, 4)) == "1:4"
    by_name, by_object = (prune.wrap(build("llama"), **options)
                          for options in (dict(group="matrix"), dict(pattern=prune.matrix)))
    assert logits(by_name).equal(logits(by_object))
    assert logits(prune.wrap(build("llama"), pattern="matrix")).equal(logits(by_object))


@pytest.mark.parametrize("options, message", [
    (dict(pattern=2), "pattern=2 is none of prune.row"),
    (dict(pattern="rows"), "pattern='rows' is unknown; known: 'row', 'matrix', 'model', or N:M"),
    (dict(score="random"), "score='random' is no function"),
    (dict(pattern=prune.n_m(1, 4)), "sparsity=0.5 is not that of 1:4, which is 0.75"),
    (dict(sparsity=0.6, pattern=prune.n_m(2, 4)), "sparsity=0.6 is not that of 2:4, which is 0.5"),
    (dict(sparsity=0.667, group="1:3"), "is not that of 1:3, which is 0.6666666666666666$"),
    (dict(sparsity=0.5, group="1:5"), "sparsity=0.5 is not that of 1:5"),
    (dict(sparsity=0.8, group="1:5"), "1:5 at 'layers.0.self_attn.q_proj': a row has 16 weights"),
    (dict(group="4:4"), "n=4 is not a whole number from 1 to 3"), (dict(group="0:4"), "n=0"),
    (dict(group="1:1"), "m=1"),
    (dict(group="rows"),
     "group='rows' is unknown; known: 'row', 'matrix', 'model', or N:M such as '2:4'"),
])
def test_what_fits_nothing_is_named(options, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        prune.wrap(model, **options)
    assert not minillm.layers(model)


def test_a_file_has_the_pattern_by_name(tmp_path):
    model = prune.wrap(build("llama"), pattern=prune.n_m(2, 4))
    prune.save(model, tmp_path / "a")
    again = prune.load(build("llama"), tmp_path / "a")
    assert logits(again).equal(logits(model))
    assert minillm.layers(again)["layers.0.mlp.up_proj"].patches["prune"].config() == dict(
        sparsity=0.5, group="2:4"
    )


def test_gradual_pruning_keeps_the_pattern():
    model = prune.wrap(build("llama"), sparsity=0.5, pattern=prune.n_m(2, 4))
    schedule = Gradual(0.5, end=1.0, every=1)
    for step in range(5):
        schedule(model, step, 5)
        now = schedule.at(step, 5)
        for layer in minillm.layers(model).values():
            patch = layer.patches["prune"]
            assert (patch.mask.unflatten(1, (-1, 4)).sum(-1).eq(4 - round(4 * now)).all()
                    and patch.group == "2:4")
    assert patch.mask.equal(minillm.layers(prune.wrap(build("llama"), pattern=prune.n_m(2, 4)))[
        "layers.2.mlp.down_proj"].patches["prune"].mask)


def masks_of_two_names():
    model = prune.wrap(build("llama"), ["q_proj"], name="still", sparsity=0.25)
    return prune.wrap(model, ["q_proj", "up_proj"], name="grown", sparsity=0.0)


def test_gradual_pruning_changes_the_masks_of_one_name():
    model, schedule = masks_of_two_names(), Gradual(0.5, end=1.0, every=1, name="grown")
    for step in range(5):
        schedule(model, step, 5)
    for name, layer in minillm.layers(model).items():
        for patch in layer.patches.values():
            share = {"still": 0.25, "grown": 0.5}[patch.name]
            assert (~patch.mask).float().mean() == share == patch.sparsity, (name, patch.name)
    assert Gradual(0.5, name="a") != Gradual(0.5, name="b") != Gradual(0.5)


@pytest.mark.parametrize("name, message", [
    (None, "name=None: .* the masks of one name, and this model has masks of 'grown', 'still'"),
    ("other", "name='other': .* this model has masks of 'grown', 'still'")])
def test_gradual_pruning_has_to_know_which_masks(name, message, monkeypatch):
    monkeypatch.setattr(minillm.train.loop, "update", lambda run: pytest.fail("a step was made"))
    for call in (lambda: Gradual(0.5, name=name)(masks_of_two_names(), 0, 5),
                 lambda: quiet(masks_of_two_names(), steps=2, on_step=Gradual(0.5, name=name))):
        with pytest.raises(ValueError, match=message):
            call()


def test_gradual_pruning_ends_at_the_share_of_the_pattern(monkeypatch):
    monkeypatch.setattr(minillm.train.loop, "update", lambda run: pytest.fail("a step was made"))
    model = prune.wrap(build("llama"), pattern=prune.n_m(2, 4))
    for call in (lambda: quiet(model, steps=2, on_step=Gradual(0.8)),
                 lambda: Gradual(0.8)(model, 0, 5)):
        with pytest.raises(ValueError, match="sparsity=0.8 is not that of 2:4, which is 0.5"):
            call()


def test_a_pruned_weight_comes_back_when_it_is_larger_than_others():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    model[0].weight.data = torch.tensor([[0.1, 1, 2, 3]])
    prune.wrap(model, ["0"], sparsity=0.0)
    schedule, patch = Gradual(0.25, first=0.25, every=1, end=1.0), model[0].patches["prune"]
    schedule(model, 0, 9)
    assert patch.mask.tolist() == [[False, True, True, True]]
    model[0].base.weight.data[0, 0] = 9.0  # as AdamW may move it beneath the mask
    Gradual(0.3, first=0.25, every=1, end=1.0)(model, 4, 9)  # the share grew, but rounds to one
    assert patch.mask.tolist() == [[True, False, True, True]]


# --- Wanda --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern, k",
                         [(prune.row, None), (prune.n_m(2, 4), 2), (prune.matrix, None)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_wanda_is_its_formula(name, pattern, k):
    """Leaf by leaf: |W| ||X||₂ with the inputs that the model gives it once all leaves
    before it are masked."""
    model = build(name)
    weights = {site.name: site.dense()[0].detach().clone() for site in minillm.registry.walk(model)
               if site.leaf}
    wanda.wrap(model, ROWS, pattern=pattern, batch_size=4, progress=False)
    found = {name: layer for name, layer in minillm.layers(model).items()}
    assert len(found) >= 6
    for where, layer in found.items():
        seen = []
        handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            model(ROWS)
        handle.remove()
        W, X = weights[where].double().tolist(), torch.cat(seen).double()
        norms = [X[:, j].norm().item() for j in range(X.shape[1])]
        S = torch.tensor([[abs(w) * norms[j] for j, w in enumerate(row)] for row in W])
        groups = {"row": S, "matrix": S.view(1, -1)}.get(pattern.name, S.view(-1, 4))
        assert layer.patches["prune"].mask.equal(
            by_hand(groups, groups.shape[1] // 2).view(S.shape)
        ), where
    assert logits(model).isfinite().all()


def test_wanda_keeps_what_large_inputs_need():
    W = nn.Linear(8, 4)
    model, X = nn.Sequential(nn.Embedding(24, 8), W), None
    model[0].weight.data[:, 5] *= 100
    W.weight.data[:, 5] = W.weight.data[:, 5].abs().clamp(min=0.01)
    wanda.wrap(model, ROWS, ["1"], progress=False)
    assert model[1].patches["prune"].mask[:, 5].all() and X is None
    assert not prune.wrap(nn.Sequential(copy.deepcopy(W).requires_grad_(False)),
                          sparsity=0.5)[0].patches["prune"].mask.all()


def test_wandas_file_is_a_file_of_prune(tmp_path):
    model = wanda.wrap(build("gpt2"), ROWS, sparsity=0.25, progress=False)
    prune.save(model, tmp_path / "a")
    again = prune.load(build("gpt2"), tmp_path / "a")
    assert logits(again).equal(logits(model)) and not logits(again).equal(logits(build("gpt2")))
    assert logits(prune.unwrap(model)).equal(logits(build("gpt2")))


def test_wanda_over_lora_scores_what_is_there():
    model = minillm.lora.wrap(build("llama"), r=2)
    nn.init.constant_(minillm.layers(model)["layers.0.self_attn.q_proj"].patches["lora"].B, 5.0)
    wanda.wrap(model, ROWS, progress=False)
    layer = minillm.layers(model)["layers.0.self_attn.q_proj"]
    assert list(layer.patches) == ["lora", "prune"]
    plain = (
        minillm.layers(wanda.wrap(build("llama"), ROWS, progress=False))[
            "layers.0.self_attn.q_proj"
        ]
        .patches["prune"]
        .mask
    )
    assert not layer.patches["prune"].mask.equal(plain)


@pytest.mark.parametrize("options, message", [
    (dict(pattern=prune.model), "pattern=model compares all leaves at once"),
    (dict(pattern="rows"), "pattern='rows' is unknown"),
    (dict(sparsity=1), "sparsity=1"),
    (dict(sparsity=0.3, pattern=prune.n_m(2, 4)), "sparsity=0.3 is not that of 2:4"),
    (dict(examples=[]), "no examples"), (dict(targets=["embed_tokens"]), "no leaf"),
])
def test_wanda_names_what_is_wrong_before_any_leaf_is_masked(options, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        wanda.wrap(model, **{"examples": ROWS, "progress": False, **options})
    assert not minillm.layers(model)
    prune.wrap(model, ["layers.2.mlp.up_proj"])
    with pytest.raises(ValueError, match="'layers.2.mlp.up_proj' is already wrapped with prune"):
        wanda.wrap(model, ROWS, progress=False)
    assert len(minillm.layers(model)) == 1
