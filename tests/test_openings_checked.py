"""What is wrong with an opening or a number is found before the work, in one line;
exact schedules."""

import json

import numpy as np
import pytest
import torch
from models import build
from safetensors.torch import load_file, save_file
from test_nothing_lost import row
from test_train import quiet

import minillm
from minillm.freeze.gradual import Unfreezing
from minillm.prune.gradual import Gradual
from minillm.train import loss_sum
from minillm.train.distill import Distillation


def short_teacher():
    return minillm.Transformer(minillm.Config(24, 8, 1, 2, positions=6))


@pytest.mark.parametrize("options, message", [
    (dict(loss="mse"), r"^loss='mse' is not a function loss\(model, ids, labels, mask\)$"),
    (dict(on_step=3), r"^on_step=3 is not a function on_step\(model, step, steps\)$"),
    (dict(on_step=Gradual),
     r"^on_step=Gradual is a class: give an object of it, on_step=Gradual\(...\)$"),
    (dict(loss=[1] * 99), "^loss=a list is not"),
    (dict(write="x.safetensors"), r"^write='x.safetensors' is not a function write\(model\)$"),
])
def test_what_is_no_function_is_one_line_before_the_work(options, message, monkeypatch, tmp_path):
    monkeypatch.setattr(minillm.train.loop, "update", lambda run: pytest.fail("a step was made"))
    with pytest.raises(ValueError, match=message) as error:
        quiet(build("llama"), log=tmp_path / "log", **options)
    assert "\n" not in str(error.value) and not (tmp_path / "log").exists()


def test_a_teacher_with_fewer_positions_is_found_before_the_work(monkeypatch):
    monkeypatch.setattr(minillm.train.loop, "update", lambda run: pytest.fail("a step was made"))
    with pytest.raises(
        ValueError,
        match="the teacher cannot read this: example 2 has 7 tokens, and the model has 6",
    ):
        quiet(build("llama"), [row(5), row(6), row(7)], loss=Distillation(short_teacher()))


@pytest.mark.parametrize("made, message", [
    (lambda model, *batch: 3.0, "loss= gives a float: it has to be one number"),
    (lambda model, *batch: model.norm.weight * 2,
     r"gives a Parameter|gives a Tensor of the shape \(16,\)"),
    (lambda model, *batch: loss_sum(model, *batch).detach(), "a number without a gradient"),
])
def test_a_loss_that_is_no_number_is_one_line(made, message):
    with pytest.raises(ValueError, match=message):
        quiet(build("llama"), loss=made)


def test_numbers_of_the_dataclasses_are_checked():
    for wrong in (dict(begin="a"), dict(end=None), dict(begin=-0.1), dict(every=2.5),
                  dict(begin=0.5, end=0.5)):
        with pytest.raises(ValueError, match="=") as error:
            Gradual(**wrong)
        assert next(iter(wrong)) in str(error.value)
    with pytest.raises(ValueError, match="teacher=None is not a model"):
        Distillation(None)


# --- numbers of numpy -----------------------------------------------------------------------------


def test_numbers_of_numpy_are_saved(tmp_path):
    schedule = Gradual(np.float32(0.5), first=np.float64(0), end=np.float64(1), every=np.int64(1))
    json.dumps(vars(schedule))
    model = minillm.prune.wrap(build("llama"), sparsity=0.0)
    quiet(model, steps=2, checkpoints=tmp_path, on_step=schedule)
    minillm.prune.save(model, tmp_path / "a.safetensors")
    model = minillm.quant.wrap(build("llama"), bits=np.int64(4), group=np.int64(8))
    minillm.quant.save(model, tmp_path / "b.safetensors")
    found = minillm.quant.load(build("llama"), tmp_path / "b.safetensors")
    ids = torch.tensor([[3, 1, 4]])
    assert found(ids).equal(model(ids))


# --- exact schedules ------------------------------------------------------------------------------


def test_before_its_begin_a_schedule_stays_at_the_first():
    schedule = Gradual(sparsity=0.9, first=0.1, begin=0.4, end=0.8, every=1)
    steps = 11  # so begin is the step 4, and end the step 8
    assert [schedule.at(t, steps) for t in range(5)] == pytest.approx([0.1] * 5)
    assert [schedule.at(t, steps) for t in (5, 6, 7)] == pytest.approx(
        [0.9 - 0.8 * (1 - t / 4) ** 3 for t in (1, 2, 3)])
    assert schedule.at(8, steps) == schedule.at(10, steps) == 0.9
    late = Gradual(sparsity=0.9, begin=0.5, end=1.0, every=1)  # 0.5 * 10 is 5, and 0.5 * 11 is 6
    assert late.at(5, 11) == 0 < late.at(6, 11) == pytest.approx(0.9 - 0.9 * 0.8**3)


def test_unfreezing_settles_with_the_last_block():
    assert [Unfreezing(until).settled(10) for until in (0.5, 0.55, 1)] == [5, 6, 10]


def test_what_a_patch_holds_and_does_not_train_has_to_be_the_same(tmp_path):
    def model(shift):
        model = minillm.lora.wrap(build("llama"), r=2)
        for layer in minillm.layers(model).values():
            layer.patches["lora"].A.requires_grad_(False)
        with torch.no_grad():
            minillm.layers(model)["layers.1.mlp.up_proj"].patches["lora"].A[0, 0] += shift
        return model

    quiet(model(0), steps=2, checkpoints=tmp_path)
    quiet(model(0), steps=2, checkpoints=tmp_path, resume=True)
    with pytest.raises(ValueError, match="lora at 'layers.1.mlp.up_proj' has tensors="):
        quiet(model(1e-3), steps=2, checkpoints=tmp_path, resume=True)


# --- numbers beyond a type, and batches of no row -------------------------------------------------


def test_a_weight_beyond_float16_is_an_error(tmp_path):
    minillm.save(build("llama"), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"norm.weight holds 1e\+05, which is beyond float16 \(at most 6.55e\+04\): load it "
              r"as float32",
    ):
        minillm.load(tmp_path / "m", dtype="float16")
    assert minillm.load(tmp_path / "m", dtype="bfloat16")[0].norm.weight[3] == 99840
    assert minillm.load(tmp_path / "m")[0].norm.weight[3] == 1e5


def test_sparse_takes_no_rows():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    minillm.sparse.wrap(model, anyway=True)
    for shape in ((0, 6), (2, 0, 6)):
        assert model(torch.zeros(shape)).shape == (*shape[:-1], 5)
