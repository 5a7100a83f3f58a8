"""peft's adapter files: written here and read by peft, written by peft and read here; and
what does not fit is an error."""

import json
import warnings

import pytest
import safetensors.torch
import torch
from conftest import hugging_face, peft_model
from models import IDS, build, logits

import minillm
from minillm.checkpoints import peft as files
from minillm.registry import layers

LINEARS = {"hf_llama": ["q_proj", "down_proj"], "hf_gpt2": ["c_attn", "c_fc"]}
EMBED = {"hf_llama": "embed_tokens", "hf_gpt2": "wte"}
WRAPS = {
    "lora": lambda m, kind: minillm.lora.wrap(m, LINEARS[kind], r=3, alpha=5.0),
    "every leaf": lambda m, kind: minillm.lora.wrap(m, r=12, alpha=5.0, rank_stabilized=True),
    "dropout": lambda m, kind: minillm.lora.wrap(m, LINEARS[kind], r=3, dropout=0.1),
    "embedding": lambda m, kind: minillm.lora.wrap(m, [LINEARS[kind][0], EMBED[kind]], r=3),
    "one block": lambda m, kind: minillm.lora.wrap(m, rf".*\.1\..*({'|'.join(LINEARS[kind])})",
                                                   r=3),
    "dora": lambda m, kind: minillm.lora.dora.wrap(m, LINEARS[kind], r=3),
    "adalora": lambda m, kind: minillm.lora.adalora.wrap(m, LINEARS[kind], r=3, alpha=5.0),
    "vera": lambda m, kind: minillm.lora.vera.wrap(m, LINEARS[kind], r=3),
    "loha": lambda m, kind: minillm.lora.loha.wrap(m, LINEARS[kind], r=3, alpha=5.0),
    "lokr": lambda m, kind: minillm.lora.lokr.wrap(m, LINEARS[kind], r=1, alpha=5.0),
    "lokr of both": lambda m, kind: minillm.lora.lokr.wrap(m, LINEARS[kind], r=1, factor=2,
                                                           decompose_both=True),
    "ia3": lambda m, kind: minillm.adapters.ia3.wrap(m),
    "ia3 at outputs": lambda m, kind: minillm.adapters.ia3.wrap(m, LINEARS[kind], feedforward=[]),
    "pissa": lambda m, kind: minillm.lora.pissa.wrap(m, LINEARS[kind], r=3, alpha=4.0),
    "stable pissa": lambda m, kind: minillm.lora.pissa.wrap(m, LINEARS[kind], r=3, alpha=4.0,
                                                            rank_stabilized=True),
}
CONFIGS = {  # peft's own
    "lora": ("LoraConfig", dict(r=3, lora_alpha=5)),
    "rslora": ("LoraConfig", dict(r=3, lora_alpha=5, use_rslora=True, lora_dropout=0.1)),
    "dora": ("LoraConfig", dict(r=3, use_dora=True)),
    "patterns": ("LoraConfig", dict(r=3, rank_pattern={"q_proj": 2, "c_attn": 2, r"2\.mlp\.\w+": 4},
                                    alpha_pattern={"down_proj": 7, "h.1.mlp.c_fc": 7})),
    "some layers": ("LoraConfig", dict(r=3, layers_to_transform=[0, 2])),
    "adalora": ("AdaLoraConfig", dict(init_r=5, target_r=2, lora_alpha=5, total_step=9)),
    "vera": ("VeraConfig", dict(r=5)),
    "loha": ("LoHaConfig", dict(r=3, alpha=5, rank_pattern={"q_proj": 2})),
    "lokr": ("LoKrConfig", dict(r=1, alpha=5, decompose_both=True)),
    "lokr by 4": ("LoKrConfig", dict(r=2, decompose_factor=4)),
    "ia3": ("IA3Config", dict(feedforward_modules=["down_proj", "c_fc"])),
}
SPELT = {"lora": {"A": "lora_A.default.weight", "B": "lora_B.default.weight",
                  "m": "lora_magnitude_vector.default.weight"},
         "vera": {"d": "vera_lambda_d.default", "b": "vera_lambda_b.default"}}
