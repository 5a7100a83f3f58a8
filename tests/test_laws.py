"""The laws of docs/design.md, for every technique in the table, every ordered pair of
them, on every kind of leaf and model.

A technique is found by being registered; `test_every_technique_is_registered` finds one
that is not.
"""

import copy
import importlib
import inspect
import itertools
import pathlib
import pickle
import pkgutil
import random
import subprocess
import sys

import pytest
import torch
from conftest import close, law
from models import IDS, MODELS, build, logits

import minillm
from minillm.registry import CannotMerge, Format, KINDS, METHODS, Patch, leaf, parameters, walk
from minillm.registry.learning import claimed_by, noted

FIRST = {method.kind: name for name, method in reversed(METHODS.items())}
NAMES = [name for name, method in METHODS.items() if name == FIRST[method.kind]]  # one of each kind
OPTIONS = {  # NAME/VARIANT: options of the methods, for the laws of one alone
    f"{name}/{variant}".rstrip("/"): small for name, method in METHODS.items()
    for variant, small in method.small.items()
}
FORMATS = [name for name in NAMES if issubclass(KINDS[METHODS[name].kind], Format)]
# two formats: an error, tested below
PAIRS = [pair for pair in itertools.permutations(NAMES, 2) if not set(pair) <= set(FORMATS)]
LOSSY = [METHODS[name].kind for name in FORMATS if KINDS[METHODS[name].kind].not_neutral]
# those that learn some of the model's own
CLAIMS = [name for name in NAMES if getattr(KINDS[METHODS[name].kind], "claim", False)]
NORMLESS = ("Linear", "Conv1D")  # models without a norm


class Whole(str):
    """The name of a model on which every pair is run, and not a third of them."""


WHOLE = [pytest.param(Whole(kind), marks=pytest.mark.slow, id=f"{kind}-all") for kind in MODELS]
every_model = pytest.mark.parametrize("kind", [*MODELS, *WHOLE])


def pairs(kind, law, each=3):
    """The pairs of kinds that a law runs on one of the six models: a third of all pairs (each=3)
    is divided among the models, and `law` (0 to 5) says which third. Under `slow`: all of them
    on all models."""
    start = list(MODELS).index(kind) + 6 * (law % each)
    chosen = PAIRS if isinstance(kind, Whole) else PAIRS[start :: 6 * each]
    return [names for names in chosen if not clash(kind, names)]


def clash(kind, names):
    """Whether one of several takes the place of the head, which another wraps too: an error.

    A plain model does not say which leaf is its head, so the defaults take it as any other leaf.
    """
    every = [KINDS[METHODS[name.split("/")[0]].kind] for name in names]
    return (kind in NORMLESS and any(getattr(cls, "instead", False) for cls in every)
            and any(getattr(cls, "touches", "") == "weight" for cls in every))


def alone(kind):
    """Each method with its options: all of them on one model, a third of them on each
    other one, and under `slow` all."""
    every = [(key,) for key in OPTIONS if kind not in NORMLESS or not key.endswith("/norms")]
    return (every if isinstance(kind, Whole) or kind == "llama"
            else every[list(MODELS).index(kind) % 3 :: 3])


class technique:
    """The family's verbs on what one method has put into the model."""

    def __init__(self, key):
        self.method = METHODS[key.split("/")[0]]
        self.verbs, self.name = minillm.techniques()[self.method.family], self.method.kind

    def wrap(self, model, options):
        return self.method.wrap(model, *([EXAMPLES] if self.method.calibrated else []), **options)

    def unwrap(self, model):
        return self.verbs.unwrap(model, self.name)

    def merge(self, model):
        return self.verbs.merge(model, self.name)

    def unmerge(self, model):
        return self.verbs.unmerge(model, self.name)

    def save(self, model, path):
        return self.verbs.save(model, path, self.name)

    def load(self, model, path):
        return self.verbs.load(model, path)


EXAMPLES = [minillm.data.Example(row.tolist(), row.tolist()) for row in IDS]


def declared(key):
    """The class that the table of kinds has for a key."""
    return KINDS[technique(key).name]


