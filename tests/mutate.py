"""Do the tests notice a mistake? Change one token of minillm, run the tests that execute it, look.

    python tests/mutate.py --count 40 --seed 0             # run it by hand: pytest does not
    python tests/mutate.py --count 40 --seed 0 --list      # show the changes and run nothing
    python tests/mutate.py --count 40 --seed 0 --only 7    # make change 7 of these again
    python tests/mutate.py --file "minillm/lora*" --tests tests/test_lora.py tests/test_laws.py

1. All tests run once in a copy of the working tree, and a plugin notes the lines of minillm that
   each test executes (`mutate_plugin.py`; it needs `pip install coverage`). The notes go to a file
   (`--map`) that is named after the content of the tree. A later run on the same tree reads them.
2. The seed chooses `--count` of all possible changes (`mutate_changes.py`).
3. Each change is written into a copy, never into the tree itself. The tests that execute its
   statement run there until one fails. Those of the test file that mirrors the changed file come
   first, and the quickest of them first. A crash, a hang or an error at import counts as noticed.
   Then the old text comes back.

The plugin does not see what a test does in another process. That is why the test file that
mirrors the changed file always runs whole, and last of all the test of two processes. A change
that survives may be no mistake at all (x < 1 and x <= 0 agree on whole numbers): read it before you
write a test for it.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import fnmatch
import hashlib
import json
import multiprocessing
import os
import pathlib
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import tqdm

from mutate_changes import choose

ROOT = pathlib.Path(__file__).resolve().parent.parent


# What takes long to import and is no part of minillm is imported once, in the process that all
# others are forked from.
HEAVY = ["torch", "torch._dynamo", "transformers", "peft", "sacrebleu", "safetensors.torch"]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(HEAVY)


def work(tree, environment, arguments, quiet):
    """Run pytest in the directory `tree`: what a forked process does."""
    os.setsid()  # so that its children can be ended with it
    os.chdir(tree)
    os.environ.update(environment)
    sys.path[:] = [tree, f"{tree}/tests", *(path for path in sys.path if path != sys.path[0])]
    sys.modules.pop("mutate_changes", None)  # pytest imports the copy's
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    sys.dont_write_bytecode, tempfile.tempdir = True, None
    tqdm.tqdm.set_lock(threading.RLock())  # its lock between processes would leak at `os._exit`
    if quiet:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    code = pytest.ExitCode.INTERNAL_ERROR
    try:
        code = pytest.main(arguments)
    finally:
        sys.stdout.flush()
        os._exit(code)


class Copy:
    """A copy of the working tree, with a home, a cache and temporary files of its own."""

    def __init__(self, files, parent):
        self.place, self.running = pathlib.Path(tempfile.mkdtemp(dir=parent)), None
        self.tree = self.place / "tree"
        for file in files:
            (self.tree / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, self.tree / file)
        own = dict(HOME="home", MINILLM_CACHE="cache", TMPDIR="tmp")
        for name in own.values():
            (self.place / name).mkdir()
        self.environment = {key: str(self.place / name) for key, name in own.items()} | {
            "PYTHONPATH": f"{self.tree}{os.pathsep}{self.tree / 'tests'}",
            "PYTHONDONTWRITEBYTECODE": "1",  # a stale .pyc would hide a change of the same length
            "MUTATE_TASK": str(self.place / "task"),
        }

    def pytest(self, task, *arguments, timeout=None, quiet=True):
        """Run pytest here with the plugin; returns the exit code (None: too long) and its notes."""
        out = self.place / "out"
        out.write_text("")
        (self.place / "task").write_text(json.dumps(task | dict(out=str(out))))
        plugins = ["-p", "mutate_plugin", "-p", "no:cacheprovider"]
        plugins += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported early
        arguments = [*plugins, "--basetemp", str(self.place / "base"), *arguments]
        task = str(self.tree), self.environment, arguments, quiet
        self.running = PROCESSES.Process(target=work, args=task)
        self.running.start()
        try:
            self.running.join(timeout)
            return self.running.exitcode, out.read_text()
        finally:
            self.stop()

    def stop(self):
        if self.running is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.running.pid, signal.SIGKILL)  # its children too

    def notices(self, mutant, tests):
        """The one of `tests` that notices the mutant, "an import" for all of them, or None."""
        slowest = {}
        for test, seconds in tests.items():  # the first test of a file may make what all of it use
            slowest[file_of(test)] = max(seconds, slowest.get(file_of(test), 0))
        task = dict(record=False, limits={test: 60 + 10 * slowest[file_of(test)] for test in tests})
        path, timeout = self.tree / mutant.file, 300 + 10 * sum(tests.values())
        old = text_of(path)
        path.write_text(mutant.text, encoding="utf-8")
        try:
            code, last = self.pytest(task, "-x", *sorted(slowest), timeout=timeout)
        finally:
            path.write_text(old, encoding="utf-8")
        return None if code == pytest.ExitCode.OK else last or "an import"


def text_of(path):
    return path.read_text(encoding="utf-8")


def file_of(test):
    return test.split("::")[0]


def tracked():
    """The files of the working tree that git knows or does not ignore."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(file for file in listed.split("\0") if (ROOT / file).is_file())


OTHER_PROCESSES = ["tests/test_distributed.py"]  # what these tests run, no plugin sees


