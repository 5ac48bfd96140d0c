"""The manifests of deploy/ against the schemas of Kubernetes, and against the service, its settings and its image."""

import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import kubernetes_validate
import pytest
import yaml

import corr2d
from core import usable_cores, usable_memory
from service.app import COMPUTE_CONCURRENCY, create_app
from service.app_state import get_app_state
from service.configuration.computed_settings import REQUEST_MEMORY_FRACTION, compute_defaults
from service.configuration.settings import ENV_PREFIX, Settings
from service.metrics.prometheus import MetricsCollector
from service.middleware.auth import PUBLIC_PATHS
from service.server.supervisor import FORCED_EXIT_DELAY_S
from tests.deployment.custom_resources import CUSTOM_RESOURCES, PREDICTOR_FIELDS
from tests.deployment.manifests import (
    KUBERNETES,
    ROOT,
    Resource,
    find,
    render,
    render_by_kubectl,
    render_by_python,
)
from tests.project.test_monitoring import list_selectors
from tests.servers import open_client, run_serve_command

OVERLAYS = {name: render(KUBERNETES / "overlays" / name) for name in ("cpu", "gpu")}
RESOURCES = {f"{name} {each['kind']} {each['metadata']['name']}": each for name in OVERLAYS for each in OVERLAYS[name]}

INFERENCE_SERVICE: Resource = yaml.safe_load((ROOT / "deploy" / "kserve" / "inferenceservice.yaml").read_text())
PREDICTOR: Resource = INFERENCE_SERVICE["spec"]["predictor"]
PREDICTOR_POD = {name: value for name, value in PREDICTOR.items() if name not in PREDICTOR_FIELDS}

DOCKERFILE = (ROOT / "Dockerfile").read_text()

KUBERNETES_VERSIONS = ["1.31", "1.37"]

POD_NAME = "corr2d-5d8f7c9b6-x2x7k"

UNITS = {"Gi": 1 << 30, "Mi": 1 << 20}
MEMORY_OF_PROCESS_MB = 1000
"""Memory in MB for Python, torch and compiled code, and for the process that compiles engines: docs/operations.md."""


def read_settings(pod: Resource, resources: list[Resource]) -> dict[str, str]:
    """Return the environment variables of the only container of a pod."""
    (container,) = pod["containers"]
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        found |= find(resources, "ConfigMap", source["configMapRef"]["name"])["data"]
    return found | {variable["name"]: read_value(variable) for variable in container.get("env", ())}


def read_value(variable: Resource) -> str:
    """Return the value of an environment variable, which may be the name of the pod."""
    if "valueFrom" not in variable:
        return str(variable["value"])
    assert variable["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    return POD_NAME


def parse_memory(text: str) -> int:
    return int(text[:-2]) * UNITS[text[-2:]]


PODS = {name: find(OVERLAYS[name], "Deployment")["spec"]["template"]["spec"] for name in OVERLAYS}
PODS["kserve"] = PREDICTOR_POD
VARIABLES = {name: read_settings(PODS[name], OVERLAYS.get(name, [])) for name in PODS}

every_pod = pytest.mark.parametrize("name", PODS)


def assert_valid(resource: Resource, version: str) -> None:
    schema = CUSTOM_RESOURCES.get((resource["apiVersion"], resource["kind"]))
    if schema is None:
        kubernetes_validate.validate(resource, version, strict=True)
    else:
        assert set(resource) == {"apiVersion", "kind", "metadata", "spec"}
        jsonschema.validate(resource["spec"], schema)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("resource", RESOURCES.values(), ids=RESOURCES.keys())
def test_resources_match_their_schemas(resource: Resource, version: str) -> None:
    assert_valid(resource, version)


@pytest.mark.parametrize("components", [[], ["hpa"], ["keda", "monitoring"], ["hpa", "monitoring", "api-keys"]])
def test_components_can_be_combined(components: list[str], tmp_path: Path) -> None:
    base = Path(os.path.relpath(KUBERNETES, tmp_path))
    config = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [str(base / "base")],
        "components": [str(base / "components" / name) for name in components],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(config))
    resources = render(tmp_path)
    for resource in resources:
        assert_valid(resource, KUBERNETES_VERSIONS[-1])
    kinds = {resource["kind"] for resource in resources}
    assert ("ServiceMonitor" in kinds) == ("monitoring" in components)
    has_keys = "CORR2D_API_KEYS_FILE" in find(resources, "ConfigMap", "corr2d-settings")["data"]
    assert has_keys == ("api-keys" in components)
    if "monitoring" in components:
        assert ("authorization" in find(resources, "ServiceMonitor")["spec"]["endpoints"][0]) == has_keys