def kind_of(key):
    cls = declared(key)
    return Format if issubclass(cls, Format) else Patch if issubclass(cls, Patch) else None


def wrap(model, key):
    """Wrap with the options of the key, from a seed of its own."""
    torch.manual_seed(sum(map(ord, key)))
    return technique(key).wrap(model, OPTIONS[key])


@torch.no_grad()
def learn(model, key):
    """Move all that the technique has to learn, as training would."""
    torch.manual_seed(sum(map(ord, key)) + 1)
    name = technique(key).name
    own = [p for patch in patches(model, key) for p in patch.parameters()]
    if name in noted(model):
        own = {id(p): p for slot, *_, p in parameters(model) if p.requires_grad
               and (name == "freeze" or slot in claimed_by(model, name))}
        own = list(own.values())
    for p in own:
        p.add_(torch.randn_like(p) * 0.1)
    return model


def coarse(*names):
    """Whether a rounding is so coarse (4 bits, or FP8's 3 of mantissa) that small changes are
    lost, or flip a code."""
    return any(name.split("/")[0] in ("nf4", "fp4", "fp8", "qat") for name in names)


def attach(model, *names):
    for name in names:
        learn(wrap(model, name), name)
    return model


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def forgets(*names):
    """Whether what is stored after these is rounded, so that the original bits are gone."""
    return any(technique(name).name in LOSSY for name in names)


# --- 1, 2: at birth -----------------------------------------------------------------------------


@every_model
def test_neutral_at_birth_and_frozen_below(kind):
    for names in alone(kind) + pairs(kind, 0):
        model = attach(build(kind), *names[:-1])
        ids = minillm.prepare(model, IDS)[0]
        before, bits = logits(model, ids), {id(p): p.clone() for p in model.parameters()}
        wrap(model, names[-1])
        what = f"{names} on {kind}"
        if not declared(names[-1]).not_neutral:
            close("1 neutral", logits(model, ids), before, what)
        owned = {id(p) for n in names for m in patches(model, n) for p in m.parameters()}
        # of the model's own what is claimed learns too, where freeze does not forbid it
        if owned or set(CLAIMS) & set(names):
            frozen = minillm.registry.learning.stopped_by(model, "freeze")
            claimed = {slot for name in CLAIMS for slot in claimed_by(model, name)}
            groups = {}
            for slot, *_, p in parameters(model):
                groups.setdefault(id(p), set()).add(slot)
            owned |= {i for i, slots in groups.items() if slots & claimed and not slots & frozen}
        if owned:
            learning = {id(p) for p in model.parameters() if p.requires_grad}
            law("2 frozen", learning == owned, f"{what}: not just what it added learns")
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                          lr=0.1)
            logits(model).square().mean().backward()
            optimizer.step()
            moved = [p for p in model.parameters() if id(p) in bits and id(p) not in owned
                     and not torch.equal(p, bits[id(p)])]
            law("2 frozen", not moved, f"{what}: the base moved")


def patches(model, key):
    name = technique(key).name
    return [layer.patches[name] for layer in minillm.layers(model).values()
            if name in layer.patches]


def test_what_is_not_neutral_says_why():
    for name in METHODS:
        model, why = build("Linear"), declared(name).not_neutral
        before = logits(model)
        after = logits(wrap(model, name), IDS)
        law("1 neutral", torch.allclose(before, after, atol=1e-6) == (not why),
            f"{name} declares {why!r}")


@every_model
def test_a_step_of_training_reaches_all_that_learns(kind):
    for name, in alone(kind):
        model = attach(build(kind), name)
        logits(model).square().mean().backward()
        for key, p in model.named_parameters():
            if p.requires_grad:
                law("2 frozen", p.grad is not None and p.grad.abs().sum() > 0,
                    f"{name} on {kind}: {key} gets no gradient")


# --- 3: fold equals forward ---------------------------------------------------------------------


