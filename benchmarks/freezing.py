"""A training step of SmolLM2 in full, with all but its last blocks frozen, and in the phases
of gradual unfreezing: 4 x 128 tokens (--batch, --length), AdamW, float32.

All sides start from the same weights and take the same batches, so their first losses have
to agree; the table says how far they are apart. A phase of gradual unfreezing in which k
blocks learn should cost what freezing all but the last k costs. "report" is what
`minillm.report` says of gradients, AdamW's states and activations, without the weights; the
peak is that of the whole process. Run: python -m benchmarks.freezing
"""

import contextlib
import time

import torch

import minillm
from benchmarks import common
from minillm.freeze.gradual import Unfreezing
from minillm.measure import report

SIDES = {"full": dict(last=None, gradual=None)}
SIDES |= {"the last 2 blocks": dict(last=2, gradual=None)}
SIDES |= {f"gradual, {k} blocks": dict(last=None, gradual=k) for k in (2, 10, 20)}
SETTINGS = dict(lr=1e-5, steps=3, warmup=2)


def setup(side, settings):
    torch.manual_seed(0)
    device, k = settings["device"], side["gradual"]
    model, _ = minillm.load(settings["checkpoint"], dtype="float32", device=device)
    model.train()
    if side["last"]:
        minillm.freeze.wrap(model, last=side["last"])
    unfreeze, steps = Unfreezing(until=0.5), 2 * len(model.layers)  # a block joins at each step
    batches = iter(
        torch.tensor(settings["ids"]).view(-1, settings["batch"], settings["length"]).to(device)
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                  lr=settings["lr"])

    def phase():
        """The context of a step in which k blocks learn."""
        return unfreeze.around(model, k - 1, steps) if k else contextlib.nullcontext()

    def step():
        ids = next(batches)
        with phase():
            value = model.loss(ids, ids)
            value.backward()
        if k:
            unfreeze(model, k - 1, steps)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    with phase():
        told = report.report(model, settings["batch"], settings["length"], repeats=1)
    losses = [step() for _ in range(settings["warmup"])]

    def measure():
        common.wait(device)
        began = time.perf_counter()
        losses.extend(step() for _ in range(settings["steps"]))
        common.wait(device)
        seconds = time.perf_counter() - began
        return {"tokens/s": settings["steps"] * settings["batch"] * settings["length"] / seconds,
                "losses": list(losses), "learn": told.trainable,
                "report": told.gradients + told.optimizer + told.activations}

    return measure


def main():
    args = common.arguments(__doc__, batch=4, length=128, steps=SETTINGS["steps"])
    settings = dict(SETTINGS, batch=args.batch, length=args.length, steps=args.steps,
                    checkpoint=common.checkpoint(args.shape))
    _, tokenizer = minillm.load(settings["checkpoint"])
    needed = settings["warmup"] + args.rounds * settings["steps"]
    settings["ids"] = tokenizer.encode(minillm.data.topics())[
        : needed * settings["batch"] * settings["length"]]
    limits = common.limits(args.device)
    found = common.run("benchmarks.freezing", SIDES, args, settings)
    rows, base = [], next(iter(found.values()))
    for name, measured in found.items():
        last, of = measured[-1], base[-1]
        rows.append({
            "side": name, "parameters that learn": f"{last['learn']:,}",
            "tokens/s": f"{common.median(measured, 'tokens/s'):,.0f}",
            "times the first": f"{common.ratio(measured, base, 'tokens/s'):.2f}",
            "peak MB": f"{last['peak_bytes'] / 1e6:,.0f}",
            "of the first's": f"{last['peak_bytes'] / of['peak_bytes']:.2f}",
            "report, MB": f"{last['report'] / 1e6:,.0f}",
            "of the first": f"{last['report'] / of['report']:.2f}",
            "first loss apart": f"{abs(last['losses'][0] - of['losses'][0]):.1e}"})
    del settings["ids"], settings["checkpoint"]
    common.keep("freezing", args, settings, rows, limits)


if __name__ == "__main__":
    main()
