"""simple_request.py, run as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fake_service import (
    BAD_ADDRESSES,
    HANG_UP,
    HTML,
    IMAGE,
    LIMIT,
    OK,
    PREDICTIONS,
    Reply,
    Serve,
    always,
    as_reply,
    assert_one_line,
    environment,
    error_reply,
    first_then_hang,
    run,
    run_with_closed_output,
)  # fmt: skip
from harness import ROOT

pytest_plugins = ["client_fixtures"]


def ask(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run(ROOT / "simple_request.py", *arguments)


@pytest.mark.parametrize(
    ("variables", "shown"),
    [({"PYTHONIOENCODING": "latin-1"}, "1. \\u5c0f\\u72ac caf\u00e9: 0.9000\n"),
     ({"PYTHONIOENCODING": "ascii"}, "1. \\u5c0f\\u72ac caf\\xe9: 0.9000\n"),
     ({"PYTHONIOENCODING": "utf-8"}, "1. \u5c0f\u72ac caf\u00e9: 0.9000\n")],
    ids=["latin-1", "ascii", "utf-8"],
)  # fmt: skip
def test_characters_that_the_terminal_lacks_are_escaped(
    serve: Serve, image: Path, variables: dict[str, str], shown: str
) -> None:
    labels = [{"label": "\u5c0f\u72ac caf\u00e9", "probability": 0.9}]
    service = serve(always(as_reply(200, {"success": True, "predictions": labels})))
    command = [sys.executable, str(ROOT / "simple_request.py"), str(image), "--url", service.url]

    done = subprocess.run(command, capture_output=True, env=environment() | variables, timeout=LIMIT, check=False)

    assert done.stderr == b""
    assert done.stdout.decode(variables["PYTHONIOENCODING"]) == shown


def test_predictions_are_printed_in_the_order_of_the_answer(serve: Serve, image: Path) -> None:
    # given
    service = serve(always(OK))

    # when
    done = ask(image, "--url", f"{service.url}/predict")

    # then
    assert done.stdout == "1. beagle: 0.9462\n2. bluetick: 0.0320\n"
    assert (done.returncode, done.stderr) == (0, "")


def test_the_file_is_posted_unchanged_as_the_field_image(serve: Serve, image: Path) -> None:
    # given
    service = serve(always(OK))

    # when
    ask(image, "--url", service.url)

    # then
    assert len(service.bodies) == 1
    assert b'name="image"' in service.bodies[0]
    assert IMAGE in service.bodies[0]


def test_several_images_and_folders_are_all_classified(serve: Serve, tmp_path: Path) -> None:
    # given
    service = serve(always(OK))
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("b.JPG", "a.png", "notes.txt"):
        (folder / name).write_bytes(name.encode())
    (tmp_path / "alone.gif").write_bytes(b"alone")

    # when
    done = ask(tmp_path / "alone.gif", folder, "--url", service.url)

    # then
    lines = ["1. beagle: 0.9462", "2. bluetick: 0.0320"]
    names = [str(tmp_path / "alone.gif"), str(folder / "a.png"), str(folder / "b.JPG")]
    assert done.stdout.splitlines() == [line for name in names for line in (name, *lines)]
    assert (done.returncode, done.stderr) == (0, "")
    for content, body in zip((b"alone", b"a.png", b"b.JPG"), service.bodies, strict=True):
        assert content in body


def test_the_file_name_dash_means_standard_input(serve: Serve) -> None:
    service = serve(always(OK))
    command = [sys.executable, str(ROOT / "simple_request.py"), "-", "--url", service.url]

    printed = subprocess.check_output(command, input=IMAGE, env=environment(), timeout=LIMIT)

    assert printed.startswith(b"1. beagle")
    assert IMAGE in service.bodies[0]


def test_option_json_prints_one_line_of_json_per_image(serve: Serve, image: Path) -> None:
    done = ask(image, image, "--json", "--url", serve(always(OK)).url)

    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == [{"image": str(image), "predictions": PREDICTIONS}] * 2


def test_it_continues_after_a_rejected_image(serve: Serve, image: Path, tmp_path: Path) -> None:
    # given
    service = serve(lambda _service, number: error_reply(400, "bad_image", "Not an image.") if number == 1 else OK)

    # when
    done = ask(image, tmp_path / "missing.png", image, "--url", service.url)

    # then
    first, second = done.stderr.splitlines()
    assert first == f"{image}: Not an image. (status 400)"
    assert "missing.png" in second
    assert done.stdout.splitlines()[:2] == [str(image), "1. beagle: 0.9462"]
    assert done.returncode == 1


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_it_stops_quietly_when_its_output_is_closed(serve: Serve, image: Path, options: list[str]) -> None:
    service = serve(always(OK))

    done = run_with_closed_output(ROOT / "simple_request.py", image, image, image, "--url", service.url, *options)

    assert (done.returncode, done.stderr) == (0, "")
    assert len(service.bodies) == 1


def test_closed_standard_error_does_not_change_the_exit_code(unused_url: str, image: Path) -> None:
    done = run_with_closed_output(ROOT / "simple_request.py", image, "--url", unused_url, errors_too=True)

    assert done.returncode == 1


@pytest.mark.parametrize("status", [429, 503])
def test_it_retries_as_retry_after_says(serve: Serve, image: Path, status: int) -> None:
    # given
    busy = error_reply(status, "queue_full")._replace(retry_after="1")
    service = serve(lambda _service, number: busy if number <= 2 else OK)

    # when
    done = ask(image, "--url", service.url)

    # then
    assert done.stdout.startswith("1. beagle")
    assert done.stderr == "The service asks to wait 1 s before another try.\n" * 2
    assert len(service.bodies) == 3
    assert service.bodies[2] == service.bodies[0]


@pytest.mark.parametrize(
    ("reply", "options", "tries"),
    [
        (error_reply(503, "queue_full"), [], 1),
        (error_reply(400, "bad_image")._replace(retry_after="1"), [], 1),
        (error_reply(503, "queue_full")._replace(retry_after="1"), ["--retries", "0"], 1),
        (error_reply(503, "queue_full")._replace(retry_after="0"), ["--retries", "2"], 3),
    ],
)
def test_it_retries_only_with_retry_after_and_within_option_retries(
    serve: Serve, image: Path, reply: Reply, options: list[str], tries: int
) -> None:
    service = serve(always(reply))

    done = ask(image, "--url", service.url, *options)

    assert (done.returncode, len(service.bodies)) == (1, tries)
    assert done.stderr.endswith(f"Try again in a moment. (status {reply.status})\n")


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (
            error_reply(503, "queue_full", "The queue is full:\ntry later."),
            "The queue is full: try later. (status 503)\n",
        ),
        (error_reply(400, "no_image", "Send an image."), "Send an image. (status 400)\n"),
        (error_reply(200, "odd", "It did not work."), "It did not work. (status 200)\n"),
    ],
)
def test_the_message_of_the_service_is_printed(serve: Serve, image: Path, reply: Reply, sentence: str) -> None:
    # given
    service = serve(always(reply))

    # when
    done = ask(image, "--url", service.url)

    # then
    assert (done.returncode, done.stdout, done.stderr) == (1, "", sentence)


@pytest.mark.parametrize(
    "reply",
    [
        HTML,
        Reply(502, b"<html>Bad gateway</html>"),
        Reply(204, b""),
        as_reply(200, ["beagle"]),
        as_reply(200, {"success": True}),
        as_reply(200, {"success": True, "predictions": [{"label": "beagle", "probability": "high"}]}),
        as_reply(404, {"detail": "Not Found"}),
        as_reply(500, {"success": False, "error": "broken"}),
        as_reply(201, {"success": True, "predictions": PREDICTIONS}),
    ],
)
def test_an_answer_in_another_format_is_an_error(serve: Serve, image: Path, reply: Reply) -> None:
    # given
    service = serve(always(reply))

    # when
    done = ask(image, "--url", service.url)

    # then
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, service.url, f"status {reply.status}", "--url")


def test_a_refused_connection_is_reported_with_what_to_do(unused_url: str, image: Path) -> None:
    # when
    done = ask(image, "--url", unused_url)

    # then
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, unused_url, "start the service")


@pytest.mark.parametrize("reply", [HANG_UP, OK._replace(missing=100)])
def test_a_closed_connection_is_reported_with_what_to_do(serve: Serve, image: Path, reply: Reply | None) -> None:
    # given
    service = serve(always(reply))

    # when
    done = ask(image, "--url", service.url)

    # then
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, service.url, "start the service")


def test_it_gives_up_after_its_time_limit(serve: Serve, image: Path) -> None:
    # given
    service = serve(first_then_hang(0))

    # when
    done = ask(image, "--url", service.url, "--timeout", "0.3")

    # then
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, service.url, "in 0.3 s", "--timeout")


@pytest.mark.parametrize("name", ["", "missing.png"])
def test_a_missing_file_or_empty_folder_is_reported_with_what_to_do(unused_url: str, tmp_path: Path, name: str) -> None:
    # when
    done = ask(tmp_path / name, "--url", unused_url)

    # then
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, f"Cannot read {tmp_path / name} (", "give the path")


@pytest.mark.parametrize("address", BAD_ADDRESSES)
def test_an_invalid_url_is_reported_with_a_valid_example(image: Path, address: str) -> None:
    # when
    done = ask(image, "--url", address)

    # then
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, f"'{address}' is not an address", "http://host:port")


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "1e300", "soon"])
def test_an_invalid_time_limit_is_rejected(unused_url: str, image: Path, seconds: str) -> None:
    # when
    done = ask(image, "--url", unused_url, "--timeout", seconds)

    # then
    assert done.returncode == 2
    assert "--timeout" in done.stderr.splitlines()[-1]
