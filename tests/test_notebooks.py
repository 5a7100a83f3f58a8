"""The notebooks: each .ipynb is made of its .py, its outputs hold no error, and each
.py runs as a script.

CI runs all of them (see .ci/run). `notebooks/build.py` makes the .ipynb.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TEXTS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
every_notebook = pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
MOST = 300_000  # bytes of an .ipynb, pictures included


def cells(path):
    return json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]


def test_all_are_there():
    assert sorted(int(path.stem.split("_")[0]) for path in TEXTS) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


@every_notebook
def test_the_notebook_is_made_of_its_text(path):
    jupytext = pytest.importorskip("jupytext", reason="needs the extra 'notebooks'")
    made = [(cell.cell_type, cell.source) for cell in jupytext.read(path, fmt="py:percent").cells]
    assert made == [(cell["cell_type"], "".join(cell["source"])) for cell in cells(path)], (
        f"run notebooks/build.py {path.stem}")


@every_notebook
def test_the_outputs_are_of_a_whole_run(path):
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}, (
        "an error, or an object's repr")
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture"
    assert path.with_suffix(".ipynb").stat().st_size < MOST


@every_notebook
def test_a_notebook_opens_with_its_question_and_shows_the_source(path):
    text, first = path.read_text(encoding="utf-8"), "".join(cells(path)[0]["source"])
    assert first.startswith("# ") and "?**" in first
    assert "inspect.getsource(" in text and "$$" in text and "redict" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs_as_a_script(path, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ
                          | dict(MINILLM_SHORT="1", MPLBACKEND="Agg", PYTHONPATH=str(ROOT)))
    assert not done.returncode, done.stderr[-3000:]
    assert not list(tmp_path.iterdir()), "it leaves files behind"
