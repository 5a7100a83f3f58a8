"""AdaLoRA: its formula, its penalty, the ranks' budget; peft's layer, allocator and files."""

import copy
import json
import types

import pytest
import torch
from conftest import hugging_face, peft_model
from models import IDS, build, learnt, logits, two

import minillm
from minillm import data
from minillm.checkpoints import peft as files
from minillm.lora import adalora
from minillm.lora.budget import Budget, score
from minillm.lora.orthogonal import Orthogonal
from minillm.train import loss_sum, train

EXAMPLES = [data.Example(row, list(row)) for row in torch.randint(
    1, 24, (12, 8), generator=torch.Generator().manual_seed(0)).tolist()]
LINEARS = {"hf_llama": ["q_proj", "down_proj"], "hf_gpt2": ["c_attn", "c_fc"]}
CUTS = dict(target=2, begin=0.2, end=0.8, every=2)


def patches(model):
    return [layer.patches["adalora"] for layer in minillm.layers(model).values()]


def test_the_formula():
    model, x = learnt(adalora.wrap(two(), r=3, alpha=6)), torch.randn(4, 6)
    W, b, patch = model[0].base.weight, model[0].base.bias, patches(model)[0]
    assert patch.P.shape == (5, 3) and patch.E.shape == (3,) and patch.Q.shape == (3, 6)
    y = torch.stack([W @ row + b + 6 / 3 * patch.P @ torch.diag(patch.E) @ patch.Q @ row
                     for row in x])
    torch.testing.assert_close(model[0](x), y)


def test_at_birth():
    patch = patches(adalora.wrap(build("llama")))[0]
    assert patch.r == 12 and not patch.E.any() and patch.kept.all()
    wide = patches(adalora.wrap(torch.nn.Sequential(torch.nn.Linear(400, 300))))[0]
    for p in (wide.P, wide.Q):
        assert p.std().item() == pytest.approx(0.02, rel=0.05) and p.mean().abs() < 0.001
    # the rank is at most that of the smaller side
    assert [patch.scale for patch in patches(adalora.wrap(two(), alpha=3.0, r=5))] == [0.6, 0.75]


def test_the_penalty():
    """Per learnt token: the weight times the mean of the norms; none in eval mode."""
    model = learnt(adalora.wrap(build("llama"), r=3)).train()
    each = []
    for patch in patches(model):
        each += [(patch.P.T @ patch.P - torch.eye(3)).square().sum().sqrt(),
                 (patch.Q @ patch.Q.T - torch.eye(3)).square().sum().sqrt()]
    labels = IDS.clone()
    labels[0, :3] = -100
    plain, loss = loss_sum(model, IDS, labels), Orthogonal(loss_sum, weight=0.3)
    tokens = 3 + 5  # the first label of a row is never learnt
    torch.testing.assert_close(loss(model, IDS, labels) - plain,
                               0.3 * tokens * sum(each) / len(each), rtol=1e-4, atol=1e-4)
    assert torch.equal(loss(model.eval(), IDS, labels), plain)
    minillm.use(model.train())
    with pytest.raises(ValueError, match="none takes part"):
        loss(model, IDS, labels)


def test_the_penalty_makes_them_orthonormal():
    model, far = adalora.wrap(build("llama"), r=3), []
    for _ in range(2):
        far.append(sum(n.item() for patch in patches(model) for n in patch.apart()))
        train(model, EXAMPLES, steps=10, lr=1e-1, loss=Orthogonal(loss_sum, 5.0), progress=False)
    assert far[1] < 0.5 * far[0]


@pytest.mark.parametrize("options, message", [
    (dict(loss="x"), "is not a loss"), (dict(loss=int), "is not a loss"),
    (dict(loss=loss_sum, weight=-1), "weight=-1"),
    (dict(loss=loss_sum, weight=float("nan")), "weight=nan")])
def test_what_a_penalty_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Orthogonal(**options)


# --- the budget ---------------------------------------------------------------------------------


def test_the_schedule():
    """b_T + (b_0 - b_T) (1 - (t - t_i) / (t_f - t_i))^3, by hand, for 21 steps of 4 leaves."""
    budget = Budget(target=2, begin=0.25, end=0.75)
    found = [budget.at(t, 21, 40, 4) for t in range(21)]
    assert found[:6] == [40] * 6 and found[15:] == [8] * 6
    assert found[5:16] == [int(8 + 32 * (1 - (t - 5) / 10) ** 3) for t in range(5, 16)]
    assert budget.settled(21) == 15


