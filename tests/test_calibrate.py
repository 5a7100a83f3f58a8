"""Calibration: what each leaf gets is what it gets in the whole model, run example by example."""

import copy

import pytest
import torch
from conftest import hugging_face
from models import MODELS, build, learnt, two
from test_roles import made
from torch import nn

import minillm
from minillm import calibrate
from minillm.data import Example

ROWS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [5, 8, 9, 7, 9], [3, 2, 3, 8, 4, 6, 2]]
FAMILIES = [*MODELS, "hf_qwen2", "hf_mistral", "hf_neox", "hf_neo", "hf_opt"]


def small(name):
    torch.manual_seed(0)
    model = made(name)
    return model.eval()


@torch.no_grad()
def by_hand(model, name, rows=ROWS):
    """X (tokens, in) of one leaf, each example alone through the whole model."""
    (site,) = [site for site in minillm.registry.walk(model) if site.name == name]
    found = []
    handle = (site.layer or site.module).register_forward_pre_hook(
        lambda _, args: found.append(args[0].flatten(0, -2).clone())
    )
    for row in rows:
        ids, _, _ = minillm.prepare(model, torch.tensor([row]))
        model(ids)
    handle.remove()
    return torch.cat(found).double()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_leaf_gets_what_it_gets_in_the_whole_model(name, size):
    model, seen = small(name), {}
    calibrate.stream(model, ROWS, lambda site, s: seen.update({site.name: s}), batch_size=size,
                     progress=False)
    assert len(seen) == len(minillm.layers(minillm.lora.wrap(copy.deepcopy(model), r=1)))
    for where, s in seen.items():
        X = by_hand(model, where)
        assert s.count == len(X) == 22
        torch.testing.assert_close(s.H.double(), X.T @ X, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_leaf_is_fed_by_the_changed_ones_before_it(name):
    """The reference runs the whole model anew for each leaf, with the leaves before its
    group changed."""
    model, reference, order, seen = small(name), small(name), [], {}
    calibrate.stream(small(name), ROWS, lambda site, s: order.append((site.name, s)),
                     progress=False)

    @torch.no_grad()
    def change(site, s):
        site.module.weight.mul_(1.5)
        seen[site.name] = s

    calibrate.stream(model, ROWS, change, statistic=calibrate.Squares, batch_size=2, progress=False)
    here = {site.name: site for site in minillm.registry.walk(reference)}
    for i, (where, s) in enumerate(order):
        if i == 0 or s is not order[i - 1][1]:  # a new group: what was before it has changed by now
            group = [other for other, t in order if t is s]
            X = by_hand(reference, where)
            for other in group:
                assert seen[other].count == len(X)
                torch.testing.assert_close(seen[other].sum.double(), X.square().sum(0), rtol=1e-4,
                                           atol=1e-4)
                here[other].module.weight.data.mul_(1.5)
    groups = len({id(s) for s in seen.values()})
    per = {"llama": 4, "hf_llama": 4, "hf_qwen2": 4, "hf_mistral": 4, "hf_gpt2": 4, "gpt2": 4,
           "hf_neox": 4, "hf_neo": 4, "hf_opt": 4}
    blocks = len(minillm.registry.roles.blocks(model))
    head = 0 if hasattr(model, "get_output_embeddings") else 1
    assert groups == per.get(name, 2) * blocks + head, "q, k, v share an input, and gate and up"


def test_the_order_is_that_of_the_calls():
    order = []
    calibrate.stream(small("llama"), ROWS, lambda site, s: order.append(site.name),
                     ["down_proj", "gate_proj", "o_proj", "k_proj"],
                     progress=False)
    assert order == [f"layers.{i}.{key}" for i in range(3)
                     for key in ("self_attn.k_proj", "self_attn.o_proj",
                                 "mlp.gate_proj", "mlp.down_proj")]


def test_leaves_outside_of_the_blocks_take_the_whole_model():
    model, seen = small("llama"), {}
    calibrate.stream(model, ROWS, lambda site, s: seen.update({site.name: s}),
                     ["lm_head", "layers.2.mlp.up_proj"], progress=False)
    for where, s in seen.items():
        X = by_hand(model, where)
        torch.testing.assert_close(s.H.double(), X.T @ X, rtol=1e-4, atol=1e-4)

    class Before(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.first = nn.Embedding(24, 16), nn.Linear(16, 16)
            self.body, self.last = build("Linear").layers, nn.Linear(16, 24)

        def forward(self, ids):
            x = self.first(self.embed(ids))
            for layer in self.body:
                x = layer(x)
            return self.last(x)

    model, seen = Before(), {}

    @torch.no_grad()
    def change(site, s):
        seen[site.name] = s
        site.module.weight.mul_(1.5)

    calibrate.stream(model, ROWS, change, progress=False)
    assert list(seen) == ["first", *(f"body.{i}.mlp.{j}" for i in range(3) for j in (0, 2)), "last"]
    # what is before them has changed, and changes no more
    for where in ("first", "body.0.mlp.0", "last"):
        X = by_hand(model, where)
        torch.testing.assert_close(seen[where].H.double(), X.T @ X, rtol=1e-4, atol=1e-4)


def test_a_plain_stack_is_run_whole():
    model, seen = nn.Sequential(nn.Embedding(24, 6), *two()), []

    @torch.no_grad()
    def change(site, s):
        X = by_hand(model, site.name)
        torch.testing.assert_close(s.H.double(), X.T @ X, rtol=1e-4, atol=1e-4)
        site.module.weight.mul_(1.5)
        seen.append(site.name)

    calibrate.stream(model, ROWS, change, progress=False)
    assert seen == ["1", "3"]


def test_blocks_may_be_leaves():
    """The leaf in the block's place is replaced, and the next block is fed by the new one."""
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layers = (
                nn.Embedding(24, 6),
                nn.ModuleList(nn.Linear(6, 6) for _ in "123"),
            )

        def forward(self, ids):
            x = self.embed(ids)
            for layer in self.layers:
                x = layer(x)
            return x

    model, seen = Stack(), []

    def change(site, s):
        X = by_hand(model, site.name)
        torch.testing.assert_close(s.H.double(), X.T @ X, rtol=1e-4, atol=1e-4)
        minillm.quant.wrap(model, [site.name])
        model.layers[int(site.name[-1])].scale.mul_(2)
        seen.append(site.name)

    calibrate.stream(model, ROWS, change, progress=False)
    assert (seen == ["layers.0", "layers.1", "layers.2"]
            and len(minillm.registry.formats_of("quant", model)) == 3)


def test_only_the_blocks_that_are_named_are_run():
    model, runs = small("llama"), []
    model.layers[2].register_forward_hook(lambda *_: runs.append(1))
    calibrate.stream(model, ROWS, lambda site, s: None, ["layers.1.mlp.up_proj"], progress=False)
    assert len(runs) == 1, "with one row, which shows whether blocks are called again"


def test_a_leaf_that_a_block_calls_twice_counts_twice():
    model, seen = build("Linear"), {}
    for block in model.layers:
        block.mlp.append(nn.Sequential(nn.GELU(), nn.Linear(16, 16), nn.GELU()))
        block.mlp.append(block.mlp[3])
    calibrate.stream(model, ROWS, lambda site, s: seen.update({site.name: s}), batch_size=1,
                     progress=False)
    for where in ("layers.1.mlp.0", "layers.1.mlp.3.1", "layers.2.mlp.2"):
        X = by_hand(model, where)
        assert seen[where].count == len(X) == (44 if where.endswith("3.1") else 22)
        torch.testing.assert_close(seen[where].H.double(), X.T @ X, rtol=1e-4, atol=1e-4)


class Looped(nn.Module):
    """Its blocks are called twice: as two rounds, or because one block is in two places."""

    def __init__(self, shared):
        super().__init__()
        self.embed, self.layers = nn.Embedding(24, 16), build("Linear").layers[:2]
        self.rounds = 1 if shared else 2
        if shared:
            self.layers.append(self.layers[0])
        self.head = nn.Linear(16, 24)

    def forward(self, ids):
        x = self.embed(ids)
        for block in [*self.layers] * self.rounds:
            x = block(x)
        return self.head(x)


def albert():
    transformers = hugging_face()
    config = transformers.AlbertConfig(
        vocab_size=24, embedding_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=32, pad_token_id=0,
        classifier_dropout_prob=0, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    return transformers.AlbertForMaskedLM(config).eval()


@pytest.mark.parametrize("make", [lambda: Looped(False), lambda: Looped(True), albert])
def test_blocks_that_are_called_again_count_each_time(make):
    torch.manual_seed(0)
    model, seen = make(), {}
    calibrate.stream(model, ROWS, lambda site, s: seen.update({site.name: s}), progress=False)
    more = [where for where, s in seen.items() if s.count > 22]
    assert any("layer" in where for where in more), seen
    for where, s in seen.items():
        X = by_hand(model, where)
        assert s.count == len(X)
        torch.testing.assert_close(s.H.double(), X.T @ X, rtol=1e-4, atol=1e-4)


def test_hooks_of_the_user_run_as_in_the_whole_model():
    model, seen = small("llama"), {}
    model.layers[1].register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    model.layers[1].register_forward_hook(lambda _, args, output: output + 1)
    calibrate.stream(model, ROWS, lambda site, s: seen.update({site.name: s}), progress=False)
    for where in ("layers.1.mlp.down_proj", "layers.2.mlp.down_proj"):
        X = by_hand(model, where)
        torch.testing.assert_close(seen[where].H.double(), X.T @ X, rtol=1e-4, atol=1e-4)


def test_examples_are_a_tensor_lists_or_examples():
    found = []
    for examples in (torch.tensor(ROWS[::3]), ROWS[::3], [Example(row, row) for row in ROWS[::3]]):
        calibrate.stream(small("llama"), examples, lambda site, s: found.append(s),
                         ["layers.0.mlp.up_proj"], progress=False)
    assert found[0].H.equal(found[1].H) and found[0].H.equal(found[2].H) and found[0].count == 14


def test_packed_examples_are_their_documents():
    model, apart, packed = small("llama"), {}, {}
    rows = [Example(ROWS[0] + ROWS[1], ROWS[0] + ROWS[1], documents=[1] * 7 + [2] * 3),
            Example(ROWS[2], ROWS[2])]
    calibrate.stream(model, ROWS[:3], lambda site, s: apart.update({site.name: s}), progress=False)
    calibrate.stream(model, rows, lambda site, s: packed.update({site.name: s}), progress=False)
    for where, s in packed.items():
        assert s.count == 15
        torch.testing.assert_close(s.H, apart[where].H, rtol=1e-4, atol=1e-4)


WRAPS = {
    "lora": lambda m: learnt(minillm.lora.wrap(m, r=2)),
    "quant": minillm.quant.wrap,
    "prune": minillm.prune.wrap,
    "prompts": lambda m: minillm.prompts.wrap(m, length=2),
    "adapters": lambda m: learnt(minillm.adapters.wrap(m, size=2)),
    "adapters around blocks": lambda m: learnt(minillm.adapters.wrap(
        m, lambda name,
        module: name.rpartition(".")[2].isdigit() and not isinstance(module, nn.Linear), size=2)),
}


@pytest.mark.parametrize("wrapped", WRAPS)
@pytest.mark.parametrize("name", ["llama", "hf_gpt2", "hf_llama"])
def test_it_works_with_what_is_attached(name, wrapped):
    model, seen = WRAPS[wrapped](small(name)).eval(), {}
    calibrate.stream(model, ROWS, lambda site, s: seen.update({site.name: s}), batch_size=2,
                     progress=False)
    for where, s in list(seen.items())[:: 5]:
        X = by_hand(model, where)
        assert s.count == len(X)
        torch.testing.assert_close(s.H.double(), X.T @ X, rtol=1e-4, atol=1e-4)


def hooks(model):
    return [(name, len(m._forward_hooks), len(m._forward_pre_hooks), m.training)
            for name, m in model.named_modules()]


@pytest.mark.parametrize("name", ["llama", "hf_gpt2", "hf_llama"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(name, fails):
    model = minillm.freeze.wrap(small(name), last=1).train()
    next(model.children()).eval()
    model.register_forward_hook(lambda *_: None)
    before = (
        hooks(model),
        [p.requires_grad for p in model.parameters()],
        [p.clone() for p in model.parameters()],
    )

    def change(site, s):
        assert not torch.is_grad_enabled() and not site.module.training
        if fails:
            raise ArithmeticError

    if fails:
        with pytest.raises(ArithmeticError):
            calibrate.stream(model, ROWS, change, progress=False)
    else:
        calibrate.stream(model, ROWS, change, progress=False)
    assert hooks(model) == before[0] and [p.requires_grad for p in model.parameters()] == before[1]
    assert all(p.equal(q) and p.grad is None for p, q in zip(model.parameters(), before[2]))
    assert torch.is_grad_enabled()


def test_what_is_new_has_the_mode_of_its_site():
    model = small("llama").train()
    model.layers[1].mlp.up_proj.eval()
    for change in (minillm.prune.wanda.wrap, minillm.quant.gptq.wrap):
        change(model, ROWS, progress=False)
        for name, module in model.named_modules():
            assert module.training == ("layers.1.mlp.up_proj" not in name), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_statistics_are_at_least_float32(dtype):
    for statistic, key in ((calibrate.Gram, "H"), (calibrate.Squares, "sum")):
        found = []
        calibrate.stream(small("llama").to(dtype), ROWS,
                         lambda site, s: found.append(getattr(s, key)), statistic=statistic,
                         progress=False)
        assert all(t.dtype == torch.promote_types(dtype, torch.float32) for t in found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_run_uncompiled():
    model, seen = minillm.compile(small("llama")), []
    calibrate.stream(model, ROWS, lambda site, s: seen.append(s), progress=False)
    assert len(seen) == 21 and model.compiled


def test_the_bar_counts_leaves(capsys):
    calibrate.stream(small("llama"), ROWS, lambda site, s: None, ["k_proj", "up_proj"])
    assert "6/6" in capsys.readouterr().err


class Odd(nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.fault, self.embed, self.layers, self.head = (
            fault,
            nn.Embedding(24, 16),
            build("Linear").layers,
            nn.Linear(16, 24),
        )
        if fault == "used twice":
            self.layers[2].mlp[0] = self.layers[0].mlp[0]
        if fault == "skipped":
            self.layers[1].mlp.append(nn.Linear(16, 16))
            self.layers[1].mlp.forward = lambda x, mlp=self.layers[1].mlp: mlp[2](mlp[1](mlp[0](x)))

    def forward(self, ids):
        x = self.embed(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 1 and self.fault == "between":
                x = 2 * x
            if i == 1 and self.fault == "nan":
                x = x.fill_(torch.nan)
            if i == 1 and self.fault == "left out":
                return self.head(x)
        return self.head(x)


@pytest.mark.parametrize("fault, message", [
    ("between", "the input of 'layers.2' is not the output of the block before it"),
    ("nan", "the input of 'layers.2'|holds nan"),
    ("skipped", r"no example reaches 'layers.1.mlp.3' \(1 such\).*targets="),
    ("left out", "the model calls 2 of its 3 blocks"),
    ("used twice", "'layers.0.mlp.0' is used in 2 places"),
])
def test_what_cannot_be_run_block_by_block_is_refused_before_any_change(fault, message):
    changed = []
    with pytest.raises(ValueError, match=message):
        calibrate.stream(Odd(fault), ROWS, lambda site, s: changed.append(site), r"layers.*",
                         progress=False)
    assert not changed


@pytest.mark.parametrize("examples, message",
                         [([], "no examples"), ("text", "not a list of Examples"),
                          ([3], "not an Example")])
def test_examples_that_are_none_are_named(examples, message):
    with pytest.raises((ValueError, TypeError), match=message):
        calibrate.stream(small("llama"), examples, print, progress=False)
    with pytest.raises(ValueError, match="batch_size=0"):
        calibrate.stream(small("llama"), ROWS, print, batch_size=0, progress=False)


def test_an_encoder_decoder_is_refused():
    transformers = hugging_face()
    config = transformers.T5Config(vocab_size=24, d_model=16, d_kv=8, d_ff=32, num_layers=2,
                                   num_heads=2)
    with pytest.raises(ValueError, match="several lists of blocks"):
        calibrate.stream(transformers.T5ForConditionalGeneration(config), ROWS, print,
                         progress=False)
