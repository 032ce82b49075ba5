"""A plugin of pytest for mutants_random.py: records which tests reach which lines of the product,
in this process and in those that `tests.conftest.run` forks.
"""

import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

FOLDER = os.environ.get("REACH_FOLDER")
ROOT = Path(__file__).resolve().parents[1]
seconds = {}


def begin(context=None):
    """Return a started Coverage whose data file is its own."""
    import coverage

    left_out = [str(ROOT / name / "*") for name in ("tests", "bench", ".venv")]
    data_file = f"{FOLDER}/cov.{os.getpid()}"
    recorder = coverage.Coverage(
        data_file, source=[str(ROOT)], omit=left_out, config_file=False, context=context
    )
    recorder.start()
    return recorder


@contextmanager
def in_fork():
    """Record a forked command as part of the test that runs it."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    recorder = begin(test) if FOLDER and test else None
    try:
        yield
    finally:
        if recorder:
            recorder.stop()
            recorder.save()


def pytest_sessionstart(session):
    session.recorder = begin()


def pytest_runtest_logstart(nodeid):
    import coverage

    with suppress(coverage.CoverageException):
        coverage.Coverage.current().switch_context(nodeid)


def pytest_runtest_logreport(report):
    seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration


def pytest_sessionfinish(session):
    session.recorder.stop()
    session.recorder.save()
    Path(f"{FOLDER}/seconds.{os.getpid()}").write_text(json.dumps(seconds), encoding="utf-8")
