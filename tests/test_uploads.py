"""How an image may be sent to /predict, and what a client is told that sends it otherwise."""

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
from conftest import (
    ROOT,
    Service,
    assert_error,
    free_port,
    make_certificates,
    missing,
    need,
    resident_bytes,
    run_apache,
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
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def chunks(data: bytes) -> Iterator[bytes]:
    return iter([data[:1000], data[1000:]])


# What is taken


@pytest.mark.parametrize(
    "content_type", ["application/octet-stream", "binary/octet-stream", "Application/Octet-Stream; x=y", "", None]
)
def test_a_body_of_unknown_kind_is_taken_as_an_image(service: Service, content_type: str | None) -> None:
    assert label(post(service, SEVEN, content_type)) == "7"


PACKED = {
    "gzip": ("gzip", gzip.compress(SEVEN)),
    "x-gzip": ("x-gzip", gzip.compress(SEVEN)),
    "in capitals": ("GZIP", gzip.compress(SEVEN)),
    "gzip of several members": ("gzip", gzip.compress(SEVEN[:500]) + gzip.compress(b"") + gzip.compress(SEVEN[500:])),
    "gzip filled up with zeros": ("gzip", gzip.compress(SEVEN) + bytes(70_000)),
    "deflate": ("deflate", zlib.compress(SEVEN)),
    "raw deflate": ("deflate", raw_deflate(SEVEN)),
    "identity": ("identity", SEVEN),
    "identity and gzip": ("identity, gzip", gzip.compress(SEVEN)),
    "empty": ("", SEVEN),
}


@pytest.mark.parametrize(("encoding", "body"), PACKED.values(), ids=PACKED.keys())
def test_a_packed_body_is_unpacked(service: Service, encoding: str, body: bytes) -> None:
    assert label(post(service, body, "image/jpeg", **{"Content-Encoding": encoding})) == "7"
    assert label(post(service, chunks(body), None, **{"Content-Encoding": encoding})) == "7"


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_packed_form_is_unpacked(service: Service, encoding: str, pack: Any) -> None:
    two = part(SEVEN) + form((ROOT / "models/digits/three.png").read_bytes())

    answer = post(service, pack(two), FORM, **{"Content-Encoding": encoding})

    assert [each["predictions"][0]["label"] for each in answer.json()["results"]] == ["7", "3"]


FORMS = {
    "a file name in another charset": form(disposition='form-data; name="image"; filename="\xe9t\xe9.jpg"'),
    "an empty file name": form(disposition='form-data; name="image"; filename=""'),
    "only a file name for other languages": form(disposition="form-data; name=image; filename*=UTF-8''%C3%A9.jpg"),
    "text beside it": part(b"a holiday", 'form-data; name="comment"') + form(),
    "a large text beside it": part(b"x" * 700_000, 'form-data; name="comment"') + form(),
    "another file beside it": part(SEVEN, 'form-data; name="thumbnail"; filename="x"') + form(),
    "something before and after": b"before\r\n" + form() + b"x" * 300_000,
    "line feeds alone": form().replace(b"\r\n", b"\n"),
}


@pytest.mark.parametrize("body", FORMS.values(), ids=FORMS.keys())
def test_an_odd_form_with_an_image_is_taken(service: Service, body: bytes) -> None:
    assert label(post(service, body, FORM)) == "7"


@pytest.mark.parametrize(("size", "status"), [(LIMIT, 200), (LIMIT + 1, 413)])
@pytest.mark.parametrize("way", ["plain", "chunked", "gzip"])
def test_an_upload_may_be_as_large_as_the_setting_says_and_no_larger(
    service: Service, size: int, status: int, way: str
) -> None:
    body = SEVEN + bytes(size - len(SEVEN))
    sent = {"plain": body, "chunked": chunks(body), "gzip": gzip.compress(body, 1)}[way]

    answer = post(service, sent, "image/jpeg", **({"Content-Encoding": "gzip"} if way == "gzip" else {}))

    assert answer.status_code == status, answer.text
    assert status == 200 or "16 MB" in assert_error(answer, 413, "too_large")


# What is refused, and why

TEXT = 'form-data; name="image"'
BASE64 = base64.b64encode(SEVEN)
REFUSED_FORMS = {
    "a part without a filename": (form(disposition=TEXT), "missing_image", ("`image`", "no filename", "curl -F")),
    "the same with 700 kB": (form(bytes(700_000), TEXT), "missing_image", ("no filename",)),
    "base64 text": (form(BASE64, TEXT), "missing_image", ("base64", "curl -F")),
    "base64 text of 700 kB": (form(base64.b64encode(bytes(525_000)), TEXT), "missing_image", ("base64",)),
    "base64 text in lines": (form(base64.encodebytes(SEVEN), TEXT), "missing_image", ("base64",)),
    "a data: URL": (form(b"data:image/jpeg;base64," + BASE64, TEXT), "missing_image", ("data: URL", "decode")),
    "an address": (form(b"https://example.org/cat.jpg", TEXT), "missing_image", ("address", "curl -F")),
    "another field": (form(disposition='form-data; name="file"; filename="x"'), "missing_image", ("`file`", "`image`")),
    "an array": (form(disposition='form-data; name="image[]"; filename="x"'), "missing_image", ("`image[]`",)),
    "in capitals": (form(disposition='form-data; name="Image"; filename="x"'), "missing_image", ("`Image`",)),
    "no name": (form(disposition='form-data; filename="x"'), "missing_image", ("name its field `image`",)),
    "no file": (form(b"1", 'form-data; name="top"'), "missing_image", ("has no file", "curl -F")),
    "no part": (b"--X--\r\n", "missing_image", ("has no file", "curl -F")),
    "another boundary": (form().replace(b"--X", b"--Y"), "bad_request", ("boundary", "not in the body")),
    "no boundary in a large body": (bytes(700_000), "bad_request", ("boundary", "not in the body")),
    "nothing": (b"", "bad_request", ("body is empty",)),
    "cut off in the image": (form()[:1000], "bad_request", ("ends before its closing boundary",)),
    "cut off in a header": (form()[:30], "bad_request", ("ends before its closing boundary",)),
    "cut off before the end": (part(SEVEN), "bad_request", ("ends before its closing boundary",)),
    "a part without a name": (b"--X\r\nA: b\r\n\r\nc\r\n--X--\r\n", "bad_request", ("Content-Disposition",)),
    "endless headers": (b"--X\r\nA: " + bytes(700_000), "bad_request", ("headers that are too long",)),
}  # fmt: skip


@pytest.mark.parametrize(("body", "code", "told"), REFUSED_FORMS.values(), ids=REFUSED_FORMS.keys())
def test_a_form_without_an_image_is_told_what_is_wrong(
    service: Service, body: bytes, code: str, told: tuple[str, ...]
) -> None:
    message = assert_error(post(service, body, FORM), 400, code)

    assert all(each in message for each in told), message


def test_a_form_of_very_many_parts_is_413_and_says_so(service: Service) -> None:
    assert "parts" in assert_error(post(service, part(b"", TEXT) * 2000, FORM), 413, "too_large")


@pytest.mark.parametrize(
    ("content_type", "told"),
    [
        ("multipart/form-data", "has no boundary"),
        ("multipart/form-data; boundary=", "has no valid boundary"),
        ('multipart/form-data; boundary=""', "has no valid boundary"),
        ("multipart/form-data; boundary=\u00fcber", "has no valid boundary"),
    ],
)
def test_a_form_without_a_good_boundary_says_so(service: Service, content_type: str, told: str) -> None:
    message = assert_error(post(service, form(), content_type.encode("latin-1")), 400, "bad_request")  # type: ignore[arg-type]

    assert told in message
    assert "header" in message


@pytest.mark.parametrize(
    ("content_type", "body", "told"),
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
def test_a_body_of_another_kind_is_told_which_are_taken(
    service: Service, content_type: str, body: bytes, told: str
) -> None:
    message = assert_error(post(service, body, content_type), 400, "missing_image")

    assert told in message
    assert "curl -F image=@photo.jpg" in message


DAMAGED = {
    "cut off": (gzip.compress(SEVEN)[:-20], "ends before"),
    "without its checksum": (gzip.compress(SEVEN)[:-8], "ends before"),
    "a wrong checksum": (gzip.compress(SEVEN)[:-8] + bytes(8), "damaged"),
    "a wrong byte": (gzip.compress(SEVEN)[:40] + b"\xff" * 9 + gzip.compress(SEVEN)[49:], "damaged"),
    "not packed at all": (SEVEN, "damaged"),
    "something behind it": (gzip.compress(SEVEN) + b"more", "damaged"),
    "very many members": (gzip.compress(b"") * 100_000, "goes on"),
}


@pytest.mark.parametrize(("body", "told"), DAMAGED.values(), ids=DAMAGED.keys())
@pytest.mark.parametrize("content_type", ["image/jpeg", FORM])
def test_a_damaged_packed_body_is_400(service: Service, body: bytes, told: str, content_type: str) -> None:
    answer = post(service, body, content_type, **{"Content-Encoding": "gzip"})

    assert told in assert_error(answer, 400, "bad_request")


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, gzip", "br, gzip", "x" * 5000])
def test_a_body_packed_in_another_way_is_415_and_says_which_are_taken(service: Service, encoding: str) -> None:
    answer = post(service, SEVEN, "image/jpeg", **{"Content-Encoding": encoding})

    message = assert_error(answer, 415, "unsupported_media_type")
    assert "gzip" in message
    assert len(message) < 200
    assert answer.headers["Accept-Encoding"] == "gzip, deflate"


def test_a_gzip_bomb_ends_at_the_limit_and_costs_no_memory() -> None:
    """A body of 0.3 MB that unpacks to 300 MB: as an image, as a form's file, as a form's text."""
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
def test_apache_leaves_it_to_the_web_to_say_how_large_a_request_may_be(service: Service, size: int) -> None:
    assert "16 MB" in assert_error(post(service, bytes(size), "image/png"), 413, "too_large")


# No room for uploads


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A folder on a file system of its own that has room for one upload of the largest size."""
    if os.geteuid() != 0:
        missing("it takes root to mount a file system")
    with tempfile.TemporaryDirectory(prefix="test-uploads-") as name:
        mount("-t", "tmpfs", "-o", "size=20m,mode=1777", "tmpfs", name)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", name], capture_output=True, check=False)


def mount(*arguments: str) -> None:
    if subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode:
        missing("no file system can be mounted here")


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


TROUBLES = [(fill, empty), (make_read_only, make_writable), (remove, make_again)]


def test_without_room_for_uploads_they_are_503_until_there_is(
    service: Service, small_disk: Path, tmp_path: Path
) -> None:
    log, large = tmp_path / "log", SEVEN + bytes(500_000)
    with run_apache(IMAGE_QUEUE=service.queue, TMPDIR=str(small_disk), log=log) as url:
        web = Service(url)
        assert label(post(web, large, "image/jpeg")) == label(web.post(large)) == "7"
        (small_disk / "filler").write_bytes(MB * 10)
        assert_error(requests.get(f"{url}/readyz", timeout=10), 503, "storage_full")  # for want of 16 MB

        for begin, end in TROUBLES:
            begin(small_disk)
            for refused in [post(web, large, "image/jpeg"), post(web, chunks(large), None), web.post(large)] * 3:
                assert refused.headers["Retry-After"] == "5"
                assert "try again" in assert_error(refused, 503, "storage_full")
            unready = requests.get(f"{url}/readyz", timeout=10)
            assert unready.json()["ready"] is False
            assert_error(unready, 503, "storage_full")
            assert label(post(web, SEVEN, "image/jpeg")) == "7"  # small ones stay in memory
            assert requests.get(f"{url}/livez", timeout=10).ok

            end(small_disk)
            assert label(post(web, large, "image/jpeg")) == label(web.post(large)) == "7"
            assert requests.get(f"{url}/readyz", timeout=10).ok

    told = [line for line in log.read_text().splitlines() if "can't be stored" in line]
    assert len(told) <= 2 * len(["of 16 MB", *TROUBLES])  # of each process at most one line for each
    for reason in ("9.94 MB are free", "No space left", "Read-only", "No such file"):
        assert any(reason in line and str(small_disk) in line for line in told), reason
    assert "Traceback" not in log.read_text()


# Slow networks


def impatient_site(folder: Path) -> list[str]:
    """Copy the project, with an Apache that waits 1, 2 or 4 seconds where ours waits 10, 20 or more; how to run it."""
    for name in ("deploy/apache", "image_queue", "web"):
        shutil.copytree(ROOT / name, folder / name)
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*.wsgi")):
        shutil.copy(file, folder)
    for site in (folder / "deploy/apache").glob("*.conf"):
        text = site.read_text()
        site.write_text(re.sub(r"(?m)^(RequestReadTimeout|Timeout|.* socket-timeout=).*$", in_less_time, text))
    folder.chmod(0o755)
    run, environment = folder / "deploy/apache/run-private", Path(sys.prefix).resolve()
    if os.geteuid() != 0:
        (folder / ".venv").symlink_to(environment)
        return [str(run)]
    (folder / ".venv").mkdir()  # not a link, which the web could not follow into /root
    return [need("unshare"), "--mount", "sh", "-ec", f"mount --bind {environment} {folder}/.venv; exec {run}"]


def in_less_time(line: re.Match[str]) -> str:
    def less(seconds: re.Match[str]) -> str:
        return str(next(short for short, most in ((1, 10), (2, 20), (4, 10_000)) if int(seconds[0]) <= most))

    return re.sub(r"(?<!MinRate=)\b\d+", less, line[0])


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that Apache's user may read, as pytest's own are not when root runs it."""
    with tempfile.TemporaryDirectory(prefix="test-uploads-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.slow("sends an image for 8 seconds")
def test_an_upload_may_take_longer_than_any_limit_as_long_as_it_flows(service: Service, public: Path) -> None:
    """Twice as fast as the slowest allowed, twice as long as the longest limit; half a TLS handshake is cut."""
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
    """Yield a body at so many bytes a second."""
    for begin in range(0, len(body), rate // 10):
        time.sleep(0.1)
        yield body[begin : begin + rate // 10]
