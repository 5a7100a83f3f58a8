"""What all tests share: one seed, and the count of the laws that were checked."""

import collections
import warnings

import pytest
import torch

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
    law(name, torch.allclose(a, b, rtol=0, atol=tolerance * scale), f"{what}: off by {(a - b).abs().max():.3g} at scale {scale:.3g}")


def pytest_terminal_summary(terminalreporter):
    if LAWS:
        each = ", ".join(f"{name}: {n}" for name, n in sorted(LAWS.items()))
        terminalreporter.write_line(f"laws: {sum(LAWS.values())} checks ({each})")


def hugging_face():
    """transformers, or a skip; its own import raises deprecation warnings that are not ours."""
    with warnings.catch_warnings(action="ignore"):
        return pytest.importorskip("transformers", reason="needs the extra 'parity'")
