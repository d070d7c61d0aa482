"""Requests of the Open Inference Protocol: what the parser takes and refuses."""

import io
import json
import tracemalloc
from base64 import b64encode
from collections.abc import Callable
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import settings
from helpers import ServiceError, Shape, base64_decode_image
from web.body_parts import Part, PixelPart
from web.errors import BadRequest, WebError
from web.tensors import InferRequest, bytes_to_parse, json_size, parse

SHAPE: Shape = (2, 3, 3)
PIXELS = np.arange(2 * 18, dtype=np.uint8).reshape(2, *SHAPE)
FILES = [b"GIF89a...", b"\x89PNG", b"\xff\xd8\0\xff"]


def parsed(tensor: Any, data: bytes = b"", body: Callable[[], IO[bytes]] = io.BytesIO, **others: Any) -> InferRequest:
    """The request with this input, whose binary data is stored in a stream from `body`."""
    text = orjson.dumps({"inputs": [tensor]} | others)
    stream = body()
    stream.write(text + data)
    stream.flush()
    return parse(text, Part(stream, len(text), len(data)), SHAPE, body)


def images(**changes: Any) -> dict[str, Any]:
    return {"name": "image", "datatype": "BYTES", "shape": [3], "data": [b64encode(each).decode() for each in FILES],
            } | changes  # fmt: skip


def pixels(**changes: Any) -> dict[str, Any]:
    data = PIXELS.ravel().tolist()
    return {"name": "pixels", "datatype": "UINT8", "shape": [2, *SHAPE], "data": data} | changes


def binary(tensor: dict[str, Any], data: bytes) -> dict[str, Any]:
    others = {name: value for name, value in tensor.items() if name != "data"}
    return others | {"parameters": {"binary_data_size": len(data)}}


def prefixed(*contents: bytes) -> bytes:
    return b"".join(len(each).to_bytes(4, "little") + each for each in contents)


def decoded(part: Part) -> Any:
    assert isinstance(part, PixelPart)
    return base64_decode_image(part.encode(), settings.IMAGE_DTYPE, SHAPE)


@pytest.mark.parametrize("body", [io.BytesIO, TemporaryFile])
@pytest.mark.parametrize("shape", [[3], [3, 1]])
def test_images_are_the_same_as_json_and_binary(body: Callable[[], IO[bytes]], shape: list[int]) -> None:
    nested = [[each] for each in images()["data"]]

    for data in (images()["data"], nested):
        assert [part.read() for part in parsed(images(shape=shape, data=data), body=body).parts] == FILES
    tensor = binary(images(shape=shape), prefixed(*FILES))
    assert [part.read() for part in parsed(tensor, prefixed(*FILES), body).parts] == FILES


@pytest.mark.parametrize("body", [io.BytesIO, TemporaryFile])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize(("datatype", "numpy"), [("UINT8", "u1"), ("FP32", "<f4")])
def test_pixels_are_the_same_as_json_and_binary(
    monkeypatch: pytest.MonkeyPatch, body: Callable[[], IO[bytes]], dtype: str, datatype: str, numpy: str
) -> None:
    monkeypatch.setattr(settings, "IMAGE_DTYPE", dtype)
    tensor, data = pixels(datatype=datatype), PIXELS.astype(numpy).tobytes()
    requests = [parsed(tensor, body=body), parsed(tensor | {"data": PIXELS.tolist()}, body=body),
                parsed(binary(tensor, data), data, body)]  # fmt: skip

    for request in requests:
        np.testing.assert_array_equal([decoded(part) for part in request.parts], PIXELS)


def test_a_part_may_be_read_again_and_closing_it_leaves_the_others() -> None:
    first, second, _ = parsed(images()).parts
    with first:
        assert first.seek(0, io.SEEK_END) == len(FILES[0])
        first.seek(0)
        assert first.read() == FILES[0]

    assert second.read() == FILES[1]
    second.seek(0)
    assert second.read() == FILES[1]


