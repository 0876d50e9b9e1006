"""A converted data set, a configuration file, and the command lines, started as files or as processes."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from run_cases import base_settings, convert_patterns, draw_patterns

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def launch_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    return convert_patterns(draw_patterns(folder / "images"), folder / "shards")


@pytest.fixture
def config_file(launch_shards: Path, tmp_path: Path) -> Path:
    """The smallest GCA-HNG run as YAML; its run folder is `tmp_path / "run"`."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(base_settings(launch_shards, tmp_path / "run")))
    return path


@dataclass(frozen=True)
class Ended:
    """How a command line ended."""

    status: int
    out: str
    err: str


CommandLine = Callable[..., Ended]


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Run `launch/NAME` as a file, inside this process: an interpreter with torch takes seconds to start."""

    def run(name: str, *arguments: object) -> Ended:
        script = str(ROOT / "launch" / name)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def process(tmp_path: Path) -> CommandLine:
    """Run Python with these arguments as a process of its own, in another folder than the checkout's."""

    def run(*arguments: object) -> Ended:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run
