"""The examples: each runs, and a technique of one's own is one file and one line, which
the laws hold."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

import minillm

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
RUN = {  # what its output has to say
    "tune_hugging_face.py": ["0 modules of minillm are left",
                             "transformers reads it    the logits differ by at most 0.0e+00"],
    "tune_hugging_face.py gpt2": ["GPT2LMHeadModel", "0 modules of minillm are left"],
    "chat_smollm2.py": ["before: perplexity", "after 2 steps: perplexity"],
    "to_llama_cpp.py": ["pruned: 101,376 zeros", "q8_0.gguf, read again"],
    "transfer.py": ["head alone", "what pretraining adds to the accuracy of all weights"],
    "own_technique.py": ["holds   in_a_file", "SSF"],
}
LAWS = """
import sys
import pytest
import ssf  # the one line
from minillm.registry import METHODS
for name in set(METHODS) - {"ssf", "lora", "prune", "quant"}:  # the pairs of all would take minutes
    del METHODS[name]
chosen = "Linear or loading or neutral"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", chosen, sys.argv[1]]))
"""


def run(*command):
    path = os.pathsep.join(map(str, (ROOT, EXAMPLES)))
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True,
                          text=True, stdin=subprocess.DEVNULL,
                          env=os.environ | dict(MINILLM_SHORT="1", PYTHONPATH=path))


def code(path):
    """The lines of a file that are code: neither blank, nor a comment, nor in a docstring."""
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    documented = [node for node in ast.walk(tree)
                  if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    strings = {line for node in documented if ast.get_docstring(node)
               for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return [line for i, line in enumerate(lines, 1) if line.strip()
            and not line.strip().startswith("#") and i not in strings]


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_an_example_runs(command):
    if command.startswith("tune_hugging_face"):
        pytest.importorskip("transformers", reason="needs the extra 'parity'")
    for module in {"to_llama_cpp.py": ["gguf"], "chat_smollm2.py": ["jinja2"]}.get(command, []):
        pytest.importorskip(module, reason="needs the extra 'hub'")
    name, *arguments = command.split()
    done = run(EXAMPLES / name, *arguments)
    assert not done.returncode, done.stderr[-3000:]
    for part in RUN[command]:
        assert part in done.stdout, done.stdout


@pytest.mark.parametrize("name", ["tune_hugging_face", "to_llama_cpp", "chat_smollm2"])
def test_a_model_that_is_missing_is_one_line(name, tmp_path):
    if name == "tune_hugging_face":
        pytest.importorskip("transformers", reason="needs the extra 'parity'")
    done = run(EXAMPLES / f"{name}.py", tmp_path / "no")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert str(tmp_path / "no") in done.stderr and not done.stdout


def test_a_model_that_llama_cpp_could_not_have_is_found_before_any_work(tmp_path):
    pytest.importorskip("gguf", reason="needs the extra 'hub'")
    model = minillm.Transformer(minillm.Config.gpt2(50, 32, 2, 2, positions=16))
    minillm.save(model, tmp_path / "g")
    done = run(EXAMPLES / "to_llama_cpp.py", tmp_path / "g")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout, done.stderr


def test_every_example_is_run():
    assert {command.split()[0] for command in RUN} | {"ssf.py"} == {
        path.name for path in EXAMPLES.glob("*.py")
    }
    for path in EXAMPLES.glob("*.py"):
        assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 100, path


def test_a_technique_is_one_file_of_thirty_lines_and_one_line():
    assert len(code(EXAMPLES / "ssf.py")) <= 30
    lines = [line for line in code(EXAMPLES / "own_technique.py") if "ssf" in line]
    assert lines[0].split("#")[0].strip() == "import ssf"
    assert all("import" not in line for line in lines[1:])
    assert "ssf" not in "".join(path.read_text(encoding="utf-8")
                                for path in (ROOT / "minillm").rglob("*.py"))


@pytest.mark.slow
def test_the_laws_of_minillm_hold_for_it():
    done = run("-c", LAWS, ROOT / "tests" / "test_laws.py")
    assert not done.returncode and "5 merge" in done.stdout, (
        done.stdout[-3000:] + done.stderr[-3000:])
