"""`loss=` and `on_step=`: distillation, gradual pruning, gradual unfreezing, each
against its formula and resumed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import hugging_face
from models import build
from test_train import examples, quiet

import minillm
from minillm import data
from minillm.freeze.gradual import Unfreezing
from minillm.prune.gradual import Gradual
from minillm.train import loss_sum, openings
from minillm.train.distill import Distillation

# --- the openings -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_step_reads_gradients_and_leaves_parameters_out(dtype):
    model, seen = build("llama").to(dtype), []
    low = {name: p.clone() for name, p in model.named_parameters() if name.startswith("layers.0")}

    def look(model, step, steps):
        seen.append((step, steps, model.norm.weight.grad.abs().sum().item() > 0,
                     model.norm.weight.grad.dtype))
        for p in model.layers[0].parameters():
            p.grad = None

    quiet(model, steps=3, weight_decay=0.1, on_step=look)
    assert seen == [(i, 3, True, dtype) for i in range(3)]
    after = dict(model.named_parameters())
    assert all(after[name].equal(p) for name, p in low.items()), "neither moved nor decayed"
    assert not after["layers.1.mlp.up_proj.weight"].equal(
        build("llama").to(dtype).layers[1].mlp.up_proj.weight
    )


def test_what_is_left_out_is_not_clipped_with_the_rest():
    def nothing_below(model, step, steps):
        for name, p in model.named_parameters():
            if not name.startswith("norm"):
                p.grad = None

    record = quiet(build("llama"), steps=1, clip=1e9, on_step=nothing_below)[0]
    assert record["norm"] < quiet(build("llama"), steps=1, clip=1e9)[0]["norm"] / 2


def test_a_loss_of_ones_own():
    def twice(model, ids, labels, mask=None):
        return 2 * loss_sum(model, ids, labels, mask)

    one, two = quiet(build("llama"), steps=1), quiet(build("llama"), steps=1, loss=twice)
    assert two[0]["loss"] == pytest.approx(2 * one[0]["loss"])


def a_step(model, step, steps):
    pass


def test_a_checkpoint_belongs_to_its_functions(tmp_path):
    quiet(minillm.prune.wrap(build("llama"), sparsity=0.0), steps=4, checkpoints=tmp_path,
          on_step=Gradual(0.5))
    for other in (Gradual(0.6), a_step, None):
        with pytest.raises(ValueError, match=r"other settings: on_step=.*Gradual\(sparsity=0.5"):
            quiet(minillm.prune.wrap(build("llama"), sparsity=0.0), steps=4, checkpoints=tmp_path,
                  resume=True,
                  on_step=other)
    assert openings.named(a_step) == "test_openings.a_step" and openings.named(None) is None


def test_a_checkpoint_belongs_to_its_teacher(tmp_path):
    teacher, other = build("llama"), build("llama")
    with torch.no_grad():
        other.norm.weight.mul_(1.1)
    quiet(build("llama"), steps=2, checkpoints=tmp_path, loss=Distillation(teacher))
    quiet(build("llama"), steps=2, checkpoints=tmp_path, resume=True,
          loss=Distillation(copy.deepcopy(teacher)))
    with pytest.raises(ValueError, match=r"other settings: loss=.*Distillation\(teacher="):
        quiet(build("llama"), steps=2, checkpoints=tmp_path, resume=True, loss=Distillation(other))


# --- gradual pruning ----------------------------------------------------------------------------


def test_the_sparsity_follows_the_cube():
    schedule, steps = Gradual(sparsity=0.9, first=0.1, begin=0.2, end=0.8, every=5), 101
    for step in range(steps):
        t = min(max(step - 20, 0) // 5 * 5, 60)
        expected = 0.9 + (0.1 - 0.9) * (1 - t / 60) ** 3
        assert schedule.at(step, steps) == pytest.approx(expected), step
    assert schedule.at(80, steps) == 0.9 == schedule.at(100, steps)


@pytest.mark.parametrize("group", ["row", "matrix", "model"])
def test_gradual_pruning_ends_at_the_mask_of_the_largest(group):
    model = minillm.prune.wrap(build("llama"), sparsity=0.0, group=group)
    shares = []

    def watched(model, step, steps, prune=Gradual(0.5, every=2)):
        prune(model, step, steps)
        patch = minillm.layers(model)["layers.0.mlp.up_proj"].patches["prune"]
        shares.append((~patch.mask).float().mean().item())
        assert patch.sparsity == prune.at(step, steps)

    quiet(model, steps=9, on_step=watched)
    assert len(set(shares)) > 2 and (group == "model" or shares == sorted(shares))
    again = minillm.prune.wrap(copy.deepcopy(minillm.prune.unwrap(copy.deepcopy(model))),
                               sparsity=0.5, group=group)
    for name, layer in minillm.layers(model).items():
        patch, other = layer.patches["prune"], minillm.layers(again)[name].patches["prune"]
        assert patch.config() == dict(sparsity=0.5, group=group)
        off = (patch.mask != other.mask).float().mean()
        assert off < 0.2, "the last training moved few weights across the border"
    assert sum((~layer.patches["prune"].mask).sum()
               for layer in minillm.layers(model).values()) == sum(
        (~layer.patches["prune"].mask).sum() for layer in minillm.layers(again).values())


def test_gradual_pruning_without_a_mask_is_an_error():
    with pytest.raises(ValueError, match="this model has none: minillm.prune.wrap"):
        quiet(build("llama"), steps=1, on_step=Gradual(0.5))
    for wrong in (dict(sparsity=1.0), dict(first=-1), dict(every=0), dict(begin=0.5, end=0.5),
                  dict(end=1.5)):
        with pytest.raises(ValueError):
            Gradual(**wrong)


def test_a_mask_over_lora_is_ranked_by_what_lies_beneath_it():
    model = minillm.prune.wrap(minillm.lora.wrap(build("llama"), r=2), sparsity=0.0)
    quiet(model, steps=3, lr=0.1, on_step=Gradual(0.5, every=1))
    layer = minillm.layers(model)["layers.0.mlp.up_proj"]
    assert (~layer.patches["prune"].mask).float().mean() == 0.5


# --- gradual unfreezing -------------------------------------------------------------------------


def test_blocks_join_from_the_top():
    model, moved = build("llama"), []
    before = {name: p.clone() for name, p in model.named_parameters()}
    unfreeze = Unfreezing(until=0.75)

    def watched(model, step, steps):
        moved.append(sorted({name.split(".")[1] if name.startswith("layers.")
                             else name.split(".")[0]
                             for name, p in model.named_parameters() if not p.equal(before[name])}))
        unfreeze(model, step, steps)

    quiet(model, steps=8, on_step=watched)  # three blocks join at the steps 0, 2 and 4
    after = ["lm_head", "norm"]
    assert (moved[0] == [] and moved[1] == moved[2] == ["2", *after]
            and moved[3] == moved[4] == ["1", "2", *after])
    assert moved[5] == ["0", "1", "2", "embed_tokens", *after]


def test_what_a_technique_added_waits_with_its_block():
    model, unfreeze, had = minillm.lora.wrap(build("llama"), r=2), Unfreezing(until=0.75), []

    def watched(model, step, steps):
        unfreeze(model, step, steps)
        had.append({name.split(".")[1] for name, p in model.named_parameters()
                    if p.grad is not None})

    quiet(model, steps=8, on_step=watched)
    assert had == [{"2"}] * 2 + [{"1", "2"}] * 2 + [{"0", "1", "2"}] * 4


def test_unfreezing_wants_blocks_and_a_share():
    with pytest.raises(ValueError, match="no list of blocks"):
        Unfreezing()(torch.nn.Sequential(torch.nn.Linear(2, 2)), 0, 4)
    for wrong in (0, 1.5, "x"):
        with pytest.raises(ValueError, match="until="):
            Unfreezing(wrong)


# --- distillation -------------------------------------------------------------------------------


def by_hand(student, teacher, rows, T, share):
    """The formula, token by token, in float64."""
    total = 0.0
    for row in rows:
        ids = torch.tensor([row.ids])
        s, t = (m(ids)[0].double() for m in (student, teacher))
        for i, label in list(enumerate(row.labels))[1:]:
            if label != data.NOT_LEARNT:
                p, q = (F.softmax(x[i - 1] / T, 0) for x in (t, s))
                hard = -F.log_softmax(s[i - 1], 0)[label]
                total += (1 - share) * hard + share * T**2 * (p * (p.log() - q.log())).sum()
    return total


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_distillation_is_its_formula(kind):
    torch.manual_seed(5)
    student, teacher, rows = build(kind), build(kind), examples(3)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    teacher.train()
    ids, labels, mask = data.collate(rows, 0)
    for T, share in ((1.0, 0.5), (3.0, 0.9), (2.0, 0.0)):
        found = Distillation(teacher, T, share)(student, ids, labels, mask)
        torch.testing.assert_close(found.double(), by_hand(student, teacher, rows, T, share),
                                   rtol=1e-5, atol=1e-5)
    assert teacher.training, "the teacher is in its own mode again"


@pytest.mark.parity
def test_distillation_of_a_hugging_face_model():
    hugging_face()
    teacher, student = build("hf_llama"), build("hf_llama")
    with torch.no_grad():
        teacher.lm_head.weight.mul_(2)
    history = quiet(student, steps=10, lr=0.02, loss=Distillation(teacher, share=1.0))
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]


def test_a_student_comes_near_its_teacher_and_the_teacher_stays():
    teacher, student = build("llama"), build("llama")
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    before = [p.clone() for p in teacher.parameters()]
    history = quiet(student, steps=20, lr=0.02, loss=Distillation(teacher, share=1.0))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert all(p.equal(q) and p.grad is None for p, q in zip(teacher.parameters(), before))


def test_distillation_wants_one_tokenizer_and_numbers():
    ids = torch.tensor([[3, 1, 4]])
    other = minillm.Transformer(minillm.Config(30, 8, 1, 2))
    with pytest.raises(ValueError, match="the teacher has 30 tokens, the student 24"):
        Distillation(other)(build("llama"), ids, ids)
    for wrong in (dict(temperature=0), dict(share=2), dict(share=-0.1)):
        with pytest.raises(ValueError, match="is not"):
            Distillation(other, **wrong)


# --- resumed ------------------------------------------------------------------------------------


def gradual():
    return minillm.prune.wrap(build("llama"), sparsity=0.0), dict(on_step=Gradual(0.6, every=2))


def unfreezing():
    return build("llama"), dict(on_step=Unfreezing())


def distilling():
    torch.manual_seed(7)
    teacher = build("llama")
    with torch.no_grad():
        teacher.norm.weight.mul_(1.5)
    return minillm.lora.wrap(build("llama"), r=2, dropout=0.2), dict(loss=Distillation(teacher))


@pytest.mark.parametrize("make", [gradual, unfreezing, distilling])
@pytest.mark.parametrize("at", [3, 7])
def test_a_training_goes_on_bit_for_bit(make, at, tmp_path):
    expected, options = make()
    whole = quiet(expected, steps=10, **options)
    model, options = make()
    quiet(model, steps=10, checkpoints=tmp_path, save_every=1, keep=20, **options)
    for path in sorted(tmp_path.glob("step-*"))[at:]:
        path.unlink()
    model, options = make()
    rest = quiet(model, steps=10, checkpoints=tmp_path, resume=True, **options)
    assert [r["loss"] for r in rest] == [r["loss"] for r in whole]
    theirs = expected.state_dict()
    assert all(t.equal(theirs[name]) for name, t in model.state_dict().items())
    for name, layer in minillm.layers(model).items():
        for key, patch in layer.patches.items():
            assert patch.config() == minillm.layers(expected)[name].patches[key].config()
