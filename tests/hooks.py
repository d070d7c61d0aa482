"""pytest's hooks: which tests run, in which order and on which worker, and what is printed at the end."""

from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

SLOW = ("fault", "alone", "images", "chroot", "browser", "backends", "tools", "slow")  # see pyproject.toml
BY_FIXTURE = {"debian": "chroot", "images_to_come": "images", "chrome": "browser"}
# Both use the bare Debian, and the images are built while test_install.py runs. They take longest, so they start first.
IMAGES = ("test_install.py", "test_docker.py")
left_out: Counter[str] = Counter()


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """Keeps the tests of a file on one worker, since they share fixtures that are expensive to make."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "images" if file.endswith(IMAGES) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    # Not --dist loadgroup: xdist would add the group to the tests' names, but pytest 9.2 ignores new names.
    return ByFile(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help=f"leave out the tests marked {', '.join(SLOW)}")


def kind(item: pytest.Item) -> str | None:
    """The first of the markers in SLOW that a test has."""
    return next((name for name in SLOW if item.get_closest_marker(name)), None)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    for item in items:
        for fixture in BY_FIXTURE.keys() & getattr(item, "fixturenames", ()):
            item.add_marker(BY_FIXTURE[fixture])
    items.sort(key=lambda item: IMAGES.index(item.path.name) if item.path.name in IMAGES else len(IMAGES))
    yield
    if config.getoption("quick"):
        slow = [item for item in items if kind(item)]
        left_out.update(str(kind(item)) for item in slow)
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not kind(item)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send this worker's counts to the main process, which prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(left_out)


def pytest_testnodedown(node: Any) -> None:
    """Add a worker's counts only if no other worker has sent them, since every worker collects every test."""
    left_out.update(Counter(getattr(node, "workeroutput", {}).get("left_out", {})) - left_out)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the figures that tests recorded, one per line, for the tables of the documents."""
    figures = [
        (report.nodeid.rpartition("::")[2], value)
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
