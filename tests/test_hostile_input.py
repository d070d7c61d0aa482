"""What hostile clients send: mutated images, odd files, bombs, malformed forms and malformed HTTP.

None may end a process or leak memory. Only malformed HTTP may get a 5xx.
"""

import gc
import gzip
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import hostile
import pytest
import requests
from harness import ROOT, Service, assert_error, connect, raw_answer, resident_bytes, web_processes
from hostile.bmp import GRAYS, RLE8, make_bmp
from hostile.gif import EMPTY_COMMENT, frame, make_gif
from hostile.jpeg import COMMENT, EXIF, jpeg_with, segment
from hostile.other import EMPTY
from hostile.parts import zeros
from hostile.png import chunk, header, make_png, png_with
from hostile.tiff import tiff_of_strip, tiff_of_tile
from PIL import EpsImagePlugin, Image
from PIL.PngImagePlugin import PngImageFile
from samples import saved

from image_queue import WebQueue
from web import image_preparation as preparation
from web.metrics import Metrics
from web.pipeline import Pipeline, Wanted

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "5000"))
WARM = EXAMPLES // 2  # by then, each process has reached the highest memory use of every decoder
MUTANT_CLIENTS = 2
CODES = {400: {"bad_image", "missing_image"}, 413: {"too_large"}}
GOOD = saved(hostile.SMALL, "PNG")
BITMAP = saved(hostile.SMALL, "BMP")


@pytest.fixture
def unharmed(service: Service) -> Iterator[Service]:
    """The service. Afterwards, the same processes must run and answer a good request, without a logged traceback."""
    processes = web_processes(service.url)
    yield service
    assert service.post(GOOD).status_code == 200
    assert sorted(web_processes(service.url)) == sorted(processes)
    assert service.servers[0].alive
    assert "Traceback" not in service.servers[0].log


# Mutated images


def post_mutants(service: Service, numbers: range) -> Counter[int]:
    """Post these mutants, MUTANT_CLIENTS at once; check each answer and count the statuses."""

    def client(first: int) -> Counter[int]:
        with requests.Session() as session:
            return Counter(check_mutant(session, service.url, number) for number in numbers[first::MUTANT_CLIENTS])

    with ThreadPoolExecutor(MUTANT_CLIENTS) as pool:
        return sum(pool.map(client, range(MUTANT_CLIENTS)), Counter[int]())


def check_mutant(session: requests.Session, url: str, number: int) -> int:
    """Post a mutant and return the status of the answer, which must be 200, 400 or 413."""
    response = session.post(f"{url}/predict", files={"image": ("x", hostile.mutant(number))}, timeout=60)
    status = response.status_code
    if status != 200:
        assert status in CODES, f"mutant {number}: {response.text}"
        code = response.json()["error"]["code"]
        assert code in CODES[status], f"mutant {number}: {response.text}"
        assert_error(response, status, code)
    return status


@pytest.mark.slow("posts 5,000 mutated images")
def test_mutated_images_never_harm_the_service(
    unharmed: Service, record_property: Callable[[str, object], None]
) -> None:
    """FUZZ_EXAMPLES=100000 posts more of them."""
    middle = (WARM + EXAMPLES) // 2
    statuses, found = Counter[int](), []
    for numbers in (range(WARM), range(WARM, middle), range(middle, EXAMPLES)):
        statuses += post_mutants(unharmed, numbers)
        found.append(sizes(unharmed))

    assert statuses.total() == EXAMPLES
    early, halfway, late = found
    assert early.keys() == halfway.keys() == late.keys()
    # Each process gets about 625 mutants in each half, so a leak of 2 kB per mutant would add 1.25 MB in each half. A
    # process that gets its most expensive image late grows in one half only.
    grown = min(after[pid] - before[pid] for before, after in ((early, halfway), (halfway, late)) for pid in late)
    assert grown < 1e6
    answered = ", ".join(f"{times} x {status}" for status, times in statuses.most_common())
    growth = min(late[pid] - early[pid] for pid in late)
    megabytes = f"{growth / 1e6:.1f} MB or more, and none to more than {max(late.values()) / 1e6:.0f} MB"
    record_property("figures", f"{answered}; each web process grew by {megabytes}")


