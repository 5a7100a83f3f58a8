"""Tune SmolLM2 on conversations, and chat with it.

    minillm fetch smollm2                      once
    python examples/chat_smollm2.py            tunes it, asks it three questions, and then you do
    python examples/chat_smollm2.py DIRECTORY  the same with a model of yours, or with tiny

The conversations are made of the standard library: a question about a function, and the first line
of its docstring. SmolLM2 learns to answer in one line, as a docstring does. Where SmolLM2 is not in
the cache, the tiny model takes its place, to show the way. It knows no English worth a chat.
"""

import os
import sys

import minillm

SHORT = bool(os.environ.get("MINILLM_SHORT"))
STEPS = 2 if SHORT else 30
PLAIN = ("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
         "{% if add_generation_prompt %}assistant: {% endif %}")  # for a model without a template


def load(source):
    """(model, tokenizer, learning rate)."""
    if source == "smollm2" and SHORT:
        source = "tiny"
    try:
        model, tokenizer = minillm.load(source, dtype="float32")
    except (OSError, ValueError) as error:
        if source != "smollm2":
            raise SystemExit(str(error)) from None
        print(f"{error}\nThe tiny model takes its place.\n")
        source = "tiny"
        model, tokenizer = minillm.load(source)
    if tokenizer is None:
        raise SystemExit(f"{source} has no tokenizer, which a chat needs")
    tokenizer.chat_template = tokenizer.chat_template or PLAIN
    return model, tokenizer, 6e-3 if source == "tiny" else 1e-3


def conversations(which):
    """One of two messages for each function of the standard library with a docstring."""
    for record in minillm.data.texts(which):
        line = record.text.partition("\n")[0]
        if record.name.isidentifier() and not record.name.startswith("_") and 20 < len(line) < 80:
            ask = f"What does {record.name} of Python's module {record.module} do?"
            yield [dict(role="user", content=ask), dict(role="assistant", content=line)]


def some(which, count):
    """So many of them, from all over the library."""
    found = list(conversations(which))
    return found[:: max(1, len(found) // count)][:count]


def answer(model, tokenizer, messages):
    """What the model says next."""
    ids = tokenizer.chat_spans(messages, generate=True)[1]
    new = model.generate([ids], 40, stop=tokenizer.stops, pad=tokenizer.pad)[0, len(ids):]
    return tokenizer.decode(new.tolist()).strip()


def main(source="smollm2"):
    model, tokenizer, rate = load(source)
    train, test = some("train", 8 if SHORT else 120), some("test", 3 if SHORT else 16)
    examples, held_out = ([minillm.data.conversation(messages, tokenizer, 128) for messages in part]
                          for part in (train, test))
    print(minillm.data.preview(examples[:1], tokenizer))

    def report(when):
        print(f"\n{when}: {minillm.measure.completions(model, held_out)!r} of the answers")
        for asked, said in test[:3]:
            print(f"  {asked['content']}\n    {answer(model, tokenizer, [asked])!r}\n"
                  f"    the docstring: {said['content']!r}")

    report("before")
    minillm.lora.wrap(model, ["q_proj", "v_proj"], r=8)
    minillm.train.train(model, examples, steps=STEPS, batch_size=4, lr=rate, progress=False)
    report(f"after {STEPS} steps")
    minillm.lora.merge(model, keep=False)  # an ordinary model again, as fast as before

    if sys.stdin.isatty():
        print("\nAsk it something; an empty line ends the conversation.")
        messages = []
        while line := input("> ").strip():
            messages.append(dict(role="user", content=line))
            messages.append(dict(role="assistant", content=answer(model, tokenizer, messages)))
            print(messages[-1]["content"])


if __name__ == "__main__":
    main(*sys.argv[1:])