def record(files, tests, path):
    """{test: its seconds and {file: lines}} of all that pass, from the file at `path` or a run."""
    digest = hashlib.sha256(repr((sys.version, tests)).encode())
    for file in files:
        if file.endswith((".py", ".cfg", ".toml")) and not file.startswith("tests/mutate"):
            digest.update(file.encode() + b"\0" + (ROOT / file).read_bytes())
    tree, temporary = digest.hexdigest(), pathlib.Path(tempfile.gettempdir())
    path = pathlib.Path(path or temporary / f"minillm-map-{tree[:16]}.json")
    notes = json.loads(path.read_text()) if path.exists() else {}
    if notes.get("tree") != tree:
        print(f"running all tests once, to note the lines that each executes in {path}", flush=True)
        with tempfile.TemporaryDirectory() as parent:
            code, noted = Copy(files, parent).pytest(dict(record=True), *tests, quiet=False)
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            sys.exit("pytest did not reach its end, so nothing is known of the tests")
        notes = json.loads(noted) | dict(tree=tree)
        path.write_text(json.dumps(notes))
    for test in notes["failed"]:
        print(f"left out, because it fails without a change: {test}")
        notes["tests"].pop(test, None)
    return notes["tests"]


def candidates(mutant, notes):
    """{test: seconds} of the tests that could notice a mutant, in the order in which they run."""
    file, change = mutant.file, mutant.change
    stem = pathlib.Path(file).stem.replace("__main__", "cli")  # which only runs in other processes
    names = file, f"test_{stem}"  # its own doctest, and the file that mirrors it
    own = {t for t in notes if file_of(t) == names[0] or pathlib.Path(file_of(t)).stem == names[1]}
    lines = {test: note["lines"].get(file, ()) for test, note in notes.items()}
    hit = {t for t in notes if any(change.first <= line <= change.last for line in lines[t])}
    # it runs once, at import, and constants are read anywhere
    if not hit and not change.in_function:
        hit = {test for test in notes if lines[test] or file_of(test) == "tests/test_snapshots.py"}
    elsewhere = {test for test in notes if file_of(test) in OTHER_PROCESSES} - hit - own
    total = collections.Counter()
    for test in hit | own | elsewhere:
        total[file_of(test)] += notes[test]["seconds"]

    def rank(test):
        file = file_of(test)
        return (test in elsewhere, test not in own, total[file], file, notes[test]["seconds"])

    return {test: notes[test]["seconds"] for test in sorted(hit | own | elsewhere, key=rank)}


def try_all(mutants, notes, files, workers):
    """Print what becomes of each mutant; returns {number: mutant} of those that survive."""
    survivors, free = {}, queue.SimpleQueue()

    def one(number, mutant):
        tests, began, copy = candidates(mutant, notes), time.perf_counter(), free.get()
        noticed = copy.notices(mutant, tests) if tests else None
        free.put(copy)
        by = f"by {noticed}" if noticed else f"by none of {len(tests)} tests"
        sign, seconds = "noticed " if noticed else "SURVIVED", time.perf_counter() - began
        print(f"{number:3d} {sign} {mutant}   {by} ({seconds:.0f} s)", flush=True)
        if not noticed:
            survivors[number] = mutant

    with contextlib.ExitStack() as stack:
        parent = stack.enter_context(tempfile.TemporaryDirectory(prefix="mutate-"))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(workers))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # after Ctrl-C
        for _ in range(workers):
            copy = Copy(files, parent)
            stack.callback(copy.stop)
            free.put(copy)
        for done in [pool.submit(one, *item) for item in mutants.items()]:
            done.result()
    return dict(sorted(survivors.items()))


def main():
    args, files = parser().parse_args(), tracked()
    chosen = {
        file: text_of(ROOT / file) for file in files
        if file.startswith("minillm/") and file.endswith(".py")
        and any(fnmatch.fnmatch(file, pattern) for pattern in args.file)}
    mutants = dict(enumerate(choose(chosen, args.count, args.seed), 1))
    if args.only:
        mutants = {number: mutants[number] for number in args.only}
    if args.list:
        print("\n".join(f"{number:3d} {mutant}" for number, mutant in mutants.items()))
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when the first process imports it
    survivors = try_all(mutants, record(files, args.tests, args.map), files, args.workers)
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} noticed")
    for number, mutant in survivors.items():
        print(f"\n{number:3d} {mutant}")
        for sign, text in (("-", chosen[mutant.file]), ("+", mutant.text)):
            print(f"    {sign} {text.splitlines()[mutant.line - 1].strip()}")


def parser():
    whole = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(description=__doc__, formatter_class=whole)
    add = top.add_argument
    add("--count", type=int, default=40, help="how many changes")
    add("--seed", type=int, default=0, help="chooses them among all possible changes")
    add("--file", nargs="+", default=["*"], metavar="PATTERN", help="only files that match")
    add("--tests", nargs="+", default=[], metavar="FILE", help="only these test files")
    add("--only", nargs="+", type=int, metavar="N", help="only the changes of these numbers")
    add("--list", action="store_true", help="show the changes and run nothing")
    add("--workers", type=int, default=1, help="how many changes at a time")
    add("--map", metavar="FILE", help="keeps the lines of each test; else a temporary file")
    return top


if __name__ == "__main__":
    main()
