"""deploy/kubernetes without a cluster: kubectl renders the manifests, the schemas of Kubernetes and of the custom
resources check them, and each name in them is one of the images', the settings' or another manifest's.
"""

import json
import operator
import os
import re
import subprocess
import sys
from functools import cache, reduce
from pathlib import Path
from typing import Any

import crd_schemas
import jsonschema
import kubernetes_validate
import pytest
import yaml
from harness import ROOT, Missing, answers, free_port, need, run_redis, wait_until
from redis import Redis
from redis.exceptions import NoPermissionError

import settings
from helpers import model_name

sys.path.append(str(ROOT / "benchmarks"))

import autoscale

FOLDER = ROOT / "deploy/kubernetes"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SCRIPTS = Path(sys.executable).parent
OF_APACHE = {"RUN_DIR", "APACHE_DEFINES", "TRUSTED_PROXIES"}  # no settings: deploy/apache/run-private reads them
OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir())
Manifest = dict[str, Any]
pytestmark = pytest.mark.tools


@cache
def kustomize(folder: Path) -> str:
    """What `kubectl apply -k` would send."""
    kubectl = SCRIPTS / "kubectl"
    if not kubectl.exists():
        raise Missing("kubectl is not installed")
    return subprocess.check_output([str(kubectl), "kustomize", str(folder)], text=True, timeout=60)


