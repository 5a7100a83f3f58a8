"""Do the tests notice a mistake? Change one token of minillm at random, run the tests that execute it, and see.

    python tests/mutate.py --count 40 --seed 0                  # run by hand: pytest does not do this
    python tests/mutate.py --count 40 --seed 0 --list           # show the changes and run nothing
    python tests/mutate.py --count 40 --seed 0 --only 7         # make change 7 of these again
    python tests/mutate.py --file "minillm/lora*" --tests tests/test_lora.py tests/test_laws.py

1. All tests run once in a copy of the working tree. `sys.settrace` notes the lines of minillm that each test executes. These
   notes go to a file (`--map`) that is named after the content of the tree, and a later run on the same tree reads them.
2. The seed chooses `--count` of all possible changes (`mutations.py` lists them).
3. Each change is written into a copy, never into the tree itself. The tests that execute its statement run there until one
   fails: first those of the test file that mirrors the changed file, the quickest first. A crash, a hang and an error at
   import count as noticed. Then the old text comes back.

What a test does in another process is not traced: that is why the test file that mirrors the changed file always runs whole.
A change that survives may be no mistake at all (x < 1 and x <= 0 agree on whole numbers): read it before you write its test.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import faulthandler
import fnmatch
import hashlib
import json
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

from mutations import choose

ROOT = pathlib.Path(__file__).resolve().parent.parent


# --- inside pytest: a plugin that records or selects -----------------------------------------------------------------------


def pytest_configure(config):
    if "MUTATE_TASK" in os.environ:  # its children must not take the task for theirs
        task = json.loads(pathlib.Path(os.environ.pop("MUTATE_TASK")).read_text())
        config.pluginmanager.register(Recorder(task) if task["record"] else Runner(task))


class Recorder:
    """Notes the lines of minillm that each test executes. Those of a shared fixture count for all tests of its file."""

    def __init__(self, task):
        self.out, self.package = task["out"], str(ROOT / "minillm") + os.sep
        self.tests, self.failed, self.shared, self.seen = {}, [], collections.defaultdict(set), set()

    def call(self, frame, event, arg):
        if frame.f_code.co_filename.startswith(self.package):
            return self.line(frame, event, arg)

    def line(self, frame, event, arg):
        self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self.line

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.seen, began = set(), time.perf_counter()
        threading.settrace(self.call)
        sys.settrace(self.call)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)
            self.tests[item.nodeid] = time.perf_counter() - began, self.seen

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        before, self.seen = self.seen, set()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                self.shared[fixturedef.baseid] |= self.seen
            self.seen |= before

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self):
        notes = {}
        for test, (seconds, seen) in self.tests.items():
            lines = collections.defaultdict(list)
            for file, line in sorted(seen.union(*(more for base, more in self.shared.items() if test.startswith(base)))):
                lines[os.path.relpath(file, ROOT)].append(line)
            notes[test] = dict(seconds=seconds, lines=lines)
        pathlib.Path(self.out).write_text(json.dumps(dict(tests=notes, failed=self.failed)))


class Runner:
    """Runs the chosen tests in their order, and notes the last one that began. A test that hangs ends the process."""

    def __init__(self, task):
        self.out, self.limits = pathlib.Path(task["out"]), task["limits"]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        order = {test: i for i, test in enumerate(self.limits)}
        items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.out.write_text(item.nodeid)
        faulthandler.dump_traceback_later(self.limits[item.nodeid], exit=True, file=sys.__stderr__)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()


# --- outside: copies of the tree, and pytest in them --------------------------------------------------------------------------


class Copy:
    """A copy of the working tree in a directory of its own, with a home, a cache and temporary files of its own."""

    def __init__(self, files, parent):
        self.place = pathlib.Path(tempfile.mkdtemp(dir=parent))
        self.tree, self.running = self.place / "tree", None
        for file in files:
            (self.tree / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, self.tree / file)
        for name in ("home", "cache", "tmp"):
            (self.place / name).mkdir()

    def pytest(self, task, tests, timeout=None, quiet=True):
        """Run pytest on `tests` (files) with the plugin; returns (exit code or None after the timeout, what it noted)."""
        out, order = self.place / "out", self.place / "task"
        out.write_text("")
        order.write_text(json.dumps(dict(task, out=str(out))))
        own = dict(HOME="home", MINILLM_CACHE="cache", TMPDIR="tmp", MUTATE_TASK="task")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
                       "PYTHONPATH": f"{self.tree}{os.pathsep}{self.tree / 'tests'}", **{k: str(self.place / v) for k, v in own.items()}}
        command = [sys.executable, "-m", "pytest", "-p", "mutate", "-p", "no:cacheprovider", "--basetemp", str(self.place / "base")]
        told = subprocess.DEVNULL if quiet else None
        self.running = subprocess.Popen([*command, *(["-x"] if quiet else []), *tests], cwd=self.tree, env=environment, stdout=told,
                                        stderr=told, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code = self.running.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            self.stop()
        return code, out.read_text()

    def stop(self):
        with contextlib.suppress(ProcessLookupError, AttributeError):
            os.killpg(self.running.pid, signal.SIGKILL)  # its children too

    def try_out(self, mutant, chosen):
        """The test that notices a mutant, "import" where it cannot be imported, or None."""
        if not chosen:
            return None
        path, limits = self.tree / mutant.file, {}
        old = path.read_text(encoding="utf-8")
        slowest = {file_of(test): max(s for t, s in chosen.items() if file_of(t) == file_of(test)) for test in chosen}
        for test in chosen:
            limits[test] = 60 + 10 * slowest[file_of(test)]
        path.write_text(mutant.text, encoding="utf-8")
        try:
            code, noted = self.pytest(dict(record=False, limits=limits), sorted(slowest), 300 + 5 * sum(chosen.values()))
        finally:
            path.write_text(old, encoding="utf-8")
        return None if code in (0, pytest.ExitCode.NO_TESTS_COLLECTED) else noted or "import"


def file_of(test):
    return test.split("::")[0]


def tracked(root):
    """The files of the working tree that git knows or does not ignore."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True, text=True, check=True)
    return sorted(file for file in listed.stdout.split("\0") if (root / file).is_file())