SPELT["dora"] = SPELT["lora"]
SPELT |= {kind: {key: f"{suffix}.default" for key, suffix in files.SUFFIXES[kind].items()}
          for kind in ("adalora", "loha", "lokr", "ia3")}


def learn(model):
    """Values as after training."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in (p for layer in layers(model).values() for p in layer.patches.parameters()):
            p.add_(torch.randn_like(p) * 0.2)
    return model


def edit(directory, settings=(), tensors=None):
    """Change a file: settings to set, and a function that changes the dict of tensors."""
    config = json.loads((directory / files.CONFIG).read_text())
    (directory / files.CONFIG).write_text(json.dumps(config | dict(settings)))
    every = safetensors.torch.load_file(directory / files.TENSORS)
    if tensors:
        tensors(every)
        safetensors.torch.save_file(every, directory / files.TENSORS, {"format": "pt"})


@pytest.mark.parity
@pytest.mark.parametrize("name", WRAPS)
@pytest.mark.parametrize("kind", LINEARS)
def test_written_here_and_read_by_peft(kind, name, tmp_path):
    peft = pytest.importorskip("peft")
    model = learn(WRAPS[name](build(kind), kind))
    y = logits(model)
    if kind == "hf_gpt2" and name.startswith("lo") and name != "lora":
        with pytest.raises(ValueError, match="is no nn.Linear, and peft has lo.. for that alone"):
            files.save(model, tmp_path / "a")
        return
    files.save(model, tmp_path / "a")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(build(kind), tmp_path / "a")
    assert not [one for one in map(str, (w.message for w in seen))
                if "missing" in one or "ignored" in one or "unexpected" in one]
    assert torch.allclose(logits(theirs.eval()), y, atol=1e-5)
    again = files.load(build(kind), tmp_path / "a")
    assert torch.allclose(logits(again), y, atol=1e-5)
    if "pissa" not in name:
        assert torch.equal(logits(again), y)
        ours, other = (next(iter(layers(m).values())).patches for m in (model, again))
        assert [p.config() for p in ours.values()] == [p.config() for p in other.values()]


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", LINEARS)
def test_written_by_peft_and_read_here(kind, name, tmp_path):
    method, options = CONFIGS[name]
    if method in ("LoHaConfig", "LoKrConfig"):
        if kind == "hf_gpt2":
            pytest.skip("peft has these for nn.Linear alone")
    else:
        options = dict(options, fan_in_fan_out=kind == "hf_gpt2")
    if method == "IA3Config":
        options = dict(options, feedforward_modules=[LINEARS[kind][1]])
    theirs = learn_theirs(peft_model(build(kind), method, target_modules=LINEARS[kind], **options))
    theirs.save_pretrained(tmp_path / "a")
    model = files.load(build(kind), tmp_path / "a", name="mine")
    y, other = logits(model), logits(theirs.eval())
    assert torch.allclose(y, other, atol=1e-5) and not torch.allclose(y, logits(build(kind)))
    weight = torch.randn_like(y)
    for p in theirs.parameters():  # peft's file is in inference mode
        p.grad = None
    (y * weight).sum().backward(), (other * weight).sum().backward()
    ours = {}
    for where, layer in layers(model).items():
        patch = layer.patches["mine"]
        ours |= {f"{where}.{key}": p for key, p in patch.named_parameters()}
    grads = {key: p for key, p in theirs.base_model.model.named_parameters() if p.grad is not None}
    assert len(ours) == len(grads)
    for key, p in ours.items():
        where, _, last = key.rpartition(".")
        grad = grads[f"{where}.{SPELT[patch.kind][last]}"].grad
        assert torch.allclose(p.grad, grad.view_as(p), atol=1e-4), key


def learn_theirs(theirs):
    torch.manual_seed(4)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    return theirs


@pytest.mark.parity
@pytest.mark.parametrize("kind", LINEARS)
def test_a_prompt_both_ways(kind, tmp_path):
    peft = pytest.importorskip("peft")
    model = learn(minillm.prompts.wrap(build(kind), length=4))
    files.save(model, tmp_path / "a")
    with warnings.catch_warnings(action="ignore"):
        theirs = peft.PeftModel.from_pretrained(build(kind), tmp_path / "a").eval()
        theirs.save_pretrained(tmp_path / "b")
    ids, _, _ = minillm.prepare(model, IDS)
    expected = theirs(input_ids=IDS).logits
    for one in (model, files.load(build(kind), tmp_path / "b")):
        assert torch.allclose(one(ids).logits, expected, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_minillms_transformer_has_the_names_of_hugging_face(family, tmp_path):
    """Its own model and the exported one are one base for an adapter."""
    peft, transformers = pytest.importorskip("peft"), hugging_face()
    base = build(family)
    minillm.save(base, tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    targets = ["o_proj", "up_proj", "down_proj"] + ["q_proj", "lm_head"] * (family == "llama")
    model = learn(minillm.lora.wrap(build(family), targets, r=3))
    files.save(model, tmp_path / "a")
    with warnings.catch_warnings(action="ignore"):
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    assert torch.allclose(theirs(input_ids=IDS).logits, model(IDS), atol=1e-5)
    again = files.load(build(family), tmp_path / "a")
    assert torch.equal(again(IDS), model(IDS))
    if family == "gpt2":
        model = minillm.lora.wrap(build("gpt2"), ["q_proj"], r=2)
        with pytest.raises(ValueError, match="'layers.0.self_attn.q_proj' is a part of c_attn"):
            files.save(model, tmp_path / "b")
        assert json.loads((tmp_path / "a" / files.CONFIG).read_text())["fan_in_fan_out"]


def test_a_matrix_that_hugging_face_has_transposed(tmp_path):
    """o_proj is square: no shape would show it."""
    model = minillm.lora.wrap(build("gpt2"), ["up_proj"], r=2)
    model.norm.weight.requires_grad_(True)
    files.save(model, tmp_path / "a")
    files.load(build("gpt2"), tmp_path / "a")
    for name in ("layers.0.self_attn.o_proj", "layers.0.self_attn.q_proj"):
        p = model.get_submodule(name).weight.requires_grad_(True)
        with pytest.raises(ValueError, match=f"'{name}' has learned, and is no module of its own"):
            files.save(model, tmp_path / "b")
        p.requires_grad_(False)
    key = "transformer.h.0.attn.c_proj"
    edit(tmp_path / "a", dict(modules_to_save=["ln_f", key]),
         lambda t: t.update({f"base_model.model.{key}.weight": torch.ones(16, 16)}))
    with pytest.raises(ValueError, match="a matrix that is transposed in this model"):
        files.load(build("gpt2"), tmp_path / "a")


@pytest.mark.parity
def test_modules_to_save(tmp_path):
    peft = pytest.importorskip("peft")
    model = learn(minillm.lora.wrap(build("hf_gpt2"), ["c_fc"], r=2))
    with torch.no_grad():
        model.transformer.ln_f.weight.requires_grad_(True).add_(0.3)
    y = logits(model)
    files.save(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / files.CONFIG).read_text())
    assert config["modules_to_save"] == ["transformer.ln_f"]
    with warnings.catch_warnings(action="ignore"):
        theirs = peft.PeftModel.from_pretrained(build("hf_gpt2"), tmp_path / "a").eval()
        theirs.save_pretrained(tmp_path / "b")
    assert torch.allclose(logits(theirs), y, atol=1e-5)
    for name in "ab":
        again = files.load(build("hf_gpt2"), tmp_path / name)
        assert torch.allclose(logits(again), y, atol=1e-6)
        assert again.transformer.ln_f.weight.requires_grad
        assert not again.transformer.wte.weight.requires_grad
    edit(tmp_path / "a", dict(modules_to_save=None))
    with pytest.raises(ValueError, match="'transformer.ln_f.bias', which is no part of the adap"):
        files.load(build("hf_gpt2"), tmp_path / "a")


def saved(tmp_path, **options):
    model = learn(minillm.lora.wrap(build("llama"), ["q_proj", "o_proj"], r=3, **options))
    files.save(model, tmp_path / "a")
    return tmp_path / "a"


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("settings, tensors, message", [
    (dict(peft_type="LOHA2"), None, "peft_type is 'LOHA2'; minillm reads LORA"),
    (dict(bias="all"), None, "bias is 'all', which minillm does not implement"),
    (dict(lora_bias=True), None, "lora_bias is True"),
    (dict(layer_replication=[[0, 2]]), None, "layer_replication is"),
    (dict(something_new=3), None, "something_new is 3"),
    (dict(init_lora_weights="pissa_niter_4"), None, "belongs to a base from which that start took"),
    (dict(target_modules=["q_proj", "o_prj"]), None, "target_modules names 'o_prj', which no leaf"),
    (dict(target_modules=["q_proj", "o_proj", "up_proj"]), None,
     r"no tensors for 'model.layers.0.mlp.up_proj' \(3 such\)"),
    (dict(r=2), None, "does not fit this model"),
    (dict(lora_alpha=-1), None, "alpha=-1 is not a number above 0"),
    ({}, lambda t: t.update({KEY[len("base_model.model."):]: t.pop(KEY)}), "does not begin with"),
    ({}, lambda t: t.update({KEY.replace("layers.0", "layers.7"): t.pop(KEY)}),
     "'model.layers.7.self_attn.q_proj', which this model lacks; what would have matched"),
    ({}, lambda t: t.pop(KEY), "does not fit this model, which needs"),
    ({}, lambda t: t.update({"base_model.model.x": torch.zeros(2)}), "'x', which is no part"),
    ({}, lambda t: t.clear(), "holds no tensor of lora"),
    ({}, lambda t: t.update({KEY: t[KEY].fill_(torch.nan)}), "nan or infinity"),
])
def test_what_does_not_fit_is_an_error_and_changes_nothing(settings, tensors, message, tmp_path):
    directory = saved(tmp_path)
    edit(directory, settings, tensors)
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        files.load(model, directory)
    assert not layers(model) and all(p.requires_grad for p in model.parameters())


def test_another_embedding_is_another_model(tmp_path):
    model = learn(minillm.lora.wrap(build("llama"), ["embed_tokens"], r=3))
    files.save(model, tmp_path / "a")
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    edit(tmp_path / "a", (), lambda t: t.update({name: model.embed_tokens.base.weight.clone()}))
    files.load(build("llama"), tmp_path / "a")
    edit(tmp_path / "a", (), lambda t: t[name].add_(1))
    with pytest.raises(ValueError, match="another embedding than this model"):
        files.load(build("llama"), tmp_path / "a")


def test_what_a_file_of_peft_cannot_say(tmp_path):
    model = minillm.lora.wrap(build("llama"), r=2, name="sql")
    learn(model)
    minillm.lora.wrap(model, r=2, name="chat")
    with pytest.raises(ValueError, match=r"the adapters chat, sql, .*name='chat'"):
        files.save(model, tmp_path / "a")
    learn(model)
    with pytest.raises(ValueError, match="chat was trained over sql, which no file of peft says"):
        files.save(model, tmp_path / "a", name="chat")
    with pytest.raises(ValueError, match=r"no adapter called 'sq' here .*attached: chat, sql"):
        files.save(model, tmp_path / "a", name="sq")
    model = minillm.adapters.wrap(build("llama"), size=2)
    with pytest.raises(ValueError, match="no adapter here that peft has a file for .lora, dora"):
        files.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    files.save(minillm.lora.wrap(build("llama"), r=2), tmp_path / "a")
    with pytest.raises(ValueError, match="lora is already|already wrapped with lora"):
        files.load(minillm.lora.wrap(build("llama"), r=2), tmp_path / "a")


def test_no_file_of_others_is_replaced(tmp_path):
    directory = saved(tmp_path)
    saved(tmp_path)  # its own
    (directory / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match="README.md, which no earlier save there wrote"):
        saved(tmp_path)
    model = minillm.lora.wrap(build("llama"), ["q_proj"], r=3)
    files.save(model, directory, force=True)
    assert (directory / "README.md").read_text() == "mine"
    edit(directory, (), lambda t: t)  # as peft writes it
    for force in (False, True):
        with pytest.raises(FileExistsError, match="adapter_model.safetensors"):
            files.save(model, directory, force=force)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="a pickle, which can run any code and is not opened"):
        files.load(build("llama"), tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        files.load(build("llama"), tmp_path / "c")