@every_model
def test_fold_equals_forward(kind):
    for names in alone(kind) + pairs(kind, 1):
        model = attach(build(kind), *names)
        for where, layer in minillm.layers(model).items():
            what = f"{names} on {kind} at {where}"
            try:
                W, b = layer.dense()
            except (CannotMerge, AttributeError):
                continue
            how = leaf(layer.base)
            x = (
                torch.randint(24, (5,))
                if how.lookup
                else torch.randn(5, W.shape[1], requires_grad=True)
            )
            learnt = [p for p in layer.patches.parameters()] + ([] if how.lookup else [x])
            y, folded = layer(x), how.compute(x, W, b)
            close("3 fold", folded, y, what)
            if learnt:
                weight = torch.randn_like(y)
                ours, theirs = (torch.autograd.grad((out * weight).sum(), learnt)
                                for out in (y, folded))
                for p, q in zip(ours, theirs):
                    close("3 fold", q, p, f"{what}: gradient", 1e-4)
            shown = layer.weight
            law("3 fold", torch.equal(shown, W.T if how.transposed else W),
                f"{what}: Layer.weight is the folded one")


# --- 4: formats and patches commute -------------------------------------------------------------


@every_model
def test_format_and_patch_commute(kind):
    for a, b in pairs(kind, 0, each=1):
        if kind_of(a) is not Format or kind_of(b) is not Patch:
            continue
        one, two = attach(build(kind), a, b), attach(build(kind), b, a)
        # a mask chooses by the weights it sees: give both the same
        for p, q in zip(patches(one, b), patches(two, b)):
            q.load_state_dict(p.state_dict())
        close("4 commute", logits(one), logits(two), f"{a} and {b} on {kind}", 1e-6)


def test_two_formats_are_an_error_that_names_both():
    for a, b in itertools.permutations(FORMATS, 2):
        with pytest.raises(ValueError,
                           match=rf"already stored as {name_of(a)}.*minillm\.{METHODS[a].family}"
                                 r"\.unwrap"):
            wrap(wrap(build("Linear"), a), b)


# --- 5: merge, unmerge, unwrap ------------------------------------------------------------------


@every_model
def test_unwrap_gives_the_original_back(kind):
    for names, order in [(names, order) for names in alone(kind) + pairs(kind, 2)
                         for order in itertools.permutations(names)]:
        model = build(kind)
        modules, before, learns = (
            list(map(id, model.modules())),
            state(model),
            [p.requires_grad for p in model.parameters()],
        )
        for name in names:
            wrap(model, name)
        for name in order:  # the order must not matter
            technique(name).unwrap(model)
        what = f"{names} on {kind}, unwrapped {order}"
        law("5 unwrap", list(map(id, model.modules())) == modules,
            f"{what}: the modules are the same objects")
        law("5 unwrap", [p.requires_grad for p in model.parameters()] == learns,
            f"{what}: what learns is the same")
        if forgets(*names):
            law("5 unwrap", before.keys() == model.state_dict().keys(),
                f"{what}: the names are the same")
        else:
            law("5 unwrap", same(state(model), before), f"{what}: bit for bit")


@every_model
def test_merge_equals_forward_and_unmerge_gives_it_back(kind):
    for names in alone(kind) + pairs(kind, 0):
        name, beneath = names[-1], names[0] if len(names) > 1 else None
        if kind_of(name) is not Patch:
            continue
        verbs, what = technique(name), f"merge of {names} on {kind}"
        model = attach(build(kind), *names)
        wrapped, before = logits(model), state(model)
        plain = verbs.name
        stands_below = any(list(layer.patches)[0] != plain
                           for layer in minillm.layers(model).values() if plain in layer.patches)
        try:
            verbs.merge(model)
        except CannotMerge:
            law("5 merge", declared(name).fold is Patch.fold,
                f"{what}: only what has no fold cannot be merged")
            law("5 merge", same(state(model), before), f"{what}: a refused merge changes nothing")
            continue
        except ValueError as error:
            lost = coarse(*names) and forgets(*names) and "would lose it" in str(error)
            law("5 merge", lost or stands_below and technique(beneath).name in str(error),
                f"{what}: {error}")
            law("5 merge", same(state(model), before), f"{what}: a refused merge changes nothing")
            continue
        exact = 0.4 if coarse(*names) and forgets(*names) else 0.05 if forgets(*names) else 1e-5
        close("5 merge", logits(model), wrapped, what, exact)
        law("5 merge", not patches(model, name), f"{what}: the patch is gone")
        verbs.unmerge(model)
        law("5 merge", same(state(model), before), f"{what}: unmerge gives all back, bit for bit")
        law("5 merge", torch.equal(logits(model), wrapped), f"{what}: and computes the same")
        verbs.merge(model)
        verbs.unwrap(model)
        before_it = attach(build(kind), *([beneath] if beneath else []))
        law("5 merge", same(state(model), state(before_it)),
            f"{what}: unwrapping what was merged gives the original back")


