"""A checkpoint goes on with the same functions alone: teacher, measure, arguments, the
order of rates."""

import functools

import pytest
import torch
from models import build
from test_train import quiet

import minillm
from minillm.train import openings
from minillm.train.distill import Distillation


def a_step(model, step, steps):
    pass


def changed(what):
    """A teacher that differs in one thing alone, of which no own parameter knows."""
    teacher = minillm.prune.wrap(minillm.lora.wrap(build("llama"), r=2), sparsity=0.25)
    layer = minillm.layers(teacher)["layers.1.mlp.up_proj"]
    teacher.register_buffer("count", torch.zeros(3))
    with torch.no_grad():
        match what:
            case "lora":
                layer.patches["lora"].A[1, 3] += 1e-3
            case "mask":
                layer.patches["prune"].mask[0] = True
            case "active":
                layer.patches["lora"].active = False
            case "alpha":
                layer.patches["lora"].alpha = 5.0
            case "buffer":
                teacher.count[2] = 1
            case "int8":
                minillm.quant.wrap(teacher, ["layers.0.mlp.up_proj"])
    return teacher


@pytest.mark.parametrize("what", ["lora", "mask", "active", "alpha", "buffer", "int8"])
def test_a_checkpoint_belongs_to_all_of_its_teacher(what):
    one, same, other = (openings.named(Distillation(changed(w))) for w in ("", "", what))
    assert one == same != other


def a_measure(model, scale=1.0):
    return scale


class Scaled:
    def __call__(self, model):
        return 1.0


def test_a_checkpoint_belongs_to_its_measure(tmp_path):
    options = dict(steps=2, checkpoints=tmp_path)
    quiet(build("llama"), evaluate=a_measure, **options)
    for other in (Scaled(), functools.partial(a_measure, scale=1.0)):
        with pytest.raises(ValueError,
                           match="other settings: evaluate='test_same_training.a_measure' then, "):
            quiet(build("llama"), evaluate=other, resume=True, **options)
    quiet(build("llama"), evaluate=a_measure, resume=True, **options)


def test_a_partial_is_named_with_its_arguments():
    def named(*args, **keywords):
        return openings.named(functools.partial(a_measure, *args, **keywords))

    assert named(scale=2.0) == "partial(test_same_training.a_measure, scale=2.0)" != named(2.0)
    assert named(a_step) == "partial(test_same_training.a_measure, test_same_training.a_step)", (
        "and not its address")
    assert named(torch.ones(2)) == named(torch.ones(2)) != named(torch.zeros(2))
    assert named(build("llama")) == named(build("llama")) != named(build("gpt2"))


def test_the_order_of_rates_counts(tmp_path):
    """The last expression that matches decides."""
    rates, options = {"layers": 2.0, "layers.1": 0.5}, dict(steps=2, checkpoints=tmp_path)
    quiet(build("llama"), rates=rates, **options)
    quiet(build("llama"), rates=rates, resume=True, **options)
    with pytest.raises(ValueError, match=r"rates=\{'layers': 2.0, .* then, \{'layers.1': 0.5, "):
        quiet(build("llama"), rates=dict(reversed(rates.items())), resume=True, **options)