def test_inference_service_matches_its_schema() -> None:
    assert (INFERENCE_SERVICE["apiVersion"], INFERENCE_SERVICE["kind"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
    )
    assert INFERENCE_SERVICE["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "RawDeployment"
    for name in PREDICTOR.keys() - PREDICTOR_POD.keys():
        jsonschema.validate(PREDICTOR[name], PREDICTOR_FIELDS[name])
    # The other fields are those of a pod.
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": PREDICTOR_POD}
    kubernetes_validate.validate(pod, KUBERNETES_VERSIONS[-1], strict=True)


def test_a_misspelt_field_is_an_error() -> None:
    resource = yaml.safe_load(yaml.safe_dump(find(OVERLAYS["cpu"], "Deployment")))
    resource["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(resource, KUBERNETES_VERSIONS[-1], strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rendering_without_kubectl_is_the_same(overlay: str) -> None:
    def sort(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: sort(value[name]) for name in sorted(value)}
        return sorted(map(sort, value), key=repr) if isinstance(value, list) else value

    folder = KUBERNETES / "overlays" / overlay
    assert sort(render_by_python(folder)) == sort(render_by_kubectl(folder))


def test_every_file_is_used() -> None:
    used = {KUBERNETES / "overlays" / name / "kustomization.yaml" for name in OVERLAYS}
    pending = list(used)
    while pending:
        file = pending.pop()
        config = yaml.safe_load(file.read_text())
        named = [*config.get("resources", ()), *config.get("components", ())]
        named += [patch["path"] for patch in config.get("patches", ())]
        for path in (file.parent / name for name in named):
            target = (path / "kustomization.yaml" if path.is_dir() else path).resolve()
            if target.name == "kustomization.yaml" and target not in used:
                pending.append(target)
            used.add(target)
    assert {path.resolve() for path in KUBERNETES.rglob("*.yaml")} == used


@every_pod
def test_every_variable_is_a_setting_or_of_the_image(name: str) -> None:
    settings = {ENV_PREFIX + field.upper() for field in Settings.model_fields}
    image = set(re.findall(r"(\w+)=", " ".join(re.findall(r"^ENV (.+)$", DOCKERFILE, re.MULTILINE))))
    assert VARIABLES[name].keys() <= settings | image


@every_pod
def test_replica_is_the_name_of_the_pod(name: str) -> None:
    assert VARIABLES[name]["CORR2D_REPLICA"] == POD_NAME


@every_pod
def test_settings_with_the_limits_of_the_pod_are_valid(name: str, tmp_path: Path) -> None:
    (container,) = PODS[name]["containers"]
    limits = container["resources"]["limits"]
    assert container["resources"]["requests"]["cpu"] == limits["cpu"]
    assert container["resources"]["requests"]["memory"] == limits["memory"]
    # The control group of the container, as the kubelet creates it.
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text(f"{100_000 * int(limits['cpu'])} 100000\n")
    (group / "memory.max").write_text(f"{parse_memory(limits['memory'])}\n")
    cores, memory = usable_cores(tmp_path), usable_memory(tmp_path)
    assert cores <= int(limits["cpu"])
    assert memory <= parse_memory(limits["memory"])

    settings = compute_defaults(Settings(threads=cores, memory_mb=REQUEST_MEMORY_FRACTION * memory / 1e6))
    assert settings.memory_mb is not None
    assert memory / 1e6 - settings.memory_mb > MEMORY_OF_PROCESS_MB
    # The largest body, its array and its result fit.
    assert settings.memory_mb * 3 / 8 > 4 * settings.max_body_mb


@every_pod
def test_probes_are_public_routes(name: str) -> None:
    (container,) = PODS[name]["containers"]
    paths = create_app(Settings()).openapi()["paths"]
    ports = {container["ports"][0]["name"], container["ports"][0]["containerPort"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        request = container[probe]["httpGet"]
        assert request["path"] in paths.keys() & PUBLIC_PATHS
        assert request["port"] in ports
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    # The first start compiles the engines: tests/servers.py waits as long.
    assert container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"] >= 180


@every_pod
def test_pod_stops_before_it_is_killed(name: str) -> None:
    drain_s, timeout_s = (float(VARIABLES[name][f"CORR2D_{each}"]) for each in ("DRAIN_S", "REQUEST_TIMEOUT_S"))
    assert PODS[name]["terminationGracePeriodSeconds"] > drain_s + timeout_s + FORCED_EXIT_DELAY_S


def test_compose_and_kserve_wait_longer_than_requests() -> None:
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["corr2d"]
    defaults = Settings()
    assert int(service["stop_grace_period"].removesuffix("s")) > defaults.drain_s + defaults.request_timeout_s
    assert PREDICTOR["timeout"] > float(VARIABLES["kserve"]["CORR2D_REQUEST_TIMEOUT_S"])


@every_pod
def test_container_is_restricted_as_the_image_allows(name: str) -> None:
    pod = PODS[name]
    (container,) = pod["containers"]
    user, group = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[0]
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": int(user),
        "runAsGroup": int(group),
        "fsGroup": int(group),
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert "emptyDir" in mounts["/tmp"]  # noqa: S108 - the container's own
    assert "emptyDir" in mounts[VARIABLES[name]["XDG_CACHE_HOME"]]
    keys = Path(VARIABLES[name]["CORR2D_API_KEYS_FILE"])
    assert mounts[str(keys.parent)]["secret"]["items"] == [{"key": keys.name, "path": keys.name}]


@every_pod
def test_port_is_that_of_the_image(name: str) -> None:
    (container,) = PODS[name]["containers"]
    (exposed,) = re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.MULTILINE)
    assert str(container["ports"][0]["containerPort"]) == exposed == VARIABLES[name]["CORR2D_PORT"]
    for service in (each for each in OVERLAYS.get(name, []) if each["kind"] == "Service"):
        (port,) = service["spec"]["ports"]
        assert (port["targetPort"], port["appProtocol"]) == (container["ports"][0]["name"], "http")


@every_pod
def test_image_has_the_version_of_the_package(name: str) -> None:
    (container,) = PODS[name]["containers"]
    assert container["image"].rpartition(":")[2].removesuffix("-cuda") == corr2d.__version__


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_match_the_pods(overlay: str) -> None:
    resources = OVERLAYS[overlay]
    labels = find(resources, "Deployment")["spec"]["template"]["metadata"]["labels"]
    selectors = [
        find(resources, "Deployment")["spec"]["selector"]["matchLabels"],
        find(resources, "Service")["spec"]["selector"],
        find(resources, "Service", "corr2d-pods")["spec"]["selector"],
        find(resources, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        find(resources, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        *(spread["labelSelector"]["matchLabels"] for spread in PODS[overlay]["topologySpreadConstraints"]),
    ]
    for selector in selectors:
        assert selector
        assert selector.items() <= labels.items()
    # Exactly one autoscaler: two would work against each other.
    autoscalers = [each for each in resources if each["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")]
    assert [each["spec"]["scaleTargetRef"]["name"] for each in autoscalers] == ["corr2d"]
    assert "replicas" not in find(resources, "Deployment")["spec"]


def test_prometheus_scrapes_one_service_by_its_port_and_path() -> None:
    resources = OVERLAYS["gpu"]
    monitor = find(resources, "ServiceMonitor")["spec"]
    (endpoint,) = monitor["endpoints"]
    (service,) = [
        each
        for each in resources
        if each["kind"] == "Service"
        and monitor["selector"]["matchLabels"].items() <= each["metadata"]["labels"].items()
    ]
    # The operator uses the name of the Service as the label `job`, which the alerts and the autoscaler select.
    assert service["metadata"]["name"] == "corr2d"
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    assert endpoint["path"] in create_app(Settings()).openapi()["paths"]


def test_autoscaler_reads_existing_metrics() -> None:
    resources = OVERLAYS["gpu"]
    (trigger,) = find(resources, "ScaledObject")["spec"]["triggers"]
    metrics = {
        sample.name
        for family in MetricsCollector(get_app_state(create_app(Settings())).metrics, "").collect()
        for sample in family.samples
    }
    selectors = list_selectors(trigger["metadata"]["query"])
    assert {selector.name for selector in selectors} == {"corr2d_computations", "corr2d_queue_depth"} <= metrics
    namespace = find(resources, "Deployment")["metadata"]["namespace"]
    for selector in selectors:
        labels = {each.name: each.value for each in selector.matchers.matchers}
        assert labels == {"job": "corr2d", "namespace": namespace}
    (container,) = PODS["gpu"]["containers"]
    cores = int(container["resources"]["limits"]["cpu"])
    assert float(trigger["metadata"]["threshold"]) == min(COMPUTE_CONCURRENCY, cores)


def test_documented_command_creates_a_rule_from_the_alerts() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text()
    (command,) = re.findall(r"^(\{ printf .*?\}) \| kubectl", page, re.MULTILINE | re.DOTALL)
    rule = yaml.safe_load(subprocess.check_output(["bash", "-c", command], cwd=ROOT, text=True))
    assert (rule["apiVersion"], rule["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((ROOT / "monitoring" / "alerts.yml").read_text())


@pytest.mark.slow
def test_service_starts_with_the_variables_and_drains(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice:0123456789abcdef\n")
    limits = PODS["cpu"]["containers"][0]["resources"]["limits"]
    variables = {name: value for name, value in VARIABLES["cpu"].items() if name not in ("CORR2D_PORT", "CORR2D_HOST")}
    variables |= {
        "CORR2D_API_KEYS_FILE": str(keys),
        "CORR2D_THREADS": limits["cpu"],
        "CORR2D_MEMORY_MB": str(REQUEST_MEMORY_FRACTION * parse_memory(limits["memory"]) / 1e6),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        # Those of a Service of this name, in a pod with enableServiceLinks.
        "CORR2D_PORT": "tcp://10.96.0.7:8000",
        "CORR2D_SERVICE_HOST": "10.96.0.7",
        "CORR2D_PORT_8000_TCP_ADDR": "10.96.0.7",
    }
    body = {"input": [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "kernel": [[0, 1], [2, 3]]}
    with run_serve_command(tmp_path / "log", **variables) as (process, address):
        with open_client(address) as send:
            assert send("POST", "/correlate", json=body).status_code == 401
            headers = {"Authorization": "Bearer 0123456789abcdef"}
            assert send("POST", "/correlate", json=body, headers=headers).json()["output"] == [[19, 25], [37, 43]]
            assert send("GET", "/info", headers=headers).json()["settings"]["replica"] == POD_NAME
        stopped = time.monotonic()
        process.send_signal(signal.SIGTERM)
        # Requests are served until the endpoints are removed everywhere.
        drain_s, served = float(variables["CORR2D_DRAIN_S"]), 0
        with suppress(httpx.ConnectError):
            while time.monotonic() - stopped < drain_s + 5:
                assert httpx.post(f"{address}/correlate", json=body, headers=headers).status_code == 200
                served += 1
                time.sleep(0.2)
        assert process.wait(PODS["cpu"]["terminationGracePeriodSeconds"]) == 0
        assert time.monotonic() - stopped >= drain_s
        assert served > 10
