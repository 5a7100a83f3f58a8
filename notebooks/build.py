"""Run the notebooks: each .py text becomes the .ipynb beside it, with its outputs.

    python notebooks/build.py                     all of them
    python notebooks/build.py 1_start_here        one of them

Needs the extra `notebooks`. Edit the .py; the .ipynb is made of it.
"""

import hashlib
import pathlib
import sys
import time

import jupytext
import nbclient

HERE = pathlib.Path(__file__).parent
KERNEL = dict(kernelspec=dict(display_name="Python 3", language="python", name="python3"),
              language_info=dict(name="python"))


def build(path):
    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata = KERNEL
    for i, cell in enumerate(notebook.cells):  # the same ids at each run, for a short diff
        cell["id"] = hashlib.sha256(f"{i} {cell.source}".encode()).hexdigest()[:8]
    here = dict(metadata=dict(path=HERE))
    nbclient.NotebookClient(notebook, timeout=600, resources=here, coalesce_streams=True).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if "outputs" in cell:  # tqdm says once that its bar has no widget; no page shows a bar
            cell.outputs = [out for out in cell.outputs if "TqdmWarning" not in out.get("text", "")]
    notebook.metadata = KERNEL
    jupytext.write(notebook, path.with_suffix(".ipynb"))


if __name__ == "__main__":
    names = sys.argv[1:] or sorted(path.stem for path in HERE.glob("[0-9]*.py"))
    for name in names:
        began = time.perf_counter()
        build(HERE / f"{name}.py")
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
