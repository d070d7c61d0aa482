"""The ways to send an image to /predict, and the errors for requests that do it wrong."""

import base64
import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from harness import (
    ROOT,
    Missing,
    Service,
    all_serving,
    assert_error,
    free_port,
    make_certificates,
    need,
    resident_bytes,
    run_apache,
    wait_until,
    web_processes,
)

SEVEN = (ROOT / "models/digits/seven.jpg").read_bytes()
FORM = "multipart/form-data; boundary=X"
LIMIT = 16 * 2**20
MB = b"\0" * 2**20


def part(data: bytes, disposition: str = 'form-data; name="image"; filename="photo.jpg"', more: str = "") -> bytes:
    return f"--X\r\nContent-Disposition: {disposition}\r\n{more}\r\n".encode("latin-1") + data + b"\r\n"


def form(data: bytes = SEVEN, disposition: str = 'form-data; name="image"; filename="photo.jpg"') -> bytes:
    return part(data, disposition) + b"--X--\r\n"


def post(service: Service, body: Any, content_type: str | None, **headers: str) -> requests.Response:
    named = {} if content_type is None else {"Content-Type": content_type}
    return requests.post(f"{service.url}/predict", body, headers=named | headers, timeout=60)


def label(answer: requests.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["predictions"][0]["label"])


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()


def chunks(data: bytes) -> Iterator[bytes]:
    return iter([data[:1000], data[1000:]])


# Accepted


@pytest.mark.parametrize(
    "content_type", ["application/octet-stream", "binary/octet-stream", "Application/Octet-Stream; x=y", "", None]
)
def test_body_of_unknown_type_is_treated_as_an_image(service: Service, content_type: str | None) -> None:
    assert label(post(service, SEVEN, content_type)) == "7"


COMPRESSED = {
    "gzip": ("gzip", gzip.compress(SEVEN)),
    "x-gzip": ("x-gzip", gzip.compress(SEVEN)),
    "upper case": ("GZIP", gzip.compress(SEVEN)),
    "gzip of several members": ("gzip", gzip.compress(SEVEN[:500]) + gzip.compress(b"") + gzip.compress(SEVEN[500:])),
    "gzip padded with zeros": ("gzip", gzip.compress(SEVEN) + bytes(70_000)),
    "deflate": ("deflate", zlib.compress(SEVEN)),
    "raw deflate": ("deflate", raw_deflate(SEVEN)),
    "identity": ("identity", SEVEN),
    "identity and gzip": ("identity, gzip", gzip.compress(SEVEN)),
    "empty": ("", SEVEN),
}


@pytest.mark.parametrize(("encoding", "body"), COMPRESSED.values(), ids=COMPRESSED.keys())
def test_compressed_body_is_decompressed(service: Service, encoding: str, body: bytes) -> None:
    assert label(post(service, body, "image/jpeg", **{"Content-Encoding": encoding})) == "7"
    assert label(post(service, chunks(body), None, **{"Content-Encoding": encoding})) == "7"


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_form_is_decompressed(service: Service, encoding: str, compress: Any) -> None:
    two = part(SEVEN) + form((ROOT / "models/digits/three.png").read_bytes())

    answer = post(service, compress(two), FORM, **{"Content-Encoding": encoding})

    assert [each["predictions"][0]["label"] for each in answer.json()["results"]] == ["7", "3"]


FORMS = {
    "a file name in another charset": form(disposition='form-data; name="image"; filename="\xe9t\xe9.jpg"'),
    "an empty file name": form(disposition='form-data; name="image"; filename=""'),
    "only an extended file name (filename*)": form(disposition="form-data; name=image; filename*=UTF-8''%C3%A9.jpg"),
    "with a text field": part(b"a holiday", 'form-data; name="comment"') + form(),
    "with a large text field": part(b"x" * 700_000, 'form-data; name="comment"') + form(),
    "with another file": part(SEVEN, 'form-data; name="thumbnail"; filename="x"') + form(),
    "with data before and after": b"before\r\n" + form() + b"x" * 300_000,
    "bare line feeds": form().replace(b"\r\n", b"\n"),
}


@pytest.mark.parametrize("body", FORMS.values(), ids=FORMS.keys())
def test_unusual_form_with_an_image_is_accepted(service: Service, body: bytes) -> None:
    assert label(post(service, body, FORM)) == "7"


