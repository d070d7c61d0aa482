"""Rate limits: they are shared by all processes, and count each key without storing it."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import requests
from access_fixtures import NEW_KEY, OLD_KEY, PNG, bearer
from harness import Service, assert_error, free_port, run_apache
from redis import Redis


def post_nothing(url: str, **headers: str) -> requests.Response:
    """Send a request that counts but has no image: it gets 400 unless the limit rejects it."""
    return requests.post(f"{url}/predict", headers=headers, timeout=60)


def test_rate_limit_is_shared_by_processes_and_machines(redis: Redis) -> None:
    """Two Apaches with two processes each count together, and X-Forwarded-For is ignored."""
    queue, before = f"queue-{free_port()}", set(redis.scan_iter("*:limit:*"))  # other tests' counters
    with ExitStack() as stack, ThreadPoolExecutor(32) as pool:
        apaches = [run_apache(RATE_LIMIT="1000/day;20/hour", IMAGE_QUEUE=queue) for _ in range(2)]
        urls = [stack.enter_context(apache) for apache in apaches]
        asked = [pool.submit(post_nothing, urls[i % 2], **{"X-Forwarded-For": f"192.0.2.{i}"}) for i in range(120)]
        responses = [each.result() for each in asked]
        unlimited = [requests.get(url + path, timeout=10).status_code for url in urls for path in ("/", "/livez")]

    assert Counter(response.status_code for response in responses) == {400: 20, 429: 100}
    refused = next(response for response in responses if response.status_code == 429)
    assert "20/hour" in assert_error(refused, 429, "rate_limited")
    assert 3000 < int(refused.headers["Retry-After"]) <= 3601
    assert unlimited == [200] * 4
    counters = set(redis.scan_iter("*:limit:*")) - before
    assert len(counters) == 2
    assert all(counter.startswith(f"{queue}:".encode()) and redis.ttl(counter) > 0 for counter in counters)


def test_rate_limit_counts_each_key_without_storing_it(redis: Redis, tmp_path: Path) -> None:
    queue, log = f"queue-{free_port()}", tmp_path / "log"
    with run_apache(RATE_LIMIT="2/hour", API_KEYS=f"{OLD_KEY},{NEW_KEY}", IMAGE_QUEUE=queue, log=log) as url:
        keyless = [post_nothing(url).status_code for _ in range(4)]
        old = [post_nothing(url, **bearer(OLD_KEY)).status_code for _ in range(3)]
        new = [post_nothing(url, **bearer(NEW_KEY)).status_code for _ in range(3)]

    assert (keyless, old, new) == ([401] * 4, [400, 400, 429], [400, 400, 429])
    counters = [key.decode() for key in redis.scan_iter(f"{queue}*")]
    assert len(counters) == 2
    assert not any(OLD_KEY in counter or NEW_KEY in counter for counter in counters)
    assert "exceeded" not in log.read_text()  # a line for each rejection would let clients fill the disk


def test_rate_limited_client_may_return_after_retry_after(redis: Redis) -> None:
    with run_apache(RATE_LIMIT="1/2seconds", IMAGE_QUEUE=f"queue-{free_port()}") as url:
        assert post_nothing(url).status_code == 400
        refused = post_nothing(url)
        while refused.status_code == 400:  # on a slow machine, a new window has already begun
            refused = post_nothing(url)
        assert refused.headers["Retry-After"] in {"1", "2", "3"}
        time.sleep(int(refused.headers["Retry-After"]))

        assert post_nothing(url).status_code == 400


def test_rate_limit_is_not_enforced_without_redis(tmp_path: Path) -> None:
    """Requests wait in the web until Redis is back, so the limit must not reject them."""
    unused = str(free_port())
    with run_apache(RATE_LIMIT="1/hour", REDIS_PORT=unused, REDIS_TIMEOUT="0.5", log=tmp_path / "log") as url:
        assert [post_nothing(url).status_code for _ in range(3)] == [400] * 3
        assert_error(Service(url).post(PNG), 503, "redis_down")

    log = (tmp_path / "log").read_text()
    assert "RATE_LIMIT is not enforced" in log
    assert "Traceback" not in log
