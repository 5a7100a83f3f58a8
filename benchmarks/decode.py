"""Generation on SmolLM2, batch 1, greedy, beside transformers and, where it is
installed, llama.cpp: prefill and decode tokens/s.

Decoding reads every weight once a token, so the machine's limit is its bandwidth over
the bytes of the weights; the table gives each side's share of that. All sides in
float32 have to continue with the same tokens; the table says how many of the first are.
Run: python -m benchmarks.decode
"""

import time

import torch

import minillm
from benchmarks import common

SIDES = {
    "transformers float32": dict(library="transformers", dtype="float32"),
    "minillm float32": dict(library="minillm", dtype="float32"),
    "minillm float32 compiled": dict(library="minillm", dtype="float32", compiled=True),
    "transformers bfloat16": dict(library="transformers", dtype="bfloat16"),
    "minillm bfloat16": dict(library="minillm", dtype="bfloat16"),
    "minillm bfloat16 compiled": dict(library="minillm", dtype="bfloat16", compiled=True),
    "minillm int8 compiled": dict(library="minillm", dtype="float32", compiled=True, int8=True),
    "llama.cpp float32": dict(library="llama.cpp", dtype="float32"),
}
SETTINGS = dict(prompt=128, new=64)
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
            "embed_tokens", "lm_head"]  # the last two share their matrix, and its codes


def setup(side, settings):
    make = {"transformers": transformers, "minillm": ours, "llama.cpp": llama_cpp}[side["library"]]
    prefill, generate, size = make(side, settings)
    began = time.perf_counter()
    generate()
    ready = time.perf_counter() - began
    prefill()

    def timed(work):
        common.wait(settings["device"])
        began = time.perf_counter()
        result = work()
        common.wait(settings["device"])
        return time.perf_counter() - began, result

    def measure():
        before, _ = timed(prefill)
        whole, new = timed(generate)
        # the first new token comes out of the prefill
        decode = (settings["new"] - 1) / (whole - before)
        return {"decode": decode, "prefill": settings["prompt"] / before, "tokens": new,
                "bytes": size, "warm": ready}

    return measure


def transformers(side, settings):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["checkpoint"], dtype=getattr(torch, side["dtype"])
    )
    model = model.to(settings["device"]).eval()
    ids = torch.tensor([settings["ids"]], device=settings["device"])
    told = dict(max_new_tokens=settings["new"], min_new_tokens=settings["new"], do_sample=False,
                pad_token_id=2)
    return (torch.inference_mode()(lambda: model(ids, logits_to_keep=1)),
            lambda: model.generate(ids, attention_mask=torch.ones_like(ids),
                                   **told)[0, ids.shape[1]:].tolist(), weights(model))


def ours(side, settings):
    model, _ = minillm.load(settings["checkpoint"], dtype=side["dtype"], device=settings["device"])
    if side.get("int8"):
        minillm.quant.wrap(model, MATRICES)
    if side.get("compiled"):
        minillm.compile(model)
    ids = torch.tensor([settings["ids"]], device=settings["device"])
    return (lambda: model.generate(ids, 1),
            lambda: model.generate(ids, settings["new"])[0, ids.shape[1]:].tolist(),
            weights(model))


def llama_cpp(side, settings):
    import llama_cpp

    path = settings["checkpoint"] + ".gguf"
    model = llama_cpp.Llama(path, n_ctx=512, n_threads=torch.get_num_threads(),
                            n_threads_batch=torch.get_num_threads(), verbose=False)

    def prefill():
        model.reset()
        model.eval(settings["ids"])

    def generate():
        model.reset()
        new = []
        for token in model.generate(settings["ids"], temp=0.0, repeat_penalty=1.0, reset=True):
            new.append(token)
            if len(new) == settings["new"]:
                return new

    return prefill, generate, settings["parameters"] * 4


def weights(model):
    """The bytes that a token has to read: every matrix once, of an untied embedding one row."""
    head, embedding = model.get_output_embeddings(), getattr(model, "embed_tokens", None)
    total = minillm.report.total_bytes(model)
    if embedding is None or memory(head) & memory(embedding):
        return total
    return total - minillm.report.total_bytes(embedding)


def memory(module):
    return {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}


def main():
    args = common.arguments(__doc__)
    settings = dict(SETTINGS, checkpoint=common.checkpoint(args.shape))
    model, tokenizer = minillm.load(settings["checkpoint"])
    settings["parameters"] = sum(p.numel() for p in model.parameters())
    try:
        import llama_cpp  # noqa: F401

        minillm.save(model, settings["checkpoint"] + ".gguf", tokenizer=tokenizer, force=True)
    except ImportError:
        pass
    settings["ids"] = tokenizer.encode(minillm.data.topics())[: settings["prompt"]]
    limits = common.limits(args.device)
    found = common.run("benchmarks.decode", SIDES, args, settings)
    rows = []
    for name, measured in found.items():
        base = found.get(f"transformers {SIDES[name]['dtype']}", measured)
        pairs = list(zip(measured[-1]["tokens"], base[-1]["tokens"]))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        speed = common.median(measured, "decode")
        rows.append({
            "side": name, "decode, tokens/s": f"{speed:,.1f}",
            "of transformers": f"{common.ratio(measured, base, 'decode'):.2f}",
            "of the bandwidth": f"{speed * measured[-1]['bytes'] / limits['bytes/s']:.0%}",
            "prefill, tokens/s": f"{common.median(measured, 'prefill'):,.0f}",
            "prefill of transformers": f"{common.ratio(measured, base, 'prefill'):.2f}",
            "first run, s": f"{measured[0]['warm']:.1f}",
            "peak MB": f"{measured[-1]['peak_bytes'] / 1e6:,.0f}",
            "same tokens": f"{same} of {len(pairs)}"})
    del settings["ids"], settings["checkpoint"]
    common.keep("decode", args, settings, rows, limits)


if __name__ == "__main__":
    main()
