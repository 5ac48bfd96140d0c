"""Render the overlays of deploy/kubernetes: by kubectl, or by the part of kustomize that they use."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"

Resource = dict[str, Any]

LIST_KEYS = {"containers": "name", "volumes": "name", "volumeMounts": "mountPath", "env": "name"}
"""Fields of lists that a strategic merge patch merges, with the field that identifies their elements."""

SELECTORS = {
    "Deployment": (("spec", "selector", "matchLabels"), ("spec", "template", "metadata", "labels")),
    "Service": (("spec", "selector"),),
}
"""Paths of labels that `includeSelectors` sets, in addition to those of the resource itself."""

HASH_PATTERN = re.compile(r"(corr2d-settings)-[a-z0-9]{10}\b")


def render(folder: Path) -> list[Resource]:
    """Return the resources of a folder with a kustomization.yaml; names of ConfigMaps have no hash."""
    return render_by_kubectl(folder) if shutil.which("kubectl") else render_by_python(folder)


def render_by_kubectl(folder: Path) -> list[Resource]:
    """Return the output of `kubectl kustomize`, without the hashes in the names of ConfigMaps."""
    process = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return list(yaml.safe_load_all(HASH_PATTERN.sub(r"\1", process.stdout)))


def render_by_python(folder: Path, resources: list[Resource] | None = None) -> list[Resource]:
    """Apply a kustomization or a component to resources, and return them."""
    config = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found = list(resources or [])
    for path in config.get("resources", ()):
        target = folder / path
        found += render_by_python(target) if target.is_dir() else yaml.safe_load_all(target.read_text())
    for path in config.get("components", ()):
        found = render_by_python(folder / path, found)
    for generator in config.get("configMapGenerator", ()):
        apply_generator(found, generator)
    for patch in config.get("patches", ()):
        apply_patch(found, patch, folder)
    for resource in found:
        transform(resource, config)
    return found


def apply_generator(resources: list[Resource], generator: Resource) -> None:
    """Add a ConfigMap, or merge values into one."""
    values = dict(line.split("=", 1) for line in generator["literals"])
    if generator.get("behavior") == "merge":
        find(resources, "ConfigMap", generator["name"])["data"].update(values)
    else:
        metadata = {"name": generator["name"]}
        resources.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": values})


def transform(resource: Resource, config: Resource) -> None:
    """Set the namespace, labels and images of a kustomization."""
    if "namespace" in config:
        resource["metadata"]["namespace"] = config["namespace"]
    for labels in config.get("labels", ()):
        for path in (("metadata", "labels"), *SELECTORS.get(resource["kind"], ())):
            set_default(resource, path).update(labels["pairs"])
    for image in config.get("images", ()) if resource["kind"] == "Deployment" else ():
        for container in resource["spec"]["template"]["spec"]["containers"]:
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"


def find(resources: list[Resource], kind: str, name: str = "corr2d") -> Resource:
    """Return the only resource of a kind and name."""
    (resource,) = [each for each in resources if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return resource


def set_default(resource: Resource, path: tuple[str, ...]) -> Resource:
    """Return the mapping at a path, which is created if it is missing."""
    for name in path:
        resource = resource.setdefault(name, {})
    return resource


def apply_patch(resources: list[Resource], patch: Resource, folder: Path) -> None:
    """Apply a strategic merge patch, or a JSON patch of operations `add` to all resources of a kind."""
    content = yaml.safe_load((folder / patch["path"]).read_text())
    if isinstance(content, dict):
        merge(find(resources, content["kind"], content["metadata"]["name"]), content)
        return
    for resource in resources:
        for operation in content if resource["kind"] == patch["target"]["kind"] else ():
            assert operation["op"] == "add"
            target: Any = resource
            *parents, last = operation["path"].strip("/").split("/")
            for part in parents:
                target = target[int(part) if isinstance(target, list) else part]
            target[last] = operation["value"]


def merge(target: Resource, patch: Resource) -> None:
    """Apply a strategic merge patch."""
    for name, value in patch.items():
        if isinstance(value, dict) and isinstance(target.get(name), dict):
            merge(target[name], value)
        elif name in LIST_KEYS and name in target:
            present = {element[LIST_KEYS[name]]: element for element in target[name]}
            for element in value:
                if element[LIST_KEYS[name]] in present:
                    merge(present[element[LIST_KEYS[name]]], element)
                else:
                    target[name].append(element)
        else:
            target[name] = value
