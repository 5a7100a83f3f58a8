"""A user's day: chats of one's own, preview, train, interrupt, resume, chat, evaluate, export.

Each command runs as a user runs it: in a process of its own, from a directory of its own, with a
home of its own. In the end the home and the cache are as they were, and the directory holds what
the commands were asked to write and nothing else. transformers and llama.cpp continue a text from
the exported files with the same words.
"""

import json
import os

import pytest
import safetensors.torch
import torch
from day import SYSTEM, Day, chats, in_llama_cpp, in_transformers, measure, notes

import minillm
from minillm import files

pytestmark = [pytest.mark.slow, pytest.mark.parity]

QUESTION = "What does a new chain cost?"


@pytest.fixture
def day(tmp_path):
    return Day(tmp_path, files.cache())


def test_a_day_with_chats(day):
    if not (day.cache / "smollm2" / "SHA256").exists():
        pytest.skip("run: minillm fetch smollm2")
    lines = [json.dumps(dict(messages=messages)) + "\n" for messages in chats()]
    (day.work / "chats.jsonl").write_text("".join(lines[:48]))
    (day.work / "held.jsonl").write_text("".join(lines[48:]))
    before = day.listing()
    train = ("train --model smollm2 --technique lora --option r=8 --data chats.jsonl "
             "--eval-data held.jsonl --epochs 3 --batch-size 4 --length 256 --rate 0.001 ")
    out = "--checkpoints checkpoints --log log.jsonl --out adapter.safetensors"
    tuned = "--model smollm2 --adapter adapter.safetensors"

    preview = day.run(train + "--preview")
    assert "A new chain costs 24 euros." in preview
    assert "token" in preview.lower()
    assert sorted(os.listdir(day.work)) == ["chats.jsonl", "held.jsonl"], "it writes nothing"

    train += out
    said = day.interrupt(train, log="log.jsonl")
    assert "--resume goes on from there" in said
    assert list((day.work / "checkpoints").glob("step-*.safetensors"))
    assert 3 <= len(day.steps("log.jsonl")) < 36
    day.run(f"{train} --resume")
    assert day.steps("log.jsonl") == list(range(36)), "48 chats, 4 a step, 3 epochs"

    scores = [day.run(f"eval {which} --data held.jsonl") for which in ("--model smollm2", tuned)]
    losses, bleus = ([measure(score, name) for score in scores] for name in ("loss", "BLEU"))
    assert losses[1] < 0.7 * losses[0] and bleus[1] > bleus[0]

    turns = [QUESTION, "And a bell?", "Thank you!"]
    chatted = day.run(f'chat {tuned} --system "{SYSTEM}"', stdin="\n".join(turns) + "\n\n")
    place = 0
    for answer in answers(day.work / "adapter.safetensors", turns):
        assert answer in chatted[place:], "each turn sees those before it"
        place = chatted.index(answer, place) + len(answer)

    expected = day.run(f'generate {tuned} --chat "{QUESTION}" --max-new-tokens 16').strip()
    day.run(f"export {tuned} --out merged")
    day.run(f"export {tuned} --out merged.gguf --type f32")
    says_the_same(day, f'--chat "{QUESTION}" --max-new-tokens 16', QUESTION, True, expected)
    untuned = day.run(f'generate --model smollm2 --chat "{QUESTION}" --max-new-tokens 16').strip()
    assert expected and expected != untuned, "the training shows"

    assert day.listing() == before
    assert sorted(os.listdir(day.work)) == [
        "adapter.safetensors", "chats.jsonl", "checkpoints", "held.jsonl", "log.jsonl", "merged",
        "merged.gguf"]


def answers(adapter, turns):
    """What the tuned model answers, turn by turn, computed in this process."""
    model, tokenizer = minillm.load("smollm2")
    minillm.lora.load(model, adapter)
    messages = [dict(role="system", content=SYSTEM)]
    for turn in turns:
        messages.append(dict(role="user", content=turn))
        ids = tokenizer.encode(tokenizer.chat(messages, generate=True))
        new = model.generate([ids], 60, stop=tokenizer.eos)[0].tolist()[len(ids):]
        answer = tokenizer.decode([i for i in new if i != tokenizer.eos]).strip()
        assert answer and len(new) < 60, "shorter than the limit of `chat`"
        yield answer
        messages.append(dict(role="assistant", content=answer))


def says_the_same(day, asked, prompt, chat, expected):
    """Both exported files continue the prompt with `expected`, here and in other programs."""
    for exported in ("merged", "merged.gguf"):
        assert day.run(f"generate --model {exported} {asked}").strip() == expected
    ids, text = in_transformers(day.work / "merged", prompt, chat)
    assert text == expected
    _, tokenizer = minillm.load(day.work / "merged")
    if chat:
        prompt = tokenizer.chat([dict(role="user", content=prompt)], generate=True)
    assert tokenizer.encode(prompt) == ids
    assert in_llama_cpp(day.work / "merged.gguf", ids) in (expected, None)  # None: not installed


def test_a_day_with_a_text(day):
    """The model that minillm pretrains itself has no chat template: it continues texts."""
    (day.work / "notes.txt").write_text(notes())
    (day.work / "held.txt").write_text(notes()[:1500])
    day.run("show --model tiny")  # pretrains it where the cache has none
    before = day.listing()
    train = ("train --model tiny --technique lora --option r=8 --data notes.txt --eval-share 0.2 "
             "--epochs 20 --batch-size 4 --length 64 --rate 0.01")
    tuned = "--model tiny --adapter adapter.safetensors"

    assert "token" in day.run(f"{train} --preview").lower()
    day.run(f"{train} --log whole.jsonl --out whole.safetensors")
    again = f"{train} --log log.jsonl --checkpoints checkpoints --out adapter.safetensors"
    day.interrupt(again, log="log.jsonl")
    assert len(day.steps("log.jsonl")) < len(day.steps("whole.jsonl"))
    day.run(f"{again} --resume")
    assert day.steps("log.jsonl") == day.steps("whole.jsonl")
    whole, resumed = (
        safetensors.torch.load_file(day.work / f"{name}.safetensors")
        for name in ("whole", "adapter"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole), "bit for bit"

    held = "--text held.txt --length 64"
    scores = [day.run(f"eval {which} {held}") for which in ("--model tiny", tuned)]
    perplexities = [measure(score, "perplexity") for score in scores]
    assert perplexities[1] < 0.5 * perplexities[0]

    for out, said in ((".", "choose a directory in it"),
                      ("notes.txt", "notes.txt looks like a file")):
        message = day.run(f"export {tuned} --out {out}", code=1)
        assert message.count("\n") == 1 and said in message
    assert (day.work / "notes.txt").read_text() == notes(), "what minillm did not write stays"

    prompt = "A new chain costs"
    expected = day.run(f'generate {tuned} "{prompt}" --max-new-tokens 16').strip()
    day.run(f"export {tuned} --out merged")
    day.run(f"export {tuned} --out merged.gguf")
    says_the_same(day, f'"{prompt}" --max-new-tokens 16', prompt, False, expected)

    assert day.listing() == before
    assert sorted(os.listdir(day.work)) == [
        "adapter.safetensors", "checkpoints", "held.txt", "log.jsonl", "merged", "merged.gguf",
        "notes.txt", "whole.jsonl", "whole.safetensors"]
