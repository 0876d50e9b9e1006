"""The table of `table_cases`, some of its runs really trained."""

import shutil
from pathlib import Path

import pytest
import yaml
from run_cases import base_settings, convert_patterns, draw_patterns
from table_cases import SPEC, Tiny, train


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Both seeds of the baseline, the second in a folder of its own; the first seed of the graph."""
    tiny = Tiny(tmp_path_factory.mktemp("tables"))
    shards = convert_patterns(draw_patterns(tiny.folder / "images"), tiny.folder / "shards")
    settings = base_settings(shards, tiny.folder / "unused")
    (tiny.folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    tiny.spec.write_text(SPEC)
    train(tiny.planned("Baseline", 0))
    # Settings that change no number, and another folder.
    train(tiny.planned("Baseline", 1), f"run.dir={tiny.runs}/elsewhere", "train.log_every=2", "eval.ks=[1,2]")
    train(tiny.planned("Baseline + GNN", 0))
    return tiny


@pytest.fixture
def tiny(trained: Tiny, tmp_path: Path) -> Tiny:
    """A copy whose runs may be damaged; the shards stay where they are."""
    for name in ("tiny.yaml", "spec.yaml", "runs"):
        source = trained.folder / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, symlinks=True)
        else:
            shutil.copy(source, tmp_path / name)
    return Tiny(tmp_path)
