"""Files for the services around the repository: they can be parsed, and agree with the Makefile and the version."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import corr2d

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
YAML_FILES = [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]

SCHEMAS = {
    "citation-file-format": ["CITATION.cff"],
    "compose-spec": ["docker-compose.yml"],
    "dependabot": [".github/dependabot.yml"],
    "github-issue-config": [".github/ISSUE_TEMPLATE/config.yml"],
    "github-issue-forms": [".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/feature.yml"],
    "github-workflows": [str(path.relative_to(ROOT)) for path in WORKFLOWS],
}
"""Files by the schema of check-jsonschema that they follow."""


def read_yaml(path: Path) -> dict[Any, Any]:
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict)
    return content


def list_check_commands() -> list[str]:
    """Return the tools that `make check` runs."""
    recipe = MAKEFILE.split("\ncheck:", 1)[1].split("\n\n", 1)[0]
    return re.findall(r"\$\(BIN\)/(.+)", recipe)


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_yaml_can_be_parsed(path: Path) -> None:
    assert read_yaml(path)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_of_services_follow_their_schemas(schema: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *SCHEMAS[schema]]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert process.returncode == 0, process.stdout + process.stderr


def test_schemas_cover_all_files_of_github() -> None:
    files = {str(path.relative_to(ROOT)) for path in (ROOT / ".github").rglob("*.yml")}
    assert files <= {path for paths in SCHEMAS.values() for path in paths}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_existing_make_targets(path: Path) -> None:
    targets = re.findall(r"^([\w./-]+):", MAKEFILE, re.MULTILINE)
    for job in read_yaml(path)["jobs"].values():
        assert job["timeout-minutes"]
        for command in re.findall(r"\bmake (\S+)", " ".join(step.get("run", "") for step in job["steps"])):
            assert command == "${{" or command in targets, command


def test_workflows_test_every_supported_python_version() -> None:
    jobs = read_yaml(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    supported = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    matrix = jobs["test"]["strategy"]["matrix"]
    assert {*matrix["python"], *(job["python"] for job in matrix["include"])} == set(supported)
    least, limit = re.findall(r"3\.(\d+)", PROJECT["project"]["requires-python"])
    assert supported == [f"3.{minor}" for minor in range(int(least), int(limit))]


def test_commit_hooks_are_those_of_make_check() -> None:
    (repository,) = read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    tools = {shlex.split(hook["entry"])[0] for hook in repository["hooks"]}
    checked = {f".venv/bin/{command.split()[0]}" for command in list_check_commands()}
    assert tools == checked - {".venv/bin/pytest"}


def test_versions_and_dates_agree() -> None:
    citation = read_yaml(ROOT / "CITATION.cff")
    version, date = re.findall(r"^## (\d\S*) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert corr2d.__version__ == version == str(citation["version"])
    assert str(citation["date-released"]) == date


def test_every_dependency_is_pinned() -> None:
    optional = PROJECT["project"]["optional-dependencies"] | PROJECT["dependency-groups"]
    declared = [*PROJECT["project"]["dependencies"], *(line for lines in optional.values() for line in lines)]
    names = {re.split(r"[^\w.-]", line, maxsplit=1)[0].replace(".", "-").lower() for line in declared}
    pins = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert names <= set(pins)


def test_lock_file_has_the_pinned_versions_with_their_hashes() -> None:
    text = (ROOT / "requirements.lock").read_text()
    locked = re.findall(r"^([\w-]+)==(\S+)(?: ;.*)? \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)
    assert len(locked) == len(re.findall("^[^# ]", text, re.MULTILINE))
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {name: pins[name] for name, _ in locked} == dict(locked)
    declared = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["plot"]]
    names = {re.split(r"[^\w.-]", line, maxsplit=1)[0].replace(".", "-").lower() for line in declared}
    assert names - set(dict(locked)) == {"torch"}
