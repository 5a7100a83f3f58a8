"""Freezing by role, and what freezing and gradual unfreezing cost: operations, memory."""

import pytest
import torch
import torch.nn.functional as F
from models import IDS, build, two
from test_learning import learning
from test_train import quiet
from torch.utils.flop_counter import FlopCounterMode

import minillm
from minillm.freeze.gradual import Unfreezing
from minillm.measure import report
from minillm.train import openings

# --- the embedding and the head ---------------------------------------------------------------


HEADS = {"llama": ("embed_tokens", "lm_head"), "Linear": ("embed", "head"),
         "gpt2": ("embed_tokens", "embed_tokens"),  # tied
         "hf_llama": ("model.embed_tokens", "model.embed_tokens"),
         "hf_gpt2": ("transformer.wte", "transformer.wte")}


def within(model, *names):
    return {one for one in learning(model) if one.startswith(tuple(f"{name}." for name in names))}


@pytest.mark.parametrize("kind", HEADS)
def test_the_embedding_and_the_head_by_one_argument_each(kind):
    embedding, head = HEADS[kind]
    every, tied = learning(build(kind)), embedding == head
    both = {*within(build(kind), embedding, head, *(["lm_head"] if tied else []))}
    of = {"embedding": both if tied else within(build(kind), embedding),
          "head": both if tied else within(build(kind), head)}
    for role, part in of.items():
        assert part and learning(minillm.freeze.wrap(build(kind), **{role: True})) == every - part
    top = learning(minillm.freeze.wrap(build(kind), last=1))
    assert not top & of["embedding"] and (top & of["head"] == set() if tied else of["head"] <= top)
    for role, part in of.items():
        model = minillm.freeze.wrap(build(kind), last=1, **{role: False})
        assert learning(model) == top | part
        model = minillm.freeze.wrap(build(kind), last=1, **{role: True})
        assert learning(model) == top - part
        assert learning(minillm.freeze.unwrap(model)) == every
    if not tied:
        model = minillm.freeze.wrap(build(kind), embedding=True, head=True)
        assert learning(model) == every - of["embedding"] - of["head"]
        model = minillm.freeze.wrap(build(kind), ["layers"], head=True)
        assert learning(model) == every - of["head"] - within(build(kind), "layers")


@pytest.mark.parametrize("options, message", [
    (dict(embedding=False), "embedding=False freezes no parameter: nothing would be left to freez"),
    (dict(targets=[""], head=False), "matches no module"),
    (dict(head=1), "head=1 is neither True nor False"),
    (dict(last=1, first=1), "last=1 and first=1: each says what is frozen"),
    (dict(embedding=True, head=False), "embedding=True, head=False: the two share a matrix"),
    (dict(last=1, head=True, embedding=False), "share a matrix"),
    (dict(targets=".*", head=True), "targets='.*', head=True freezes every parameter"),
])
def test_a_wrong_freeze(options, message):
    with pytest.raises(ValueError, match=message):
        minillm.freeze.wrap(build("gpt2"), **options)


def test_a_model_without_a_known_head():
    from test_roles import made

    with pytest.raises(ValueError, match="has no list of blocks"):
        minillm.freeze.wrap(two(), head=True)
    model = made("hf_llama").model  # the base without its head
    with pytest.raises(ValueError, match="this LlamaModel has no part that is known as its head"):
        minillm.freeze.wrap(model, head=True)


# --- what it costs ----------------------------------------------------------------------------


