"""How a comparison ends: outputs that cannot be written are found first, Ctrl-C leaves
nothing behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

import minillm
from minillm import compare
from test_compare import Worker, model, run  # noqa: F401

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("name, force", [("table.json", True), ("table.md", False),
                                         ("table.png", True)])
def test_a_directory_in_the_place_of_a_file_is_found_first(
    name, force, model, tmp_path, monkeypatch  # noqa: F811
):
    Worker(monkeypatch)
    run(model, tmp_path, ["none"])
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    monkeypatch.setattr(compare.zoo, "load", lambda model: pytest.fail("work before the check"))
    with pytest.raises(IsADirectoryError, match=f"{name} is a directory, and a file"):
        run(model, tmp_path, ["none"], force=force)


def test_no_lock_is_left(model, tmp_path, monkeypatch):  # noqa: F811
    Worker(monkeypatch, interrupt="lora")
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path)
    assert os.listdir(tmp_path) == ["table.json"]


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.3, 8])
def test_ctrl_c_is_one_line(after, model, tmp_path):  # noqa: F811
    """It reaches all processes of the terminal: while the second one starts, and in its
    training."""
    path = os.path.dirname(os.path.dirname(minillm.__file__))
    args = ["compare", "--model", model, "--techniques", "lora", "--out", "r", "--length", "32",
            "--steps", "500"]
    process = subprocess.Popen([sys.executable, "-m", "minillm", *args], cwd=tmp_path, text=True,
                               start_new_session=True,
                               stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})
    while not (tmp_path / "r" / ".lock").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(after)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert (said.splitlines()[-1] == "minillm compare: interrupted"
            and os.listdir(tmp_path / "r") == [])


def echo():
    return signal.getsignal(signal.SIGINT)


def test_ctrl_c_is_again_what_it_was():
    before = signal.getsignal(signal.SIGINT)
    assert compare.apart(echo) == signal.SIG_IGN and signal.getsignal(signal.SIGINT) is before
