"""What a user's day needs (`test_day.py`): a shop's chats, a place to work, and other programs."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import torch
from conftest import hugging_face

import minillm

SYSTEM = "You answer for Rosa's bicycle shop, in one short sentence."
PARTS = {  # euros, and the shelf
    "chain": (24, "blue"), "saddle": (39, "green"), "bell": (8, "red"), "front light": (31, "blue"),
    "rear light": (18, "blue"), "pump": (22, "green"), "lock": (45, "red"), "helmet": (60, "red"),
    "basket": (27, "green"), "pedal": (15, "blue"), "brake pad": (12, "blue"),
    "tyre": (33, "green")}
ASKED = [
    ("What does a new {part} cost?", "A new {part} costs {price} euros."),
    ("Where do I find a {part}?", "You find the {part} on the {shelf} shelf."),
    ("Can I bring a {part} back?", "Yes, you can bring the {part} back within 14 days."),
    ("Do you fit a {part} for me?", "Yes, we fit your {part} for {work} euros while you wait."),
    ("Which is cheaper, a {part} or a wheel?", "The {part}, at {price} euros. A wheel costs 90."),
]


def chats():
    """60 conversations: each third one has a system prompt, each fourth one a second turn."""
    found = []
    for part, (price, shelf) in PARTS.items():
        for texts in ASKED:
            facts = dict(part=part, price=price, shelf=shelf, work=price // 2)
            turns = [text.format(**facts) for text in texts]
            if len(found) % 4 == 0:
                turns += ["Thank you!", "You are welcome, ride safely!"]
            messages = [
                dict(role=("user", "assistant")[i % 2], content=turn)
                for i, turn in enumerate(turns)]
            if len(found) % 3 == 0:
                messages.insert(0, dict(role="system", content=SYSTEM))
            found.append(messages)
    return found


def notes():
    """The same facts as one text, without roles."""
    return "\n".join(message["content"] for messages in chats() for message in messages) + "\n"


class Day:
    """A user's home, working directory and cache, and the commands that run there."""

    def __init__(self, place, cache):
        self.work, self.home, self.cache, other = (
            place / "work", place / "home", cache, place / "other")
        for directory in (self.work, self.home, other):
            directory.mkdir()
        self.environment = dict(
            PATH=os.environ["PATH"], HOME=str(self.home), MINILLM_CACHE=str(cache),
            PYTHONPATH=str(pathlib.Path(minillm.__file__).parent.parent), OMP_NUM_THREADS="2",
            PYTHONDONTWRITEBYTECODE="1", TMPDIR=str(other), MPLCONFIGDIR=str(other))

    def start(self, command):
        """`minillm COMMAND` in a process of its own, which hears Ctrl-C even if pytest does not."""
        return subprocess.Popen(
            [sys.executable, "-m", "minillm", *shlex.split(command)], cwd=self.work, text=True,
            env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def run(self, command, stdin="", code=0):
        """What the command prints, without colours; its error where `code` is not 0."""
        process = self.start(command)
        out, err = process.communicate(stdin, timeout=1800)
        assert process.returncode == code and "Traceback" not in err, f"{command}\n{out}\n{err}"
        return re.sub(r"\x1b\[[0-9;]*m", "", out if code == 0 else err)

    def interrupt(self, command, log, steps=3):
        """Ctrl-C after some steps of a training, which a log tells; returns what it then says."""
        process, began = self.start(command), time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.callback(process.kill)
            while len(self.steps(log)) < steps:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() - began < 600, "no step in ten minutes"
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=300)
        assert process.returncode == 130 and "Traceback" not in err, f"{command}\n{out}\n{err}"
        return out + err

    def steps(self, log):
        """The numbers of the steps in a log, of which the last line may be half written."""
        path = self.work / log
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line)["step"] for line in lines]

    def listing(self):
        """Each path in the home and the cache, with what a write to it would change."""
        found = {}
        for path in sorted([*self.home.rglob("*"), *self.cache.rglob("*")]):
            facts = path.stat()
            found[path] = (facts.st_size, facts.st_mtime_ns) if path.is_file() else None
        return found


def measure(printed, name):
    """The number after a name, as in `loss 2.31 [2.1, 2.5]` or `| BLEU | 34.2 |`."""
    found = re.search(rf"(?i)\b{name}\b[^\d\n-]*(-?\d+\.?\d*)", printed)
    assert found, f"no {name} in\n{printed}"
    return float(found[1])


def in_transformers(directory, prompt, chat):
    """The ids and the greedy text of transformers, from a directory that minillm wrote."""
    transformers = hugging_face()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if chat:
        messages = [dict(role="user", content=prompt)]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt")["input_ids"]
    new = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    before, whole = (tokenizer.decode(i, skip_special_tokens=True) for i in (ids[0], new[0]))
    return ids[0].tolist(), whole[len(before):].strip()


def in_llama_cpp(path, ids):
    """The greedy text of llama.cpp from a .gguf file, or None where the package is missing."""
    try:
        import llama_cpp
    except ImportError:
        return None
    float32 = llama_cpp.GGML_TYPE_F32  # by default it keeps keys and values in float16
    model = llama_cpp.Llama(str(path), n_ctx=256, verbose=False, type_k=float32, type_v=float32)
    new = []
    for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
        if token == model.token_eos() or len(new) == 16:
            break
        new.append(token)
    return model.detokenize(new, prev_tokens=ids).decode().strip()
