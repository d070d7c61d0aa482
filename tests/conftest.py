"""Fixtures that several files share, the environment of the tests, and skipping where this machine lacks something."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from redis import Redis

# These modules have assertions or fixtures, and must be registered before they are imported.
pytest.register_assert_rewrite("access_fixtures", "browser", "harness", "load", "queue_fixtures")

from harness import (  # noqa: E402
    ROOT,
    Missing,
    Serve,
    Service,
    answers,
    free_port,
    own_keys,
    run_redis,
    run_serve,
    run_service,
    wait_until,
)

pytest_plugins = ["hooks"]

# Set before any test imports settings.py, which reads the environment on import.
os.environ.update(
    REDIS_HOST="127.0.0.1", REDIS_PORT=str(free_port()), MODEL=str(ROOT / "models/digits.keras"), PYTHONUNBUFFERED="1"
)
# JAX sets this to 1 on import, and programs under test would inherit it.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
for name in ("REDIS_URL", "IMAGE_QUEUE", "LABELS", "MODEL_WEIGHTS"):
    os.environ.pop(name, None)
sys.path[:0] = [str(ROOT), str(ROOT / "models")]


@pytest.fixture(scope="session")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of this test run's Redis."""
    port = int(os.environ["REDIS_PORT"])
    with run_redis(tmp_path_factory.mktemp("redis") / "log", port) as process:
        client = Redis(port=port, socket_timeout=5)
        wait_until(lambda: process.alive and answers(client), "Redis answers")
        yield port


@pytest.fixture
def redis(redis_port: int) -> Iterator[Redis]:
    """A client of this test run's Redis. Afterwards deletes all keys except those of the shared services."""
    client = Redis(port=redis_port, socket_timeout=5)
    yield client
    for key in own_keys(client):
        client.delete(key)


@pytest.fixture(scope="session")
def service(redis_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with the digits model and the default settings, for tests that leave it unharmed."""
    with run_service(tmp_path_factory.mktemp("service")) as shared:
        yield shared


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """A bin/serve with the digits model and a Redis without persistence. It restarts whatever a test kills."""
    with run_serve(tmp_path_factory.mktemp("serve") / "log") as serve:
        serve.process.wait_for_log("* Ready on port")
        yield serve


@pytest.fixture(scope="session")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a bare Debian, which tests copy."""
    from chroot import make_base  # noqa: PLC0415 - imported only where a test needs it

    return make_base(tmp_path_factory.mktemp("debian") / "root")


def images_are_wanted(session: pytest.Session) -> bool:
    """Whether this run tests container images."""
    return any("storage" in getattr(item, "fixturenames", ()) for item in session.items)


@pytest.fixture(scope="session")
def images_to_come(debian: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[list[str]]]:
    """Build the Dockerfile's images in the background. The result is buildah's options for finding them."""
    from container_images import Storage  # noqa: PLC0415 - imported only where a test needs it

    storage = Storage(tmp_path_factory.mktemp("buildah"))
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(storage.fill, debian)
    storage.empty()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> None:
    """Skip a test that raised Missing; with CI=true it fails."""
    if call.excinfo and isinstance(call.excinfo.value, Missing) and os.environ.get("CI") != "true":
        reason = str(call.excinfo.value)
        call.excinfo = pytest.CallInfo.from_call(lambda: pytest.skip(reason), call.when).excinfo
