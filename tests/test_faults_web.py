"""Web processes and Apache stop or reload, clients hang up, are slow or too many: accepted requests are answered.

A run prints the figures for the table of faults in docs/reliability.md.
"""

import json
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
import requests
from harness import (
    ROOT,
    Service,
    all_serving,
    apache_of,
    connect,
    free_port,
    run_apache,
    run_model_server,
    run_service,
    wait_until,
    web_processes,
)
from load import CLIENTS, Load, Record, ask, in_flight, known_images
from redis import Redis

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def victim(redis_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service for faults that it recovers from. Tests may add model servers and Apaches to its queue."""
    with run_service(tmp_path_factory.mktemp("victim")) as service:
        yield service


# Reloads


def reload(url: str) -> None:
    """Do what apachectl graceful does; return when all web processes are new."""
    before = web_processes(url)
    os.kill(apache_of(url), signal.SIGUSR1)
    wait_until(lambda: len(set(web_processes(url)) - set(before)) == len(before), "new web processes", 60)


def test_five_graceful_reloads_fail_almost_no_request(victim: Service, record_property: Record) -> None:
    """Apache fails requests that an old worker has accepted but not passed on when the web processes stop."""
    with Load(victim.url) as load:
        for _ in range(5):
            load.wait_for(100)
            reload(victim.url)
        load.wait_for(200)

    assert set(load.failures) <= {"503 unavailable", "500 internal_error", "502 bad_gateway"}
    assert sum(load.failures.values()) <= len(load.outcomes) / 20
    record_property("figures", load.figures)


def test_request_spanning_a_reload_gets_503_with_retry_after(victim: Service, record_property: Record) -> None:
    """An old worker has received the first half of the headers when its web processes end."""
    image = known_images()[0]
    request = requests.Request("POST", "http://x/predict", files={"image": image.data}).prepare()
    assert isinstance(request.body, bytes)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with connect(victim.url, 10) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\n")
        wait_until(lambda: is_accepted(connection), "a worker has the connection")
        reload(victim.url)
        assert ask(victim.url, image).right

        connection.sendall(f"{head}\r\n".encode() + request.body)
        answer = HTTPResponse(connection)
        answer.begin()
        body = answer.read()

    assert (answer.status, json.loads(body)["error"]["code"]) == (503, "unavailable"), body
    assert answer.getheader("Retry-After")
    record_property("figures", "503 unavailable with Retry-After")


def is_accepted(connection: socket.socket) -> bool:
    """Whether a process has accepted the connection. Until then, the kernel lists the other end without an inode."""
    mine = f"{connection.getsockname()[1]:04X}"
    lists = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    rows = [line.split() for line in lists.splitlines()]
    return any(row[2].endswith(f":{mine}") and row[9] != "0" for row in rows)


def test_restarting_the_web_processes_alone_five_times_loses_nothing(victim: Service, record_property: Record) -> None:
    """During the fifth restart, requests take longer than mod_wsgi's default limit of 5 seconds."""
    with Load(victim.url) as load:
        for _ in range(4):
            load.wait_for(100)
            reload_web_processes(victim.url)
        load.wait_for(100)
        wait_until(lambda: all_serving(victim.url), "web processes that serve")
        victim.servers[0].send(signal.SIGSTOP)
        before = all_serving(victim.url)
        (ROOT / "keras_rest_api_app.wsgi").touch()
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(requests.get, f"{victim.url}/livez", timeout=60) for _ in range(8)]
            time.sleep(7)
            victim.servers[0].send(signal.SIGCONT)
            assert all(each.result().status_code == 200 for each in asked)
        wait_until(lambda: not set(before) & set(web_processes(victim.url)), "new web processes", 60)
        load.wait_for(200)

    assert load.failures == {}
    record_property("figures", load.figures)


def reload_web_processes(url: str) -> None:
    """Touch the .wsgi file, as after an update; return when the old web processes have ended."""
    # mod_wsgi records the file's time after importing it: a process that is still starting would miss the change.
    before = wait_until(lambda: all_serving(url), "web processes that serve")
    (ROOT / "keras_rest_api_app.wsgi").touch()
    wait_until(lambda: not set(before) & set(web_processes(url)), "new web processes", 60)


# Dead web processes, absent model servers, impatient clients


def test_killed_web_process_fails_only_its_own_requests(redis: Redis, victim: Service, record_property: Record) -> None:
    before = set(redis.keys(f"{victim.queue}:*"))  # keys of other tests that have not expired yet
    with run_apache(IMAGE_QUEUE=victim.queue, REQUEST_TIMEOUT="5") as url, Load(url) as load:
        load.wait_for(100)
        victim.servers[0].send(signal.SIGSTOP)
        wait_until(lambda: redis.llen(victim.queue) + in_flight(redis, victim.queue) == CLIENTS, "all requests wait")
        killed, other = web_processes(url)
        os.kill(killed, signal.SIGKILL)
        died = time.monotonic()
        victim.servers[0].send(signal.SIGCONT)
        load.wait_for(200)
        assert other in web_processes(url)

    failed = [o for o in load.outcomes if not o.right]
    assert failed
    assert set(load.failures) <= {"500 internal_error", "502 bad_gateway"}
    assert all(o.started < died < o.started + o.seconds + 0.1 for o in failed)
    assert len(failed) < CLIENTS
    wait_until(
        lambda: not set(redis.keys(f"{victim.queue}*")) - before - heartbeats(redis, victim.queue),
        "their keys are gone",
    )
    record_property("figures", f"{load.figures}, all of them in the killed process")