@pytest.mark.parametrize(("size", "status"), [(LIMIT, 200), (LIMIT + 1, 413)])
@pytest.mark.parametrize("way", ["plain", "chunked", "gzip"])
def test_upload_size_limit_is_exact(service: Service, size: int, status: int, way: str) -> None:
    body = SEVEN + bytes(size - len(SEVEN))
    sent = {"plain": body, "chunked": chunks(body), "gzip": gzip.compress(body, 1)}[way]

    answer = post(service, sent, "image/jpeg", **({"Content-Encoding": "gzip"} if way == "gzip" else {}))

    assert answer.status_code == status, answer.text
    assert status == 200 or "16 MB" in assert_error(answer, 413, "too_large")


# Rejected, with the reason

TEXT = 'form-data; name="image"'
BASE64 = base64.b64encode(SEVEN)
BAD_FORMS = {
    "a part without a filename": (form(disposition=TEXT), "missing_image", ("`image`", "no filename", "curl -F")),
    "a part of 700 kB without a filename": (form(bytes(700_000), TEXT), "missing_image", ("no filename",)),
    "base64 text": (form(BASE64, TEXT), "missing_image", ("base64", "curl -F")),
    "base64 text of 700 kB": (form(base64.b64encode(bytes(525_000)), TEXT), "missing_image", ("base64",)),
    "base64 text in lines": (form(base64.encodebytes(SEVEN), TEXT), "missing_image", ("base64",)),
    "a data: URL": (form(b"data:image/jpeg;base64," + BASE64, TEXT), "missing_image", ("data: URL", "decode")),
    "a web address": (form(b"https://example.org/cat.jpg", TEXT), "missing_image", ("web address", "curl -F")),
    "another field": (form(disposition='form-data; name="file"; filename="x"'), "missing_image", ("`file`", "`image`")),
    "an array": (form(disposition='form-data; name="image[]"; filename="x"'), "missing_image", ("`image[]`",)),
    "upper-case field": (form(disposition='form-data; name="Image"; filename="x"'), "missing_image", ("`Image`",)),
    "no name": (form(disposition='form-data; filename="x"'), "missing_image", ("name its field `image`",)),
    "no file": (form(b"1", 'form-data; name="top"'), "missing_image", ("has no file", "curl -F")),
    "no part": (b"--X--\r\n", "missing_image", ("has no file", "curl -F")),
    "another boundary": (form().replace(b"--X", b"--Y"), "bad_request", ("boundary", "does not occur in the body")),
    "no boundary in a large body": (bytes(700_000), "bad_request", ("boundary", "does not occur in the body")),
    "empty": (b"", "bad_request", ("body is empty",)),
    "cut off in the image": (form()[:1000], "bad_request", ("ends before its closing boundary",)),
    "cut off in a header": (form()[:30], "bad_request", ("ends before its closing boundary",)),
    "cut off before the end": (part(SEVEN), "bad_request", ("ends before its closing boundary",)),
    "a part without a name": (b"--X\r\nA: b\r\n\r\nc\r\n--X--\r\n", "bad_request", ("Content-Disposition",)),
    "endless headers": (b"--X\r\nA: " + bytes(700_000), "bad_request", ("headers that are too long",)),
}  # fmt: skip


@pytest.mark.parametrize(("body", "code", "expected"), BAD_FORMS.values(), ids=BAD_FORMS.keys())
def test_form_without_an_image_gets_the_reason(
    service: Service, body: bytes, code: str, expected: tuple[str, ...]
) -> None:
    message = assert_error(post(service, body, FORM), 400, code)

    assert all(each in message for each in expected), message


def test_form_with_too_many_parts_is_413(service: Service) -> None:
    assert "parts" in assert_error(post(service, part(b"", TEXT) * 2000, FORM), 413, "too_large")


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("multipart/form-data", "has no boundary"),
        ("multipart/form-data; boundary=", "has no valid boundary"),
        ('multipart/form-data; boundary=""', "has no valid boundary"),
        ("multipart/form-data; boundary=\u00fcber", "has no valid boundary"),
    ],
)
def test_form_without_a_valid_boundary_is_400(service: Service, content_type: str, expected: str) -> None:
    message = assert_error(post(service, form(), content_type.encode("latin-1")), 400, "bad_request")  # type: ignore[arg-type]

    assert expected in message
    assert "header" in message


@pytest.mark.parametrize(
    ("content_type", "body", "expected"),
    [
        ("application/x-www-form-urlencoded", SEVEN, "application/x-www-form-urlencoded"),
        ("application/x-www-form-urlencoded", b"image=" + BASE64, "curl -F"),
        ("application/json", json.dumps({"image": BASE64.decode()}).encode(), "JSON"),
        ("application/vnd.api+json", b"{}", "JSON"),
        ("text/plain", SEVEN, "text/plain"),
        ("multipart/mixed; boundary=X", form(), "multipart/mixed"),
        ("image", SEVEN, "image/jpeg"),
    ],
)
def test_body_of_another_type_gets_the_accepted_types(
    service: Service, content_type: str, body: bytes, expected: str
) -> None:
    message = assert_error(post(service, body, content_type), 400, "missing_image")

    assert expected in message
    assert "curl -F image=@photo.jpg" in message