# --- 6: files -----------------------------------------------------------------------------------

FRESH = """
import pickle, sys
import torch
from models import build, logits
import minillm
for kind, files, expected, order in pickle.load(open(sys.argv[1], "rb")):
    model = build(kind)
    try:
        for name, path in files:
            family = minillm.registry.store.holds(path)[0]
            minillm.techniques()[family].load(model, path)
    except ValueError as error:
        assert order and f"made over {files[1][0]}" in str(error), (kind, files, error)
        continue
    assert order != "error", (kind, files)
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-6), (kind, files)
"""


@pytest.mark.parametrize("kinds", [["Conv1D", "gpt2", "hf_llama"],
                                   pytest.param([Whole(kind) for kind in MODELS],
                                                marks=pytest.mark.slow)],
                         ids=["some", "all"])
def test_save_and_load_in_a_fresh_process(kinds, tmp_path):
    jobs = []
    for kind in kinds:
        try:
            build(kind)
        except pytest.skip.Exception:
            continue
        for names in alone(kind) + pairs(kind, 1):
            model = attach(build(kind), *names)
            files = []
            for name in names:
                files.append((technique(name).name,
                              str(tmp_path / f"{len(jobs)}-{len(files)}.safetensors")))
                technique(name).save(model, files[-1][1])
            jobs.append((str(kind), files, logits(model).detach(), ""))
            # the other order: equal with a format, an error where one was made over the other
            if len(files) > 1:
                kinds = [kind_of(name) for name in names]
                order = "" if Format in kinds or kinds == [None, None] else "error"
                jobs.append((str(kind), files[::-1], jobs[-1][2], order))
    (tmp_path / "jobs").write_bytes(pickle.dumps(jobs))
    here = pathlib.Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path / "jobs")],
                          capture_output=True, text=True,
                          env={**__import__("os").environ, "PYTHONPATH": f"{here}:{here.parent}"})
    assert not done.returncode, done.stderr[-3000:]
    for _ in jobs:
        law("6 files", True, "")


@pytest.mark.parametrize("key", OPTIONS)
def test_loading_computes_nothing(key, tmp_path, monkeypatch):
    """No random number is drawn, nothing is packed or ranked: a file brings all that it needs."""
    model, base = attach(build("llama"), key), build("llama")
    technique(key).save(model, tmp_path / "a")
    for cls in set(KINDS.values()):
        for verb in ("fill", "pack"):
            if hasattr(cls, verb):
                monkeypatch.setattr(cls, verb, lambda *_: pytest.fail("computed while loading"))
    before = torch.get_rng_state()
    technique(key).load(base, tmp_path / "a")
    law("6 loading", torch.equal(torch.get_rng_state(), before), f"{key} drew random numbers")
    close("6 loading", logits(base), logits(model), key)


# --- 7: what PyTorch does with modules ------------------------------------------------------------


@every_model
def test_deepcopy_state_dict_and_half_precision(kind):
    for names in alone(kind) + pairs(kind, 2, each=9):
        what = f"{names} on {kind}"
        model = attach(build(kind), *names)
        expected = logits(model)
        twin = copy.deepcopy(model)
        law("7 modules", torch.equal(logits(twin), expected), f"deepcopy of {what}")
        for name in reversed(names):
            technique(name).unwrap(twin)
        law("7 modules", torch.equal(logits(model), expected),
            f"{what}: unwrapping the copy leaves the original")
        other = build(kind)
        for name in names:
            wrap(other, name)
        other.load_state_dict(model.state_dict())
        law("7 modules", torch.equal(logits(other), expected), f"state_dict of {what}")
        for dtype in (torch.bfloat16, torch.float16):
            off = (
                logits(copy.deepcopy(model).to(dtype)).float() - expected
            ).norm() / expected.norm()
            law("7 modules", off < (0.35 if coarse(*names) else 0.1),
                f"{dtype} of {what}: off by {off:.3f} of the norm")


