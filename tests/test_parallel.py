"""Parallel adapters: the paper's formula, where they lie, and what is refused."""

import pytest
import torch
from models import IDS, build, learnt, logits, two
from torch import nn

import minillm
from minillm.adapters import parallel
from minillm.registry import CannotMerge, roles


@pytest.mark.parametrize("kind", ["llama", "gpt2", "hf_llama", "hf_gpt2", "Linear"])
def test_by_default_beside_each_mlp(kind):
    model = parallel.wrap(build(kind), size=3)
    assert list(minillm.layers(model)) == [block.mlp.name for block in roles.parts(model).blocks]
    learns = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learns) == 3 * 2 * 3 * 16  # 2 m d for each of three blocks
    for layer in minillm.layers(model).values():
        patch = layer.patches["parallel"]
        assert not patch.up.any() and 0 < patch.down.abs().max() <= 16**-0.5
        assert patch.config() == dict(size=3, scale=4.0, width=16)


@pytest.mark.parametrize("options", [{}, dict(scale=0.5)])
def test_the_formula_of_the_paper(options):
    """h + s W_up relu(W_down x) of the MLP's own input x, and the gradients."""
    model = learnt(parallel.wrap(build("llama"), size=4, **options))
    layer = model.layers[0].mlp
    patch, x = layer.patches["parallel"], torch.randn(2, 5, 16, requires_grad=True)
    s = options.get("scale", 4.0)
    beside = torch.stack([patch.up @ torch.clamp(patch.down @ token, min=0)
                          for token in x.flatten(0, 1)]).view(2, 5, 16)
    expected = layer.base(x) + s * beside
    y, weight = layer(x), torch.randn(2, 5, 16)
    assert torch.allclose(y, expected, atol=1e-5) and not torch.allclose(y, layer.base(x), atol=0.1)
    learn = [x, patch.down, patch.up]
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), learn) for out in (y, expected))):
        assert torch.allclose(a, b, atol=1e-4)


def test_it_sees_the_input_and_houlsbys_the_output():
    """Beside a sublayer that gives zeros, its change is still that of the input."""
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    minillm.adapters.wrap(model, ["0"], size=2)
    for key in ("down", "up"):
        nn.init.ones_(getattr(model[0].patches["adapters"], key))
    assert not model(x).any()
    minillm.adapters.unwrap(model)
    parallel.wrap(model, ["0"], size=2, scale=1.0)
    for key in ("down", "up"):
        nn.init.ones_(getattr(model[0].patches["parallel"], key))
    expected = 2 * x.sum(1, keepdim=True).clamp(min=0).expand(3, 4)
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_over_a_houlsby_adapter_the_input_is_still_that_of_the_sublayer():
    model = learnt(parallel.wrap(minillm.adapters.wrap(build("gpt2"), "mlp", size=2), size=3))
    layer, x = model.layers[0].mlp, torch.randn(2, 3, 16)
    houlsby, patch = layer.patches.values()
    h = layer.base(x)
    expected = houlsby.adapt(h) + 4 * torch.relu(x @ patch.down.T) @ patch.up.T
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "hf_llama", "hf_gpt2"])
def test_beside_an_attention_that_gives_a_tuple_or_takes_its_input_by_name(kind):
    model = learnt(parallel.wrap(build(kind), r"(self_attn|attn)", size=2))
    layer = next(iter(minillm.layers(model).values()))
    patch, seen = layer.patches["parallel"], {}

    def before(module, args, kwargs):
        seen["x"] = args[0] if args else kwargs["hidden_states"]

    layer.base.register_forward_pre_hook(before, with_kwargs=True)
    layer.base.register_forward_hook(lambda module, args, output: seen.update(inner=output))
    layer.register_forward_hook(lambda module, args, output: seen.update(outer=output))
    logits(model, IDS)
    inner, outer = (out[0] if isinstance(out, tuple) else out
                    for out in (seen["inner"], seen["outer"]))
    change = 4 * torch.relu(seen["x"] @ patch.down.T) @ patch.up.T
    assert change.abs().max() > 0.1 and torch.allclose(outer, inner + change, atol=1e-5)


def test_beside_a_leaf_of_two_widths_and_over_a_format():
    model = learnt(parallel.wrap(minillm.quant.wrap(two()), ["0"], size=2))
    patch, x = model[0].patches["parallel"], torch.randn(3, 6)
    assert patch.down.shape == (2, 6) and patch.up.shape == (5, 2)
    expected = model[0].base(x) + 4 * torch.relu(x @ patch.down.T) @ patch.up.T
    assert torch.allclose(model[0](x), expected, atol=1e-5)


def test_a_mixture_of_experts_has_one_adapter_beside_all_experts():
    from test_roles import made

    model = parallel.wrap(made("hf_mixtral"), size=2)
    assert list(minillm.layers(model)) == [f"model.layers.{i}.mlp" for i in range(3)]
    assert model.model.layers[0].mlp.patches["parallel"].width == 16
    assert logits(model).isfinite().all()


class Narrow(nn.Module):
    """A sublayer (8) -> (4) in a block."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))

    def forward(self, x):
        return self.mlp(x)


@pytest.mark.parametrize("call, message", [
    (lambda: parallel.wrap(two()), "no sublayer to wrap by default in this Sequential"),
    (lambda: parallel.wrap(build("llama"), size=0), "size=0 is not a whole number of at least 1"),
    (lambda: parallel.wrap(build("llama"), scale=0), "scale=0 is not a number above 0"),
    (lambda: parallel.wrap(build("llama"), scale=float("nan")), "scale=nan is not"),
    (lambda: parallel.wrap(build("llama"), width=0), "width=0 is not"),
    (lambda: parallel.wrap(build("llama"), ["mpl"]), "'mpl' matches no sublayer.*'mlp'"),
    (lambda: logits(parallel.wrap(build("llama"), width=8)),
     r"width=8: the output that this adapter changes has the width 16; wrap\(model, width=16\)"),
    (lambda: parallel.wrap(Narrow(), size=2)(torch.randn(2, 8)),
     "the input of this sublayer has the width 8, and its output 4: .* only if it is a leaf"),
])
def test_a_wrong_call_says_what_is_possible(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_opt_has_no_mlp_module():
    from test_roles import made

    with pytest.raises(ValueError, match="no sublayer to wrap by default in this OPTForCausalLM"):
        parallel.wrap(made("hf_opt"))


def test_it_cannot_be_merged():
    model = parallel.wrap(build("llama"), size=2)
    with pytest.raises(CannotMerge, match="parallel cannot be merged"):
        minillm.adapters.merge(model)


def test_it_learns_and_its_file_brings_it_back(tmp_path):
    model = parallel.wrap(build("llama"), size=4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        output = logits(model)[:, :-1].flatten(0, 1)
        (loss := nn.functional.cross_entropy(output, IDS[:, 1:].flatten())).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    minillm.adapters.save(model, tmp_path / "a")
    again = minillm.adapters.load(build("llama"), tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
