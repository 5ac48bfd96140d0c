"""Tables and links of the README and of docs against the code."""

import re
from pathlib import Path

from core import ENGINES
from service.app import create_app
from service.app_state import get_app_state
from service.cli.options import format_setting
from service.codecs.content_coding import COMPRESSORS
from service.codecs.header_checks import DTYPES
from service.codecs.registry import DECODABLE_MEDIA_TYPES, ENCODABLE_FORMATS, FORMATS
from service.configuration.settings import ENV_PREFIX, Settings
from service.errors import ClientDisconnected
from service.metrics.prometheus import MetricsCollector
from service.negotiation import CONTENT_CODINGS
from service.problems import PROBLEM_TYPES

ROOT = Path(__file__).parents[2]
API_PAGE = (ROOT / "docs" / "http-api.md").read_text()
ARCHITECTURE_PAGE = (ROOT / "docs" / "architecture.md").read_text()
FORMATS_PAGE = (ROOT / "docs" / "formats.md").read_text()
MONITORING_PAGE = (ROOT / "docs" / "monitoring.md").read_text()
PERFORMANCE_PAGE = (ROOT / "docs" / "performance.md").read_text()
PRECISION_PAGE = (ROOT / "docs" / "precision.md").read_text()


def parse_table_rows(heading: str, page: str = API_PAGE) -> list[list[str]]:
    """Return the cells of the table below a heading, without its header."""
    section = page.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]


def test_endpoint_table_matches_the_routes() -> None:
    described = create_app(Settings()).openapi()["paths"]
    served = {
        f"`{method.upper()} {path}`": operation["summary"]
        for path, operations in described.items()
        for method, operation in operations.items()
    }
    listed = dict(parse_table_rows("Endpoints"))
    assert listed.keys() == served.keys()
    for endpoint, summary in served.items():
        assert listed[endpoint].startswith(summary)


def test_settings_table_is_complete() -> None:
    assert parse_table_rows("Settings") == [
        [f"`{ENV_PREFIX}{name.upper()}`", format_setting(field.default), str(field.description)]
        for name, field in Settings.model_fields.items()
    ]


def test_error_table_is_complete() -> None:
    listed = [
        (int(status), name.strip("`").removeprefix("urn:corr2d:error:"), title)
        for status, name, title in parse_table_rows("Errors")
    ]
    without_class = {
        (404, "not-found", "Not Found"),
        (405, "method-not-allowed", "Method Not Allowed"),
        (500, "internal", "Internal error"),
    }
    sent = {
        (kind.status, kind.name, kind.title) for error, kind in PROBLEM_TYPES.items() if error is not ClientDisconnected
    }
    assert listed == sorted(listed, key=lambda row: row[0])
    assert set(listed) == sent | without_class


def test_format_tables_are_complete() -> None:
    listed = parse_table_rows("Media types", FORMATS_PAGE)
    assert [media_type.strip("`") for media_type, _, _ in listed] == list(FORMATS)
    for media_type, body, response in listed:
        assert (body != "none") == (media_type.strip("`") in DECODABLE_MEDIA_TYPES)
        assert (response != "none") == (media_type.strip("`") in ENCODABLE_FORMATS)
    assert dict(parse_table_rows("Data types", FORMATS_PAGE))["dtypes"] == ", ".join(f"`{dtype}`" for dtype in DTYPES)


def test_engine_tables_are_complete() -> None:
    methods = {name: engine.METHOD for name, engine in ENGINES.items()}
    listed = parse_table_rows("Engines", PERFORMANCE_PAGE)
    assert {name.strip("`"): method for name, method, *_ in listed} == methods
    direct, others = re.findall(r"^\| (`.*?) \| every", PRECISION_PAGE, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", direct)) == {name for name in methods if methods[name] == "direct"}
    assert set(re.findall(r"`(\w+)`", others)) == {name for name in methods if methods[name] != "direct"}


def test_content_codings_are_listed() -> None:
    section = FORMATS_PAGE.split("\n## Compression\n", 1)[1].split("\n## ", 1)[0]
    assert set(re.findall("[a-z]+", " ".join(re.findall("`([^`]+)`", section)))) >= {
        *CONTENT_CODINGS.split(", "),
        *COMPRESSORS,
    }


def test_layout_matches_the_source_tree() -> None:
    for paths, _ in parse_table_rows("Layout", ARCHITECTURE_PAGE):
        for path in re.findall(r"`([^`]+)`", paths):
            assert (ROOT / path).exists(), path


def test_every_link_points_to_a_file() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"({page.name})" in index or page.name == "README.md"


def test_modules_of_the_page_are_in_contributing() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().split("\n## Change the page\n", 1)[1].split("\n## ", 1)[0]
    modules = {path.name for path in (ROOT / "service" / "playground" / "static").glob("*.js")}
    assert set(re.findall(r"`(\w+\.js)`", section)) == modules


def test_every_make_target_is_in_contributing() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    for target in re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE):
        if target not in ("help", "clean"):
            assert f"`make {target}`" in contributing


def test_routes_match_the_contract() -> None:
    paths = create_app(Settings()).openapi()["paths"]
    other_paths = {"/kernels", "/info", "/livez", "/readyz", "/metrics"}
    assert set(paths) == {"/correlate", "/conv2d", "/train-kernel"} | other_paths


def test_tables_of_metrics_and_labels_are_complete() -> None:
    families = list(MetricsCollector(get_app_state(create_app(Settings())).metrics, "").collect())
    suffix = {"counter": "_total", "info": "_info"}
    labels: dict[str, dict[str, None]] = {}
    listed = parse_table_rows("Metrics", MONITORING_PAGE)
    for family, row in zip(families, listed[: len(families)], strict=True):
        names = list(dict.fromkeys(name for sample in family.samples for name in sample.labels if name != "le"))
        written = ", ".join(f"`{name}`" for name in names) or "none"
        assert row == [f"`{family.name}{suffix.get(family.type, '')}`", family.type, written, family.documentation]
        for name in names if family.type != "info" else ():
            values = dict.fromkeys(sample.labels[name] for sample in family.samples)
            labels[name] = {**labels.get(name, {}), **values}
    # The two tables are separated by the header of the second and the line below it.
    values_of = {name.strip("`"): values for name, values in listed[len(families) + 2 :]}
    assert values_of.keys() == labels.keys()
    for label in labels.keys() - {"reason"}:
        assert values_of[label] == ", ".join(f"`{value}`" for value in labels[label])
