"""Tune a Hugging Face model with LoRA, merge it, and hand it back to transformers and peft.

    python examples/tune_hugging_face.py               the tiny Llama that minillm pretrained here
    python examples/tune_hugging_face.py gpt2          a GPT-2 of random weights, from a config
    python examples/tune_hugging_face.py DIRECTORY     a model of yours, with its tokenizer

The texts are the docstrings of the standard library, and the model learns to say which of 8
packages each comes from. It stays an object of transformers throughout: minillm wraps its leaves in
place, and `merge` leaves ordinary leaves behind.
"""

import copy
import os
import sys
import tempfile

import torch
import transformers

import minillm
from minillm.model import tokenizer as tokenizers

SHORT = bool(os.environ.get("MINILLM_SHORT"))
STEPS = 3 if SHORT else 80


def opened(source):
    """(a model of transformers, minillm's tokenizer)."""
    directory = minillm.zoo.tiny() if source in ("tiny", "gpt2") else source
    if not os.path.isfile(os.path.join(directory, "config.json")):
        raise SystemExit(f"{source} is no directory with a model of transformers (config.json)")
    try:
        tokenizer = tokenizers.load(directory)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    if source != "gpt2":
        return transformers.AutoModelForCausalLM.from_pretrained(directory).eval(), tokenizer
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.vocab_size, n_embd=96, n_layer=4, n_head=4, n_positions=512,
        bos_token_id=tokenizer.eos, eos_token_id=tokenizer.eos, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0)
    return transformers.GPT2LMHeadModel(config).eval(), tokenizer


def main(source="tiny"):
    transformers.logging.disable_progress_bar()
    model, tokenizer = opened(source)
    train = minillm.data.task("package", tokenizer, "train", limit=800)
    test = minillm.data.task("package", tokenizer, "test", limit=8 if SHORT else 64)
    ids = torch.tensor([tokenizer.encode(test.prompts[0])])

    def scores():
        chosen = minillm.measure.choose(model, tokenizer, test.prompts, test.choices)
        perplexity = minillm.measure.completions(model, test.examples)
        accuracy = minillm.measure.accuracy(chosen, test.references)
        return f"perplexity of the answers {perplexity:.2f}, accuracy {accuracy:.2f}"

    print(f"{type(model).__module__}.{type(model).__name__}, {model.num_parameters():,} parameters")
    print(f"before the training      {scores()}")

    torch.manual_seed(0)
    minillm.lora.wrap(model, r=8)  # each linear leaf but the head, Conv1D as well as nn.Linear
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"with LoRA                {learns:,} parameters learn")
    minillm.train.train(model, train.examples, steps=STEPS, lr=5e-3, progress=False)
    print(f"after {STEPS:3} steps          {scores()}")

    with torch.no_grad(), tempfile.TemporaryDirectory() as directory:
        wrapped = model(ids).logits
        adapter = f"{directory}/adapter.safetensors"
        minillm.lora.save(model, adapter)
        print(f"the adapter's file       {os.path.getsize(adapter):,} bytes")

        minillm.lora.merge(model, keep=False)  # nothing is kept for an `unmerge`
        ours = [one for one in model.modules() if type(one).__module__.startswith("minillm")]
        print(f"merged                   {len(ours)} modules of minillm are left")
        print(f"merged - wrapped         {difference(model(ids).logits, wrapped)}")

        model.save_pretrained(f"{directory}/merged")
        read = transformers.AutoModelForCausalLM.from_pretrained(f"{directory}/merged").eval()
        print(f"transformers reads it    {difference(read(ids).logits, model(ids).logits)}")
        new = read.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.eos)
        print(f"the end of a prompt      ...{test.prompts[0][-60:]!r}")
        print(f"transformers continues   {tokenizer.decode(new[0, ids.shape[1] :].tolist())!r}")
        print(f"the reference            {test.references[0]!r}")
        check_peft(read, ids)


def difference(a, b):
    return f"the logits differ by at most {float((a - b).abs().max()):.1e}"


def check_peft(model, ids):
    """peft puts a LoRA of its own around the merged model; it starts as nothing."""
    try:
        import peft
    except ImportError:
        print("peft                     is not installed")
        return
    targets = ["c_attn"] if model.config.model_type == "gpt2" else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out="c_attn" in targets)
    around = peft.get_peft_model(copy.deepcopy(model), config).eval()
    print(f"peft wraps it            {difference(around(ids).logits, model(ids).logits)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
