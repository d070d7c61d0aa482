"""What the documents say is so: each command in them works, each link leads somewhere, each metric is listed."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import make_samples
import pytest
from conftest import AS_INSTALLED, ROOT, Process, Service, free_port, running, wait_until

from model_server import metrics as server_metrics
from web import metrics as web_metrics

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/tutorial.md", "docs/operations.md",
             "docs/architecture.md"]  # fmt: skip
TUTORIAL = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")

# Commands that other tests run, by what they begin with, and one such test.
ELSEWHERE = {
    "bin/serve": "test_serve.py::test_it_serves_the_bundled_model_says_so_and_ctrl_c_leaves_nothing",
    "MODEL=path/to/name.keras bin/serve": "test_docs.py::test_the_tutorial_leads_from_training_to_answers",
    "MODEL=": "test_classifier.py::test_a_keras_classifier_gets_its_own_preprocessing_and_its_weights_file",
    ".venv/bin/python run_model_server.py --model": "test_docs.py::test_the_tutorial_leads_from_training_to_answers",
    ".venv/bin/python run_model_server.py --gpu": "test_model_server.py::test_each_model_server_gets_a_gpu_of_its_own",
    "curl -O https://": "test_classifier.py::test_without_internet_the_line_says_which_file_to_put_where",
    "API_KEYS=0f3b... bin/serve": "test_doors.py::test_either_of_two_keys_opens_the_door",
    "bin/install": "test_install.py::test_it_installs_a_service_that_answers",
    "cp /opt/keras-rest-api/deploy/apache/default-tls.conf": "test_install.py::test_it_installs_a_service_that_answers",
    "a2en": "test_install.py::test_it_installs_a_service_that_answers",
    "apt-get install -y ssl-cert": "test_install.py::test_it_installs_a_service_that_answers",
    "apache2ctl configtest": "test_install.py::test_it_installs_a_service_that_answers",
    "sed -i": "test_install.py::test_it_installs_a_service_that_answers",
    "docker compose up": "test_docker.py::test_the_images_answer_hardened",
    "bin/test": "test_docs.py::test_each_command_is_run_here_or_by_another_test",
}
RUN = ("curl -F ", "curl -H ", ".venv/bin/python s", "API_KEY=", "openssl ")
NOT_RUN = ("bin/bench", "systemctl ")  # it takes minutes, and its parts have tests; and no test has a systemd
# What the commands leave in the project's folder.
LEFT = ["train_shapes.py", *(f"{shape}.png" for shape in ("circle", "square", "triangle")),
        "models/shapes.keras", "models/shapes.json"]  # fmt: skip


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """The commands of every console block, without their comments."""
    blocks = re.findall(r"^ *```console\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [line.strip()[2:].split("  #")[0].strip() for block in blocks for line in block.splitlines()
            if line.strip().startswith(("$ ", "# "))]  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_to_a_file_leads_there(document: str) -> None:
    text = text_of(document)
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)

    assert [link for link in links if not (ROOT / document).parent.joinpath(link).exists()] == []


def test_every_document_is_found_from_the_readme() -> None:
    assert [name for name in DOCUMENTS[1:] if f"]({name})" not in text_of("README.md")] == []


def test_every_metric_is_listed_in_operations() -> None:
    metrics = [*web_metrics.OWN, server_metrics.BATCHES, server_metrics.COMPUTE, server_metrics.OUTCOMES,
               server_metrics.JOBS, server_metrics.ABOUT]  # fmt: skip
    gauges = ["redis_up", "queue_length", "model_servers"]
    endings = {"counter": "_total", "info": "_info"}
    there = {family.name + endings.get(family.type, "") for metric in metrics for family in metric.describe()}

    listed = set(re.findall(r"^\| `(keras_\w+)` \|", text_of("docs/operations.md"), re.MULTILINE))

    assert listed == there | {f"keras_rest_api_{name}" for name in gauges}


def test_every_alert_says_what_to_do() -> None:
    alerts = re.findall(r"alert: (\w+)", text_of("deploy/monitoring/alerts.yml"))

    assert len(alerts) >= 7
    assert [alert for alert in alerts if f"| `{alert}`" not in text_of("docs/operations.md")] == []


# Commands


@pytest.fixture
def folder() -> Iterator[Path]:
    """The project's folder, which is afterwards as it was."""
    assert [name for name in LEFT if (ROOT / name).exists()] == []
    yield ROOT
    for name in LEFT:
        (ROOT / name).unlink(missing_ok=True)