def operations(model, around=None):
    """The floating-point operations of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        with around or torch.enable_grad():
            # model.loss takes a gradient within its forward pass, which the counter cannot follow
            F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
    return counter.get_total_flops()


def deep(layers=6, tied=True):
    torch.manual_seed(0)
    return minillm.Transformer(minillm.Config(24, 16, layers, 2, ffn=32, positions=32, tied=tied))


@pytest.mark.parametrize("tied", [True, False])
def test_the_graph_stops_at_the_lowest_block_that_learns(tied):
    """Beneath it there is the forward pass alone: two thirds of the operations are saved there."""
    full, by_blocks = operations(deep(tied=tied)), []
    for last in range(1, 6):
        model = minillm.freeze.wrap(deep(tied=tied), last=last)
        by_blocks.append(operations(model))
        frozen = next(p for name, p in model.named_parameters() if name.startswith("layers.0.mlp"))
        assert frozen.grad is None and model.embed_tokens.weight.grad is None
    each = [b - a for a, b in zip(by_blocks, by_blocks[1:])]
    assert len(set(each)) == 1 and by_blocks[-1] < full
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        deep(tied=tied).hidden(IDS)
    assert each[0] == 2 * forward.get_total_flops() / 6


def test_the_report_shows_the_memory_that_freezing_saves():
    full = report.report(deep(), length=16, repeats=1)
    part = report.report(minillm.freeze.wrap(deep(), last=2), length=16, repeats=1)
    block = sum(p.numel() for p in deep().layers[0].parameters())
    assert part.trainable == 2 * block + 16
    assert part.gradients == 4 * part.trainable and part.optimizer == 8 * part.trainable
    one, two = (
        report.report(minillm.freeze.wrap(deep(n), last=2), length=16, repeats=1).activations
        for n in (6, 12))
    assert one == two == part.activations < 0.5 * full.activations
    assert full.spared == 0 and part.spared == 12 * (full.parameters - part.trainable)
    saved = f"{part.spared / 2**20:,.2f} MiB"
    assert [line for line in part.table().splitlines() if "saved by what is frozen" in line
            and saved in line]
    assert "saved" not in full.table()


# --- gradual unfreezing -------------------------------------------------------------------------


def whole(unfreezing):
    """The same, with all gradients computed and then dropped."""
    return lambda model, step, steps: unfreezing(model, step, steps)


def test_a_step_of_gradual_unfreezing_costs_what_it_trains():
    unfreeze, steps = Unfreezing(until=0.5), 24  # six blocks: one more every second step
    for step in range(0, 12, 2):
        model, blocks = deep(), step // 2 + 1
        cost = operations(model, unfreeze.around(model, step, steps))
        same = minillm.freeze.wrap(deep(), last=blocks) if blocks < 6 else deep()
        assert cost == operations(same), step
        assert all(p.requires_grad for p in model.parameters())
        ours = {name for name, p in model.named_parameters() if p.grad is not None}
        assert ours == {name for name, p in same.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, wrap", [
    ("llama", None), ("gpt2", None), ("llama", lambda m: minillm.lora.wrap(m, r=2)),
    ("gpt2", lambda m: minillm.prune.wrap(m)),
    ("llama", lambda m: minillm.lora.wrap(m, r"layers\.0.*proj", r=2)),  # waits alone at first
])
def test_it_trains_bit_for_bit_as_with_all_gradients(kind, wrap, dtype):
    logs, states = [], []
    for hide in (lambda unfreezing: unfreezing, whole):
        model = build(kind).to(dtype)
        torch.manual_seed(2)
        model = wrap(model) if wrap else model
        log = quiet(model, steps=9, accumulate=2, weight_decay=0.1, on_step=hide(Unfreezing()))
        logs.append([(record["loss"], record["norm"]) for record in log])
        states.append(model.state_dict())
    assert logs[0] == logs[1]
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


def test_what_waited_learns_again_after_an_error():
    model, unfreeze = build("llama"), Unfreezing()
    model.norm.weight.requires_grad_(False)
    with pytest.raises(KeyboardInterrupt):
        with unfreeze.around(model, 0, 10):
            assert not model.layers[0].mlp.up_proj.weight.requires_grad
            assert model.layers[2].mlp.up_proj.weight.requires_grad
            raise KeyboardInterrupt
    assert learning(model) == learning(build("llama")) - {"norm.weight"}
    with unfreeze.around(model, 5, 10):
        assert learning(model) == learning(build("llama")) - {"norm.weight"}


def test_several_processes_compute_all_gradients(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(openings.distributed, "place", lambda: (0, 2))
    with openings.around(Unfreezing(), model, 0, 10):
        assert all(p.requires_grad for p in model.parameters())
    monkeypatch.undo()
    with openings.around(lambda *_: None, model, 0, 10):
        assert all(p.requires_grad for p in model.parameters())
