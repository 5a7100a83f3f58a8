"""A pytest plugin for `mutate.py`: note the lines that each test executes, or run chosen tests."""

import collections
import contextlib
import faulthandler
import json
import os
import pathlib
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = "shared fixture of "


def pytest_configure(config):
    if "MUTATE_TASK" in os.environ:  # its children must not take the task for theirs
        task = json.loads(pathlib.Path(os.environ.pop("MUTATE_TASK")).read_text())
        config.pluginmanager.register(Recorder(task) if task["record"] else Runner(task))


class Recorder:
    """Notes the lines of minillm that each test executes, by `coverage`, whose tracer is in C.

    The lines of a shared fixture count for all tests of its file.
    """

    def __init__(self, task):
        import coverage  # only the script needs it

        self.out, self.seconds, self.failed, self.context = task["out"], {}, [], ""
        package = str(ROOT / "minillm" / "*")
        self.coverage = coverage.Coverage(data_file=None, config_file=False, include=[package])
        self.coverage.start()

    @contextlib.contextmanager
    def within(self, context):
        """Lines that are executed inside count for this context."""
        before, self.context = self.context, context
        self.coverage.switch_context(context)
        try:
            yield
        finally:
            self.context = before
            self.coverage.switch_context(before)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        began = time.perf_counter()
        with self.within(item.nodeid):
            try:
                return (yield)
            finally:
                self.seconds[item.nodeid] = time.perf_counter() - began

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        shared = fixturedef.scope != "function"
        with self.within(SHARED + fixturedef.baseid if shared else self.context):
            return (yield)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self):
        self.coverage.stop()
        data, of = self.coverage.get_data(), collections.defaultdict(dict)
        for path in data.measured_files():
            file = os.path.relpath(path, ROOT)
            for line, contexts in data.contexts_by_lineno(path).items():
                for context in contexts:
                    of[context].setdefault(file, set()).add(line)
        notes = {}
        for test, seconds in self.seconds.items():
            lines = collections.defaultdict(set)
            for context, files in of.items():
                fits = context.startswith(SHARED) and test.startswith(context[len(SHARED) :])
                for file, found in files.items() if fits or context == test else ():
                    lines[file] |= found
            notes[test] = dict(seconds=seconds, lines={f: sorted(n) for f, n in lines.items()})
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
