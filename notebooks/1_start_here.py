# %% [markdown]
# # 1 Start here
#
# **How do I teach a language model something, make it small, and hand it on?**
#
# This page goes the whole way with a model of half a million parameters. Each step first says
# what will come out, and then measures it. Everything runs on a CPU, and nothing is downloaded.
#
# The other notebooks look at one step each: 2 the transformer, 3 formats and patches, 4 LoRA, 5
# making a model small.

# %%
import inspect
import logging
import os
import pathlib
import tempfile

import matplotlib.pyplot as plt
import torch

import minillm
from minillm.measure.memory import total_bytes
from minillm.registry import walk

logging.getLogger("minillm").setLevel(logging.WARNING)
plt.rcParams["figure.dpi"] = 80
torch.manual_seed(0)
SHORT = bool(os.environ.get("MINILLM_SHORT"))  # CI runs this page with a few steps

# %% [markdown]
# ## The model
#
# `load` takes `"tiny"`, `"smollm2"`, a Hugging Face directory or a `.gguf` file. The tiny model
# is pretrained on this machine the first time, which takes about two minutes. `show` prints its
# tree: what each module is, how many parameters of it learn, and its bytes.

# %%
model, tokenizer = minillm.load("tiny")
print(minillm.show(model))

# %% [markdown]
# ## The task
#
# The model reads a docstring of Python's standard library and says which of 8 packages it comes
# from. The package's own name is masked. Training and test texts come from different modules.

# %%
train = minillm.data.task("package", tokenizer, "train", limit=64 if SHORT else 800)
test = minillm.data.task("package", tokenizer, "test", limit=8 if SHORT else 128)
print(test.prompts[0], "->", test.references[0])
print(len(train.examples), "examples to learn,", len(test.examples), "to test")


# %%
def scores():
    chosen = minillm.measure.choose(model, tokenizer, test.prompts, test.choices)
    return dict(perplexity=minillm.measure.completions(model, test.examples),
                accuracy=minillm.measure.accuracy(chosen, test.references))


before = scores()
print(before)
print(f"a guess has an accuracy of 1/{len(test.choices)} = {1 / len(test.choices):.3f}")

# %% [markdown]
# A score carries its 95% interval and the number of examples.
#
# ## LoRA: the formula and the code
#
# Each weight $W$ of shape (out, in) is frozen. Beside it a product of two thin matrices learns:
#
# $$y = W x + s\,B A x, \qquad s = \frac{\alpha}{r}$$
#
# $A$ has the shape (r, in), and $B$ (out, r). $B$ starts at zero, so nothing changes at first.
# Here is how the library computes it:

# %%
print(inspect.getsource(minillm.lora.LoRA.forward))
print(inspect.getsource(minillm.lora.LoRA.fold))

# %% [markdown]
# ## Predict, then measure
#
# A leaf gets $r\,(\text{in} + \text{out})$ parameters. So the tree above says how many will
# learn, and how large the file will be: 4 bytes for each of them.

# %%
R = 8
leaves = [site for site in walk(model) if site.leaf and ".layers." in f".{site.name}"]
predicted = sum(R * sum(site.shape) for site in leaves)
print(f"predicted: {predicted:,} parameters in {len(leaves)} leaves, {4 * predicted:,} bytes")

minillm.lora.wrap(model, r=R)
learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"measured:  {learns:,} parameters in {len(minillm.layers(model))} leaves")
assert learns == predicted
assert scores() == before  # B is zero: each answer is the same

# %% [markdown]
# ## Train
#
# `train` knows nothing of LoRA. It trains what has `requires_grad`, and `wrap` has decided that.

# %%
log = minillm.train.train(model, train.examples, steps=4 if SHORT else 150, lr=5e-3, progress=False)
after = scores()
for name in before:
    print(f"{name:12}{before[name]!r}  ->  {after[name]!r}")

fig, axes = plt.subplots(1, 2, figsize=(9, 3))
axes[0].plot([record["loss"] for record in log])
axes[0].set(title="loss of each step", xlabel="step", ylabel="nats per learnt token", yscale="log")
values = [before["accuracy"], after["accuracy"]]
axes[1].bar(["before", "after"], values, width=0.5)
axes[1].axhline(1 / len(test.choices), color="grey", linestyle=":", label="a guess")
axes[1].set(title="accuracy on the test's modules", ylim=(0, 1))
axes[1].legend()
fig.tight_layout()

# %% [markdown]
# ## Save, and merge
#
# The file holds what LoRA added, and a fingerprint of the model that it belongs to. `merge` folds
# it into the weights. Then the model is an ordinary one, with no module of LoRA left.

# %%
folder = tempfile.TemporaryDirectory()
adapter = pathlib.Path(folder.name) / "adapter.safetensors"
minillm.lora.save(model, adapter)
size = adapter.stat().st_size
print(f"predicted: {4 * predicted:,} bytes; the file has {size:,}, with names and a fingerprint")

ids = torch.tensor([tokenizer.encode(test.prompts[0])])
with torch.no_grad():
    wrapped = model(ids)
    minillm.lora.merge(model)
    merged = model(ids)
    print(f"merged and wrapped differ by at most {(merged - wrapped).abs().max():.1e}, "
          f"of logits up to {wrapped.abs().max():.1f}")
    minillm.lora.unmerge(model)
    print("unmerge gives the same bits back:", torch.equal(model(ids), wrapped))
    minillm.lora.merge(model, keep=False)  # keeps nothing for an unmerge
assert not minillm.layers(model)

# %% [markdown]
# ## Make it small
#
# int8 stores one byte a weight, and one float32 scale for each row:
#
# $$s_i = \max_j |W_{ij}| / 127, \quad q_{ij} = \mathrm{round}(W_{ij} / s_i), \quad W \approx s q$$
#
# The embedding, which is also the head, stays as it is.

# %%
print(inspect.getsource(minillm.quant.grid.Grid.fit))
print(inspect.getsource(minillm.quant.grid.Grid.round))

# %%
was = total_bytes(model)
leaves = [site for site in walk(model) if site.leaf and ".layers." in f".{site.name}"]
saved = sum(3 * site.shape[0] * site.shape[1] - 4 * site.shape[0] for site in leaves)
print(f"predicted: {was - saved:,} bytes of {was:,}")
minillm.quant.wrap(model)
print(f"measured:  {total_bytes(model):,} bytes")
assert total_bytes(model) == was - saved
small = scores()
for name in after:
    print(f"{name:12}{after[name]!r}  ->  {small[name]!r}")

# %% [markdown]
# ## Hand it on
#
# A checkpoint holds dense weights, so `unwrap` gives them back first, on the grid of int8. The
# directory is one that transformers opens.

# %%
minillm.quant.unwrap(model)
directory = pathlib.Path(folder.name) / "merged"
minillm.save(model, directory, tokenizer)
for path in sorted(directory.iterdir()):
    print(f"{path.stat().st_size:>10,} bytes  {path.name}")
again, tokenizer = minillm.load(directory)
answer = minillm.measure.generate_text(again, tokenizer, test.prompts[:4], max_new_tokens=4)
for text, reference in zip(answer, test.references):
    print(f"the model read from there says {text.strip()!r}; right is {reference!r}")
folder.cleanup()

# %% [markdown]
# ## What there is
#
# Each technique has the same verbs: `wrap`, `unwrap`, `merge`, `unmerge`, `save`, `load`. Each is
# one file, which begins with its formula and its paper.

# %%
for name, method in minillm.registry.METHODS.items():
    print(f"{method.path + '.wrap':30}{method.does}")
