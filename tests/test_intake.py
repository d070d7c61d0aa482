"""How a model server reads jobs: the parser of replies, and the ways to parse a job."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import orjson
import pytest
from harness import wait_until
from hypothesis import given
from hypothesis import strategies as st
from queue_fixtures import ABOUT, IMAGE, answer, ids, images, in_background, push, result_of, waiting_ids
from redis import Redis
from redis.exceptions import ConnectionError, RedisError, ResponseError

import settings
from helpers import base64_decode_image, base64_encode_image
from image_queue import Job, ServerQueue, failed
from image_queue.entry_parser import EntryParser

pytest_plugins = ["queue_fixtures"]

LONGEST = 20_000
LONG = bytes(range(256)) * 78  # 19,968 bytes, with line ends and zeros
REPLIES = [
    (b"$3\r\na\r\n\r\n", b"a\r\n"),
    (b"$0\r\n\r\n", b""),
    (b":42\r\n", 42),
    (b"$%d\r\n%s\r\n" % (len(LONG), LONG), LONG),
    (b"$-1\r\n", None),
    (b"*-1\r\n", None),
    (b"+OK\r\n", b"OK"),
    (b"$%d\r\n%s\r\n" % (10 * LONGEST, b"x" * 10 * LONGEST), b"x" * (LONGEST + 1)),
    (b"$%d\r\n%s\r\n" % (LONGEST + 1, b"y" * (LONGEST + 1)), b"y" * (LONGEST + 1)),
    (b"$1\r\nz\r\n", b"z"),
]


class Connected:
    """What the parser uses of a connection of redis-py."""

    socket_timeout = 5.0

    def __init__(self, end: socket.socket) -> None:
        end.settimeout(self.socket_timeout)
        self._get_socket = lambda: end


@pytest.fixture
def both_ends() -> Iterator[tuple[socket.socket, EntryParser]]:
    """Give Redis' end of a connection, and a parser at the other."""
    far, near = socket.socketpair()
    parser = EntryParser(65536, LONGEST)
    parser.on_connect(Connected(near))
    with closing(far), closing(near):
        yield far, parser


def as_bytes(reply: Any) -> Any:
    return bytes(reply) if isinstance(reply, memoryview) else reply


@pytest.mark.parametrize("step", [1, 7, 64, 1000, 10**6])
def test_replies_are_read_however_they_are_cut(both_ends: tuple[socket.socket, EntryParser], step: int) -> None:
    far, parser = both_ends
    stream = b"".join(sent for sent, _ in REPLIES * 2)

    def send() -> None:
        for start in range(0, len(stream), step):
            far.sendall(stream[start : start + step])

    threading.Thread(target=send, daemon=True).start()

    assert [as_bytes(parser.read_response()) for _ in REPLIES * 2] == [expected for _, expected in REPLIES * 2]
    assert not parser.can_read()


def test_an_error_within_replies_is_returned(both_ends: tuple[socket.socket, EntryParser]) -> None:
    far, parser = both_ends
    far.sendall(b"$1\r\na\r\n-ERR no\r\n$1\r\nb\r\n")

    replies = [as_bytes(parser.read_response()) for _ in range(3)]

    assert (replies[0], replies[2]) == (b"a", b"b")
    assert isinstance(replies[1], ResponseError)


def test_a_connection_that_ends_within_a_reply_is_an_error(both_ends: tuple[socket.socket, EntryParser]) -> None:
    far, parser = both_ends
    far.sendall(b"$10\r\nabc")
    far.shutdown(socket.SHUT_WR)

    with pytest.raises(ConnectionError):
        parser.read_response()


def test_a_parser_asked_not_to_wait_keeps_what_has_arrived(both_ends: tuple[socket.socket, EntryParser]) -> None:
    far, parser = both_ends
    far.sendall(b"+O")

    with pytest.raises(TimeoutError):
        parser.read_response(timeout=0)
    far.sendall(b"K\r\n")

    assert parser.read_response() == b"OK"


TEXTS = st.text(max_size=20)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text("ab_-", min_size=1, max_size=9) | TEXTS | st.integers(),
        "deadline": st.floats(0, 2e9) | st.none() | TEXTS,
        "request": TEXTS,
        "top": st.integers(-1, 5),
        "shape": st.just([2, 2, 3]) | st.lists(st.integers(0, 9)),
        "crashes": st.integers(-1, 3),
        "image": st.binary(max_size=40).map(lambda data: base64_encode_image(np.frombuffer(data, np.uint8))) | TEXTS,
        "more": st.dictionaries(TEXTS, TEXTS, max_size=2) | st.just(',"image":"'),
    },
)


@given(FIELDS, st.permutations(["image", "id", "more"]), st.sampled_from([(",", ":"), (", ", ": ")]), st.data())
def test_a_job_is_the_same_whichever_way_it_is_parsed(
    fields: dict[str, Any], order: list[str], separators: tuple[str, str], data: st.DataObject
) -> None:
    """With its image split off and decoded first, if it is as dump() writes it, and as JSON."""
    last = {name: fields.pop(name) for name in order if name in fields}
    raw = json.dumps(fields | last, separators=separators).encode()
    raw = raw[: data.draw(st.integers(len(raw) - 3, len(raw)))]

    assert parsed(memoryview(raw)) == parsed(raw)