def by_hand(w, grads, beta1, beta2):
    """The score of one number, by the paper's formulas, step by step."""
    mean = spread = 0.0
    for value, grad in zip(w, grads):
        now = abs(value * grad)
        mean = beta1 * mean + (1 - beta1) * now
        spread = beta2 * spread + (1 - beta2) * abs(now - mean)
    return mean * spread


def test_the_scores():
    model, budget = adalora.wrap(two(), r=2), Budget(beta1=0.6, beta2=0.3, target=1)
    budget.check(model)
    patch, seen = patches(model)[0], {key: [] for key in "PEQ"}
    for step in range(3):
        for p in model.parameters():
            if p.requires_grad:
                p.data, p.grad = torch.randn_like(p), torch.randn_like(p)
        for key in seen:
            p = getattr(patch, key)
            seen[key].append((p.detach().clone(), p.grad.clone()))
        budget(model, step, 100)

    def s(key, *place):
        w, grads = ([pair[i][place].item() for pair in seen[key]] for i in (0, 1))
        return by_hand(w, grads, 0.6, 0.3)

    expected = [s("E", i) + sum(s("P", j, i) for j in range(5)) / 5
                + sum(s("Q", i, j) for j in range(6)) / 6 for i in range(2)]
    torch.testing.assert_close(score(patch), torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_the_largest_of_all_leaves_stay():
    model, budget = learnt(adalora.wrap(two(), r=4)), Budget(target=3, begin=0, end=0.5, every=1)
    budget.check(model)
    one, other = patches(model)
    for patch, values in ((one, [9.0, 1, 8, 7]), (other, [2.0, 10, 3, 4])):
        patch.mean_E.copy_(torch.tensor(values)), patch.spread_E.fill_(1)
    E = one.E.detach().clone()
    budget.after(model, 5, 11)  # the last cut
    assert one.kept.tolist() == [True, False, True, True]
    assert other.kept.tolist() == [False, True, True, True]
    assert torch.equal(one.E, E * torch.tensor([1, 0, 1, 1]))
    with torch.no_grad():
        one.E.fill_(1), one.mean_E.fill_(0)
    budget.after(model, 6, 11)  # the choice stays, and the averages no longer count
    assert one.E.tolist() == [1, 0, 1, 1]
    budget(model, 6, 11)
    assert not one.mean_E.any()


def test_between_cuts_nothing_is_cut():
    model, budget = learnt(adalora.wrap(two(), r=4)), Budget(**CUTS)
    budget.check(model)
    for step, cuts in ((0, False), (2, False), (9, False), (10, True)):
        for patch in patches(model):
            patch.E.data.fill_(1)
        budget.after(model, step, 21)
        zeros = sum(int((patch.E == 0).sum()) for patch in patches(model))
        assert bool(zeros) == cuts, step


def trained(model, steps=20, **options):
    return train(model, EXAMPLES, steps=steps, lr=2e-2, batch_size=4, progress=False,
                 loss=Orthogonal(loss_sum), on_step=Budget(**CUTS), **options)


@pytest.mark.parametrize("kind", ["llama", pytest.param("hf_gpt2", marks=pytest.mark.slow)])
def test_a_training_ends_with_the_budget(kind):
    model = adalora.wrap(build(kind), r=4)
    log = trained(model)
    every = patches(model)
    kept = [int(patch.kept.sum()) for patch in every]
    assert sum(kept) == 2 * len(every) and len(set(kept)) > 1, "the ranks differ"
    for patch in every:
        assert torch.equal(patch.E != 0, patch.kept), "what was cut stays cut"
    assert log[-1]["loss"] < log[0]["loss"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("dtype, at", [
    (torch.bfloat16, 11), *(pytest.param(*one, marks=pytest.mark.slow) for one in (
        (torch.float32, 3), (torch.float32, 11), (torch.float32, 18), (torch.bfloat16, 18)))])
def test_an_interrupted_training_goes_on_bit_for_bit(dtype, at, tmp_path):
    def start():
        torch.manual_seed(0)
        return adalora.wrap(build("llama"), r=4).to(dtype)

    whole, model = start(), start()
    log = trained(whole)
    with pytest.raises(KeyboardInterrupt):
        stopped(model, at, tmp_path)
    model = start()
    assert trained(model, checkpoints=tmp_path, save_every=0, resume=True)[-1]["loss"] == (
        log[-1]["loss"])
    for one, other in zip(patches(whole), patches(model)):
        for key in ("P", "E", "Q", "kept", "mean_P", "spread_Q"):
            assert torch.equal(getattr(one, key), getattr(other, key)), key


def stopped(model, at, path):
    """A training that Ctrl-C ends after the step `at`."""
    import os
    import signal

    class Interrupting(Orthogonal):
        def __call__(self, *args):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(*args)

    calls = []
    Interrupting.__qualname__ = Interrupting.__name__ = "Orthogonal"
    train(model, EXAMPLES, steps=20, lr=2e-2, batch_size=4, progress=False, checkpoints=path,
          save_every=0, loss=Interrupting(loss_sum), on_step=Budget(**CUTS))


def test_the_file_has_the_ranks_and_no_averages(tmp_path):
    model = adalora.wrap(build("llama"), r=4)
    trained(model)
    minillm.lora.save(model, tmp_path / "a")
    assert not [key for key in minillm.registry.store.read(tmp_path / "a")[0] if "mean" in key]
    other = minillm.lora.load(build("llama"), tmp_path / "a")
    assert torch.equal(logits(other), logits(model))
    assert [p.kept.tolist() for p in patches(other)] == [p.kept.tolist() for p in patches(model)]
    merged = logits(minillm.lora.merge(copy.deepcopy(model)))
    torch.testing.assert_close(merged, logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options, message", [
    (dict(target=0), "target=0"), (dict(every=0), "every=0"), (dict(begin=-0.1), "begin=-0.1"),
    (dict(begin=0.8), "begin=0.8, end=0.75"), (dict(beta1=1), "beta1=1"),
    (dict(beta2=1.0), "never moves"), (dict(end=1.5), "end=1.5")])
def test_wrong_budgets(options, message):
    with pytest.raises(ValueError, match=message):
        Budget(**options)


def test_a_budget_needs_adalora_of_one_name():
    with pytest.raises(ValueError, match="this model has none: minillm.lora.adalora.wrap"):
        train(minillm.lora.wrap(build("llama")), EXAMPLES, steps=2, lr=1e-3, on_step=Budget())
    model = adalora.wrap(adalora.wrap(two(), name="a", r=2), name="b", r=4)
    with pytest.raises(ValueError, match="name=None.*'a', 'b'"):
        Budget(target=1).check(model)
    with pytest.raises(ValueError, match="name='c'.*'a', 'b'"):
        Budget(target=1, name="c").check(model)
    with pytest.raises(ValueError, match="target=3.0: the ranks of these 2 leaves are 2 on av"):
        Budget(target=3, name="a").check(model)
    Budget(target=3, name="b").check(model)
    assert len(Budget(target=1, name="b").patches(model)) == 2


def test_a_leaf_that_takes_no_part_keeps_its_averages():
    model, budget = adalora.wrap(two(), r=2), Budget(target=1)
    budget.check(model)
    budget(model, 0, 10)  # no gradient anywhere
    assert not any(patch.mean_P.any() for patch in patches(model))


# --- peft ---------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("kind", LINEARS)
def test_it_is_pefts(kind):
    """Outputs, gradients and the penalty, with the same values."""
    ours = learnt(adalora.wrap(build(kind), LINEARS[kind], r=4, alpha=7.0)).train()
    theirs = peft_model(build(kind), "AdaLoraConfig", init_r=4, target_r=2, lora_alpha=7,
                        total_step=20, target_modules=LINEARS[kind], orth_reg_weight=0.3,
                        task_type="CAUSAL_LM",  # without it peft adds no penalty
                        fan_in_fan_out=kind == "hf_gpt2").train()
    parameters = dict(theirs.named_parameters())
    pairs = []
    for where, layer in minillm.layers(ours).items():
        patch = layer.patches["adalora"]
        for key, name in (("Q", "lora_A"), ("P", "lora_B"), ("E", "lora_E")):
            p = parameters[f"base_model.model.{where}.{name}.default"]
            p.data = getattr(patch, key).detach().clone().view_as(p)
            pairs.append((getattr(patch, key), p))
    torch.testing.assert_close(logits(ours), theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    loss = theirs(input_ids=IDS, labels=IDS).loss
    mean = Orthogonal(loss_sum, 0.3)(ours, IDS, IDS) / (IDS.numel() - len(IDS))
    torch.testing.assert_close(mean, loss, rtol=1e-5, atol=1e-5)
    loss.backward(), mean.backward()
    for p, q in pairs:
        torch.testing.assert_close(p.grad, q.grad.view_as(p), rtol=1e-4, atol=1e-5)


@pytest.mark.parity
def test_the_allocator_is_pefts():
    """The same ranks, from the same weights and gradients: every step, every cut."""
    hugging_face()
    model = learnt(adalora.wrap(build("hf_llama"), ["q_proj", "down_proj"], r=4))
    theirs = peft_model(build("hf_llama"), "AdaLoraConfig", init_r=4, target_r=2, tinit=4,
                        tfinal=4, deltaT=2, total_step=20, beta1=0.7, beta2=0.6,
                        target_modules=["q_proj", "down_proj"])
    allocator = theirs.base_model.rankallocator
    named = dict(theirs.base_model.model.named_parameters())
    budget = Budget(target=2, begin=4 / 19, end=16 / 19, every=2, beta1=0.7, beta2=0.6)
    budget.check(model)
    cuts = 0
    for step in range(17):
        for where, layer in minillm.layers(model).items():
            for key, name in (("Q", "lora_A"), ("P", "lora_B"), ("E", "lora_E")):
                w, p = getattr(layer.patches["adalora"], key), named[f"{where}.{name}.default"]
                w.data, w.grad = torch.randn_like(w), torch.randn_like(w)
                p.data, p.grad = w.detach().clone().view_as(p), w.grad.clone().view_as(p)
        budget(model, step, 20)
        before = [patch.kept.clone() for patch in patches(model)]
        budget.after(model, step, 20)
        allocator.update_ipt(theirs.base_model.model)
        pattern = None
        if step > 4 and (step % 2 == 0 or step == 16):
            count = budget.at(step, 20, allocator.init_bgt, len(before))
            pattern = allocator.mask_to_budget(theirs.base_model.model, count)
        for where, layer in minillm.layers(model).items():
            patch = layer.patches["adalora"]
            if pattern is not None:
                cuts += 1
                assert patch.kept.tolist() == pattern[f"{where}.lora_E.default"], (step, where)
                p = named[f"{where}.lora_E.default"]
                assert torch.equal(patch.E, p.view(-1)), step
        if pattern is None:
            assert all(map(torch.equal, before, [patch.kept for patch in patches(model)])), step
    assert cuts == 6 * len(patches(model))


PEFTS = pytest.mark.filterwarnings(  # peft's, of its own lists and of leaves with no rank left
    "ignore:The following rank_pattern keys:RuntimeWarning", "ignore:Adapter 'default'",
    "ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.mark.parity
@PEFTS
@pytest.mark.parametrize("kind", LINEARS)
def test_cut_ranks_go_to_pefts_files_and_back(kind, tmp_path):
    peft = pytest.importorskip("peft")
    model = adalora.wrap(build(kind), LINEARS[kind], r=4, alpha=5.0)
    trained(model)
    files.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build(kind), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(IDS).logits, logits(model), rtol=1e-5, atol=1e-5)
    again = files.load(build(kind), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert [p.kept.tolist() for p in patches(again)] == [p.kept.tolist() for p in patches(model)]


@pytest.mark.parity
@PEFTS
def test_ranks_that_peft_has_cut(tmp_path):
    theirs = peft_model(build("hf_llama"), "AdaLoraConfig", init_r=4, target_r=2, tinit=1,
                        tfinal=2, deltaT=1, total_step=8, lora_alpha=5,
                        target_modules=["q_proj", "down_proj"])
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], 1e-2)
    for step in range(8):
        theirs(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path / "theirs")
    model = files.load(build("hf_llama"), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), theirs.eval()(IDS).logits, rtol=1e-5, atol=1e-5)
    assert sum(int(patch.kept.sum()) for patch in patches(model)) <= 2 * len(patches(model))


