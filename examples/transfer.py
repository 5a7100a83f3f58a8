"""Does pretraining help a classifier, and what does the model forget meanwhile?

    python examples/transfer.py             under 5 minutes on 2 cores

The tiny model was pretrained on the docstrings of the standard library. Here it learns another
task, from few examples: which of 8 packages a docstring comes from. `minillm.classify` puts a head
of classes in the place of its head. Four trainings see the same examples, as often as each other:

    head alone             the pretrained model is frozen, and only the new head learns
    LoRA                   the head, and LoRA on all matrices
    all weights            the pretrained model learns as a whole
    all, from scratch      the same model with random weights

Each has the best of its own learning rates on the validation texts, and then three seeds. The test
texts are used once. All three sets are drawn at random from the docstrings on which the model was
pretrained, so it has read the test texts too, but without their classes. (The library's own split
keeps modules apart. Then three of four test texts come from one package, and no validation text.)
POOL was chosen after a run with "last": there, training from scratch beat the pretrained model,
for which the end of a text is no place that holds its content.
Forgetting is the change of the perplexity on the test text of the first corpus, which pretraining
did not see, with the head switched off. A model from scratch has nothing to forget.
"""

import copy
import os

import torch

import minillm
from minillm import classify, data, measure
from minillm.compare import sweep

SHORT = bool(os.environ.get("MINILLM_SHORT"))
EXAMPLES, STEPS, SEEDS = (32, 2, 1) if SHORT else (400, 100, 3)
LIMIT, WINDOWS = (16, 5) if SHORT else (300, 20)
POOL = "mean"  # "last": see above
WAYS = {"head alone": 1e-2, "LoRA": 3e-3, "all weights": 1e-3, "all, from scratch": 1e-3}


def drawn(tokenizer):
    """{split: Task}: the first texts for the training, the next to validate and to test.

    A task is sorted by a hash of its texts, so its pieces are drawn at random.
    """
    whole = data.task("package", tokenizer, "train", limit=EXAMPLES + 2 * LIMIT)
    ends = dict(train=(0, EXAMPLES), validation=(EXAMPLES, EXAMPLES + LIMIT),
                test=(EXAMPLES + LIMIT, EXAMPLES + 2 * LIMIT))
    return {split: data.Task(whole.metric, whole.examples[a:b], prompts=whole.prompts[a:b],
                             references=whole.references[a:b], choices=whole.choices)
            for split, (a, b) in ends.items()}


def texts(part):
    """The docstrings of a split, without the question that the task puts behind them."""
    return [prompt.removesuffix("\n\nPackage:") for prompt in part.prompts]


def trained(way, lr, seed, original, tokenizer, part):
    """A copy of the model with a head of classes, trained in one way."""
    torch.manual_seed(seed)
    model = copy.deepcopy(original)
    if way == "all, from scratch":
        model.reset_parameters()
    classify.wrap(model, classes=part.choices, pool=POOL)
    if way == "LoRA":
        minillm.lora.wrap(model, r=8)
    elif way.startswith("all"):
        for p in model.parameters():
            p.requires_grad_(True)
    rows = classify.examples(model, tokenizer, texts(part), part.references)
    minillm.train.train(model, rows, steps=STEPS, lr=lr, warmup=0.1, seed=seed, batch_size=8,
                        loss=classify.loss, pad=tokenizer.pad or 0, name=f"{way}, {lr:.1g}")
    return model


def accuracy(model, tokenizer, part):
    return measure.accuracy(classify.predict(model, tokenizer, texts(part)), part.references)


def language(model, tokenizer, text):
    """The perplexity of the first corpus, by the model without its head of classes."""
    if minillm.layers(model):
        minillm.use(model, *(["lora"] if "lora" in names(model) else []))
    return measure.perplexity(model, tokenizer, text, windows=WINDOWS)


def names(model):
    return {name for layer in minillm.layers(model).values() for name in layer.patches}


def main():
    original, tokenizer = minillm.load("tiny")
    parts = drawn(tokenizer)
    corpus = data.task("language", tokenizer, "test").text
    before = language(original, tokenizer, corpus)
    most = max(parts["test"].references.count(one) for one in parts["test"].choices)
    n = len(parts["test"].references)
    print(f"{len(parts['train'].references)} examples, {STEPS} steps; the most frequent class has "
          f"{most / n:.3f} of the {n} test texts")
    print(f"{'':18} {'rate':>7} {'accuracy of each seed':>24} {'mean':>6}  forgetting")
    found = {}
    for way, usual in WAYS.items():
        given = original, tokenizer, parts["train"]
        best = sweep(usual, lambda lr: accuracy(trained(way, lr, 0, *given), tokenizer,
                                                parts["validation"]), better=1)
        models = [trained(way, best["rate"], seed, *given) for seed in range(SEEDS)]
        found[way] = [accuracy(model, tokenizer, parts["test"]) for model in models]
        each = ", ".join(f"{one:.3f}" for one in found[way])
        mean = sum(map(float, found[way])) / SEEDS
        lost = ""
        if way != "all, from scratch":
            now = [language(model, tokenizer, corpus) for model in models]
            lost = " ".join(f"{measure.forgetting([before, one]):+.0%}" for one in now)
        edge = " (at the edge)" if best["at_edge"] else ""
        print(f"{way:18} {best['rate']:>7.1g} {each:>24} {mean:>6.3f}  {lost}{edge}")
    gain = measure.change(found["all, from scratch"], found["all weights"])
    print(f"what pretraining adds to the accuracy of all weights: {gain:+.3f}"
          + ("" if gain.low is None else f" [{gain.low:+.3f}, {gain.high:+.3f}]"))


if __name__ == "__main__":
    main()
