"""What an `on_step` changes: which evaluations count, and that the best and a resumed
model have all of it."""

import pytest
from models import build
from test_checkpoints import ctrl_c_at
from test_train import quiet

import minillm
from minillm.freeze.gradual import Unfreezing
from minillm.prune.gradual import Gradual
from minillm.train import Interrupted, picture, summary


def unpruned():
    return minillm.prune.wrap(build("llama"), sparsity=0.0)


def patches(model):
    return [layer.patches["prune"] for layer in minillm.layers(model).values()]


def shares(model):
    """{(the sparsity that a patch says, the share of zeros in its mask)}."""
    return {(patch.sparsity, (~patch.mask).float().mean().item()) for patch in patches(model)}


# --- which evaluations count ----------------------------------------------------------------------


def rising():
    """A measure that is the better the earlier."""
    values = iter(range(99))
    return lambda model: float(next(values))


def test_the_best_of_a_gradual_pruning_is_pruned_as_asked():
    model = unpruned()
    history = quiet(model, steps=12, evaluate=rising(), every=1,
                    on_step=Gradual(0.5, end=0.6, every=2))
    assert shares(model) == {(0.5, 0.5)}
    assert ["best" in record for record in history] == [False] * 7 + [True] * 5
    assert history[-1]["best"] == dict(step=7, value=7.0) == summary(history).best
    assert Gradual(0.5, end=0.6).at(7, 12) == 0.5 != Gradual(0.5, end=0.6, every=1).at(6, 12)


def test_patience_waits_for_the_last_pruning():
    options = dict(steps=20, evaluate=rising(), every=1, patience=2)
    assert len(quiet(unpruned(), on_step=Gradual(0.5, end=0.5), **options)) == 10 + 3


def test_patience_waits_for_the_last_block():
    unfreezing = Unfreezing(until=0.5)
    options = dict(steps=20, evaluate=rising(), every=1, patience=2)
    assert len(quiet(build("llama"), on_step=unfreezing, **options)) == 10 + 3
    model = build("llama")
    assert unfreezing.waiting(model, unfreezing.settled(20), 20) == []
    values = iter([1.0, 2.0, 3.0])  # the last evaluation counts, whatever on_step says
    options = dict(steps=3, evaluate=lambda model: next(values), every=1)
    assert quiet(model, on_step=Unfreezing(until=1),
                 **options)[-1]["best"] == dict(step=2, value=3.0)


def test_a_function_without_settled_counts_from_the_start():
    def nothing(model, step, steps):
        pass

    assert quiet(build("llama"), evaluate=rising(), every=1,
                 on_step=nothing)[-1]["best"]["step"] == 0


def test_the_picture_marks_the_best_that_counts(tmp_path):
    pytest.importorskip("matplotlib")
    history = quiet(unpruned(), steps=4, evaluate=rising(), every=1,
                    on_step=Gradual(0.5, end=0.75, every=1))
    picture(history, tmp_path / "a.svg")
    said = (tmp_path / "a.svg").read_text()
    assert "best: 2 after step 3" in said
    picture(history[:1], tmp_path / "a.svg")  # none counts yet
    assert "best" not in (tmp_path / "a.svg").read_text()


# --- the options of a patch go with its buffers ---------------------------------------------------


def test_the_best_has_the_sparsity_of_its_mask():
    """Here the best is before the last pruning, for the function says nothing of where it
    settles."""
    def prune(model, step, steps):
        Gradual(0.6, end=1.0, every=1)(model, step, steps)

    model, values = unpruned(), iter([4.0, 3.0, 1.0, 2.0, 2.0, 2.0])
    options = dict(steps=6, evaluate=lambda model: next(values), every=1)
    history = quiet(model, on_step=prune, **options)
    assert history[-1]["best"]["step"] == 2
    said = Gradual(0.6, end=1.0, every=1).at(2, 6)
    for patch in patches(model):
        k = patch.mask.shape[1]
        assert patch.sparsity == said and ((~patch.mask).sum(1) == round(said * k)).all()


def interrupted(directory, model, forward, **options):
    hook = ctrl_c_at(model, forward)
    with pytest.raises(Interrupted):
        quiet(model, checkpoints=directory, save_every=100, **options)
    hook.remove()
    return model


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("at", [3, 6, 10])
def test_a_resumed_pruning_says_its_sparsity(at, fresh, tmp_path):
    """In a model that is wrapped anew, and in the very model that Ctrl-C left; also from
    the last step."""
    options = dict(steps=10, on_step=Gradual(0.5, end=0.5, every=2))
    quiet(expected := unpruned(), **options)
    model = interrupted(tmp_path, unpruned(), at, **options)
    again = unpruned() if fresh else model
    quiet(again, checkpoints=tmp_path, save_every=100, resume=True, **options)
    assert all(t.equal(expected.state_dict()[name]) for name, t in again.state_dict().items())
    assert shares(again) == shares(expected) == {(0.5, 0.5)}


def test_the_best_of_a_resumed_pruning_has_its_sparsity(tmp_path):
    values = iter([9.0, 9.0, 9.0, 1.0, 2.0, 2.0])
    options = dict(steps=6, evaluate=lambda model: next(values), every=1)
    options |= dict(on_step=Gradual(0.5, end=0.6, every=1))
    interrupted(tmp_path, unpruned(), 5, **options)
    model = unpruned()
    assert quiet(model, checkpoints=tmp_path, resume=True, **options)[-1]["best"]["step"] == 3
    assert shares(model) == {(0.5, 0.5)}


def test_the_best_of_a_resumed_pruning_may_be_before_its_last_step(tmp_path):
    """The checkpoint has the sparsity of its last step, and that of the best beside it."""
    def prune(model, step, steps):
        Gradual(0.6, end=1.0, every=1)(model, step, steps)

    values = iter([4.0, 3.0, 1.0, 2.0, 2.0, 2.0])
    options = dict(steps=6, evaluate=lambda model: next(values), every=1, on_step=prune)
    interrupted(tmp_path, unpruned(), 5, **options)  # four steps are whole, the best is the third
    model = unpruned()
    assert quiet(model, checkpoints=tmp_path, resume=True, **options)[-1]["best"]["step"] == 2
    said = Gradual(0.6, end=1.0, every=1).at(2, 6)
    assert {patch.sparsity for patch in patches(model)} == {said}
    assert all(((~patch.mask).sum(1) == round(said * patch.mask.shape[1])).all()
               for patch in patches(model))


def test_what_on_step_does_not_change_has_to_be_the_same(tmp_path):
    options = dict(steps=4, checkpoints=tmp_path, on_step=Gradual(0.5))
    quiet(unpruned(), **options)
    for other, said in ((minillm.prune.wrap(build("llama"), sparsity=0.0, group="matrix"),
                         "group='row' then, 'matrix' now"),
                        (minillm.prune.wrap(build("llama"), ["q_proj"], sparsity=0.0),
                         "prune at 21 sites")):
        with pytest.raises(ValueError, match=said):
            quiet(other, resume=True, **options)


def test_a_file_with_the_options_of_other_patches_is_none(tmp_path):
    from safetensors.torch import save_file

    options = dict(steps=4, checkpoints=tmp_path, on_step=Gradual(0.5))
    quiet(unpruned(), **options)
    path = minillm.train.newest(tmp_path)
    tensors, metadata = minillm.registry.store.read(path)
    save_file(tensors, path,
              metadata | {"training": metadata["training"].replace('"sparsity"', '"other"')})
    with pytest.raises(ValueError, match="has the options of other patches"):
        quiet(unpruned(), resume=True, **options)