@pytest.mark.parametrize(("dtype", "expected"), [("uint8", [0, 128, 255]), ("float32", [0.25, 127.75, 254.75])])
def test_fractions_are_rounded_only_for_whole_numbers(
    monkeypatch: pytest.MonkeyPatch, dtype: str, expected: list[float]
) -> None:
    monkeypatch.setattr(settings, "IMAGE_DTYPE", dtype)
    values = [0.25, 127.75, 254.75] * 6

    [part] = parsed(pixels(datatype="FP32", shape=[1, *SHAPE], data=values)).parts

    assert decoded(part).ravel()[:3].tolist() == expected


@pytest.mark.parametrize("value", [-0.5, 255.5, 1e30, np.nan, np.inf, -np.inf])
def test_values_outside_of_0_to_255_are_refused(value: float) -> None:
    values = np.full((1, *SHAPE), 7, "<f4")
    values[0, 1, 2, 0] = value
    data = values.tobytes()
    [part] = parsed(binary(pixels(datatype="FP32", shape=[1, *SHAPE]), data), data).parts
    assert isinstance(part, PixelPart)

    with pytest.raises(BadRequest, match="0 to 255"):
        part.encode()


@pytest.mark.parametrize(
    ("fields", "top", "is_binary"),
    [({}, 0, False), ({"outputs": []}, 0, False), ({"outputs": [{"name": "probabilities"}]}, 0, False),
     ({"parameters": {"binary_data_output": True, "priority": 3}}, 0, True),
     ({"parameters": {"classification": 4}}, 4, False),
     ({"outputs": [{"name": "probabilities", "parameters": {"classification": 3, "binary_data": True}}]}, 3, True),
     ({"outputs": [{"name": "probabilities", "parameters": {"binary_data": False}}],
       "parameters": {"binary_data_output": True}}, 0, False)],
)  # fmt: skip
def test_the_client_chooses_the_form_of_the_output(fields: dict[str, Any], top: int, is_binary: bool) -> None:
    request = parsed(images(), id="mine", **fields)

    assert (request.top, request.binary, request.id) == (top, is_binary, "mine")


SIZE = {"binary_data_size": 10}
BAD_INPUTS: list[tuple[Any, str]] = [
    ([], "must be a JSON object"),
    (images(name="x"), r"`image` \(BYTES of shape \[n\]\) or `pixels` \(UINT8 or FP32 of shape \[n, 2, 3, 3\]\)"),
    (images(name=["image"]), "another name"),
    (images(datatype="UINT8"), "another datatype"),
    (images(datatype=[]), "another datatype"),
    (pixels(datatype="FP64"), "another datatype"),
    (images(shape=None), "another shape"),
    (images(shape=[]), "another shape"),
    (images(shape=[3, 2]), "another shape"),
    (images(shape=[-1]), "another shape"),
    (images(shape=[True]), "another shape"),
    (images(shape=[3.0]), "another shape"),
    (images(shape=[0]), "no images"),
    (images(shape=[10**18]), "at most 32 images"),
    (pixels(shape=[10**18, *SHAPE]), "at most 32 images"),
    (pixels(shape=[2, 3, 2, 3]), "another shape"),
    (images(shape=[2]), "has 3 elements, but its shape says 2"),
    (images(data=None), "in the list `data`"),
    (images(data=[1, 2, 3]), "must be text"),
    (images(data=["", "", ""]), "Element 0 of `image` is empty"),
    (images(data=["QQ==", "?", "QQ=="]), "Element 1 of `image` is not base64"),
    (images(data=["QQ==", "QQ==", "ä"]), "Element 2 of `image` is not base64"),
    (images(data=[["QQ=="], "QQ==", "QQ=="]), "must be text"),
    (images(parameters=[]), "`parameters` must be a JSON object"),
    (images(parameters={"shared_memory_region": "x"}), "no shared memory"),
    (images(parameters=SIZE), "only one"),
    (images(parameters={"binary_data_size": "many"}, data=None), "only one"),
    (pixels(data=[1] * 35), "has 35 values, but its shape says 36"),
    (pixels(data=[256] * 36), "whole numbers from 0 to 255"),
    (pixels(data=[-1] * 36), "whole numbers from 0 to 255"),
    (pixels(data=[1.5] * 36), "whole numbers from 0 to 255"),
    (pixels(data=[True] * 36), "whole numbers from 0 to 255"),
    (pixels(data=["1"] * 36), "whole numbers from 0 to 255"),
    (pixels(datatype="FP32", data=["1"] * 36), "numbers from 0 to 255"),
    (pixels(datatype="FP32", data=[None] * 36), "numbers from 0 to 255"),
    (pixels(data=[[1] * 36, 1]), "whole numbers from 0 to 255"),
    (pixels(data={}), "in the list `data`"),
]


