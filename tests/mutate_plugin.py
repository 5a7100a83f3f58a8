"""A pytest plugin for `mutate.py`: note the lines that each test executes, or run chosen tests."""

import collections
import faulthandler
import json
import os
import pathlib
import sys
import threading
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
MANY = 50  # calls of a function in one test after which its lines are no longer noted one by one


def pytest_configure(config):
    if "MUTATE_TASK" in os.environ:  # its children must not take the task for theirs
        task = json.loads(pathlib.Path(os.environ.pop("MUTATE_TASK")).read_text())
        config.pluginmanager.register(Recorder(task) if task["record"] else Runner(task))


class Recorder:
    """Notes the lines of minillm that each test executes.

    The lines of a shared fixture count for all tests of its file.
    """

    def __init__(self, task):
        self.out, self.package = task["out"], str(ROOT / "minillm") + os.sep
        self.tests, self.failed = {}, []
        self.seen, self.shared = set(), collections.defaultdict(set)
        self.calls = collections.Counter()

    def call(self, frame, event, arg):
        code = frame.f_code
        if not code.co_filename.startswith(self.package):
            return None
        self.calls[id(code)] += 1
        if self.calls[id(code)] > MANY:  # tracing is slow
            return None
        if self.calls[id(code)] == MANY:
            self.seen |= {(code.co_filename, line) for *_, line in code.co_lines() if line}
        return self.line(frame, event, arg)

    def line(self, frame, event, arg):
        self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self.line

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.seen, began = set(), time.perf_counter()
        self.calls.clear()
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
            shared = [more for base, more in self.shared.items() if test.startswith(base)]
            for file, line in sorted(seen.union(*shared)):
                lines[os.path.relpath(file, ROOT)].append(line)
            notes[test] = dict(seconds=seconds, lines=lines)
        pathlib.Path(self.out).write_text(json.dumps(dict(tests=notes, failed=self.failed)))


class Runner:
    """Runs the chosen tests in their order and notes the last one that began.

    A test that takes longer than its limit ends the process.
    """

    def __init__(self, task):
        self.out, self.limits = pathlib.Path(task["out"]), task["limits"]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        order = {test: i for i, test in enumerate(self.limits)}
        chosen = [item for item in items if item.nodeid in order]
        items[:] = sorted(chosen, key=lambda item: order[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.out.write_text(item.nodeid)
        faulthandler.dump_traceback_later(self.limits[item.nodeid], exit=True, file=sys.__stderr__)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