def rendered(overlay: str, folder: Path = FOLDER / "overlays") -> list[Manifest]:
    """The manifests of an overlay."""
    return list(yaml.safe_load_all(kustomize(folder / overlay)))


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    """The manifests of each overlay."""
    return rendered(request.param)


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The template of each workload's pods, by the workload's name."""
    return {each["metadata"]["name"]: each["spec"]["template"] for each in manifests
            if each["kind"] in ("Deployment", "StatefulSet")}  # fmt: skip


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [each for each in manifests if each["kind"] in kinds]


def stage(name: str) -> str:
    """The part of the Dockerfile that builds an image."""
    return re.split(r"^FROM ", DOCKERFILE.split(f" AS {name}\n")[1], flags=re.MULTILINE)[0]


def variables_of_image(name: str) -> dict[str, str]:
    lines = re.findall(r"^ENV (.*)$", stage("base") + stage(name), re.MULTILINE)
    return dict(re.findall(r'(\w+)=("[^"]*"|\S+)', " ".join(lines)))


def settings_of(manifests: list[Manifest]) -> dict[str, str]:
    [settings] = of_kind(manifests, "ConfigMap")
    return dict(settings["data"])


def test_kubernetes_accepts_the_manifests(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if manifest["kind"] in crd_schemas.KINDS:
            crd_schemas.validate(manifest)
        else:
            kubernetes_validate.validate(manifest, crd_schemas.KUBERNETES, strict=True)
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "keras-rest-api"


def test_misspelled_fields_would_be_noticed() -> None:
    [web] = [each for each in rendered("cpu") if each["kind"] == "Deployment" and each["metadata"]["name"] == "web"]
    web["spec"]["template"]["spec"]["enableServiceLink"] = False
    with pytest.raises(kubernetes_validate.ValidationError, match="enableServiceLink"):
        kubernetes_validate.validate(web, crd_schemas.KUBERNETES, strict=True)


SCALE_DOWN = ("spec", "advanced", "horizontalPodAutoscalerConfig", "behavior", "scaleDown")


@pytest.mark.parametrize(
    ("kind", "place", "field"),
    [
        ("HTTPRoute", ("spec", "rules", 0, "timeouts"), "requests"),
        ("HTTPRoute", ("metadata",), "label"),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0), "intervall"),
        ("ScaledObject", SCALE_DOWN, "stabilisationWindowSeconds"),
    ],
)
def test_misspelled_fields_of_custom_resources_would_be_noticed(kind: str, place: list[str], field: str) -> None:
    [resource] = of_kind(rendered("keda"), kind)
    reduce(operator.getitem, place, resource)[field] = "10s"
    with pytest.raises(jsonschema.ValidationError, match=f"'{field}' was unexpected"):
        crd_schemas.validate(resource)


def test_values_of_a_wrong_type_would_be_noticed() -> None:
    manifests = rendered("keda")
    [scaled] = of_kind(manifests, "ScaledObject")
    scaled["spec"]["maxReplicaCount"] = "4"
    with pytest.raises(jsonschema.ValidationError, match="'4' is not of type 'integer'"):
        crd_schemas.validate(scaled)

    [monitor] = of_kind(manifests, "PodMonitor")
    endpoint = monitor["spec"]["podMetricsEndpoints"][0]
    for port in (9100, "metrics"):  # may be a number or a name
        endpoint["targetPort"] = port
        crd_schemas.validate(monitor)
    endpoint["targetPort"] = 91.5
    with pytest.raises(jsonschema.ValidationError, match="targetPort"):
        crd_schemas.validate(monitor)


def test_a_redis_of_ones_own_replaces_the_one_in_the_base(tmp_path: Path) -> None:
    where = os.path.relpath(FOLDER, tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/kustomization.yaml").write_text(
        f"resources: [{where}/overlays/cpu]\ncomponents: [{where}/components/own-redis]\n"
    )
    manifests = rendered("mine", tmp_path)

    assert {each["metadata"]["name"] for each in rendered("cpu")} - {"redis"} == {
        each["metadata"]["name"] for each in manifests
    }
    for template in pods(manifests).values():
        [url] = [each for each in template["spec"]["containers"][0]["env"] if each["name"] == "REDIS_URL"]
        assert url["valueFrom"]["secretKeyRef"] == {"name": "redis", "key": "REDIS_URL"}


def test_pods_are_hardened_as_in_compose(manifests: list[Manifest]) -> None:
    for template in pods(manifests).values():
        pod = template["spec"]
        [container] = pod["containers"]
        assert pod["enableServiceLinks"] is pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()


def test_users_are_those_of_the_images(manifests: list[Manifest]) -> None:
    users = {name: template["spec"]["securityContext"]["runAsUser"] for name, template in pods(manifests).items()}
    www_data = subprocess.check_output(["id", "-u", "www-data"], text=True)
    [model] = re.findall(r"useradd .*--uid (\d+)", stage("model"))

    assert "USER www-data" in stage("web")
    assert users["web"] == int(www_data)
    assert {user for name, user in users.items() if name.startswith("model")} == {int(model)}


def test_places_that_programs_write_to_are_volumes(manifests: list[Manifest]) -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for name, template in pods(manifests).items():
        service = compose[name.partition("-")[0]]
        [container] = template["spec"]["containers"]
        mounted = {each["mountPath"] for each in container["volumeMounts"]} | ({"/tmp"} if name == "redis" else set())
        written = {each.partition(":")[0] for each in service["tmpfs"]}
        written |= {each.split(":")[1] for each in service.get("volumes", []) if each.startswith("keras:")}
        assert written <= mounted


def test_redis_runs_as_in_compose(manifests: list[Manifest]) -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["redis"]
    [redis] = pods(manifests)["redis"]["spec"]["containers"]
    without_port = [word for word in compose["command"] if word != "--port" and "REDIS_PORT" not in word]

    assert redis["image"] == compose["image"]
    assert redis["command"] == [*without_port, "--aclfile", "/etc/redis/users.acl"]


def test_variables_are_settings_and_their_values_valid(manifests: list[Manifest]) -> None:
    code = "import settings, json; print(json.dumps([k for k in vars(settings) if k.isupper()]))"
    known = set(json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)))
    for name, template in pods(manifests).items():
        [container] = template["spec"]["containers"]
        given = {each["name"]: each.get("value", "redis://u:p@redis:6379/0") for each in container.get("env", [])}
        if "envFrom" in container:
            [reference] = container["envFrom"]
            [settings] = of_kind(manifests, "ConfigMap")
            assert reference["configMapRef"]["name"] == settings["metadata"]["name"]
            given = settings["data"] | given
        assert given.keys() <= known | OF_APACHE
        subprocess.run(
            [sys.executable, "-c", "import settings"], cwd=ROOT, env={"PATH": "/usr/bin"} | given, check=True
        )
        if name.startswith("model"):
            assert (ROOT / given["MODEL"]).exists()
            assert (model_name(given["MODEL"]) == given["DEFAULT_MODEL"]) == (name == "model")


def test_ports_are_those_of_the_images(manifests: list[Manifest]) -> None:
    for name, template in pods(manifests).items():
        [container] = template["spec"]["containers"]
        ports = {each["name"]: each["containerPort"] for each in container["ports"]}
        if name == "web":
            assert ports == {"http": int(variables_of_image("web")["APP_PORT"])}
        elif name.startswith("model"):
            environment = {each["name"]: each.get("value") for each in container["env"]}
            assert ports == {"metrics": int(environment["METRICS_PORT"])}
            assert '"--gpu", "0"]' in stage("model")  # which adds 0 to the port
        probes = [container[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness")]
        assert {probe["httpGet"]["port"] for probe in probes if "httpGet" in probe} <= ports.keys()
    services = {each["metadata"]["name"]: each["spec"]["ports"][0] for each in of_kind(manifests, "Service")}
    [route] = of_kind(manifests, "HTTPRoute")
    [backend] = route["spec"]["rules"][0]["backendRefs"]
    assert backend["port"] == services[backend["name"]]["port"]


def test_pages_and_commands_of_the_probes_exist(manifests: list[Manifest]) -> None:
    health = (ROOT / "model_server/metrics.py").read_text() + (ROOT / "web/health.py").read_text()
    [check] = re.findall(r"^ +CMD (\[.*container_health.py.*web.*\])$", stage("web"), re.MULTILINE)
    for name, template in pods(manifests).items():
        [container] = template["spec"]["containers"]
        for kind in ("startup", "liveness", "readiness"):
            probe = container[f"{kind}Probe"]
            if "httpGet" in probe:
                assert f'"{probe["httpGet"]["path"]}"' in health
            elif name == "web":
                assert probe["exec"]["command"] == json.loads(check)
            else:
                need(probe["exec"]["command"][0])


def test_time_limits_follow_request_timeout(manifests: list[Manifest]) -> None:
    pod = pods(manifests)["web"]["spec"]
    [container] = pod["containers"]
    limit = float(settings_of(manifests)["REQUEST_TIMEOUT"])
    [sleep, seconds] = container["lifecycle"]["preStop"]["exec"]["command"]

    assert sleep == "sleep"
    assert pod["terminationGracePeriodSeconds"] > float(seconds) + limit
    assert container["livenessProbe"]["timeoutSeconds"] > limit + 10  # GRACE of container_health.py
    assert "STOPSIGNAL SIGWINCH" in stage("web")


def test_selectors_select_the_pods_of_one_workload(manifests: list[Manifest]) -> None:
    for each in of_kind(manifests, "Deployment", "StatefulSet", "PodDisruptionBudget", "Service"):
        selector = each["spec"]["selector"]
        labels = selector.get("matchLabels", selector)
        chosen = [name for name, pod in pods(manifests).items() if labels.items() <= pod["metadata"]["labels"].items()]
        assert chosen == [each["metadata"]["name"]]


def test_gpus_are_not_awaited_while_old_pods_hold_them() -> None:
    for each in of_kind(rendered("gpu"), "Deployment"):
        if each["metadata"]["name"].startswith("model"):
            assert each["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
            [container] = each["spec"]["template"]["spec"]["containers"]
            assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_keda_scales_the_model_server_by_its_pending_images() -> None:
    manifests = rendered("keda")
    [scaled] = of_kind(manifests, "ScaledObject")
    [model] = [each for each in of_kind(manifests, "Deployment") if each["metadata"]["name"] == "model"]
    [trigger] = scaled["spec"]["triggers"]
    [(metric, label, name)] = re.findall(r'^max\((\w+)\{(\w+)="(\w+)"\}\)$', trigger["metadata"]["query"])

    assert scaled["spec"]["scaleTargetRef"]["name"] == model["metadata"]["name"]
    assert "replicas" not in model["spec"]
    assert name == settings_of(manifests)["DEFAULT_MODEL"]
    assert re.search(rf'"{metric}", "[^"]*", labels=\["{label}"\]', (ROOT / "web/metrics.py").read_text())
    [monitor] = of_kind(manifests, "PodMonitor")
    assert {"port": "http", "path": "/metrics", "interval": "15s"} in monitor["spec"]["podMetricsEndpoints"]


def test_keda_has_the_numbers_that_the_simulation_recommends() -> None:
    [scaled] = of_kind(rendered("keda"), "ScaledObject")
    [up, percent] = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleUp"]["policies"]
    down = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    [trigger] = scaled["spec"]["triggers"]
    rule = autoscale.RECOMMENDED

    assert trigger["metadata"]["ignoreNullValues"] == "false"  # no figures must not count as 0
    assert float(trigger["metadata"]["threshold"]) / settings.BATCH_SIZE == rule.target / autoscale.BATCH
    assert up == {"type": "Pods", "value": rule.up_pods, "periodSeconds": rule.up_period}
    assert percent == {"type": "Percent", "value": rule.up_percent, "periodSeconds": rule.up_period}
    assert down == {"stabilizationWindowSeconds": rule.down_window}
    assert (scaled["spec"]["minReplicaCount"], scaled["spec"]["maxReplicaCount"]) == (rule.least, rule.most)


# The Secret


def made_secret() -> str:
    need("openssl")
    return subprocess.check_output([str(FOLDER / "make-secret")], text=True, timeout=30)


def test_secret_gives_each_program_what_it_needs(tmp_path: Path) -> None:
    secret = yaml.safe_load(made_secret())
    assert made_secret() != made_secret()
    users = tmp_path / "users.acl"
    users.write_text(secret["stringData"]["users.acl"])
    port = free_port()
    url = secret["stringData"]["REDIS_URL"].replace("@redis:6379/", f"@127.0.0.1:{port}/")
    documented = re.findall(r"user keras-rest-api on >PASSWORD (.*)", (ROOT / "docs/operations.md").read_text())
    assert re.findall(r"user keras-rest-api on >\w+ (.*)", users.read_text()) == documented

    with run_redis(tmp_path / "log", port, "--aclfile", str(users)):
        anybody = Redis(port=port, socket_timeout=5)
        wait_until(lambda: answers(anybody), "Redis answers PING without a password, as its probes need")
        with pytest.raises(NoPermissionError):
            anybody.llen("image_queue")

        check = [sys.executable, "deploy/check_redis.py"]
        assert subprocess.check_output(check, cwd=ROOT, env={"REDIS_URL": url, "PATH": "/usr/bin"}, text=True) == ""


# What KEDA's trigger `redis` sends, shortened: it asks for the type first, since a queue may be a set too.
KEDA_SCRIPT = "if redis.call('type', KEYS[1]).ok == 'list' then return redis.call('llen', KEYS[1]) end return 0"


def test_documented_user_of_keda_reads_the_length_of_the_queue_and_nothing_else(tmp_path: Path) -> None:
    [user] = re.findall(r"^    (user keda .*)$", (ROOT / "docs/kubernetes.md").read_text(), re.MULTILINE)
    (tmp_path / "users.acl").write_text(f"user default on nopass ~* +@all\n{user}\n")
    port = free_port()

    with run_redis(tmp_path / "log", port, "--aclfile", str(tmp_path / "users.acl")):
        web = Redis(port=port, socket_timeout=5)
        wait_until(lambda: answers(web), "Redis answers")
        web.rpush("image_queue", "a", "b")
        keda = Redis(port=port, protocol=3, driver_info=None, username="keda", password="PASSWORD")
        assert keda.eval(KEDA_SCRIPT, 1, "image_queue") == 2
        with pytest.raises(NoPermissionError):
            keda.lpop("image_queue")
