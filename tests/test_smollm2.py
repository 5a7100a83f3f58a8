"""SmolLM2-135M, whole, beside the programs that people run it with: transformers, peft,
llama.cpp."""

import dataclasses
import math
import sys
import warnings

import pytest
import torch
from conftest import hugging_face
from test_hub import SHAPES
from test_tokenizer import ODD, tables

import minillm
from minillm import checkpoints, data, files, zoo
from minillm.model.tokenizer import BytePair

pytestmark = pytest.mark.slow

PROMPTS = [
    "The capital of France is", "def fibonacci(n):", "Water boils at",
    "Once upon a time, in a small village,", "1, 2, 3, 4,",
    "The three laws of motion are", "import numpy as np\n", "To make bread you need",
    "Die Hauptstadt von Deutschland ist",
    "Q: What is the largest planet?\nA:",
]


@pytest.fixture(scope="module")
def smollm2():
    if not (files.cache() / "smollm2" / "SHA256").exists():
        pytest.skip("run: minillm fetch smollm2")
    return zoo.load("smollm2", dtype="float32")


def test_it_is_the_model_that_transformers_loads(smollm2):
    model, tokenizer = smollm2
    score = minillm.measure.perplexity(model, tokenizer, data.topics(), length=512, windows=8)
    if sys.version_info[:2] == (3, 11):  # the text is that version's
        assert abs(score - 14.693) < 0.01
    assert score.n == 8 and math.isfinite(score.high)
    new = model.generate([tokenizer.encode("The capital of France is")], 20)[0].tolist()
    assert tokenizer.decode(new).startswith(
        "The capital of France is Paris.\n\nThe answer is: 2018-01-22"
    )


@pytest.mark.parity
def test_it_continues_as_in_transformers(smollm2):
    model, tokenizer = smollm2
    (path,) = (files.cache() / "smollm2").glob("*.gguf")
    theirs = (
        hugging_face()
        .AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        .eval()
    )
    chat = tokenizer.chat([{"role": "user", "content": "Who are you?"}], generate=True)
    for prompt in [*PROMPTS, chat]:
        ids = tokenizer.encode(prompt)
        new = theirs.generate(torch.tensor([ids]),
                              attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                              max_new_tokens=24,
                              do_sample=False, eos_token_id=None, pad_token_id=2)
        assert model.generate([ids], 24)[0].tolist() == new[0].tolist(), prompt


@pytest.mark.parity
def test_its_ids_are_those_of_transformers(smollm2, tmp_path):
    """Of transformers on the files that we write: its own reading of a GGUF leaves out that
    digits stand alone."""
    _, ours = smollm2
    ours.save(tmp_path)
    theirs = hugging_face().AutoTokenizer.from_pretrained(tmp_path)
    for text in [*ODD, data.topics()]:
        assert ours.encode(text) == theirs(text)["input_ids"], text[:40]


@pytest.mark.parity
def test_lora_on_it_trains_as_pefts(smollm2, tmp_path):
    """20 steps of AdamW from the same adapter tensors, on the same batches."""
    peft, (model, tokenizer) = pytest.importorskip("peft"), smollm2
    checkpoints.save(model, tmp_path / "m")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with warnings.catch_warnings(action="ignore"):
        theirs = hugging_face().AutoModelForCausalLM.from_pretrained(
            tmp_path / "m", dtype=torch.float32
        )
        theirs = peft.get_peft_model(theirs,
                                     peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets,
                                                     task_type="CAUSAL_LM")).train()
    ours, _ = zoo.load(tmp_path / "m")
    minillm.lora.wrap(ours, targets, r=8, alpha=16).train()
    sites, copied = minillm.layers(ours), 0
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            patch = sites[name.removeprefix("base_model.model.model.")].patches["lora"]
            module.lora_B["default"].weight.data.normal_(std=0.01)
            patch.A.data.copy_(module.lora_A["default"].weight)
            patch.B.data.copy_(module.lora_B["default"].weight)
            copied += 1
    assert copied == 7 * 30
    ids, losses = (
        torch.tensor(tokenizer.encode(data.topics())[: 5 * 2 * 64]).view(5, 2, 64).repeat(4, 1, 1),
        [],
    )
    for loss, of in ((lambda batch: theirs(input_ids=batch, labels=batch).loss, theirs),
                     (lambda batch: ours.loss(batch, batch), ours)):
        optimizer, run = torch.optim.AdamW([p for p in of.parameters() if p.requires_grad],
                                           lr=1e-3), []
        for batch in ids:
            value = loss(batch)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(value.item())
        losses.append(run)
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-4)
    # the fourth time over the same five batches
    assert sum(losses[1][15:]) < sum(losses[1][:5]) - 0.5


# --- llama.cpp ----------------------------------------------------------------------------------