@every_model
def test_training_mode(kind):
    """What is wrapped follows the model's mode, and only dropout tells the modes apart."""
    for names in alone(kind) + pairs(kind, 0, each=9):
        model = attach(build(kind), *names)
        expected, what = logits(model), f"{names} on {kind}"
        model.train()
        different = not torch.equal(logits(model), expected)
        law("7 modes", different == (any(name.endswith("/dropout") for name in names)),
            f"{what}: eval and train differ: {different}")
        law("7 modes", torch.equal(logits(model.eval()), expected), f"{what}: back in eval")
        model = attach(build(kind).train(), *names)
        law("7 modes", all(module.training for module in model.modules()),
            f"{what}: wrapped in training mode")
        model.eval()
        law("7 modes", not any(module.training for module in model.modules()),
            f"{what}: put into eval mode")


@pytest.mark.parametrize("dtype", [torch.bfloat16,
                                   pytest.param(torch.float16, marks=pytest.mark.slow)])
@every_model
def test_merges_formats_and_casts_in_sequence(kind, dtype):
    """merge, cast, unmerge, unwrap, with and without a format beneath: one dtype
    throughout, and the values of the cast."""
    for patch in [name for name in NAMES if kind_of(name) is Patch
                  and declared(name).fold is not Patch.fold]:
        for form in [None, *FORMATS]:
            what = f"{patch} on {form} on {kind}, {dtype}"
            model = attach(build(kind), *([form] if form else []), patch)
            expected = logits(model)
            if form == "sparse" and patch not in ("prune", "qat"):
                continue  # the merged matrix has no zeros: refused, tested with the techniques
            try:
                technique(patch).merge(model)
            except ValueError as error:
                law("5 casts", coarse(patch, form or "") and "would lose it" in str(error),
                    f"{what}: {error}")
                continue
            model.to(dtype)

            def near(step):
                off = (logits(model).float() - expected).norm() / expected.norm()
                law("5 casts", off < (0.35 if coarse(patch, form or "") else 0.1),
                    f"{what}, after {step}: off by {off:.3f} of the norm")
                own = {p.dtype for *_, p in parameters(model)} | {
                    site.module.dense().dtype
                    for site in walk(model)
                    if isinstance(site.module, Format)
                }
                law("5 casts", own == {dtype}, f"{what}, after {step}: the model is {own}")

            near("merge and cast")
            technique(patch).unmerge(model)
            near("unmerge")
            if form:
                technique(form).unwrap(model)
                near("unwrap of the format")
            technique(patch).unwrap(model)
            plain = build(kind).to(dtype)
            if not (form and forgets(form)):
                law("5 casts", same(state(model), state(plain)),
                    f"{what}: unwrapped is the cast original")


