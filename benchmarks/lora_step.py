"""A training step of LoRA, and of DoRA, on SmolLM2, beside transformers + peft: r=8 on
the seven projections, 4 x 128 tokens (--batch, --length), AdamW.

All sides start from the same adapter tensors and take the same batches, so their losses
have to agree; the table says how far they are apart. A LoRA step takes about 4 N
operations a token (N: all parameters, the head included), which tells the share of the
machine's limit.

The floor is what no LoRA step can do without: for each matrix of the model, the head
included, the product with the input and the product with the gradient. The sides
"floor" compute these products and nothing else, in the same rounds. Run: python -m
benchmarks.lora_step
"""

import time

import torch

import minillm
from benchmarks import common

SIDES = {f"{library} {technique}{dtype}{' compiled' * compiled}": dict(
             library=library, dora=bool(technique), dtype=dtype, compiled=compiled)
         for technique, dtype in (("", "float32"), ("", "bfloat16"), ("DoRA ", "float32"))
         for library, compiled in (("peft", False), ("minillm", False), ("minillm", True),
                                   *([] if technique else [("floor", False)]))}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = dict(r=8, alpha=16, lr=1e-4, steps=4, warmup=3)


def setup(side, settings):
    torch.manual_seed(0)
    if side["library"] == "floor":
        return floor(side, settings)
    dtype, device = getattr(torch, side["dtype"]), settings["device"]
    if side["library"] == "peft":
        import peft
        import transformers

        # the other side's load brings one too
        transformers.AutoTokenizer.from_pretrained(settings["checkpoint"])
        model = transformers.AutoModelForCausalLM.from_pretrained(
            settings["checkpoint"], dtype=dtype
        ).to(device)
        told = peft.LoraConfig(r=settings["r"], lora_alpha=settings["alpha"],
                               target_modules=PROJECTIONS, task_type="CAUSAL_LM",
                               use_dora=side["dora"])
        model = peft.get_peft_model(model, told).train()
        adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}

        def loss(ids):
            return model(input_ids=ids, labels=ids).loss
    else:
        model, _ = minillm.load(settings["checkpoint"], dtype=dtype, device=device)
        wrap = minillm.lora.dora.wrap if side["dora"] else minillm.lora.wrap
        wrap(model, PROJECTIONS, r=settings["r"], alpha=settings["alpha"]).train()
        adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if side["compiled"]:
            minillm.compile(model)

        def loss(ids):
            return model.loss(ids, ids)

    # in both libraries A, then B, in the order of the layers; DoRA's lengths are those of W
    for i, p in enumerate(p for p in adapters.values() if p.dim() == 2):
        draw = torch.Generator().manual_seed(i)
        scale = p.shape[1] ** -0.5 if i % 2 == 0 else 0.0
        p.data.copy_((torch.rand(p.shape, generator=draw) * 2 - 1) * scale)
    optimizer = torch.optim.AdamW(adapters.values(), lr=settings["lr"])
    batches = iter(
        torch.tensor(settings["ids"]).view(-1, settings["batch"], settings["length"]).to(device)
    )

    def step():
        value = loss(next(batches))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    began = time.perf_counter()
    losses = [step() for _ in range(settings["warmup"])]
    ready = time.perf_counter() - began

    def measure():
        common.wait(device)
        began = time.perf_counter()
        losses.extend(step() for _ in range(settings["steps"]))
        common.wait(device)
        seconds = time.perf_counter() - began
        return {"tokens/s": settings["steps"] * settings["batch"] * settings["length"] / seconds,
                "losses": list(losses), "warm": ready}

    return measure


def floor(side, settings):
    """The matrix products of a step, with matrices of their own for each layer."""
    dtype, device = getattr(torch, side["dtype"]), settings["device"]
    model, _ = minillm.load(settings["checkpoint"], dtype=dtype, device=device)
    tokens = settings["batch"] * settings["length"]
    matrices = [module.weight.detach() for module in model.modules()
                if isinstance(module, torch.nn.Linear)]  # the head is one of them
    inputs = {n: torch.randn(tokens, n, device=device, dtype=dtype)
              for W in matrices for n in W.shape}

    def step():
        for W in matrices:
            torch.nn.functional.linear(inputs[W.shape[1]], W)
        for W in reversed(matrices):
            inputs[W.shape[0]] @ W

    began = time.perf_counter()
    for _ in range(settings["warmup"]):
        step()
    ready = time.perf_counter() - began

    def measure():
        common.wait(device)
        began = time.perf_counter()
        for _ in range(settings["steps"]):
            step()
        common.wait(device)
        seconds = time.perf_counter() - began
        return {"tokens/s": settings["steps"] * tokens / seconds, "warm": ready}

    return measure


def main():
    args = common.arguments(__doc__, batch=4, length=128)
    settings = dict(SETTINGS, batch=args.batch, length=args.length,
                    checkpoint=common.checkpoint(args.shape))
    model, tokenizer = minillm.load(settings["checkpoint"])
    size = sum(p.numel() for p in model.parameters())
    del model
    ids = tokenizer.encode(minillm.data.topics())
    settings["ids"] = ids[
        : settings["batch"]
        * settings["length"]
        * (settings["warmup"] + args.rounds * settings["steps"])
    ]
    limits = common.limits(args.device)
    found = common.run("benchmarks.lora_step", SIDES, args, settings)
    rows = []
    for name, measured in found.items():
        dtype = SIDES[name]["dtype"]
        base = found.get(f"peft {'DoRA ' * SIDES[name]['dora']}{dtype}", measured)
        apart = max((abs(a - b) for a, b in zip(measured[-1].get("losses", ()),
                                                base[-1].get("losses", ()))), default=None)
        speed = common.median(measured, "tokens/s")
        least = found.get(f"floor {dtype}")
        rows.append({
            "side": name, "tokens/s": f"{speed:,.0f}",
            "of peft": f"{common.ratio(measured, base, 'tokens/s'):.2f}",
            "of the floor": f"{common.ratio(measured, least, 'tokens/s'):.2f}" if least else "",
            "peak MB": f"{measured[-1]['peak_bytes'] / 1e6:,.0f}",
            "of peft's": f"{measured[-1]['peak_bytes'] / base[-1]['peak_bytes']:.2f}",
            "of the machine's FLOP/s": f"{speed * 4 * size / limits[f'{dtype} FLOP/s']:.0%}",
            "first steps, s": f"{measured[0]['warm']:.1f}",
            "losses apart": "" if apart is None else f"{apart:.1e}"})
    del settings["ids"], settings["checkpoint"]
    common.keep("lora_step", args, settings, rows, limits)


if __name__ == "__main__":
    main()