@pytest.mark.parametrize(("tensor", "message"), BAD_INPUTS)
def test_a_bad_input_is_refused_with_what_is_right(tensor: Any, message: str) -> None:
    with pytest.raises(WebError, match=message) as refused:
        parsed(tensor)

    assert refused.value.status in (400, 413)


@pytest.mark.parametrize(
    "data",
    [b"", b"\1", prefixed(*FILES)[:-1], prefixed(*FILES) + b"\0", prefixed(*FILES, b"x"), prefixed(*FILES[:2]),
     b"\xff\xff\xff\xff" + prefixed(*FILES)[4:], prefixed(*FILES)[:-8] + b"\xff\xff\xff\xffabcd"],
)  # fmt: skip
def test_lengths_that_lie_are_refused(data: bytes) -> None:
    with pytest.raises(BadRequest, match="not 3 elements"):
        parsed(binary(images(), data), data)


@pytest.mark.parametrize("size", [0, -1, 35, 37, 2**63, "36", True, None])
def test_a_wrong_binary_data_size_is_refused(size: Any) -> None:
    tensor = binary(pixels(), b"") | {"parameters": {"binary_data_size": size}}

    with pytest.raises(BadRequest, match=r"after the JSON, which is 36"):
        parsed(tensor, PIXELS.tobytes())


def test_binary_data_without_a_size_is_refused() -> None:
    with pytest.raises(BadRequest, match="give the input the parameter `binary_data_size`"):
        parsed(images(), b"rest")


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"inputs": []}, "0 inputs"), ({"inputs": [images(), pixels()]}, "2 inputs"), ({"inputs": {}}, "a list"),
     ({"id": 5}, "`id` must be text"), ({"id": "x" * 1001}, "at most 1000"), ({"outputs": [{"name": "x"}]}, "only"),
     ({"outputs": {}}, "a list"), ({"outputs": [5]}, "a JSON object"),
     ({"outputs": [{"name": "probabilities"}] * 2}, "2 outputs"), ({"parameters": {"classification": -1}}, "number"),
     ({"parameters": {"classification": True}}, "number"), ({"parameters": {"binary_data_output": 1}}, "true or false"),
     ({"outputs": [{"name": "probabilities", "parameters": {"shared_memory_region": "x"}}]}, "shared memory")],
)  # fmt: skip
def test_other_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        parsed(images(), **fields)


@pytest.mark.parametrize("text", [b"", b"[]", b"5", b"{", b"[" * 100_000, b'{"inputs": [NaN]}', b"\xff", b'"\\ud800"'])
def test_what_is_not_a_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(BadRequest, match="JSON"):
        parse(text, Part(io.BytesIO(), 0, 0), SHAPE, io.BytesIO)


@pytest.mark.parametrize(("header", "size"), [(None, 90), ("1", 1), ("90", 90)])
def test_the_header_says_how_much_is_json(header: str | None, size: int) -> None:
    assert json_size(header, 90) == size


