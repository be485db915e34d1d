"""A pytest plugin: ``-p resume --resume FILE`` leaves out the tests that FILE names and adds those that pass.

A test is added after its teardown, one line a test, so a run that is killed loses only the test that was running.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--resume", metavar="FILE", type=Path, help="leave out the tests named in FILE; add those that pass"
    )


def passed(config: pytest.Config) -> set[str]:
    """The ids in the file of ``--resume``."""
    file = config.getoption("--resume", default=None)
    return set(file.read_text(encoding="utf-8").splitlines()) if file is not None and file.is_file() else set()


def passes_are_kept(config: pytest.Config) -> bool:
    """Whether ``--resume`` is given."""
    return config.getoption("--resume", default=None) is not None


def pytest_configure(config: pytest.Config) -> None:
    # The workers of xdist collect before any test runs; only their controller writes.
    if passes_are_kept(config) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Keeper(config.getoption("--resume")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = passed(config)
    items[:] = [item for item in items if item.nodeid not in known]


class Keeper:
    """Writes the ids of tests that pass or are skipped."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.add(report.nodeid)
        elif report.when == "teardown" and report.nodeid not in self._failed:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(report.nodeid + "\n")
