"""The hooks of a test run: which tests run, in which order and on which worker, and what is printed at the end."""

import re
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

SLOW = ("fault", "alone", "images", "chroot", "browser", "backends", "tools", "slow")  # see pyproject.toml
BY_FIXTURE = {"debian": "chroot", "images_to_come": "images", "chrome": "browser"}
left_out: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help=f"leave out the tests marked {', '.join(SLOW)}")


def kind(item: pytest.Item) -> str | None:
    """The first of the markers in SLOW that a test has."""
    return next((name for name in SLOW if item.get_closest_marker(name)), None)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    for item in items:
        # A file's fixtures are expensive, so it stays together. xdist reads the groups below.
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        for fixture in BY_FIXTURE.keys() & getattr(item, "fixturenames", ()):
            item.add_marker(BY_FIXTURE[fixture])
    # The longest group starts first. test_install.py is ahead of test_docker.py: the images are built meanwhile.
    first = ("test_install.py", "test_docker.py")
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))
    yield
    if config.getoption("quick"):
        slow = [item for item in items if kind(item)]
        left_out.update(str(kind(item)) for item in slow)
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not kind(item)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand a worker's counts to the process that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take a worker's counts; each worker has collected every test."""
    left_out.update(Counter(getattr(node, "workeroutput", {}).get("left_out", {})) - left_out)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the figures that tests recorded, a line each, for the tables of the documents."""
    figures = [
        (re.sub(r"@\w+$", "", report.nodeid.rpartition("::")[2]), value)  # without the group that xdist adds
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "figures"
    ]
    if figures:
        terminalreporter.section("figures")
        for test, value in figures:
            terminalreporter.write_line(f"{test}: {value}")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print what --quick left out, as the last line."""
    if config.getoption("quick") and not hasattr(config, "workerinput"):
        print(closing_line(left_out))


def closing_line(counts: Counter[str]) -> str:
    kinds = ", ".join(f"{number} {name}" for name, number in counts.most_common())
    return f"* Left out {counts.total()} tests ({kinds}); bin/test --all runs them" if kinds else "* Left out no test"
