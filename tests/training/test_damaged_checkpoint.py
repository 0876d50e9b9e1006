"""A damaged checkpoint is never gone on from: the one before it is, or the run says why it cannot."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_cases import assert_same_run, make_trainer, read_metrics, train

from gcahng.errors import DataError
from gcahng.training import checkpoint

WHOLE = {"train.epochs": 3, "data.validation": 0.25, "loss.metric": "proxy_anchor"}
AUTO = {"train.resume": "auto"}


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(shards, folder, WHOLE)
    return folder


def flip_a_bit(folder: Path) -> None:
    file = folder / "optimizer-metric_model.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_a_file(folder: Path) -> None:
    file = folder / "graph.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def remove_a_file(folder: Path) -> None:
    (folder / "metric_model.safetensors").unlink()


def remove_half(folder: Path) -> None:
    for file in sorted(folder.iterdir())[::2]:
        file.unlink()


def break_the_manifest(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"sha256"', '"sha25', 1))


DAMAGES = {
    flip_a_bit: r"optimizer-metric_model\.pt is damaged",
    cut_a_file: r"graph\.safetensors is damaged",
    remove_a_file: r"lacks metric_model\.safetensors",
    remove_half: r"step-12 lacks |manifest\.json is unreadable",
    break_the_manifest: r"manifest\.json is unreadable",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    shards, tmp_path, undisturbed: Path, caplog, damage: Callable[[Path], None]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    damage(run / "step-12")
    trainer = make_trainer(shards, run, WHOLE | AUTO)
    assert trainer.progress.step == 8 and (run / "step-12").is_dir()  # nothing is touched yet
    (warning,) = [r.getMessage() for r in caplog.records if "Going back to step-8" in r.getMessage()]
    assert re.search(DAMAGES[damage], warning)
    links: dict[str, str] = {}
    step = trainer.steps.step

    def watched(*arguments: Any, **options: Any) -> Any:
        if options["step"] == 8:
            assert (run / "step-12.damaged").is_dir() and {row["step"] for row in read_metrics(run)} == set(range(1, 9))
            links.update({name: (run / name).resolve().name for name in ("last", "best", "best_test")})
        return step(*arguments, **options)

    trainer.steps.step = watched
    trainer.run()
    assert links["last"] == "step-8" and set(links.values()) <= {"last", "best", "best_test", "step-4", "step-8"}
    shutil.rmtree(run / "step-12.damaged")
    assert_same_run(run, undisturbed)


def test_all_checkpoints_damaged_are_one_error(shards, tmp_path, undisturbed: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    folders = checkpoint.checkpoints(run)
    for folder in folders:
        flip_a_bit(folder)
    with pytest.raises(
        DataError,
        match=rf"All {len(folders)} checkpoints of .*run are damaged, the newest: .*step-12/optimizer-metric_model\.pt "
        r"is damaged.* --overwrite, or in another run\.dir",
    ):
        make_trainer(shards, run, WHOLE | AUTO)
    assert checkpoint.checkpoints(run) == folders


def test_a_named_checkpoint_that_is_damaged_is_refused(shards, tmp_path, undisturbed: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run", symlinks=True)
    flip_a_bit(tmp_path / "run" / "step-12")
    with pytest.raises(DataError, match=r"optimizer-metric_model\.pt is damaged"):
        make_trainer(shards, tmp_path / "other", WHOLE | {"train.resume": f"{tmp_path}/run/step-12"})
