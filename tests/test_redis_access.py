"""Redis with a user, a password and TLS."""

import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pytest
import requests
from harness import (
    ROOT,
    Service,
    answers,
    free_port,
    make_certificates,
    need,
    run_apache,
    run_model_server,
    run_service,
    running,
    wait_until,
)
from redis import Redis
from redis.exceptions import NoPermissionError

PNG = (ROOT / "models/digits/three.png").read_bytes()
PASSWORD = "pass/word@of:redis"


class SecureRedis(NamedTuple):
    """A Redis that requires TLS, a user and a password: its port, its certificates and an admin's client."""

    port: int
    certificates: dict[str, str]
    admin: Redis

    def url(self, password: str = PASSWORD, ca: str = "") -> str:
        trust = ca or self.certificates["ca"]
        return f"rediss://keras-rest-api:{quote(password, safe='')}@127.0.0.1:{self.port}/0?ssl_ca_certs={trust}"


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A folder that Apache's user may read, unlike pytest's folders, which belong to root."""
    with tempfile.TemporaryDirectory(prefix="test-redis-access-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def secure_redis(public: Path) -> Iterator[SecureRedis]:
    """A Redis whose user is the one in docs/operations.md, word for word."""
    files, port = make_certificates(public), free_port()
    text = (ROOT / "docs/operations.md").read_text()
    [line] = re.findall(r"^ *(user keras-rest-api .*~image_queue .*)$", text, re.MULTILINE)
    users = [line.replace("PASSWORD", PASSWORD), "user default off", "user admin on >admin ~* +@all"]
    (public / "redis.conf").write_text(
        f"port 0\nbind 127.0.0.1\ntls-port {port}\ntls-auth-clients no\ntls-cert-file {files['certificate']}\n"
        f'tls-key-file {files["key"]}\ntls-ca-cert-file {files["ca"]}\nsave ""\ndir {public}\n' + "\n".join(users)
    )
    admin = Redis.from_url(f"rediss://admin:admin@127.0.0.1:{port}/0?ssl_ca_certs={files['ca']}", socket_timeout=5)
    with running([need("redis-server"), str(public / "redis.conf")], public / "log") as process:
        wait_until(lambda: process.alive and answers(admin), "Redis answers")
        yield SecureRedis(port, files, admin)


@pytest.mark.slow("starts both programs with TLS")
def test_redis_with_user_password_and_tls_works(secure_redis: SecureRedis, tmp_path: Path) -> None:
    settings = {"REDIS_URL": secure_redis.url(), "IMAGE_QUEUE": "image_queue", "RATE_LIMIT": "100/hour"}
    with run_service(tmp_path, 1, **settings) as service:
        labels = [service.label(PNG) for _ in range(3)]
        service.servers[0].stop(signal.SIGKILL)
        with run_model_server(tmp_path / "again", **settings) as again:
            labels.append(service.label(PNG))
            again.stop()

    assert labels == ["3"] * 4
    assert secure_redis.admin.acl_log() == []
    assert not any("Traceback" in log.read_text() for log in tmp_path.iterdir())


def test_documented_redis_user_has_no_other_rights(secure_redis: SecureRedis) -> None:
    with Redis.from_url(secure_redis.url(), protocol=2) as client:
        for command in (
            ["KEYS", "*"],
            ["FLUSHALL"],
            ["CONFIG", "GET", "*"],
            ["GET", "other"],
            ["EVAL", "return 1", "0"],
        ):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command)


REDIS_FAULTS = {
    "password": "rejects the password, so check the user and the password in REDIS_URL",
    "certificate": "presents an untrusted certificate, so check ssl_ca_certs",
    "rights": "does not grant this user the permissions it needs, so set those in docs/operations.md",
}


def weak_user(secure_redis: SecureRedis) -> str:
    """Create a user that may run only PING and INFO; return its URL."""
    secure_redis.admin.acl_setuser(
        "weak", enabled=True, reset=True, passwords="+the-wrong-one", keys=["image_queue*"], commands=["+ping", "+info"]
    )
    return secure_redis.url("the-wrong-one").replace("keras-rest-api", "weak")


@pytest.mark.slow("starts both programs for each case")
@pytest.mark.parametrize("fault", REDIS_FAULTS)
def test_redis_access_errors_are_logged_without_the_password(
    secure_redis: SecureRedis, public: Path, tmp_path: Path, fault: str
) -> None:
    other = make_certificates(public, "other")["ca"]
    urls = {
        "password": secure_redis.url("the-wrong-one"),
        "certificate": secure_redis.url(ca=other),
        "rights": weak_user(secure_redis),
    }
    url = urls[fault]
    logs = [tmp_path / "server.log", tmp_path / "apache.log"]
    with (
        running([sys.executable, "run_model_server.py"], logs[0], REDIS_URL=url) as server,
        run_apache(log=logs[1], REDIS_URL=url, REDIS_TIMEOUT="1") as site,
    ):
        answered = [Service(site).post(PNG), requests.get(f"{site}/readyz", timeout=10)]
        server.wait_for_log(REDIS_FAULTS[fault])
        texts = [log.read_text() for log in logs] + [response.text for response in answered]

    assert [response.status_code for response in answered] == [503, 503]
    assert REDIS_FAULTS[fault] in texts[1]
    assert REDIS_FAULTS[fault] in answered[1].json()["error"]["message"]
    for text in texts:
        assert "Traceback" not in text
        assert not any(secret in text for secret in (PASSWORD, quote(PASSWORD, safe=""), "the-wrong-one"))
