"""The dashboard and the alerts against what is counted, and with the tools that will read them."""

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
from service.exposition import Families
from service.settings import Settings

MONITORING = Path(__file__).parents[2] / "monitoring"
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
ALERTS: list[dict[str, Any]] = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
TESTS: list[dict[str, Any]] = yaml.safe_load((MONITORING / "alerts.test.yml").read_text())["tests"]

GRAFANAS_WORDS = {"$__rate_interval": "5m", "$__range": "3h"}
PROMETHEUS_OWN = {"up", "ALERTS"}
OF_EVERY_TARGET = {"job", "instance"}

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed: apt-get install prometheus"
)


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    """Those of the dashboard, with a value for each word that Grafana replaces."""
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    found += [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]
    for word, value in GRAFANAS_WORDS.items():
        found = [query.replace(word, value) for query in found]
    return found


EXPRESSIONS = [*queries(), *(alert["expr"] for alert in ALERTS)]


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    """What the expression reads; raises ValueError where it is none."""
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
    """The labels of every series at /metrics, by its name."""
    named: dict[str, list[dict[str, str]]] = {}
    for family in Families(create_app(Settings()).state.metrics, "").collect():
        for sample in family.samples:
            named.setdefault(sample.name, []).append(dict(sample.labels))
    return named


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_expression_reads_series_that_there_are(expression: str, series: dict[str, list[dict[str, str]]]) -> None:
    read = selectors(expression)
    assert read
    for selector in read:
        if selector.name in PROMETHEUS_OWN:
            continue
        assert selector.name in series
        asked = [matcher for matcher in selector.matchers.matchers if matcher.name not in OF_EVERY_TARGET]
        found = [labels for labels in series[selector.name] if all(matches(each, labels[each.name]) for each in asked)]
        assert found, selector
        # Each alternative, too: a name that is misspelt beside one that is not.
        for matcher in asked:
            for alternative in matcher.value.split("|") if matcher.op == promql_parser.MatchOp.Re else ():
                assert any(re.fullmatch(alternative, labels[matcher.name]) for labels in series[selector.name])
        grouped = re.findall(r"\bby \(([^)]*)\)", expression)
        for label in {name.strip() for names in grouped for name in names.split(",")} - OF_EVERY_TARGET:
            assert label in series[selector.name][0]


def test_the_tests_of_the_alerts_are_fed_with_series_that_there_are(series: dict[str, list[dict[str, str]]]) -> None:
    fed = [each["series"] for test in TESTS for each in test["input_series"]]
    for expression in fed:
        (selector,) = selectors(expression)
        if selector.name in PROMETHEUS_OWN:
            continue
        labels = {each.name: each.value for each in selector.matchers.matchers if each.name not in OF_EVERY_TARGET}
        assert labels in series[str(selector.name)], expression


def test_every_metric_is_on_the_dashboard(series: dict[str, list[dict[str, str]]]) -> None:
    def family(name: str) -> str:
        return re.sub("_(bucket|sum|count)$", "", name)

    shown = {family(str(selector.name)) for query in queries() for selector in selectors(query)}
    assert {family(name) for name in series} - shown == set()


def test_every_alert_says_what_is_wrong_and_how_bad_and_is_tested_both_ways() -> None:
    fires: dict[str, set[bool]] = {}
    for test in TESTS:
        for case in test["alert_rule_test"]:
            fires.setdefault(case["alertname"], set()).add(bool(case.get("exp_alerts")))
    for alert in ALERTS:
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert set(alert) == {"alert", "expr", "for", "labels", "annotations"}
        assert set(alert["annotations"]) == {"summary", "description"}
        assert True in fires[alert["alert"]]
    assert fires.keys() == {alert["alert"] for alert in ALERTS}


def test_grafanas_own_model_has_everything_that_the_dashboard_says() -> None:
    plugins.register_default_plugins()
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))

    def losses(written: Any, kept: Any, place: str) -> Iterator[str]:
        if isinstance(written, dict) and isinstance(kept, dict):
            for name, value in written.items():
                yield from losses(value, kept.get(name), f"{place}.{name}")
        elif isinstance(written, list) and isinstance(kept, list) and len(written) == len(kept):
            for at, (each, its) in enumerate(zip(written, kept, strict=True)):
                yield from losses(each, its, f"{place}[{at}]")
        elif written != kept:
            yield f"{place}: {written} became {kept}"

    assert list(losses(DASHBOARD, read, "dashboard")) == []


def test_no_two_panels_share_an_id_or_a_place() -> None:
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


@promtool
@pytest.mark.parametrize("command", [["check", "rules", "alerts.yml"], ["test", "rules", "alerts.test.yml"]])
def test_promtool_takes_the_alerts_and_their_tests_pass(command: list[str]) -> None:
    done = subprocess.run(["promtool", *command], cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_promtool_takes_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"dashboard:query:{at}", "expr": query} for at, query in enumerate(queries())]
    wrapped = tmp_path / "queries.yml"
    wrapped.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", wrapped], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
