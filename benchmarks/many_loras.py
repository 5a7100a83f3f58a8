"""Several LoRAs trained at once on SmolLM2, beside as many runs one after the other: r=8 on
the seven projections, AdamW, clipping, 1 x 64 tokens a step and LoRA (--loras, --batch,
--length).

Each LoRA has its own learning rate and its own texts. A round trains all of them from their
start, in every side from the same tensors and on the same batches; so the final losses of a
LoRA have to agree, and the table says how far they are apart. The runs one after the other
get a new LoRA each, on one base that stays in memory, and the time to wrap it does not
count. Their peak memory is therefore that of one run. Run: python -m benchmarks.many_loras
"""

import time

import torch

import minillm
from benchmarks import common
from benchmarks.lora_step import PROJECTIONS
from minillm import data
from minillm.train import many, train

SIDES = {f"{library} {way}{dtype}": dict(library=library, way=way.strip(), dtype=dtype)
         for dtype in ("float32", "bfloat16")
         for library, way in (("peft", "in turn "), ("minillm", "in turn "),
                              ("minillm", "at once "))}
SETTINGS = dict(r=8, alpha=16, lr=1e-4, steps=5)


def setup(side, settings):
    runs = {f"l{i}": dict(examples=[data.Example(row, list(row)) for row in rows],
                          lr=settings["lr"] * (1 + i / 2), seed=i, steps=settings["steps"],
                          batch_size=settings["batch"], schedule="constant")
            for i, rows in enumerate(settings["ids"])}
    prepare = peft_runs if side["library"] == "peft" else minillm_runs
    rounds = prepare(side, settings, runs)
    rounds({name: run | dict(steps=1) for name, run in list(runs.items())[:2]})  # warms up

    def measure():
        seconds, losses = rounds(runs)
        return dict(seconds=seconds, losses=losses)

    return measure


def minillm_runs(side, settings, runs):
    """A function of runs that trains them; it returns (seconds, {name: final loss})."""
    model, _ = minillm.load(settings["checkpoint"], dtype=getattr(torch, side["dtype"]),
                            device=settings["device"])
    sets = [list(runs)] if side["way"] == "at once" else [[name] for name in runs]

    def rounds(runs):
        seconds, logs = 0.0, {}
        for names in sets:
            chosen = {name: runs[name] for name in names if name in runs}
            if not chosen:
                continue
            for name in chosen:
                minillm.lora.wrap(model, PROJECTIONS, name=name, r=settings["r"],
                                  alpha=settings["alpha"])
                start(p for layer in minillm.layers(model).values()
                      for p in layer.patches[name].parameters())
            common.wait(settings["device"])
            began = time.perf_counter()
            if side["way"] == "at once":
                logs |= many(model, chosen, progress=False)
            else:
                logs |= {name: train(model, progress=False, **run) for name, run in chosen.items()}
            common.wait(settings["device"])
            seconds += time.perf_counter() - began
            minillm.lora.unwrap(model)
        return seconds, {name: log[-1]["loss"] for name, log in logs.items()}

    return rounds


def peft_runs(side, settings, runs):
    """The same with transformers and peft, one run after the other."""
    import peft
    import transformers

    # the other sides' load brings one too
    transformers.AutoTokenizer.from_pretrained(settings["checkpoint"])
    base = transformers.AutoModelForCausalLM.from_pretrained(
        settings["checkpoint"], dtype=getattr(torch, side["dtype"])).to(settings["device"])
    config = peft.LoraConfig(r=settings["r"], lora_alpha=settings["alpha"],
                             target_modules=PROJECTIONS, task_type="CAUSAL_LM")

    def one(run):
        model = peft.get_peft_model(base, config).train()
        learning = [p for p in model.parameters() if p.requires_grad]
        start(learning)
        optimizer = torch.optim.AdamW(learning, lr=run["lr"], weight_decay=0.0)
        batches = data.batches(run["examples"], run["batch_size"], run["seed"])
        common.wait(settings["device"])
        began = time.perf_counter()
        for _ in range(run["steps"]):
            ids = next(batches)[0].to(settings["device"])
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            final = loss.item()
        common.wait(settings["device"])
        seconds = time.perf_counter() - began
        model.unload()
        return seconds, final

    def rounds(runs):
        found = {name: one(run) for name, run in runs.items()}
        return (sum(seconds for seconds, _ in found.values()),
                {name: final for name, (_, final) in found.items()})

    return rounds


def start(parameters):
    """In both libraries A, then B, in the order of the layers."""
    for i, p in enumerate(parameters):
        draw = torch.Generator().manual_seed(i)
        scale = p.shape[1] ** -0.5 if i % 2 == 0 else 0.0
        p.data.copy_((torch.rand(p.shape, generator=draw) * 2 - 1) * scale)


def main():
    args = common.arguments(__doc__, loras=8, batch=1, length=64)
    settings = dict(SETTINGS, loras=args.loras, batch=args.batch, length=args.length,
                    checkpoint=common.checkpoint(args.shape))
    tokenizer = minillm.load(settings["checkpoint"])[1]
    ids = torch.tensor(tokenizer.encode(data.topics()))
    each = args.batch * SETTINGS["steps"]  # rows of a LoRA: no example twice
    rows = ids[: args.loras * each * args.length].view(args.loras, each, args.length)
    settings["ids"] = rows.tolist()
    limits = common.limits(args.device)
    found = common.run("benchmarks.many_loras", SIDES, args, settings)
    table = []
    for name, measured in found.items():
        dtype = SIDES[name]["dtype"]
        peft, turn = (found.get(f"{library} in turn {dtype}", measured)
                      for library in ("peft", "minillm"))
        table.append({
            "side": name, "seconds": f"{common.median(measured, 'seconds'):.1f}",
            "of peft's": f"{common.ratio(measured, peft, 'seconds'):.2f}",
            "of minillm's in turn": f"{common.ratio(measured, turn, 'seconds'):.2f}",
            "peak MB": f"{measured[-1]['peak_bytes'] / 1e6:,.0f}",
            "of one peft run's": f"{measured[-1]['peak_bytes'] / peft[-1]['peak_bytes']:.2f}",
            "of one minillm run's": f"{measured[-1]['peak_bytes'] / turn[-1]['peak_bytes']:.2f}",
            "losses from peft's": f"{apart(measured, peft):.1e}",
            "from minillm's in turn": f"{apart(measured, turn):.1e}"})
    del settings["ids"], settings["checkpoint"]
    common.keep("many_loras", args, settings, table, limits)


def apart(measured, base):
    """The largest distance between the final losses of a LoRA."""
    return max(abs(loss - other["losses"][name]) for one, other in zip(measured, base)
               for name, loss in one["losses"].items())


if __name__ == "__main__":
    main()
