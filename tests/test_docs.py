"""The documents match the product: every command works, every link has a target, every metric is listed."""

import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import make_samples
import pytest
from console_blocks import commands
from harness import AS_INSTALLED, ROOT, Process, Service, free_port, running, wait_until

from model_server import metrics as server_metrics
from web import metrics as web_metrics

DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
TUTORIAL = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")

INSTALL = "test_install.py::test_install_upgrade_and_remove_in_a_bare_debian"
# Commands that another test runs: the beginning of the command, and that test.
ELSEWHERE = {
    "bin/serve": "test_serve.py::test_it_serves_the_bundled_model_and_ctrl_c_leaves_nothing",
    "MODEL=path/to/name.keras bin/serve": "test_docs.py::test_the_tutorial_leads_from_training_to_answers",
    "MODELS=models/efficientnet": "test_serve_models.py::test_two_models_are_served_with_a_command_for_each",
    "MODELS=": "test_docs.py::test_the_tutorial_leads_from_training_to_answers",
    "redis-cli del image_queue:model:": "test_monitoring.py::test_a_retired_model_is_forgotten_as_operations_says",
    "MODEL=": "test_classifier.py::test_a_keras_classifier_gets_its_preprocessing_and_weights",
    ".venv/bin/python run_model_server.py --model": "test_docs.py::test_the_tutorial_leads_from_training_to_answers",
    ".venv/bin/python run_model_server.py --gpu": "test_model_server.py::test_each_model_server_gets_a_gpu_of_its_own",
    "curl -O https://": "test_classifier.py::test_without_internet_the_error_says_which_file_to_put_where",
    "API_KEYS=0f3b... bin/serve": "test_access.py::test_each_of_two_keys_is_accepted",
    "bin/install": INSTALL,
    "cp /opt/keras-rest-api/deploy/apache/default-tls.conf": INSTALL,
    "a2en": INSTALL,
    "apt-get install -y ssl-cert": INSTALL,
    "apache2ctl configtest": INSTALL,
    "sed -i": INSTALL,
    "docker compose up": "test_docker.py::test_hardened_images_answer_and_stop",
    'echo "set server': "test_balancers.py::test_drained_host_loses_nothing",
    "apachectl graceful-stop": "test_balancers.py::test_drained_host_loses_nothing",
    "docker build": "test_docker.py::test_hardened_images_answer_and_stop",
    "deploy/kubernetes/make-secret": "test_kubernetes.py::test_secret_gives_each_program_what_it_needs",
    "kubectl apply": "test_kubernetes.py::test_kubernetes_accepts_the_manifests",
    ".venv/bin/python benchmarks/sizing.py": "test_sizing.py::test_documented_table_is_what_the_program_prints",
    ".venv/bin/python benchmarks/sizing_points.py": "test_sizing.py::test_points_count_the_images_of_all_cells",
    "bin/test": "test_docs.py::test_every_command_is_run_here_or_by_another_test",
}
RUN = ("curl -F ", "curl -H ", ".venv/bin/python s", "API_KEY=", "openssl ")
NOT_RUN = ("bin/bench", "systemctl ")  # bin/bench takes minutes, and its parts have tests; test machines lack systemd
# Files that the commands create in the project's folder.
LEFT = ["train_shapes.py", *(f"{shape}.png" for shape in ("circle", "square", "triangle")),
        "models/shapes.keras", "models/shapes.json"]  # fmt: skip


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    text = re.sub(r"^ *```.*?^ *```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [*DOCUMENTS, "images/README.md"])
def test_every_relative_link_and_anchor_exists(document: str) -> None:
    text = text_of(document)
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text)
    links += [(source, "") for source in re.findall(r'<img src="([^"]+)"', text)]

    for name, anchor in links:
        target = (ROOT / document).parent / name if name else ROOT / document
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), f"{name}#{anchor}"


def test_every_document_is_linked_from_the_readme() -> None:
    others = [name for name in DOCUMENTS if name != "README.md"]

    assert [name for name in others if f"]({name})" not in text_of("README.md")] == []


def test_every_metric_is_listed_in_operations() -> None:
    metrics = [*web_metrics.Metrics().all, server_metrics.BATCHES, server_metrics.COMPUTE, server_metrics.OUTCOMES,
               server_metrics.JOBS, server_metrics.ABOUT]  # fmt: skip
    gauges = ["redis_up", "queue_length", "images_pending", "model_servers"]
    endings = {"counter": "_total", "info": "_info"}
    defined = {family.name + endings.get(family.type, "") for metric in metrics for family in metric.describe()}

    listed = set(re.findall(r"^\| `(keras_\w+)` \|", text_of("docs/operations.md"), re.MULTILINE))

    assert listed == defined | {f"keras_rest_api_{name}" for name in gauges}


def test_every_alert_is_in_the_troubleshooting_table() -> None:
    alerts = re.findall(r"alert: (\w+)", text_of("deploy/monitoring/alerts.yml"))

    assert len(alerts) >= 7
    assert [alert for alert in alerts if f"| `{alert}`" not in text_of("docs/operations.md")] == []


# Commands


@pytest.fixture
def folder() -> Iterator[Path]:
    """The project's folder; the files that the commands create are removed afterwards."""
    assert [name for name in LEFT if (ROOT / name).exists()] == []
    yield ROOT
    for name in LEFT:
        (ROOT / name).unlink(missing_ok=True)


