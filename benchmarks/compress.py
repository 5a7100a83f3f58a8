"""SmolLM2 made small after its training: rounding beside GPTQ, magnitude beside Wanda,
by perplexity.

Evaluated on the first 8 windows of 512 tokens of `pydoc_data.topics`; calibrated with
windows (32, or `--windows`) that begin 8,192 tokens in, so that the two have no token
in common. SmolLM2 is here the file in Q4_1, dequantized: its weights lie on an
asymmetric grid of 4 bits in groups of 32. One scale for a whole row and pruning gain
nothing from that, and only such sides are compared.

    gap closed      (rounding - GPTQ) / (rounding - dense), of the perplexities
    against         the perplexity of magnitude over that of Wanda

Run: python -m benchmarks.compress [--sides NAME ...]
"""

import argparse
import json
import pathlib
import platform
import time

import torch

import minillm
from minillm import data, prune, quant

INT4 = dict(bits=4, zero_point=True)
SIDES = {
    "dense": None,
    "rounding, int4": lambda m, texts: quant.wrap(m, **INT4),
    "GPTQ, int4": lambda m, texts: quant.gptq.wrap(m, texts, order=False, **INT4),
    "GPTQ, int4, order": lambda m, texts: quant.gptq.wrap(m, texts, order=True, **INT4),
    "magnitude, 50%": lambda m, texts: prune.wrap(m),
    "Wanda, 50%": lambda m, texts: prune.wanda.wrap(m, texts),
    "magnitude, 2:4": lambda m, texts: prune.wrap(m, pattern=prune.n_m(2, 4)),
    "Wanda, 2:4": lambda m, texts: prune.wanda.wrap(m, texts, pattern=prune.n_m(2, 4)),
}
RESULTS = pathlib.Path(__file__).parent / "results" / "compress-cpu.json"


def measured(side, windows):
    """{"perplexity": ..., "seconds": how long it took to make the model small, "windows": ...}."""
    model, tokenizer = minillm.load("smollm2", dtype="float32")
    ids = tokenizer.encode(data.topics())
    texts = torch.tensor(ids[8192 : 8192 + windows * 512]).view(windows, 512)
    began = time.perf_counter()
    if side is not None:
        side(model, texts)
    seconds = time.perf_counter() - began
    for technique in (quant, prune):  # evaluated as a dense model, which is faster
        if minillm.registry.formats_of(technique.__name__.split(".")[-1], model):
            technique.unwrap(model)
        elif minillm.registry.patches_of(technique.__name__.split(".")[-1], model):
            technique.merge(model, keep=False)
    score = minillm.measure.perplexity(model, tokenizer, data.topics(), length=512, windows=8)
    return dict(perplexity=float(score), seconds=seconds, windows=windows)


def ratios(found):
    """What the figures say, of those that are there."""
    value = {name: row["perplexity"] for name, row in found.items()}
    said = {}
    for name in ("GPTQ, int4", "GPTQ, int4, order"):
        if {name, "dense", "rounding, int4"} <= value.keys():
            gap = value["rounding, int4"] - value["dense"]
            said[f"gap closed by {name}"] = (value["rounding, int4"] - value[name]) / gap
    for pattern in ("50%", "2:4"):
        if {f"magnitude, {pattern}", f"Wanda, {pattern}"} <= value.keys():
            said[f"magnitude against Wanda, {pattern}"] = (
                value[f"magnitude, {pattern}"] / value[f"Wanda, {pattern}"]
            )
    return said


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--windows", type=int, default=32, help="of 512 tokens to calibrate with")
    args = parser.parse_args()
    found = json.loads(RESULTS.read_text())["sides"] if RESULTS.exists() else {}
    for name in args.sides:
        found[name] = measured(SIDES[name], args.windows)
        print(f"{name:24}{found[name]['perplexity']:10.3f}{found[name]['seconds']:8.0f} s",
              flush=True)
        versions = dict(python=platform.python_version(), torch=torch.__version__)
        RESULTS.write_text(json.dumps(dict(versions=versions, sides=found, ratios=ratios(found)),
                                      indent=2) + "\n")
    for name, ratio in ratios(found).items():
        print(f"{name}: {ratio:.2f}")


if __name__ == "__main__":
    main()