DAMAGED = {
    "cut off": (gzip.compress(SEVEN)[:-20], "ends before"),
    "without its checksum": (gzip.compress(SEVEN)[:-8], "ends before"),
    "a wrong checksum": (gzip.compress(SEVEN)[:-8] + bytes(8), "damaged"),
    "a wrong byte": (gzip.compress(SEVEN)[:40] + b"\xff" * 9 + gzip.compress(SEVEN)[49:], "damaged"),
    "not compressed": (SEVEN, "damaged"),
    "trailing data": (gzip.compress(SEVEN) + b"more", "damaged"),
    "very many members": (gzip.compress(b"") * 100_000, "goes on"),
}


@pytest.mark.parametrize(("body", "expected"), DAMAGED.values(), ids=DAMAGED.keys())
@pytest.mark.parametrize("content_type", ["image/jpeg", FORM])
def test_damaged_compressed_body_is_400(service: Service, body: bytes, expected: str, content_type: str) -> None:
    answer = post(service, body, content_type, **{"Content-Encoding": "gzip"})

    assert expected in assert_error(answer, 400, "bad_request")


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, gzip", "br, gzip", "x" * 5000])
def test_unknown_content_encoding_is_415(service: Service, encoding: str) -> None:
    answer = post(service, SEVEN, "image/jpeg", **{"Content-Encoding": encoding})

    message = assert_error(answer, 415, "unsupported_media_type")
    assert "gzip" in message
    assert len(message) < 200
    assert answer.headers["Accept-Encoding"] == "gzip, deflate"


def test_gzip_bomb_is_413_and_costs_no_memory() -> None:
    """0.3 MB that decompress to 300 MB, as an image, as a file in a form and as text in a form."""
    zeros = gzip.compress(MB, 9) * 300
    bombs = [
        ("image/png", zeros),
        (FORM, gzip.compress(part(b"")[:-2]) + zeros),
        (FORM, gzip.compress(part(b"", TEXT)[:-2]) + zeros),
    ]
    with run_apache(IMAGE_QUEUE=f"queue-{free_port()}") as url:
        before = max(map(resident_bytes, web_processes(url)))
        for content_type, bomb in bombs * 3:
            answer = post(Service(url), bomb, content_type, **{"Content-Encoding": "gzip"})
            assert "16 MB" in assert_error(answer, 413, "too_large")
        grown = max(map(resident_bytes, web_processes(url))) - before

    assert grown < 12e6


@pytest.mark.parametrize("size", [LIMIT + 2**20, 5 * LIMIT])
def test_web_not_apache_reports_the_size_limit(service: Service, size: int) -> None:
    assert "16 MB" in assert_error(post(service, bytes(size), "image/png"), 413, "too_large")