def record(files, tests, path):
    """{test: (seconds, {file: lines})} of the tests that pass, from the map at `path` or from a run."""
    digest = hashlib.sha256(repr((sys.version, tests)).encode())
    for file in files:
        if file.endswith((".py", ".cfg", ".toml")):
            digest.update(file.encode() + b"\0" + (ROOT / file).read_bytes())
    path = pathlib.Path(path or pathlib.Path(tempfile.gettempdir()) / f"minillm-map-{digest.hexdigest()[:16]}.json")
    notes = json.loads(path.read_text()) if path.exists() else {}
    if notes.get("tree") != digest.hexdigest():
        print(f"running the tests once, to note in {path} which lines each of them executes", flush=True)
        with tempfile.TemporaryDirectory() as parent:
            _, noted = Copy(files, parent).pytest(dict(record=True), tests, quiet=False)
        if not noted:
            sys.exit("pytest did not come to its end, so nothing is known")
        notes = dict(json.loads(noted), tree=digest.hexdigest())
        path.write_text(json.dumps(notes))
    if notes["failed"]:
        print(f"left out, because they fail without a change: {', '.join(notes['failed'])}")
    return {test: (note["seconds"], note["lines"]) for test, note in notes["tests"].items() if test not in notes["failed"]}


def tests_of(mutant, notes):
    """{test: seconds} of the tests that could notice a mutant, in the order in which they run."""
    stem, change = pathlib.Path(mutant.file).stem, mutant.change
    own = {test for test in notes if file_of(test) == mutant.file or pathlib.Path(file_of(test)).stem == f"test_{stem}"}
    lines = {test: lines.get(mutant.file, ()) for test, (_, lines) in notes.items()}
    hit = {test for test in notes if any(change.first <= line <= change.last for line in lines[test])}
    if not hit and not change.in_function:  # it is executed once, at import
        hit = {test for test in notes if lines[test]}
    total = collections.Counter()
    for test in hit | own:
        total[file_of(test)] += notes[test][0]
    order = sorted(hit | own, key=lambda test: (test not in own, total[file_of(test)], file_of(test), notes[test][0]))
    return {test: notes[test][0] for test in order}


def main():
    args = parser().parse_args()
    files = tracked(ROOT)
    chosen = [file for file in files if file.startswith("minillm/") and file.endswith(".py")]
    chosen = [file for file in chosen if any(fnmatch.fnmatch(file, pattern) for pattern in args.file)]
    mutants = dict(enumerate(choose({f: (ROOT / f).read_text(encoding="utf-8") for f in chosen}, args.count, args.seed), 1))
    if args.only:
        mutants = {number: mutants[number] for number in args.only}
    if args.list:
        print("\n".join(f"{number:3d} {mutant}" for number, mutant in mutants.items()))
        return
    notes, survivors = record(files, args.tests, args.map), {}
    with tempfile.TemporaryDirectory(prefix="mutate-") as parent, concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        copies, free = [Copy(files, parent) for _ in range(args.workers)], queue.SimpleQueue()
        for copy in copies:
            free.put(copy)

        def one(number, mutant):
            copy, began, could = free.get(), time.perf_counter(), tests_of(mutant, notes)
            noticed = copy.try_out(mutant, could)
            free.put(copy)
            by = f"by {noticed}" if noticed else f"by none of {len(could)} tests"
            print(f"{number:3d} {'noticed ' if noticed else 'SURVIVED'} {mutant}   {by} ({time.perf_counter() - began:.0f} s)", flush=True)
            if not noticed:
                survivors[number] = mutant

        try:
            for done in [pool.submit(one, *item) for item in mutants.items()]:
                done.result()
        finally:  # after Ctrl-C too
            pool.shutdown(wait=False, cancel_futures=True)
            for copy in copies:
                copy.stop()
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} noticed")
    for number, mutant in sorted(survivors.items()):
        print(f"\n{number:3d} {mutant}")
        for sign, text in (("-", (ROOT / mutant.file).read_text(encoding="utf-8")), ("+", mutant.text)):
            print(f"    {sign} {text.splitlines()[mutant.line - 1].strip()}")


def parser():
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--count", type=int, default=40, help="how many changes")
    top.add_argument("--seed", type=int, default=0, help="which of all possible changes")
    top.add_argument("--file", nargs="+", default=["*"], metavar="PATTERN", help="only files such as 'minillm/lora*'")
    top.add_argument("--tests", nargs="+", default=[], metavar="FILE", help="only these test files")
    top.add_argument("--only", nargs="+", type=int, metavar="N", help="only these of the changes, by number")
    top.add_argument("--list", action="store_true", help="show the changes and run nothing")
    top.add_argument("--workers", type=int, default=1, help="how many at a time")
    top.add_argument("--map", metavar="FILE", help="where the lines of each test are kept; by default beside other temporary files")
    return top


if __name__ == "__main__":
    main()
