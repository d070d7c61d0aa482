"""Both ways to read a form give the same: splitting it at its boundary, and Werkzeug's parser."""

import io
import re
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers import ServiceError
from web.form import form_images, only_file

BOUNDARY = b"X.-"
USUAL = b'Content-Disposition: form-data; name="image"; filename="photo.jpg"\r\n'
HEADERS = [
    USUAL,
    USUAL + b"Content-Type: image/jpeg\r\n",
    USUAL + b"content-type: image/jpeg; x=y\r\nContent-Length: 7\r\nContent-Transfer-Encoding: binary\r\n",
    USUAL.replace(b"photo", "Фото; x=\u0085\u2028".encode()),
    USUAL.replace(b"photo.jpg", b""),
]
ODD = [
    USUAL.replace(b'"image"', b'"IMAGE"'),
    USUAL.replace(b'; filename="photo.jpg"', b""),
    USUAL.replace(b"photo", b'pho\\"to'),
    USUAL.replace(b"\r\n", b"\n"),
    USUAL + b" continued\r\n",
    USUAL + USUAL.replace(b"image", b"other"),
    b"Content-Type: image/jpeg\r\n",
]
# Pieces that may confuse a parser: parts of line ends and of the boundary, in any order.
PIECES = st.sampled_from(
    [b"\r", b"\n", b"\r\n", b"-", b"--", b"X", b"X.-", b"X.", b" ", b"\0", b"image", *HEADERS, *ODD]
)
DATA = st.lists(PIECES | st.binary(max_size=5), max_size=8).map(b"".join)
ENDS = st.sampled_from(
    [b"\r\n--X.---\r\n", b"\r\n--X.---", b"\n--X.---\r\n", b"\r\n--X.-\r\n", b"\r\n--X.--- \r\n", b""]
)


def form(headers: bytes, data: bytes, end: bytes = b"\r\n--X.---\r\n", start: bytes = b"--X.-\r\n") -> bytes:
    return start + headers + b"\r\n" + data + end


def by_parser(body: bytes) -> list[bytes] | None:
    """Return what Werkzeug's parser finds, or None if it raises an error."""
    with suppress(ServiceError):
        return [image.read() for image in form_images(io.BytesIO(body), BOUNDARY, io.BytesIO)]
    return None


@pytest.mark.parametrize("headers", HEADERS)
def test_form_with_one_file_is_split_at_its_boundary(headers: bytes) -> None:
    data = bytes(range(256)) * 300

    assert only_file(form(headers, data), BOUNDARY) == data
    assert only_file(form(headers, data, b"\r\n--X.---"), BOUNDARY) == data


@pytest.mark.parametrize("headers", ODD)
def test_other_form_is_left_to_the_parser(headers: bytes) -> None:
    assert only_file(form(headers, b"data"), BOUNDARY) is None


@given(
    st.builds(form, st.sampled_from(HEADERS + ODD), DATA, ENDS, st.sampled_from([b"--X.-\r\n", b"\r\n--X.-\r\n", b""]))
)
@example(form(USUAL, b"\n--X.-\r\n"))
@example(form(USUAL, b"", b"--X.---\r\n"))
@example(form(USUAL, b"a\r", b"\r\n--X.---"))
def test_any_file_that_is_split_off_is_what_the_parser_finds(body: bytes) -> None:
    data = only_file(body, BOUNDARY)

    assert data is None or by_parser(body) == [data]


@given(DATA)
def test_usual_form_is_split_whatever_is_in_the_file(data: bytes) -> None:
    split = only_file(form(USUAL, data), BOUNDARY)

    assert (split == data) == (b"--" + BOUNDARY not in data)


def test_boundary_of_any_length_is_found() -> None:
    long = b"b" * 200
    body = re.sub(rb"X\.-", long, form(USUAL, b"data"))

    assert only_file(body, long) == b"data"