def sizes(service: Service) -> dict[int, int]:
    return {pid: resident_bytes(pid) for pid in web_processes(service.url)}


# Odd files


def test_odd_files_get_the_expected_status(unharmed: Service) -> None:
    assert len(hostile.ODD) > 150

    got = {name: unharmed.post(make()) for name, (make, _) in hostile.ODD.items()}

    assert {name: answer.status_code for name, answer in got.items()} == {
        name: status for name, (_, status) in hostile.ODD.items()
    }
    for name, answer in got.items():
        if answer.status_code == 400:
            assert_error(answer, 400, "missing_image" if name == EMPTY else "bad_image")


def test_an_eps_never_reaches_ghostscript(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments: called.append(arguments))
    make, _ = hostile.ODD["EPS"]

    with pytest.raises(preparation.BadImage):
        preparation.prepare_image(preparation.open_image(io.BytesIO(make())), (224, 224))

    assert not called


def test_warnings_of_pillow_are_not_kept() -> None:
    """Otherwise Python would keep the text of each warning until the process ends."""
    code = """if True:
        import io, sys
        sys.path.insert(0, "tests")
        from hostile.jpeg import SHORT, exif, jpeg_with
        from PIL import TiffImagePlugin
        from web import image_preparation as preparation
        data = jpeg_with(exif(*[(20_000 + i, SHORT, 2**31, 0) for i in range(900)]))
        preparation.prepare_image(preparation.open_image(io.BytesIO(data)), (224, 224))
        print(sum(isinstance(key, tuple) for key in getattr(TiffImagePlugin, "__warningregistry__", {})))
    """

    assert int(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, timeout=60)) == 0


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x89PNG\r\n\x1a\n" + b"x" * 99, "cannot identify image file"),
        (GOOD[:-300], "image file is truncated"),
        (b"<svg/>", "an SVG drawing"),
        (saved(hostile.SMALL, "GIF")[:20] + b"\n\x1b[31m", "cannot identify image file"),
    ],
    ids=["not a PNG", "cut off", "a drawing", "terminal control characters"],
)
def test_a_bad_image_is_logged_with_its_request_and_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, data: bytes, why: str
) -> None:
    monkeypatch.setattr(WebQueue, "shape", lambda _: (224, 224, 3))

    with caplog.at_level("INFO"), pytest.raises(preparation.BadImage):
        Pipeline(Metrics()).classify(io.BytesIO(data), Wanted("the-id-of-it", time.time() + 60, WebQueue()))

    [line] = caplog.messages
    assert line.startswith(f"request the-id-of-it: bad image: {why}")
    assert " at 0x" not in line
    assert line.isprintable()


