"""What all tests share: one seed, and the count of the laws that were checked."""

import collections
import copy
import os
import warnings

# -n 2: threads that wait for each other's cores are slower than one
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

LAWS = collections.Counter()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def law(name, holds, what):
    """Count a check of a law, and fail with what broke it."""
    LAWS[name] += 1
    assert holds, f"law {name}: {what}"


def close(name, a, b, what, tolerance=1e-5):
    """Count a check that two tensors agree, relative to the size of the second."""
    scale = max(1.0, b.abs().max().item())
    law(name, torch.allclose(a, b, rtol=0, atol=tolerance * scale),
        f"{what}: off by {(a - b).abs().max():.3g} at scale {scale:.3g}")


def pytest_sessionfinish(session):
    # one of several processes (-n 2) hands over its count
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["laws"] = dict(LAWS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    LAWS.update(getattr(node, "workeroutput", {}).get("laws", {}))


def pytest_terminal_summary(terminalreporter):
    if LAWS:
        each = ", ".join(f"{name}: {n}" for name, n in sorted(LAWS.items()))
        terminalreporter.write_line(f"laws: {sum(LAWS.values())} checks ({each})")


def peft_model(model, method="LoraConfig", **config):
    """peft's model of the method around a copy of the model, or a skip; the deprecations
    that it meets are not ours."""
    peft = pytest.importorskip("peft", reason="needs the extra 'parity'")
    with warnings.catch_warnings(action="ignore"):
        return peft.get_peft_model(copy.deepcopy(model), getattr(peft, method)(**config))


def hugging_face():
    """transformers, or a skip; its own import raises deprecation warnings that are not ours."""
    with warnings.catch_warnings(action="ignore"):
        return pytest.importorskip("transformers", reason="needs the extra 'parity'")