def compiles(kind, stacks):
    for names in stacks:
        model = attach(build(kind), *names)
        ids = minillm.prepare(model, IDS)[0]
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        close("7 compile", logits(compiled, ids), logits(model, ids), f"{names} on {kind}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["Linear", pytest.param("llama", marks=pytest.mark.slow)])
def test_compile_without_graph_breaks(kind, name):
    compiles(kind, [(name,)])


@pytest.mark.slow
@every_model
def test_compile_every_stack_without_graph_breaks(kind):
    compiles(kind, alone(kind) + pairs(kind, 0, each=1))


@pytest.mark.cuda
@every_model
def test_on_cuda(kind):
    for names in alone(kind) + pairs(kind, 0, each=1):
        model = attach(build(kind), *names)
        expected = logits(model)
        # a weight in the middle between two codes is rounded to either of them
        near = 0.05 if coarse(*names) and forgets(*names) else 1e-4
        close("7 cuda", logits(model.cuda()).cpu(), expected.cpu(), f"{names} on {kind}", near)
        there = attach(build(kind).cuda(), *names)
        law("7 cuda", all(t.is_cuda for t in there.state_dict().values()),
            f"{names} on {kind}: wrapped on the device")
        law("7 cuda", bool(logits(there).isfinite().all()), f"{names} on {kind}")


# --- stacks -------------------------------------------------------------------------------------


def drawn(number):
    """(the generator, a model's name, the keys of three to five methods, the model with these)."""
    draw = random.Random(number)
    kind = draw.choice([kind for kind in MODELS if kind != "Conv1D"])
    keys = draw.sample(sorted(OPTIONS), 14)
    model, names = build(kind), []
    for key in keys:
        if (len(names) < draw.randint(3, 5) and technique(key).name not in map(name_of, names)
                and not clash(kind, [*names, key])):
            try:
                learn(wrap(model, key), key)
            # two formats, a part of a weight beneath a mask: refused before any change
            except (ValueError, CannotMerge):
                continue
            names.append(key)
    return draw, kind, names, model


@pytest.mark.parametrize("number",
                         [*range(6),
                          *(pytest.param(n, marks=pytest.mark.slow) for n in range(6, 60))])
def test_a_stack_of_several_methods(number, tmp_path):
    """Three to five methods, drawn with their options: copied, saved, loaded, unwrapped in
    another order."""
    draw, kind, names, model = drawn(number)
    what, expected = f"{names} on {kind}", logits(model)
    law("8 stacks", bool(expected.isfinite().all()), what)
    law("8 stacks", torch.equal(logits(copy.deepcopy(model)), expected), f"deepcopy of {what}")
    again = build(kind)
    for i, key in enumerate(names):
        technique(key).save(model, tmp_path / str(i))
    files = list(enumerate(names))
    while files:
        i, key = files[0]
        try:
            technique(key).load(again, tmp_path / str(i))
        # GPTQ's codes are not W rounded: what was wrapped before it was saved over another base
        except ValueError as error:
            law("8 stacks", "made beside quant: load the file of quant first" in str(error)
                and same(state(again), state(build(kind))), f"{what}: {error}")
            files.sort(key=lambda file: name_of(file[1]) != "quant")
            assert files[0][1].startswith("gptq"), what
        else:
            files.pop(0)
    close("8 stacks", logits(again), expected, f"{what}: loaded")
    plain, left = build(kind), list(names)
    while left:
        draw.shuffle(left)
        before = len(left)
        for key in list(left):
            try:
                technique(key).unwrap(model)
            except ValueError as error:  # a part of a weight that is stored by now
                law("8 stacks", "took a part out of" in str(error), f"{what}: {error}")
                continue
            left.remove(key)
        assert len(left) < before, what
    law(
        "8 stacks",
        [p.requires_grad for p in model.parameters()]
        == [p.requires_grad for p in plain.parameters()],
        f"{what}: learns",
    )
    same_names = state(model).keys() == state(plain).keys()
    # these moved the model itself
    forgotten = forgets(*names) or {"freeze", *CLAIMS} & set(map(name_of, names))
    law("8 stacks", same_names and (forgotten or same(state(model), state(plain))),
        f"{what}: unwrapped")


def name_of(key):
    return technique(key).name


# --- the table ----------------------------------------------------------------------------------


def test_every_technique_is_registered():
    for module in pkgutil.walk_packages(minillm.__path__, "minillm."):
        if module.name == "minillm.__main__":
            continue
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            passing = cls is minillm.lora.many.Many  # in the tree only inside of a context
            if issubclass(cls, (Patch, Format)) and cls not in (Patch, Format) and not passing:
                assert cls in KINDS.values(), (
                    f"{cls.__name__} of {module.name} is not registered: its file ends with "
                    f"verbs(...)"
                )
    for name, module in minillm.techniques().items():
        for verb in ("wrap", "unwrap", "merge", "unmerge", "save", "load"):
            assert callable(getattr(module, verb)) and getattr(module, verb).__doc__, (
                f"{name}.{verb}")


def test_the_walk_never_enters_a_patch():
    for a, b in PAIRS[::6]:
        model = build("llama")
        names = [site.name for site in walk(model)]
        attach(model, a, b)
        assert [site.name for site in walk(model)] == names, (a, b)
