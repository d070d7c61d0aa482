"""What both clients have in common, run as a user runs them."""

import ast
import shutil
import sys
from pathlib import Path

import pytest
from fake_service import IMAGE, OK, Handler, Reply, Serve, always, assert_one_line, run, run_with_closed_output
from harness import ROOT

pytest_plugins = ["client_fixtures"]
for_both = pytest.mark.parametrize("script", ["simple_request.py", "stress_test.py"])


@for_both
def test_help_is_quiet_when_its_output_is_closed(script: str) -> None:
    done = run_with_closed_output(ROOT / script, "--help")

    assert (done.returncode, done.stderr) == (0, "")


@for_both
@pytest.mark.parametrize(
    ("given", "posted"),
    [("", "/predict"), ("/", "/predict"), ("/predict", "/predict"), ("/v2/ask", "/v2/ask")],
)
def test_the_path_predict_is_added_only_to_a_url_without_a_path(
    serve: Serve, image: Path, script: str, given: str, posted: str
) -> None:
    # given
    service = serve(always(OK))
    arguments = [image] if script == "simple_request.py" else ["--image", image, "--requests", 1]

    # when
    done = run(ROOT / script, *arguments, "--url", service.url + given)

    # then
    assert done.returncode == 0
    assert service.paths == [posted]


@for_both
@pytest.mark.parametrize(
    ("given", "posted"),
    [("", "/predict/digits"), ("/predict/", "/predict/digits"), ("/prefix/predict?a=b", "/prefix/predict/digits?a=b")],
)
def test_the_name_of_a_model_is_added_to_the_path(
    serve: Serve, image: Path, script: str, given: str, posted: str
) -> None:
    # given
    service = serve(always(OK._replace(model="digits")))
    arguments = [image] if script == "simple_request.py" else ["--image", image, "--requests", 1]

    # when
    done = run(ROOT / script, *arguments, "--url", service.url + given, "--model", "digits")

    # then
    assert done.returncode == 0
    assert service.paths == [posted]


@for_both
@pytest.mark.parametrize("name", ["", "a/b", "../v2", "a b", "?a"])
def test_a_name_that_no_model_can_have_is_rejected(unused_url: str, script: str, name: str) -> None:
    done = run(ROOT / script, "--url", unused_url, "--model", name)

    assert done.returncode == 2
    assert "argument --model: must be " in done.stderr


@for_both
@pytest.mark.parametrize(
    ("arguments", "variable", "sent"),
    [
        ([], "", None),
        (["--api-key", "key-1"], "", "Bearer key-1"),
        ([], "key-2\n", "Bearer key-2"),
        (["--api-key", "key-1"], "key-2", "Bearer key-1"),
    ],
    ids=["none", "argument", "environment", "both"],
)
def test_the_given_key_is_sent(
    serve: Serve, script: str, arguments: list[str], variable: str, sent: str | None
) -> None:
    # given
    service = serve(always(OK))
    options = [] if script == "simple_request.py" else ["--requests", 1]

    # when
    done = run(ROOT / script, *options, "--url", service.url, *arguments, API_KEY=variable)

    # then
    assert done.returncode == 0
    assert service.keys == [sent]


@for_both
def test_a_key_that_no_header_can_hold_is_rejected_and_not_shown(script: str) -> None:
    # when
    done = run(ROOT / script, "--api-key", "schl\u00fcssel")

    # then
    assert done.returncode == 2
    assert "--api-key: must be letters, digits and symbols on one line" in done.stderr
    assert "schl" not in done.stderr


@for_both
def test_a_client_works_without_the_project_beside_it(serve: Serve, tmp_path: Path, script: str) -> None:
    # given
    service = serve(always(OK))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cat.jpg").write_bytes(IMAGE)
    arguments = ["--requests", 1] if script == "stress_test.py" else []

    # when
    done = run(Path(shutil.copy(ROOT / script, tmp_path)), "--url", service.url, *arguments)

    # then
    assert done.returncode == 0
    assert IMAGE in service.bodies[0]


@for_both
def test_a_client_imports_only_requests_tqdm_and_the_standard_library(script: str) -> None:
    """And urllib3, which comes with requests, and matplotlib, which --plot needs."""
    # given
    nodes = list(ast.walk(ast.parse((ROOT / script).read_text())))

    # when
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}

    # then
    packages = {"requests", "tqdm", "urllib3", "matplotlib"}
    assert {name.partition(".")[0] for name in modules} <= sys.stdlib_module_names | packages


def test_redirects_are_not_followed(serve: Serve, image: Path) -> None:
    # given
    class Redirecting(Handler):
        def send_header(self, keyword: str, value: str) -> None:
            super().send_header("Location" if keyword == "Content-Type" else keyword, value)

    service = serve(always(Reply(307, b"")))
    service.RequestHandlerClass = Redirecting

    # when
    asked = run(ROOT / "simple_request.py", image, "--url", service.url)
    stressed = run(ROOT / "stress_test.py", "--image", image, "--requests", 1, "--url", service.url)

    # then
    assert "[INFO] failed: 1 x 307 not_json" in stressed.stdout
    assert_one_line(asked.stderr, "status 307")
    assert service.paths == ["/predict", "/predict"]