def run(command: str, url: str) -> str:
    """What `command` prints, at the service at `url` instead of the one that it names."""
    command = command.replace("http://localhost:8080", url)
    command = re.sub(r"(simple_request|stress_test)\.py", rf"\1.py --url {url}/predict", command)
    command = command.replace("stress_test.py", "stress_test.py --requests 100")  # unless the document says how many
    # The README says that --plot needs matplotlib, which the service does not have.
    environment = os.environ if "--plot" in command else os.environ | AS_INSTALLED
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TOLD = [command for document in DOCUMENTS if "tutorial" not in document for command in commands(text_of(document))
        if not command.startswith(NOT_RUN)]  # fmt: skip


@pytest.mark.parametrize("command", dict.fromkeys(TOLD))
def test_each_command_is_run_here_or_by_another_test(command: str, service: Service, tmp_path: Path) -> None:
    if command.startswith(RUN):
        printed = run(command.replace("load.png", str(tmp_path / "load.png")), service.url)
        assert printed
        assert '"success":false' not in printed
        return
    elsewhere = max((prefix for prefix in ELSEWHERE if command.startswith(prefix)), key=len, default=None)
    assert elsewhere, f"no test runs {command}"
    file, _, test = ELSEWHERE[elsewhere].partition("::")
    assert f"def {test}" in (ROOT / "tests" / file).read_text()


@contextmanager
def bin_serve(command: str, port: int, log: Path) -> Iterator[Process]:
    with running(["bash", "-c", f"exec env {command}"], log, PORT=str(port), REDIS_PORT=str(free_port())) as process:
        wait_until(lambda: "* Ready" in process.log or not process.alive, f"ready: {process.log}", 200)
        assert process.alive, process.log
        yield process


@pytest.mark.alone("trains a model and writes into the project's folder")
@pytest.mark.timeout(600)
def test_the_tutorial_leads_from_training_to_answers(folder: Path, tmp_path: Path) -> None:
    """Every command of it but the first, and those of production, which tests/test_install.py runs."""
    told = commands(TUTORIAL.split(DIGITS)[0])
    [program] = re.findall(r"```python\n(.*?)```", TUTORIAL, re.DOTALL)
    (folder / "train_shapes.py").write_text(program, encoding="utf-8")
    port = free_port()
    url = f"http://localhost:{port}"
    first, train, check, serve, *asking, stress = [each for each in told if not each.startswith(PRODUCTION)]

    right = float(run(train, url).rpartition("right:")[2])
    checked = run(check, url)
    with bin_serve(serve, port, tmp_path / "serve"):
        answers = [run(command, url) for command in asking]
        stressed = run(stress, url)

    assert first == "bin/serve"
    assert right > 0.95
    assert re.search(r"circle\.png: circle [01]\.\d+", checked)
    assert answers[0].startswith('{"predictions":[{"label":"triangle","probability":')
    assert re.findall(r"^1\. (\w+)", answers[1], re.MULTILINE) == ["circle", "square", "triangle"]
    assert "200 answered, 0 failed" in stressed


PRODUCTION = ("bin/install", "cp models/", "systemctl ")
DIGITS = "\n## 8. Another example: handwritten digits\n"
# Not run: the packages are those that run the tests, and to train takes 14 minutes.
TRAINING = (".venv/bin/pip install", ".venv/bin/python models/train_digits.py")


def test_the_tutorial_s_digits_are_read(service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With its pictures drawn anew, in another folder. What MODEL= serves, the tests' service serves too."""
    serve, curl, ask, *training, draw = commands(TUTORIAL.split(DIGITS)[1])
    monkeypatch.setattr(make_samples, "IMAGES", tmp_path)
    assert Path(os.environ["MODEL"]) == ROOT / re.findall("MODEL=(.*) bin/serve", serve)[0]

    make_samples.main()
    answers = [run(command, service.url) for command in (curl, ask)]

    assert draw.endswith(" models/make_samples.py")
    assert all(command.startswith(TRAINING) for command in training)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "models/digits").iterdir()}
    assert answers[0].startswith('{"predictions":[{"label":"3","probability":0.9')
    assert re.findall(r"^1\. (\d)", answers[1], re.MULTILINE) == ["5", "7", "3", "2"]
