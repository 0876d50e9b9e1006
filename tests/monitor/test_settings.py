"""What is refused before a run begins, and that nothing is open by default."""

import sys
from pathlib import Path
from typing import Any

import pytest
from run_cases import base_settings, make_config, make_trainer

from gcahng.distributed import ONE
from gcahng.errors import ConfigError
from gcahng.training.config import config_from_mapping
from gcahng.training.metrics_observer import metrics_observers


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        ({"each_rank": True}, "needs a port for rank 0 to count from: got monitor.port=null. Set monitor.port"),
        ({"port": 0}, "must lie in [1, 65535]: got 0"),
        ({"port": 65536}, "must lie in [1, 65535]: got 65536"),
        ({"port": 9400, "address": ""}, "must not be empty"),
        ({"textfile": "run.txt"}, "must end in .prom, as node_exporter wants it: got 'run.txt'"),
    ],
)
def test_impossible_settings(tmp_path: Path, monitor: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config_from_mapping(base_settings(tmp_path, tmp_path / "run") | {"monitor": monitor})
    assert message in str(refused.value)


def test_nothing_is_open_by_default(tmp_path: Path) -> None:
    assert metrics_observers(make_config(tmp_path, tmp_path / "run"), ONE) == []


@pytest.mark.parametrize("setting", ["port", "textfile"])
def test_without_prometheus_client_a_run_does_not_begin(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    value = 9400 if setting == "port" else str(tmp_path / "run.prom")
    with pytest.raises(ConfigError, match=rf"`monitor.{setting}` needs the package .* pip install 'gcahng\[monitor\]'"):
        make_trainer(shards, tmp_path / "run", {f"monitor.{setting}": value})
    assert list(tmp_path.iterdir()) == []
    # Before data is read, and together with all else that is missing.
    with pytest.raises(ConfigError, match=rf"^2 things are missing:(.|\n)*nowhere(.|\n)*`monitor.{setting}` needs"):
        make_trainer(tmp_path / "nowhere", tmp_path / "run", {f"monitor.{setting}": value})


def test_a_text_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path / "run", {"monitor.textfile": str(tmp_path / "none" / "run.prom")})
    with pytest.raises(ConfigError, match=r"`monitor.textfile` .*run.prom: the folder does not exist"):
        metrics_observers(config, ONE)
