"""Add a technique of one's own in thirty lines, and hold it to the laws.

`ssf.py`, beside this file, is the whole technique: a class, `wrap`, and two lines that enter it in
minillm's tables. The one line that adds it is `import ssf`. The laws below are those that minillm's
own tests run on every technique. They know nothing of SSF.

    python examples/own_technique.py
"""

import os
import pathlib
import tempfile

import torch

import ssf  # the one line
import minillm

STEPS = 5 if os.environ.get("MINILLM_SHORT") else 40
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def small():
    """A Llama of random weights and biases, the same at every call."""
    torch.manual_seed(0)
    config = minillm.Config(vocab_size=50, width=32, layers=2, heads=4, kv_heads=2, qkv_bias=True)
    model = minillm.Transformer(config).eval()
    move(model.parameters())
    return model


def learnt(model):
    """Move what the technique has to learn, as training would."""
    torch.manual_seed(1)
    for layer in minillm.layers(model).values():
        move(layer.patches.parameters())
    return model


@torch.no_grad()
def move(parameters):
    for p in parameters:
        p.add_(0.1 * torch.randn_like(p))


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def near(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-5 * float(b.detach().abs().max()))


# --- the laws -------------------------------------------------------------------------------------


def neutral_at_birth(technique):
    """Wrapping changes no output, and only what the technique added learns."""
    model = small()
    before, own = model(IDS), set(model.parameters())
    technique.wrap(model)
    new = set(model.parameters()) - own
    return near(model(IDS), before) and new == {p for p in model.parameters() if p.requires_grad}


def fold_equals_forward(technique):
    """The folded weight computes what the patch computes."""
    for layer in minillm.layers(learnt(technique.wrap(small()))).values():
        x = torch.randn(3, layer.dense()[0].shape[1])
        if not near(torch.nn.functional.linear(x, *layer.dense()), layer(x)):
            return False
    return True


def merge_and_back(technique):
    """merge computes the same; unmerge and unwrap give everything back, bit for bit."""
    model = learnt(technique.wrap(small()))
    before, output = state(model), model(IDS)
    merged = near(technique.merge(model)(IDS), output)
    back = same(state(technique.unmerge(model)), before)
    return merged and back and same(state(technique.unwrap(model)), state(small()))


def in_a_file(technique):
    """What is saved and loaded computes the same, bit for bit."""
    model = learnt(technique.wrap(small()))
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "adapter.safetensors"
        technique.save(model, path)
        return torch.equal(technique.load(small(), path)(IDS), model(IDS))


def on_integers(technique):
    """Format then patch computes what patch then format does."""
    one = learnt(technique.wrap(minillm.quant.wrap(small())))
    two = minillm.quant.wrap(learnt(technique.wrap(small())))
    return near(one(IDS), two(IDS))


LAWS = [neutral_at_birth, fold_equals_forward, merge_and_back, in_a_file, on_integers]


def main():
    for law in LAWS:
        holds = law(ssf)
        print(f"{'holds' if holds else 'BROKEN':8}{law.__name__}: {law.__doc__}")
        if not holds:
            raise SystemExit(1)

    print("\nSSF beside LoRA on the tiny model: which package does a docstring come from?")
    model, tokenizer = minillm.load("tiny")
    train = minillm.data.task("package", tokenizer, "train", limit=400).examples
    test = minillm.data.task("package", tokenizer, "test", limit=64).examples

    def perplexity():
        return minillm.measure.completions(model, test)

    print(f"{'as it is':12}perplexity of the answers {perplexity():.2f}")
    for name, technique, options, rate in (("SSF", ssf, {}, 3e-2),
                                           ("LoRA, r=8", minillm.lora, dict(r=8), 6e-3)):
        technique.wrap(model, **options)
        learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
        minillm.train.train(model, train, steps=STEPS, lr=rate, progress=False)
        print(f"{name:12}perplexity of the answers {perplexity():.2f}, {learns:,} parameters learn")
        technique.unwrap(model)


if __name__ == "__main__":
    main()