def test_lists_that_contradict_the_tensors(tmp_path):
    model = adalora.wrap(build("llama"), ["q_proj"], r=4)
    trained(model)
    files.save(model, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    key = next(key for key, kept in config["rank_pattern"].items() if sum(kept) < 4)
    for value, message in (([True] * 4, "keeps 4 ranks by rank_pattern"), ([True], "no list of"),
                           ([0, 1, 1, 0], "no list of"), ("x", "no list of")):
        config["rank_pattern"][key] = value
        path.write_text(json.dumps(config))
        other = build("llama")
        with pytest.raises(ValueError, match=message):
            files.load(other, tmp_path / "a")
        assert not minillm.layers(other)


def test_a_file_of_peft_has_one_rank(tmp_path):
    model = build("llama")
    model.lm_head = torch.nn.Linear(16, 2)
    adalora.wrap(model, ["q_proj", "lm_head"], r=4)
    with pytest.raises(ValueError, match="has the rank"):
        files.save(model, tmp_path / "a")


def test_what_learns_in_several_runs_at_once():
    model = adalora.wrap(build("llama"), r=2)
    run = types.SimpleNamespace(examples=EXAMPLES, lr=1e-3, steps=1).__dict__
    with pytest.raises(ValueError, match="adalora"):
        minillm.train.many(model, {"adalora": run}, progress=False)