# Full disk


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A folder on its own file system, with room for one upload of maximum size."""
    if os.geteuid() != 0:
        raise Missing("mounting a file system requires root")
    with tempfile.TemporaryDirectory(prefix="test-uploads-") as name:
        mount("-t", "tmpfs", "-o", "size=20m,mode=1777", "tmpfs", name)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", name], capture_output=True, check=False)


def mount(*arguments: str) -> None:
    if subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode:
        raise Missing("file systems can't be mounted here")


def fill(disk: Path) -> None:
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while file.write(MB):
            pass


def empty(disk: Path) -> None:
    (disk / "filler").unlink()


def make_read_only(disk: Path) -> None:
    mount("-o", "remount,ro", str(disk))


def make_writable(disk: Path) -> None:
    mount("-o", "remount,rw", str(disk))


def remove(disk: Path) -> None:
    subprocess.run(["umount", str(disk)], check=True)
    disk.rmdir()


def make_again(disk: Path) -> None:
    disk.mkdir()
    disk.chmod(0o1777)


FAULTS = [(fill, empty), (make_read_only, make_writable), (remove, make_again)]


def test_uploads_are_503_while_the_disk_is_full(service: Service, small_disk: Path, tmp_path: Path) -> None:
    log, large = tmp_path / "log", SEVEN + bytes(1_500_000)
    with run_apache(IMAGE_QUEUE=service.queue, TMPDIR=str(small_disk), log=log) as url:
        web = Service(url)
        wait_until(lambda: all_serving(url), "web processes that serve")  # each chooses its temporary folder at start
        assert label(post(web, large, "image/jpeg")) == label(web.post(large)) == "7"
        (small_disk / "filler").write_bytes(MB * 10)
        assert_error(requests.get(f"{url}/readyz", timeout=10), 503, "storage_full")  # 16 MB must be free

        for begin, end in FAULTS:
            begin(small_disk)
            for refused in [post(web, large, "image/jpeg"), post(web, chunks(large), None), web.post(large)] * 3:
                assert refused.headers["Retry-After"] == "5"
                assert "try again" in assert_error(refused, 503, "storage_full")
            unready = requests.get(f"{url}/readyz", timeout=10)
            assert unready.json()["ready"] is False
            assert_error(unready, 503, "storage_full")
            for in_memory in (SEVEN, SEVEN + bytes(500_000)):
                assert label(post(web, in_memory, "image/jpeg")) == label(web.post(in_memory)) == "7"
            assert requests.get(f"{url}/livez", timeout=10).ok

            end(small_disk)
            assert label(post(web, large, "image/jpeg")) == label(web.post(large)) == "7"
            assert requests.get(f"{url}/readyz", timeout=10).ok

    logged = [line for line in log.read_text().splitlines() if "can't be stored" in line]
    assert len(logged) <= 2 * len(["of 16 MB", *FAULTS])  # each process logs each reason at most once
    for reason in ("9.94 MB are free", "No space left", "Read-only", "No such file"):
        assert any(reason in line and str(small_disk) in line for line in logged), reason
    assert "Traceback" not in log.read_text()


# Slow networks


def impatient_site(folder: Path) -> list[str]:
    """Copy the project with Apache timeouts of 1, 2 or 4 seconds, not 10, 20 or more; return the command to run it."""
    for name in ("deploy/apache", "image_queue", "web"):
        shutil.copytree(ROOT / name, folder / name)
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*.wsgi")):
        shutil.copy(file, folder)
    for site in (folder / "deploy/apache").glob("*.conf"):
        text = site.read_text()
        site.write_text(re.sub(r"(?m)^(RequestReadTimeout|Timeout|.* socket-timeout=).*$", shorten, text))
    folder.chmod(0o755)
    run, environment = folder / "deploy/apache/run-private", Path(sys.prefix).resolve()
    if os.geteuid() != 0:
        (folder / ".venv").symlink_to(environment)
        return [str(run)]
    (folder / ".venv").mkdir()  # a mount point, since the web can't follow a link into /root
    return [need("unshare"), "--mount", "sh", "-ec", f"mount --bind {environment} {folder}/.venv; exec {run}"]


def shorten(line: re.Match[str]) -> str:
    def less(seconds: re.Match[str]) -> str:
        return str(next(short for short, most in ((1, 10), (2, 20), (4, 10_000)) if int(seconds[0]) <= most))

    return re.sub(r"(?<!MinRate=)\b\d+", less, line[0])


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that Apache's user may read; pytest's own folders belong to root."""
    with tempfile.TemporaryDirectory(prefix="test-uploads-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.slow("sends an image for 8 seconds")
def test_slow_upload_is_accepted_while_it_keeps_flowing(service: Service, public: Path) -> None:
    """At twice the minimum rate, for twice the longest timeout. Meanwhile, a stalled TLS handshake is cut off."""
    files, tls_port = make_certificates(public), free_port()
    defines = f"WEB_PROCESSES=2 WEB_THREADS=320 TLS_PORT={tls_port}"
    defines += f" TLS_CERTIFICATE={files['certificate']} TLS_KEY={files['key']}"
    body = SEVEN + bytes(max(0, 8000 - len(SEVEN)))
    (public / "app").mkdir()
    with run_apache(command=impatient_site(public / "app"), IMAGE_QUEUE=service.queue, APACHE_DEFINES=defines) as url:
        half_a_handshake = socket.create_connection(("127.0.0.1", tls_port), timeout=8)
        half_a_handshake.send(b"\x16\x03\x01\x02\x00\x01\x00")
        started = time.monotonic()

        answer = post(Service(url), slowly(body, 1000), "image/jpeg")

        assert label(answer) == "7"
        assert time.monotonic() - started > 7
        with half_a_handshake:
            half_a_handshake.settimeout(0.1)
            with suppress(ConnectionResetError):
                assert half_a_handshake.recv(1) == b""


def slowly(body: bytes, rate: int) -> Iterator[bytes]:
    """Yield a body at `rate` bytes a second."""
    for begin in range(0, len(body), rate // 10):
        time.sleep(0.1)
        yield body[begin : begin + rate // 10]