def in_llama_cpp(path, **options):
    llama_cpp = pytest.importorskip("llama_cpp", reason="run: pip install llama-cpp-python")
    # by default keys and values are kept in f16
    cache = dict(type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)
    return llama_cpp.Llama(str(path), n_ctx=256, verbose=False, logits_all=True, **cache, **options)


def logits_in_llama_cpp(model, ids):
    model.reset()
    model.eval(ids)
    return torch.tensor(model.scores[: len(ids)].copy())


def continued_in_llama_cpp(model, ids, n):
    new = []
    for token in model.generate(ids, temp=0.0, repeat_penalty=1.0, reset=True):
        new.append(token)
        if len(new) == n:
            return ids + new


@pytest.mark.parametrize("type, tolerance", [("f32", 1e-5), ("f16", 5e-3), ("q8_0", 5e-2)])
def test_llama_cpp_runs_what_we_write(smollm2, tmp_path, type, tolerance):
    model, tokenizer = smollm2
    checkpoints.save(model, tmp_path / "m.gguf", tokenizer=tokenizer, type=type)
    # with the weights as the type rounds them
    again, _ = zoo.load(tmp_path / "m.gguf", dtype="float32")
    theirs, same = in_llama_cpp(tmp_path / "m.gguf"), 0
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        ours = again.generate([ids], 24)[0].tolist()
        with torch.no_grad():
            expected = again(torch.tensor([ours]))[0]
        off = (logits_in_llama_cpp(theirs, ours) - expected).norm() / expected.norm()
        assert off < tolerance, prompt
        same += continued_in_llama_cpp(theirs, ids, 24) == ours
    assert type != "f32" or same == len(PROMPTS)


def test_llama_cpps_ids_and_chat_are_ours(smollm2, tmp_path):
    model, tokenizer = smollm2
    checkpoints.save(model, tmp_path / "m.gguf", tokenizer=tokenizer, type="q8_0")
    theirs = in_llama_cpp(tmp_path / "m.gguf", vocab_only=True)
    for text in [*ODD, data.topics()]:
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(
            text
        ), text[:40]
    assert theirs.metadata["tokenizer.chat_template"] == tokenizer.chat_template


# of 64 columns and 2 or 4 heads: width / heads, and not
@pytest.mark.parametrize("head_size", [16, 32])
@pytest.mark.parametrize("shape", ["llama", "untied", "head size", "qwen2", "biases"])
def test_llama_cpp_computes_the_same_of_other_shapes(tmp_path, shape, head_size):
    tokenizer = BytePair.from_gguf(tables("smollm"))
    config = dataclasses.replace(SHAPES[shape], vocab_size=tokenizer.vocab_size, width=64,
                                 head_size=head_size, ffn=96, positions=256,
                                 mlp_bias=False)
    model = minillm.Transformer(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    checkpoints.save(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    ids = tokenizer.encode("for x in range(10): print(x)")
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    assert (
        logits_in_llama_cpp(in_llama_cpp(tmp_path / "m.gguf"), ids) - expected
    ).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("ftype, tolerance", [
    ("Q4_0", 0.12), ("Q4_1", 0.12), ("Q5_0", 0.06), ("Q5_1", 0.06), ("Q8_0", 0.01), ("F16", 1e-3),
    ("BF16", 5e-3),
    ("Q3_K_M", 0.2), ("Q4_K_M", 0.12), ("Q5_K_M", 0.06), ("Q6_K", 0.03)])
def test_we_read_what_llama_cpp_quantizes(tmp_path, ftype, tolerance):
    """A model of whole super-blocks: 256 columns and more, so that the K-quants are used as
    such."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="run: pip install llama-cpp-python")
    tokenizer = BytePair.from_gguf(tables("smollm"))
    model = minillm.Transformer(minillm.Config(tokenizer.vocab_size, 256, 2, 4, kv_heads=2, ffn=512,
                                               positions=256)).eval()
    checkpoints.save(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    told = llama_cpp.llama_model_quantize_default_params()
    told.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}")
    assert llama_cpp.llama_model_quantize(str(tmp_path / "m.gguf").encode(),
                                          str(tmp_path / "q.gguf").encode(), told) == 0
    again, _ = zoo.load(tmp_path / "q.gguf", dtype="float32")
    for name, p in model.named_parameters():
        q = again.get_parameter(name)
        assert (q - p).norm() <= tolerance * p.norm(), name
    ids = tokenizer.encode("for x in range(10):")
    with torch.no_grad():
        expected = again(torch.tensor([ids]))[0]
    off = (
        logits_in_llama_cpp(in_llama_cpp(tmp_path / "q.gguf"), ids) - expected
    ).norm() / expected.norm()
    assert off < 0.02  # llama.cpp rounds what it multiplies with too
