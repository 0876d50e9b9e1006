"""Alert rules and scrape configuration, by promtool; and that they speak of metrics that exist."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from gcahng.monitor.specs import SPECS
from gcahng.training.collapse_warning import FIRST_STEP, SMALLEST_RANK_SHARE, SMALLEST_STD

ROOT = Path(__file__).parents[2]
OPS, UNIT_TESTS = ROOT / "ops", Path(__file__).with_name("alerts_test.yml")
# Of Prometheus itself.
FOREIGN = {"up"}

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Debian's package prometheus")


def promtool(*arguments: object) -> str:
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def rules() -> list[dict]:
    (group,) = yaml.safe_load((OPS / "alerts.yml").read_text())["groups"]
    return group["rules"]


def series(expression: str) -> set[str]:
    """Names of metrics in a PromQL expression."""
    text = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|\b(by|on|ignoring|without)\s*\([^)]*\)', " ", expression)
    return {name for name in re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", text) if name in FOREIGN or "gcahng" in name}


def exported() -> set[str]:
    """Names of the series that metrics consist of."""
    names = set()
    for spec in SPECS:
        suffixes = ("_bucket", "_sum", "_count") if spec.kind == "histogram" else ("",)
        names |= {spec.name + suffix for suffix in suffixes}
    return names


@needs_promtool
def test_the_rules_and_the_scrape_configuration_are_valid() -> None:
    assert f"{len(rules())} rules found" in promtool("check", "rules", OPS / "alerts.yml")
    assert "is valid prometheus config file syntax" in promtool("check", "config", OPS / "prometheus.yml")


@needs_promtool
def test_each_alert_fires_when_it_should_and_not_otherwise() -> None:
    promtool("test", "rules", UNIT_TESTS)


def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    wanted = {rule["alert"] for rule in rules()}
    fires, silent = set(), set()
    for case in yaml.safe_load(UNIT_TESTS.read_text())["tests"]:
        # A case that fires for some of its instances is silent for the others.
        instances = {m for s in case["input_series"] for m in re.findall(r'instance="(\w+)"', s["series"])}
        for check in case["alert_rule_test"]:
            alerts = check.get("exp_alerts", [])
            if alerts:
                fires.add(check["alertname"])
            if {alert["exp_labels"]["instance"] for alert in alerts} < instances or not alerts:
                silent.add(check["alertname"])
    assert fires == silent == wanted


def test_the_alert_of_a_collapse_has_the_numbers_of_the_warning() -> None:
    (rule,) = [rule for rule in rules() if rule["alert"] == "GcahngCollapse"]
    expression = " ".join(rule["expr"].split())
    assert f"gcahng_embedding_std < {SMALLEST_STD})" in expression
    assert f"gcahng_effective_rank < {SMALLEST_RANK_SHARE} * gcahng_class_directions)" in expression
    assert f"gcahng_step >= {FIRST_STEP})" in expression


def test_alerts_and_dashboard_use_metrics_that_exist() -> None:
    dashboard = json.loads((OPS / "grafana-dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [variable.get("definition", "") for variable in dashboard["templating"]["list"]]
    expressions += [rule["expr"] for rule in rules()]
    used = {name for expression in expressions for name in series(expression)}
    assert len(used) > 30
    assert used - FOREIGN - exported() == set()


def test_the_readme_lists_each_alert_and_file() -> None:
    text = (OPS / "README.md").read_text()
    assert {rule["alert"] for rule in rules()} <= set(re.findall(r"`(Gcahng\w+)`", text))
    assert {file.name for file in OPS.iterdir()} - {"README.md", "targets", "nodes"} <= set(
        re.findall(r"`([\w.-]+)`", text)
    )


def test_the_example_of_targets_is_what_the_endpoints_listen_on() -> None:
    """Port + local rank, every rank once."""
    targets = json.loads((OPS / "targets-example.json").read_text())
    assert [entry["labels"]["rank"] for entry in targets] == ["0", "1", "2", "3"]
    assert [entry["targets"][0].split(":")[1] for entry in targets] == ["9400", "9401"] * 2