def run(command: str, url: str) -> str:
    """Return what `command` prints when it uses the service at `url` instead of the one that it names."""
    command = command.replace("http://localhost:8080", url)
    command = re.sub(r"(simple_request|stress_test)\.py", rf"\1.py --url {url}/predict", command)
    command = command.replace("stress_test.py", "stress_test.py --requests 100")  # unless the document says how many
    # Other commands must work with only the service's packages. --plot needs matplotlib, as README.md says.
    environment = os.environ if "--plot" in command else os.environ | AS_INSTALLED
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


DOCUMENTED = [command for document in DOCUMENTS if document != "docs/tutorial.md"
              for command in commands(text_of(document)) if not command.startswith(NOT_RUN)]  # fmt: skip


@pytest.mark.parametrize("command", dict.fromkeys(DOCUMENTED))
def test_every_command_is_run_here_or_by_another_test(command: str, service: Service, tmp_path: Path) -> None:
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


def of_section(heading: str) -> list[str]:
    """The commands of a section of the tutorial."""
    return commands(TUTORIAL.split(f"\n## {heading}\n")[1].split("\n## ")[0])


@pytest.mark.alone("trains a model twice and writes into the project's folder")
@pytest.mark.timeout(900)
def test_the_tutorial_leads_from_training_to_answers(folder: Path, tmp_path: Path) -> None:
    """Runs every command except the first, and except those of section 8, which need another machine."""
    [program] = re.findall(r"```python\n(.*?)```", TUTORIAL, re.DOTALL)
    (folder / "train_shapes.py").write_text(program, encoding="utf-8")
    port = free_port()
    url = f"http://localhost:{port}"
    [first], [train], [check] = (of_section(each) for each in ("1. Install", "2. Train", "3. Check"))
    [serve, *asking], [stress] = of_section("4. Serve"), of_section("5. Measure")

    right = float(run(train, url).rpartition("right:")[2])
    checked = run(check, url)
    with bin_serve(serve, port, tmp_path / "serve"):
        answers = [run(command, url) for command in asking]
        stressed = run(stress, url)
    [serve_both, *asking_both] = of_section("6. A second model")
    with bin_serve(serve_both, port, tmp_path / "serve-both"):
        answers_of_both = [run(command, url) for command in asking_both]
        replace_under_load(url, port)

    assert first == "bin/serve"
    assert right > 0.95
    assert re.search(r"circle\.png: circle [01]\.\d+", checked)
    assert answers[0].startswith('{"predictions":[{"label":"triangle","probability":')
    assert re.findall(r"^1\. (\w+)", answers[1], re.MULTILINE) == ["circle", "square", "triangle"]
    assert "200 answered, 0 failed" in stressed
    assert answers_of_both[0] == answers[0]
    assert answers_of_both[1].startswith('{"predictions":[{"label":"3","probability":0.9')
    assert re.findall(r"^1\. (\d)", answers_of_both[2], re.MULTILINE) == ["5", "7", "3", "2"]
    for line in (
        "200 requests: 200 answered",
        "shapes: 100 requests: 100 answered",
        "digits: 100 requests: 100 answered",
    ):
        assert f"[INFO] {line}, 0 failed" in answers_of_both[3]


def replace_under_load(url: str, port: int) -> None:
    """Run the commands of the section about a new version, the stress test beside the reload."""
    change, train, check, stress, reload, look = of_section("7. A new version without a lost request")
    before = version(run(look, url))
    for command in (change, train, check):
        run(command, url)
    assert version(run(look, url)) == before  # although the file has changed

    with ThreadPoolExecutor(1) as pool:
        stressed = pool.submit(run, stress, url)
        run(f"PORT={port} {reload}", url)
        after = version(run(look, url))

    assert after != before
    assert "5000 requests: 5000 answered, 0 failed" in stressed.result()


def version(printed: str) -> str:
    """The version that an answer names, as `curl -i` prints it."""
    [found] = re.findall(r"^X-Model-Version: ([0-9a-f]{12})\r?$", printed, re.MULTILINE)
    assert "X-Model: shapes" in printed
    return str(found)


DIGITS = "9. Another example: handwritten digits"
# Not run: the tests already have these packages, and training takes 14 minutes.
TRAINING = (".venv/bin/pip install", ".venv/bin/python models/train_digits.py")


def test_the_model_reads_the_tutorial_digits(service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The pictures are drawn again, into another folder. The tests' service has the model of the MODEL= command."""
    serve, curl, ask, *training, draw = of_section(DIGITS)
    monkeypatch.setattr(make_samples, "IMAGES", tmp_path)
    assert Path(os.environ["MODEL"]) == ROOT / re.findall("MODEL=(.*) bin/serve", serve)[0]

    make_samples.main()
    answers = [run(command, service.url) for command in (curl, ask)]

    assert draw.endswith(" models/make_samples.py")
    assert all(command.startswith(TRAINING) for command in training)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "models/digits").iterdir()}
    assert answers[0].startswith('{"predictions":[{"label":"3","probability":0.9')
    assert re.findall(r"^1\. (\d)", answers[1], re.MULTILINE) == ["5", "7", "3", "2"]