@pytest.mark.parametrize(
    "raw",
    [b'{"id":"a","deadline":1,"image":"}', b'{"id":"a","deadline":1,"image":""}',
     b'{"id":"a","deadline":1,"image":"A"}',
     b'{"deadline":1,"id":"a","image":"AAAA","request":"r"}', b'{"id":"a","image":"AAAA","image":"BBBB","deadline":1}',
     b'{"id":"a","image":"AAAA","deadline":1,"image":"BBBB"}', b'{"id":"a","deadline":1,"image":"AAAA"} ',
     b'{"id":"a","deadline":1,"more":{"x":1,"image":"AAAA"}}', b'{"id":"a","deadline":1,"more":{"x":1,"image":"AAAA"}',
     b'{"id":"a","deadline":1,,"image":"AAAA"}', b'{"id":"a","deadline":1,"image":"AA\\u0041A"}',
     b'{"id":"a","deadline":1,"image":"AA\nAA"}', b'{"id":"a","deadline":1,"image":"AA AA"}', b',"image":"AAAA"}'],
)  # fmt: skip
def test_a_job_that_resembles_one_of_the_web_is_parsed_as_json(raw: bytes) -> None:
    assert parsed(memoryview(raw)) == parsed(raw)


def parsed(raw: bytes | memoryview) -> Any:
    """Return the fields of the job, with the image as bytes if it is valid."""
    try:
        job = Job.parse(raw)
    except ValueError:
        return None
    image: Any = job.image
    if isinstance(image, str):
        try:
            image = base64_decode_image(image, "uint8", (len(image) * 3 // 4 - image[-2:].count("="),)).tobytes()
        except ValueError:
            image = "invalid"
    deadline = job.deadline if image else "soon"
    return (job.id, image, deadline, job.request, job.top, job.crashes, job.shape)


def test_the_image_of_a_job_from_the_web_is_decoded_without_parsing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    loads = orjson.loads
    monkeypatch.setattr(orjson, "loads", lambda text: lengths.append(len(text)) or loads(text))  # type: ignore[func-returns-value]
    job = Job("a", "AAAA" * 1000, time.time() + 9, "r", shape=(10, 100, 3))

    assert Job.parse(memoryview(job.dump())).image == bytes(3000)
    assert max(lengths) < 100


def test_jobs_of_older_web_servers_and_other_clients_are_taken(redis: Redis, server: ServerQueue) -> None:
    later = time.time() + 60
    for text in (
        f'{{"id":"a","deadline":{later},"image":"{IMAGE}"}}',
        f'{{"image": "{IMAGE}", "id": "b", "deadline": {later}}}',
        f' {{"deadline": {later},\n "id": "c",\n "image": "{IMAGE}"\n}}\n',
        f'{{"deadline":{later},"id":"d","image":"{IMAGE.replace("a", chr(92) + "u0061")}"}}',
        f'{{"id":"e","image":"{IMAGE}","deadline":{later},"request":"last"}}',
    ):
        redis.rpush(settings.IMAGE_QUEUE, text)

    batch = server.take(32)

    assert ids(batch) == ["a", "b", "c", "d", "e"]
    assert images(batch) == [IMAGE] * 5


def test_a_long_queue_is_taken_in_order(redis: Redis, server: ServerQueue) -> None:
    expected = [f"job{number}" for number in range(300)]
    push(redis, *expected)

    assert ids(server.take(299, wait=1)) == expected[:-1]
    assert waiting_ids(redis) == expected[-1:]


def test_entries_of_any_size_may_follow_one_another(redis: Redis, server: ServerQueue) -> None:
    sizes = [1, 10**6, 3, 20_000_000, 2, 1_440_000, 0]
    for number, size in enumerate(sizes):
        push(redis, f"job{number}", image="A" * 4 * (size // 4))

    batch = server.take(32)
    answer(server, batch, failed("No."))

    assert ids(batch) == [f"job{number}" for number in range(len(sizes))]
    assert [len(image) for image in images(batch)] == [0, 10**6, 0, 0, 0, 1_440_000, 0]
    assert all(result_of(redis, job_id) == failed("No.") for job_id in ids(batch))


def test_what_was_taken_before_a_failure_is_requeued(redis: Redis, server: ServerQueue) -> None:
    """Its connection has replies outstanding, which the next command must not get."""
    push(redis, *"abcdefghijklmnop")

    def fail(job: Job) -> int:
        raise MemoryError

    with pytest.raises(MemoryError):
        server.take(16, place=fail)
    server.join()

    assert waiting_ids(redis) == list("abcdefghijklmnop")
    assert ids(server.take(32)) == list("abcdefghijklmnop")


def test_a_taking_connection_that_redis_closes_is_replaced(redis: Redis, server: ServerQueue) -> None:
    push(redis, "a", "b")
    server.take(1)
    number = redis.client_list("normal")
    redis.client_kill_filter(_type="normal", skipme=True)
    wait_until(lambda: len(redis.client_list("normal")) < len(number), "Redis has closed them")

    assert ids(server.take(1)) == ["b"]


def test_a_poll_that_is_killed_is_an_error_and_the_next_one_works(redis: Redis, server: ServerQueue) -> None:
    taken = in_background(lambda: server.take(32, wait=4))
    wait_until(lambda: redis.info("clients")["blocked_clients"], "the server waits")
    redis.client_kill_filter(_type="normal", skipme=True)

    with pytest.raises(RedisError):
        taken.result(10)
    push(redis, "a")

    assert ids(server.take(32, wait=1)) == ["a"]


def test_rejected_commands_leave_no_reply_behind(redis: Redis) -> None:
    queue = ServerQueue(ABOUT, 5)
    queue.join()
    redis.set(settings.IMAGE_QUEUE, "not a list")
    for _ in range(2):
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            queue.take(32, wait=1)
    redis.delete(settings.IMAGE_QUEUE)
    push(redis, "a", "b")

    assert ids(queue.take(32, wait=1)) == ["a", "b"]
    queue._slot_socket.close()
