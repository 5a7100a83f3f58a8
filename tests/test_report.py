"""The report against a count by hand, the peak of memory, and the tree."""

import concurrent.futures
import json
import multiprocessing

import pytest
import torch
from models import build
from torch import nn

import minillm
from minillm.measure import memory, report


def test_show_asks_for_the_model():
    for given, said in (("tiny", "'tiny'"), ((build("llama"), None), "tuple")):
        with pytest.raises(TypeError, match=f"^show takes a model, not {said}: model, tokenizer ="):
            minillm.show(given)


def test_the_report_counts_by_hand():
    model = minillm.lora.wrap(minillm.quant.wrap(build("llama")), r=2)
    told = report.report(model, batch=2, length=16)
    linears = 3 * (16 * 16 * 2 + 8 * 16 * 2 + 3 * 16 * 32)
    rows = 3 * (16 + 8 + 8 + 16 + 32 + 32 + 16)
    lora = 3 * 2 * (2 * 32 + 2 * 24 + 3 * 48)
    rest = 24 * 16 * 2 + 7 * 16
    assert told.trainable == lora and told.parameters == lora + rest
    assert told.bytes_by_format == {"quant": linears + 4 * rows, "float32": 4 * (lora + rest)}
    assert (told.gradients, told.optimizer) == (4 * lora, 8 * lora)
    assert told.activations > 2 * 16 * 16 * 4 and told.seconds_per_token > 0
    assert json.loads(told.json())["weights"] == told.weights == sum(told.bytes_by_format.values())
    assert f"{lora:,}" in told.table()
    # float32 copies are trained
    half = report.report(build("llama").bfloat16(), batch=2, length=16)
    whole = report.report(build("llama"), batch=2, length=16)
    assert (half.gradients == whole.gradients and half.optimizer == whole.optimizer
            + 4 * whole.parameters)
    fewer = report.report(minillm.freeze.wrap(build("llama"), last=1), batch=2, length=16)
    assert fewer.activations < report.report(build("llama"), batch=2, length=16).activations
    assert report.total_bytes(build("gpt2")) == 4 * sum(
        p.numel() for p in build("gpt2").parameters()
    ), "a tied matrix counts once"


def test_the_report_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report.report(build("llama")).picture(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_lines_up_and_is_markdown():
    text = report.table([dict(name="a", count=1234567), dict(name="longer", share=0.123456)])
    lines = text.splitlines()
    assert (
        len({len(line) for line in lines}) == 1
        and lines[1].startswith("|---")
        and "1,234,567" in lines[2]
        and "0.1235" in lines[3]
    )


def test_a_process_counts_its_own_peak_and_not_its_parents():
    big = torch.ones(1 << 28, dtype=torch.uint8)  # 256 MiB here, none of it there
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        theirs = pool.submit(report.peak_memory).result()
    assert 0 < theirs < report.peak_memory() - big.numel() // 2


def test_a_report_needs_no_configuration():
    told = report.report(build("Linear"), batch=2, length=8)
    assert (
        told.parameters == sum(p.numel() for p in build("Linear").parameters())
        and told.activations > 0
    )
    with pytest.raises(
        ValueError, match="Sequential has no config.vocab_size and no embedding: give vocabulary="
    ):
        report.report(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="batch=1, length=1"):
        report.report(build("llama"), length=1)


@pytest.mark.parity
def test_a_report_of_a_hugging_face_model():
    assert report.report(build("hf_gpt2"), length=64).length == 32, "no more than its positions"


needs_reset = pytest.mark.skipif(
    not memory.reset_peak(), reason="this system cannot reset a process's peak"
)


@needs_reset
def test_the_peak_of_training_is_its_own():
    """Copies made before it, and text that was held before it, are not in it; gradients
    and the optimizer's state are.
    """

    def step(model):
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 2048)).sum().backward()
        optimizer.step()

    model = nn.Linear(2048, 4096, bias=False)  # 32 MiB
    size = report.total_bytes(model)
    freed = [torch.ones(1 << 20) for _ in range(50)]
    del freed
    with report.Peak(nn.Linear(8, 8)) as small:
        step(nn.Linear(2048, 8))  # what comes with the first step of a process
    copy = {key: t.clone() for key, t in model.state_dict().items()}
    with report.Peak(model) as peak:
        step(model)
    assert (
        4 * size <= peak.bytes < 6.5 * size
    ), "weights, gradients, two states, and up to two that AdamW works in"
    with report.Peak(model) as idle:
        pass
    assert size <= idle.bytes < 1.2 * size and copy and small.bytes >= 0


def test_the_tree_counts_what_the_root_owns():
    model = build("Linear")
    before = minillm.show(model).splitlines()[0]
    model.register_buffer("table", torch.zeros(1 << 20))
    model.scale = nn.Parameter(torch.zeros(3))
    model.register_buffer("again", model.embed.weight.detach())  # a storage that is counted already
    after = minillm.show(model).splitlines()[0]
    total = sum(p.numel() for p in model.parameters()) + (1 << 20)
    assert f"of {total:,}" in after and "4.0" in after.split()[-2] and before != after