def test_an_error_does_not_keep_its_image_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error may have to wait for the other images of its request, and an image takes up to half a gigabyte."""
    monkeypatch.setattr(WebQueue, "shape", lambda _: (224, 224, 3))
    gc.collect()

    wanted = Wanted("x", time.time() + 60, WebQueue())
    error = Pipeline(Metrics()).classify_or_error(io.BytesIO(GOOD[:-300]), wanted)

    assert isinstance(error, preparation.BadImage)
    assert not [each for each in gc.get_objects() if isinstance(each, PngImageFile)]


# Bombs


@pytest.fixture(scope="module")
def costs() -> dict[str, dict[str, Any]]:
    """What each bomb costs, measured in a separate process for each."""
    printed = subprocess.check_output([sys.executable, "tests/bomb_costs.py"], cwd=ROOT, timeout=200)
    return {cost["name"]: cost for cost in map(json.loads, printed.splitlines())}


@pytest.mark.slow("decodes 81 decompression bombs")
def test_no_bomb_takes_200_ms_or_50_mb(
    costs: dict[str, dict[str, Any]], record_property: Callable[[str, object], None]
) -> None:
    seconds, megabytes = (max(cost[of] for cost in costs.values()) for of in ("seconds", "megabytes"))

    assert seconds < 0.2
    assert megabytes < 50
    most = f"{seconds * 1000:.0f} ms of CPU and {megabytes:.0f} MB"
    record_property("figures", f"{len(costs)} bombs, each at most {most}")


@pytest.mark.slow("decodes 81 decompression bombs")
@pytest.mark.parametrize("name", hostile.BOMBS)
def test_a_bomb_is_refused(costs: dict[str, dict[str, Any]], name: str) -> None:
    assert costs[name]["outcome"] in ("BadImage", "TooLarge")


@pytest.mark.slow("decodes 81 decompression bombs")
@pytest.mark.parametrize("name", hostile.HARMLESS_BOMBS)
def test_a_harmless_bomb_gives_its_pixels(costs: dict[str, dict[str, Any]], name: str) -> None:
    assert costs[name]["outcome"] == "pixels"


LARGE_BUT_GOOD: dict[str, Callable[[], bytes]] = {
    "PNG with a side of 400,000 pixels": lambda: make_png(header(400_000, 1, 1, 0), rows=b"\0" * 50_001),
    "PNG with 99 texts": lambda: png_with(chunk(b"zTXt", b"x\0\0" + zeros(9)) * 99),
    "PNG with 40,000 IDAT chunks": lambda: png_with(chunk(b"IDAT") * 40_000),
    "JPEG with 15 MB of XMP": lambda: jpeg_with(segment(EXIF, b"x" * 60_000) * 250),
    "JPEG with 900 comments": lambda: jpeg_with(segment(COMMENT, b"x") * 900),
    "run-length encoded screenshot": lambda: make_bmp(
        1920, 1080, 8, (b"\xf0\7" * 8 + b"\0\0") * 1080, compression=RLE8, palette=GRAYS
    ),
    "TIFF with 60,000 strips": lambda: saved(Image.new("L", (9, 60_000)), "TIFF", tiffinfo={278: 1}),
    "TIFF with 70,000 rows in one strip": lambda: tiff_of_strip(1, 70_000, b"x" * 70_000),
    "TIFF with a tile larger than the image": lambda: tiff_of_tile(1, 512, zlib.compress(b"\0" * 512 * 512)),
    "GIF with 9,000 comments": lambda: make_gif(2, 2, EMPTY_COMMENT * 9000, frame(0, 0, 2, 2)),
}


@pytest.mark.parametrize("name", LARGE_BUT_GOOD)
def test_files_that_encoders_write_are_below_the_limits(name: str) -> None:
    image = preparation.open_image(io.BytesIO(LARGE_BUT_GOOD[name]()))

    assert preparation.prepare_image(image, (224, 224)).shape == (224, 224, 3)


# Malformed HTTP and malformed forms


def part(data: bytes, name: str = 'name="image"; filename="x.png"', more: bytes = b"") -> bytes:
    return b"--b\r\nContent-Disposition: form-data; " + name.encode() + b"\r\n" + more + b"\r\n" + data + b"\r\n"


END = b"--b--\r\n"
FORM = part(GOOD) + END
MULTIPART = b"multipart/form-data; boundary="


def request(
    body: bytes = FORM, kind: bytes = MULTIPART + b"b", *more: bytes, length: bytes | None = None, **line: bytes
) -> bytes:
    """A request that closes the connection. `length` replaces its Content-Length, and removes it if empty."""
    first = b" ".join((line.get("method", b"POST"), line.get("path", b"/predict"), line.get("version", b"HTTP/1.1")))
    length = b"%d" % len(body) if length is None else length
    fields = [b"Host: x", b"Connection: close", b"Content-Type: " + kind, *more]
    fields += [b"Content-Length: " + length] if length else []
    return b"\r\n".join([first, *fields, b"", b""]) + body


def chunked(*chunks: bytes, coding: bytes = b"chunked") -> bytes:
    return request(b"".join(chunks), MULTIPART + b"b", b"Transfer-Encoding: " + coding, length=b"")


def sized(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


# Each request with its expected status and error code; 200 has no code.
FORMS: dict[str, tuple[bytes, int, str]] = {
    "no boundary": (request(kind=b"multipart/form-data"), 400, "bad_request"),
    "an empty boundary": (request(kind=MULTIPART), 400, "bad_request"),
    "a boundary that never occurs": (request(kind=MULTIPART + b"never"), 400, "bad_request"),
    "a boundary of 1,000 characters": (
        request(FORM.replace(b"--b", b"--" + b"b" * 1000), MULTIPART + b"b" * 1000), 200, "",
    ),
    "a boundary that is not UTF-8": (request(kind=MULTIPART + b'"\xff\xfe\x01"'), 400, "bad_request"),
    "a URL-encoded form": (request(b"image=x", b"application/x-www-form-urlencoded"), 400, "missing_image"),
    "JSON": (request(b"{}", b"application/json"), 400, "missing_image"),
    "an invalid content type": (request(kind=b";;;=;"), 400, "bad_image"),
    "an empty body": (request(b""), 400, "bad_request"),
    "two images": (request(part(GOOD) + FORM), 200, ""),
    "1,000 images": (request(part(GOOD) * 999 + FORM), 413, "too_large"),
    "an image among 900 fields": (request(part(b"x", 'name="a"') * 900 + FORM), 200, ""),
    "5,000 fields": (request(part(b"x", 'name="a"') * 5000 + FORM), 413, "too_large"),
    "5,000 files": (request(part(b"x", 'name="a"; filename="a"') * 5000 + FORM), 413, "too_large"),
    "a field of a megabyte": (request(part(b"x" * 2**20, 'name="a"') + FORM), 200, ""),
    "a field without a name": (request(part(GOOD, 'filename="x.png"') + END), 400, "missing_image"),
    "a field with an empty name": (request(part(GOOD, 'name=""; filename="x.png"') + END), 400, "missing_image"),
    "a part without Content-Disposition": (request(b"--b\r\n\r\n" + GOOD + b"\r\n" + END), 400, "bad_request"),
    "an image as a text field": (request(part(b"hello", 'name="image"') + END), 400, "missing_image"),
    "a text field and an image of the same name": (request(part(b"hello", 'name="image"') + FORM), 200, ""),
    "an empty file name": (request(part(GOOD, 'name="image"; filename=""') + END), 200, ""),
    "a file name with quotes": (request(part(GOOD, r'name="image"; filename="\"a\";b\\"') + END), 200, ""),
    "a Japanese file name": (request(part(GOOD, 'name="image"; filename="日本語 🙂.png"') + END), 200, ""),
    "a file name that is not UTF-8": (request(part(GOOD).replace(b"x.png", b"\xff\xfe\x80") + END), 200, ""),
    "a file name with ../": (request(part(GOOD, 'name="image"; filename="../../etc/passwd"') + END), 200, ""),
    "a file name of 4,000 letters": (request(part(GOOD, f'name="image"; filename="{"x" * 4000}"') + END), 200, ""),
    "a part with Content-Disposition three times": (
        request(part(GOOD, more=b'Content-Disposition: form-data; name="image"\r\n' * 2) + END), 200, "",
    ),
    "a part with a header of 100 kB": (request(part(GOOD, more=b"X: " + b"x" * 100_000 + b"\r\n") + END), 200, ""),
    "a part with 10,000 headers": (request(part(GOOD, more=b"X: x\r\n" * 10_000) + END), 200, ""),
    "a part with a header without a colon": (request(part(GOOD, more=b"nonsense\r\n") + END), 200, ""),
    "a part with a wrong length": (request(part(GOOD, more=b"Content-Length: -7\r\n") + END), 200, ""),
    "a part in base64": (request(part(GOOD, more=b"Content-Transfer-Encoding: base64\r\n") + END), 200, ""),
    "no final boundary": (request(part(GOOD)), 400, "bad_request"),
    "nothing but boundaries": (request(b"--b\r\n" * 10_000), 400, "bad_request"),
    "line feeds only, in the form": (
        request(part(b"").replace(b"\r\n", b"\n").strip(b"\n") + b"\n\n" + GOOD + b"\n--b--\n"), 200, "",
    ),
    "a compressed body": (
        request(gzip.compress(part(BITMAP) + END), MULTIPART + b"b", b"Content-Encoding: gzip"), 200, "",
    ),
}  # fmt: skip

HEADS: dict[str, tuple[bytes, int, str]] = {
    "a length that is too small": (request(length=b"100"), 400, "bad_request"),
    "a negative length": (request(length=b"-5"), 400, "bad_request"),
    "a length that is not a number": (request(length=b"many"), 400, "bad_request"),
    "a length of 40 digits": (request(length=b"9" * 40), 400, "bad_request"),
    "a length of 8 exabytes": (request(length=b"9223372036854775807"), 413, "too_large"),
    "two lengths": (request(FORM, MULTIPART + b"b", b"Content-Length: 7"), 400, "bad_request"),
    "no length": (request(length=b""), 400, "bad_request"),
    # The chunks take precedence, as the standard allows, and the connection is closed.
    "a length and chunks": (
        request(sized(FORM) + b"0\r\n\r\n", MULTIPART + b"b", b"Transfer-Encoding: chunked"), 200, "",
    ),
    "chunks": (chunked(sized(FORM[:50]), sized(FORM[50:]), b"0\r\n\r\n"), 200, ""),
    "one-byte chunks": (chunked(*(sized(bytes([byte])) for byte in FORM[:3000]), b"0\r\n\r\n"), 400, "bad_request"),
    "an unknown transfer coding": (chunked(FORM, coding=b"gzip"), 400, "bad_request"),
    "chunked twice": (chunked(sized(FORM), b"0\r\n\r\n", coding=b"chunked, chunked"), 501, "not_implemented"),
    "HTTP/1.0": (request(version=b"HTTP/1.0"), 200, ""),
    "HTTP/3.7": (request(version=b"HTTP/3.7"), 200, ""),  # treated as the newest version that Apache knows
    "an HTTP version in letters": (request(version=b"HTTP/x.y"), 400, "bad_request"),
    "a method in lower case": (request(method=b"post"), 200, ""),
    "a method of a thousand letters": (request(method=b"X" * 1000), 405, "method_not_allowed"),
    "an absolute URL": (request(path=b"http://x/predict"), 200, ""),
    "an absolute URL of another host": (request(path=b"http://example.com:99/predict"), 200, ""),
    "the address *": (request(path=b"*"), 400, "bad_request"),
    "CONNECT": (request(method=b"CONNECT", path=b"x:443"), 405, "method_not_allowed"),
    "a NUL in the address": (request(path=b"/pre\0dict"), 400, "bad_request"),
    "a quoted NUL in the address": (request(path=b"/pre%00dict"), 404, "not_found"),
    "an address that is not UTF-8": (request(path=b"/\xff\xfe"), 404, "not_found"),
    "a NUL in a header": (request(FORM, MULTIPART + b"b", b"X: a\0b"), 400, "bad_request"),
    "a folded header": (request(FORM, MULTIPART + b"b", b"X: a\r\n b"), 200, ""),
    "a space before a colon": (request(FORM, MULTIPART + b"b", b"X : a"), 400, "bad_request"),
    "1,000 headers": (request(FORM, MULTIPART + b"b", *[b"X: a"] * 1000), 400, "bad_request"),
    "no Host header": (request().replace(b"Host: x\r\n", b""), 400, "bad_request"),
    "two Host headers": (request(FORM, MULTIPART + b"b", b"Host: y"), 400, "bad_request"),
    "line feeds only, in the headers": (request().replace(b"\r\n", b"\n", 6), 400, "bad_request"),
    "Expect: 100-continue": (request(FORM, MULTIPART + b"b", b"Expect: 100-continue"), 200, ""),
    "an upgrade to HTTP/2": (request(FORM, MULTIPART + b"b", b"Upgrade: h2c", b"HTTP2-Settings: x"), 200, ""),
    "a range of the answer": (request(FORM, MULTIPART + b"b", b"Range: bytes=0-1,5-6"), 200, ""),
    "a TLS hello": (b"\x16\3\1\2\0\1\0\1\xfc\3\3" + b"\0" * 500 + b"\r\n\r\n", 400, "bad_request"),
    "an HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "bad_request"),
    "POST by HTTP/0.9": (b"POST /predict\r\n", 400, "bad_request"),
    "a header of 10 MB": (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 10_000_000 + b"\r\n\r\n", 400, "bad_request"),
}  # fmt: skip

# Bodies that are cut off or have invalid chunks. mod_wsgi treats this as its own fault: it answers 500, or appends its
# 500 to Apache's answer. Only the client that sent the body sees it.
BROKEN_BODIES = {
    "a length that is too large": request(length=b"%d" % (len(FORM) + 500)),
    "a chunk size that is not a number": chunked(b"zz\r\n", FORM),
    "a negative chunk size": chunked(b"-5\r\n", FORM),
    "a chunk size of 20 digits": chunked(b"f" * 20 + b"\r\n", FORM),
    "a chunk without its line end": chunked(b"5\r\nhelloXX0\r\n\r\n"),
    "a chunk that is cut off": chunked(sized(FORM[:50]), b"fff\r\nabc"),
    "a chunk with an endless extension": chunked(b"5;" + b"x" * 100_000 + b"\r\nhello\r\n0\r\n\r\n"),
    "1,000 trailers": chunked(sized(FORM), b"0\r\n" + b"X: y\r\n" * 1000 + b"\r\n"),
}


@pytest.mark.parametrize("name", [*FORMS, *HEADS])
def test_a_malformed_request_gets_the_expected_answer(service: Service, name: str) -> None:
    sent, status, code = (FORMS | HEADS)[name]

    answer = raw_answer(service, sent)

    if status == 200:
        assert answer.status_code == 200, answer.text
        assert answer.json()["success"] is True
    else:
        assert_error(answer, status, code)


@pytest.mark.parametrize("name", BROKEN_BODIES)
def test_a_broken_body_is_answered_in_json(service: Service, name: str) -> None:
    answer = talk(service, BROKEN_BODIES[name])

    head, _, body = answer.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1.1 (400|413|500) ", head)
    assert b"Content-Type: application/json" in head
    first, _ = json.JSONDecoder().raw_decode(body.decode())
    assert first["success"] is False


def test_malformed_requests_never_harm_the_service(unharmed: Service) -> None:
    """The client closes each connection without waiting for the answer."""
    for sent in [*(sent for sent, _, _ in (FORMS | HEADS).values()), *BROKEN_BODIES.values()]:
        with connect(unharmed.url) as connection, suppress(ConnectionError):
            connection.sendall(sent)


def talk(service: Service, sent: bytes) -> bytes:
    """Send this and close the sending side; return everything that is received."""
    with connect(service.url) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(2**16), b""))


def test_pipelined_requests_are_all_answered(service: Service) -> None:
    one = request().replace(b"Connection: close\r\n", b"")

    answers = talk(service, one * 3 + request(b"", path=b"/nothing", method=b"GET"))

    assert re.findall(rb"HTTP/1.1 (\d+) ", answers) == [b"200", b"200", b"200", b"404"]


def test_http_0_9_is_answered_without_status_and_headers(service: Service) -> None:
    assert talk(service, b"GET /\r\n").startswith(b"Welcome")


def test_a_client_that_expects_100_continue_gets_it(service: Service) -> None:
    asking = request(FORM, MULTIPART + b"b", b"Expect: 100-continue")
    head = asking[: -len(FORM)]
    with connect(service.url) as connection:
        connection.sendall(head)
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(FORM)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
