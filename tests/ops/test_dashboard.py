"""The dashboard's and the alerts' queries on a real Prometheus server that scrapes a real run."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from monitor_cases import ROOT, free_port
from run_cases import make_trainer

from gcahng.errors import Interrupted
from gcahng.monitor.run_folder import read_status
from gcahng.training.observers import Observers, RunObserver

needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's package prometheus")
PANELS: list[dict[str, Any]] = json.loads((ROOT / "ops" / "grafana-dashboard.json").read_text())["panels"]
QUERIES = {
    f"{panel['title']}: {target['legendFormat']}": target["expr"] for panel in PANELS for target in panel["targets"]
}
# What Grafana puts in place of its variables; the range is as short as this run is.
VARIABLES = {"$job": "gcahng", "$instance": ".+", "$__rate_interval": "10s"}
TIME_LIMIT_S = 150.0


def filled(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


class Server:
    """A Prometheus server of our own."""

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str, **query: str) -> Any:
        address = f"http://127.0.0.1:{self.port}/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            return json.loads(answer.read())["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression has now."""
        found: list[dict[str, Any]] = self.get("api/v1/query", query=expression)["result"]
        return found

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + TIME_LIMIT_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=5):
                    return
            except OSError:
                assert time.monotonic() < deadline, "Prometheus did not start"
                time.sleep(0.05)


@pytest.fixture(scope="module")
def target_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, target_port: int) -> Iterator[Server]:
    """With the configuration of ops/, but scraping often, and our target."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((ROOT / "ops" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    shutil.copy(ROOT / "ops" / "alerts.yml", folder)
    (folder / "targets").mkdir()
    targets = [{"targets": [f"127.0.0.1:{target_port}"], "labels": {"run": "runs/tiny"}}]
    (folder / "targets" / "tiny.json").write_text(json.dumps(targets))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        found = Server(port)
        found.wait_until_ready()
        yield found
    finally:
        process.kill()
        process.wait()


class EndsWhenTold(RunObserver):
    """Interrupts the run from inside, so that no signal comes before it begins or after it ended."""

    def __init__(self) -> None:
        self.told = threading.Event()

    def step(self, *_: Any) -> None:
        if self.told.is_set():
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def answers(server: Server, target_port: int, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By query, what it answered while a run went on; each is asked until it has answered once, or time is up."""
    settings = {"train.epochs": 10000, "train.save_every_steps": 2, "monitor.port": target_port}
    settings |= {"optim.graph.schedule.name": "constant", "data.validation": 0.25}
    run_dir = tmp_path_factory.mktemp("dashboard") / "run"
    trainer = make_trainer(shards, run_dir, settings)
    ends = EndsWhenTold()
    trainer.observers = Observers([trainer.observers, ends])
    found: dict[str, Any] = {}

    def ask() -> None:
        deadline = time.monotonic() + TIME_LIMIT_S
        missing = {name for name in QUERIES if "GPU" not in name or torch.cuda.is_available()}
        try:
            while missing and time.monotonic() < deadline:
                for name in sorted(missing):
                    found[name] = server.query(filled(QUERIES[name]))
                missing = {name for name in missing if not has_number(found[name])}
                time.sleep(0.1)
            found["alerts"] = server.get("api/v1/rules")["groups"]
            found["instances"] = server.get("api/v1/series", **{"match[]": 'gcahng_run_state{job=~"gcahng"}'})
            found["up"] = server.query("up")
        finally:
            ends.told.set()

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(Interrupted):
        trainer.run()
    trainer.close()
    asking.join()
    found["status"] = read_status(run_dir)
    return found


def has_number(series: list[dict[str, Any]]) -> bool:
    """Whether each of them has a value, and there is one."""
    return bool(series) and all(one["value"][1] != "NaN" for one in series)


@needs_prometheus
@pytest.mark.parametrize("name", QUERIES)
def test_each_query_has_an_answer(answers: dict[str, Any], name: str) -> None:
    if "GPU" in name and not torch.cuda.is_available():
        pytest.skip("GPU memory is exported on CUDA alone")
    assert has_number(answers[name]), QUERIES[name]


@needs_prometheus
def test_answers_are_those_of_the_run(answers: dict[str, Any]) -> None:
    (state,) = answers["State: {{state}}"]
    assert state["metric"]["state"] == "running" and state["metric"]["run"] == "runs/tiny"
    (share,) = answers["Share of the time that waits for data: {{instance}}"]
    assert 0 < float(share["value"][1]) < 1
    recalls = answers["Recall@k and MAP@R: R@{{k}} {{split}} {{instance}}"]
    assert {(one["metric"]["split"], one["metric"]["k"]) for one in recalls} == {
        (split, k) for split in ("test", "validation") for k in ("1", "2", "4")
    }
    assert len(answers["Losses: {{name}} {{instance}}"]) == 9
    assert {one["metric"]["instance"] for one in recalls} == {one["instance"] for one in answers["instances"]}


@needs_prometheus
def test_the_server_evaluates_each_alert(answers: dict[str, Any]) -> None:
    """And none fires for a run that is well."""
    (group,) = answers["alerts"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    wanted = yaml.safe_load((ROOT / "ops" / "alerts.yml").read_text())["groups"][0]["rules"]
    assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in wanted]
    assert [rule["name"] for rule in group["rules"] if rule["state"] == "firing"] == []
    assert [one["value"][1] for one in answers["up"]] == ["1"]


@needs_prometheus
def test_the_run_was_interrupted_as_its_status_says(answers: dict[str, Any]) -> None:
    status = answers["status"]
    assert status.state == "interrupted" and status.checkpoint == f"step-{status.step}"
    assert status.seconds_left > 0 and status.error is None
    assert status.warnings == ["PREEMPTED: asked to end and saved; go on with train.resume=auto"]


def test_the_structure_is_what_grafana_imports() -> None:
    dashboard = json.loads((ROOT / "ops" / "grafana-dashboard.json").read_text())
    assert dashboard["title"] and isinstance(dashboard["schemaVersion"], int)
    assert "id" not in dashboard  # Grafana gives the number
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    assert {"job", "instance"} <= set(variables)
    assert Counter(panel["id"] for panel in PANELS).most_common(1)[0][1] == 1
    covered: Counter[tuple[int, int]] = Counter()
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24 and place["h"] > 0
        covered.update(
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        )
        references = [target["refId"] for target in panel["targets"]]
        assert references and len(set(references)) == len(references)
        for place_of_source in (panel, *panel["targets"]):
            assert place_of_source["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert {"defaults", "overrides"} == panel["fieldConfig"].keys() and panel["title"]
        for target in panel["targets"]:
            assert 'job=~"$job", instance=~"$instance"' in target["expr"]
    assert max(covered.values()) == 1  # no panel lies on another
