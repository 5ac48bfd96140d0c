"""Check the dashboard and the alerts against the metrics, and with the tools that read them."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from service.app import create_app
from service.app_state import get_app_state
from service.configuration.settings import Settings
from service.metrics.prometheus import MetricsCollector

MONITORING = Path(__file__).parents[2] / "monitoring"
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
ALERTS: list[dict[str, Any]] = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
ALERT_TESTS: list[dict[str, Any]] = yaml.safe_load((MONITORING / "alerts.test.yml").read_text())["tests"]

GRAFANA_VARIABLES = {"$__rate_interval": "5m", "$__range": "3h"}
PROMETHEUS_SERIES = {"up", "ALERTS"}
TARGET_LABELS = {"job", "instance"}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed: apt-get install prometheus"
)


def list_panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def list_queries() -> list[str]:
    """Return the queries of the dashboard, with values for Grafana's variables."""
    found = [target["expr"] for panel in list_panels() for target in panel["targets"]]
    found += [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]
    for word, value in GRAFANA_VARIABLES.items():
        found = [query.replace(word, value) for query in found]
    return found


EXPRESSIONS = [*list_queries(), *(alert["expr"] for alert in ALERTS)]


def list_selectors(expression: str) -> list[promql_parser.VectorSelector]:
    """Return the selectors of an expression; raise ValueError if it is not valid PromQL."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def matches(matcher: promql_parser.Matcher, value: str) -> bool:
    by_pattern = matcher.op in (promql_parser.MatchOp.Re, promql_parser.MatchOp.NotRe)
    found = re.fullmatch(matcher.value, value) is not None if by_pattern else matcher.value == value
    return found != (matcher.op in (promql_parser.MatchOp.NotEqual, promql_parser.MatchOp.NotRe))


@pytest.fixture(scope="module")
def series() -> dict[str, list[dict[str, str]]]:
    """Return the labels of all series at /metrics, by metric name."""
    named: dict[str, list[dict[str, str]]] = {}
    for family in MetricsCollector(get_app_state(create_app(Settings())).metrics, "").collect():
        for sample in family.samples:
            named.setdefault(sample.name, []).append(dict(sample.labels))
    return named


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_expression_reads_existing_series(expression: str, series: dict[str, list[dict[str, str]]]) -> None:
    read = list_selectors(expression)
    assert read
    for selector in read:
        if selector.name in PROMETHEUS_SERIES:
            continue
        assert selector.name in series
        label_matchers = [matcher for matcher in selector.matchers.matchers if matcher.name not in TARGET_LABELS]
        found = [
            labels
            for labels in series[selector.name]
            if all(matches(each, labels[each.name]) for each in label_matchers)
        ]
        assert found, selector
        # Each alternative must match, too: a misspelt name can hide next to a correct one.
        for matcher in label_matchers:
            for alternative in matcher.value.split("|") if matcher.op == promql_parser.MatchOp.Re else ():
                assert any(re.fullmatch(alternative, labels[matcher.name]) for labels in series[selector.name])
        grouped = re.findall(r"\bby \(([^)]*)\)", expression)
        for label in {name.strip() for names in grouped for name in names.split(",")} - TARGET_LABELS:
            assert label in series[selector.name][0]


def test_alert_tests_use_existing_series(series: dict[str, list[dict[str, str]]]) -> None:
    fed = [each["series"] for test in ALERT_TESTS for each in test["input_series"]]
    for expression in fed:
        (selector,) = list_selectors(expression)
        if selector.name in PROMETHEUS_SERIES:
            continue
        labels = {each.name: each.value for each in selector.matchers.matchers if each.name not in TARGET_LABELS}
        assert labels in series[str(selector.name)], expression


def test_every_metric_is_on_the_dashboard(series: dict[str, list[dict[str, str]]]) -> None:
    def family(name: str) -> str:
        return re.sub("_(bucket|sum|count)$", "", name)

    shown = {family(str(selector.name)) for query in list_queries() for selector in list_selectors(query)}
    assert {family(name) for name in series} - shown == set()


def test_every_alert_has_annotations_severity_and_tests() -> None:
    fires: dict[str, set[bool]] = {}
    for test in ALERT_TESTS:
        for case in test["alert_rule_test"]:
            fires.setdefault(case["alertname"], set()).add(bool(case.get("exp_alerts")))
    for alert in ALERTS:
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert set(alert) == {"alert", "expr", "for", "labels", "annotations"}
        assert set(alert["annotations"]) == {"summary", "description"}
        assert True in fires[alert["alert"]]
    assert fires.keys() == {alert["alert"] for alert in ALERTS}


def test_dashboard_matches_the_grafana_model() -> None:
    plugins.register_default_plugins()
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))

    def list_differences(written: Any, parsed: Any, path: str) -> Iterator[str]:
        if isinstance(written, dict) and isinstance(parsed, dict):
            for name, value in written.items():
                yield from list_differences(value, parsed.get(name), f"{path}.{name}")
        elif isinstance(written, list) and isinstance(parsed, list) and len(written) == len(parsed):
            for at, (left, right) in enumerate(zip(written, parsed, strict=True)):
                yield from list_differences(left, right, f"{path}[{at}]")
        elif written != parsed:
            yield f"{path}: {written} became {parsed}"

    assert list(list_differences(DASHBOARD, read, "dashboard")) == []


def test_panel_ids_and_positions_are_unique() -> None:
    places = [tuple(panel["gridPos"].values()) for panel in DASHBOARD["panels"]]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len(set(ids)) == len(ids) == len(places)


def test_compose_mounts_files_that_exist_and_scrapes_the_service() -> None:
    services = yaml.safe_load((MONITORING.parent / "docker-compose.yml").read_text())["services"]
    mounts = [volume for service in services.values() for volume in service.get("volumes", ()) if volume[0] == "."]
    assert mounts
    for mount in mounts:
        assert (MONITORING.parent / mount.split(":")[0]).exists(), mount
    (job,) = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    assert job["job_name"] == "corr2d"
    assert target.split(":")[0] in services
    assert services["corr2d"]["ports"] == [f"127.0.0.1:8000:{target.split(':')[1]}"]


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [["check", "config", "prometheus.yml"], ["check", "rules", "alerts.yml"], ["test", "rules", "alerts.test.yml"]],
)
def test_promtool_accepts_the_alerts_and_their_tests(command: list[str]) -> None:
    done = subprocess.run(["promtool", *command], cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_accepts_every_dashboard_query(tmp_path: Path) -> None:
    rules = [{"record": f"dashboard:query:{at}", "expr": query} for at, query in enumerate(list_queries())]
    wrapped = tmp_path / "queries.yml"
    wrapped.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", wrapped], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