def heartbeats(redis: Redis, queue: str) -> set[Any]:
    """The keys that live model servers write: their heartbeats, the list of models and the shape of their images."""
    patterns = (f"{queue}:{part}" for part in ("server:*", "shape", "models", "model:*"))
    return {key for pattern in patterns for key in redis.keys(pattern)}


def test_200_clients_without_a_model_server_get_504_in_time(
    redis: Redis, tmp_path: Path, record_property: Record
) -> None:
    queue, images = f"queue-{free_port()}", known_images()[:200]
    with run_apache(IMAGE_QUEUE=queue, REQUEST_TIMEOUT="5") as url, ThreadPoolExecutor(200) as pool:
        asked = [pool.submit(ask, url, image) for image in images]
        wait_until(lambda: redis.llen(queue) == 200, "all 200 wait")
        homepage = []
        while redis.llen(queue) == 200:
            started = time.monotonic()
            assert requests.get(url, timeout=10).status_code == 200
            homepage.append(time.monotonic() - started)
        outcomes = [each.result() for each in asked]

    assert {(o.status, o.code) for o in outcomes} == {(504, "timeout")}
    assert all("no model server for digits is alive" in o.message for o in outcomes)
    assert max(o.seconds for o in outcomes) < 6
    assert sorted(homepage)[len(homepage) * 95 // 100] < 0.1
    assert redis.keys(f"{queue}*") == []
    longest = max(o.seconds for o in outcomes)
    record_property("figures", f"200 x 504, each within {longest:.2f} s; GET / within {max(homepage) * 1000:.0f} ms")


def test_images_of_clients_that_hung_up_are_not_computed(redis: Redis, tmp_path: Path, record_property: Record) -> None:
    """Not even if the web process that would withdraw the jobs dies. No key is left in Redis."""
    queue, images = f"queue-{free_port()}", known_images()[:200]
    with run_apache(IMAGE_QUEUE=queue, REQUEST_TIMEOUT="5") as url:
        with ThreadPoolExecutor(200) as pool:
            gone = [pool.submit(ask, url, image, timeout=0.1) for image in images]
            assert all(each.result().status == 0 for each in gone)
        wait_until(lambda: redis.llen(queue) > 50, "their jobs are queued")
        os.kill(web_processes(url)[0], signal.SIGKILL)
        wait_until(lambda: not redis.keys(f"{queue}:accepted:*"), "their deadlines have passed")
        left = redis.llen(queue)
        assert left
        with run_model_server(tmp_path / "server", IMAGE_QUEUE=queue) as server:
            wait_until(lambda: set(redis.keys(f"{queue}*")) == heartbeats(redis, queue) != set(), "the queue is empty")
            assert server.batches == []
            assert ask(url, images[0]).right
    record_property("figures", f"200 hung up, {left} of their jobs left in the queue, none computed, no key left")


def test_full_queue_gets_503_and_accepted_images_are_answered(
    redis: Redis, victim: Service, record_property: Record
) -> None:
    images = known_images()[:64]
    with run_apache(IMAGE_QUEUE=victim.queue, MAX_QUEUE="8") as url, ThreadPoolExecutor(64) as pool:
        victim.servers[0].send(signal.SIGSTOP)
        asked = [pool.submit(ask, url, image) for image in images]
        wait_until(lambda: redis.llen(victim.queue) == 8 and sum(a.done() for a in asked) >= 48, "the queue is full")
        victim.servers[0].send(signal.SIGCONT)
        outcomes = [each.result() for each in asked]

    refused = [o for o in outcomes if o.status == 503]
    assert all(o.code == "queue_full" and o.retry_after for o in refused)
    answered = [o for o in outcomes if o.right]
    assert len(answered) >= 8
    assert len(answered) + len(refused) == 64
    figures = f"{len(refused)} x 503 with Retry-After, {len(answered)} accepted and answered correctly"
    record_property("figures", figures)


# Slow connections


def test_200_slow_connections_are_cut_while_others_are_served(service: Service, record_property: Record) -> None:
    """Each sends one byte per second: half of the connections in their headers, the others in their body."""
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\n"
    form = b"Content-Length: 100000\r\nContent-Type: multipart/form-data; boundary=x\r\n\r\n"
    load = Load(service.url)
    slow = [connect(service.url, 10) for _ in range(200)]
    for number, connection in enumerate(slow):
        connection.sendall(head if number % 2 else head + form)
    started, cut = time.monotonic(), 0
    with load:
        while slow and time.monotonic() - started < 60:
            ready, _, _ = select.select(slow, [], [], 1)
            for connection in ready:  # a response, or the end of the connection
                slow.remove(connection)
                connection.close()
                cut += 1
            for connection in slow:
                with suppress(OSError):
                    connection.send(b"x")
        took = time.monotonic() - started

    assert cut == 200
    assert load.failures == {}
    record_property("figures", f"all 200 closed within {took:.0f} s; the others: {load.figures}")


def test_2500_silent_connections_keep_nobody_waiting(service: Service, record_property: Record) -> None:
    """2,500 send nothing, then another 2,500 send half a header, which occupies Apache's workers."""
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    took = []
    for beginning in (b"", b"POST /predict HTTP/1.1\r\nHost: x"):
        with ExitStack() as stack:
            for _ in range(2500):
                stack.enter_context(connect(service.url, 10)).sendall(beginning)
            started = time.monotonic()
            assert requests.get(f"{service.url}/livez", timeout=60).ok
            took.append(time.monotonic() - started)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))

    assert max(took) < 2  # a worker waits 10 seconds for each of them
    record_property("figures", f"GET /livez within {max(took):.2f} s")