@pytest.mark.parametrize("header", ["", "0", "91", "-1", "1.5", "x", "9" * 5000, "²", "٣", "1 "])
def test_a_header_that_lies_is_refused(header: str) -> None:
    with pytest.raises(BadRequest, match="which has 90"):
        json_size(header, 90)


@pytest.mark.parametrize("piece", [b"0,", b"[],", b"{},", b'{"":0},', b'"",', b"1.5,", b"12345678901,", b"[[]],"])
@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
def test_parsing_takes_no_more_memory_than_was_reserved(piece: bytes, datatype: str) -> None:
    data = piece * (2**20 // len(piece)) + b"0"
    fields = b'"name":"pixels","datatype":"%s","shape":[2,2,3,3]' % datatype.encode()
    text = b'{"inputs":[{%s,"data":[%s]}]}' % (fields, data)
    reserved = bytes_to_parse(text)

    tracemalloc.start()
    with pytest.raises(BadRequest):
        parse(text, Part(io.BytesIO(), 0, 0), SHAPE, io.BytesIO)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    # orjson allocates 12 bytes for each byte of JSON, but touches only 16 for each value.
    assert most - 12 * len(text) < reserved


def test_json_that_would_take_too_much_memory_is_413(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "MAX_DECODE_BYTES", 10_000_000)

    with pytest.raises(WebError, match="as binary data") as refused:
        bytes_to_parse(b"[" + b"0," * 200_000)

    assert refused.value.status == 413


# Bodies made from the parts of valid ones

NUMBERS = st.sampled_from([0, 1, 2, 3, -1, 255, 256, 2**31, 2**63, 10**30, 0.5, 1e308, 36, 48])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | st.sampled_from(["QUJD", "image", "UINT8"]),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=8,
)
SHAPES = st.lists(NUMBERS, max_size=2) | st.sampled_from([[1], [2], [1, 1], [1, *SHAPE], [2, *SHAPE]]) | JSON
DATA = JSON | st.lists(NUMBERS, min_size=17, max_size=19) | st.lists(st.sampled_from(["QUJD", ""]), max_size=3)
PARAMETERS = JSON | st.dictionaries(
    st.sampled_from(["binary_data_size", "classification", "binary_data", "binary_data_output"]), NUMBERS | JSON
)
TENSORS = st.fixed_dictionaries(
    {}, optional={"name": st.sampled_from(["image", "pixels"]) | JSON, "shape": SHAPES, "data": DATA,
                  "datatype": st.sampled_from(["BYTES", "UINT8", "FP32"]) | JSON, "parameters": PARAMETERS}
)  # fmt: skip
BODIES = st.fixed_dictionaries(
    {"inputs": st.lists(TENSORS, min_size=1, max_size=1) | JSON},
    optional={"id": JSON, "parameters": PARAMETERS, "outputs": st.lists(TENSORS, max_size=2) | JSON},
)


@given(body=BODIES | JSON, rest=st.binary(max_size=60), cut=st.integers(0, 3))
@hypothesis_settings(max_examples=1000, deadline=None, derandomize=True, database=None)
def test_any_body_is_parsed_or_refused(body: Any, rest: bytes, cut: int) -> None:
    text = json.dumps(body).encode()  # not orjson, which refuses numbers beyond 64 bits
    sent = Part(io.BytesIO(text + rest), len(text), len(rest))

    refused, parts = images_or_error(text[: len(text) - cut], sent)

    if refused:
        assert isinstance(refused, WebError)
        assert refused.status in (400, 413)
        assert str(refused).endswith(".")
        assert "\n" not in str(refused)
    else:
        assert 1 <= len(parts) <= settings.MAX_IMAGES
        assert all(parts)


def images_or_error(text: bytes, rest: Part) -> tuple[ServiceError | None, list[str | bytes]]:
    try:
        request = parse(text, rest, SHAPE, io.BytesIO)
        return None, [part.encode() if isinstance(part, PixelPart) else part.read() for part in request.parts]
    except ServiceError as error:
        return error, []
