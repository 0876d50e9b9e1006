"""`launch/export.py`: what it prints, and its errors."""

from pathlib import Path

import pytest
from run_cases import train


@pytest.fixture(scope="module")
def run_dir(launch_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "run"
    train(launch_shards, folder, {"train.max_steps_per_epoch": 1})
    return folder


def test_a_run_becomes_a_file(command_line, run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.onnx"
    options = ("--normalise", "--include-preprocess", "--image-size", 20)
    ended = command_line("export.py", "--run", run_dir, "--output", output, *options)
    assert ended.status == 0, ended.err
    size, model, images, embeddings, *checks = ended.out.splitlines()
    assert size == f"{output}: {output.stat().st_size / 2**20:.1f} MiB" and output.stat().st_size > 1000
    assert model == "small_conv, run/step-1, epoch 1"
    assert images == "images (batch, 20, 20, 3) uint8 RGB, 0 to 255"
    assert embeddings == "embeddings (batch, 8) float32, length 1"
    assert [line.partition(":")[0] for line in checks[:3]] == ["1 random image", "3 random images", "8 random images"]
    assert checks[3].startswith("8 images of ") and checks[3].endswith(" of the largest entry, cosine 1.0000000")


def test_what_is_refused(command_line, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = ("--output", tmp_path / "m.onnx")
    cases = [
        (("--run", run_dir, "--which", "best", *target), "this run has no `best`"),
        (("--checkpoint", run_dir, *target), "is a run folder, no checkpoint"),
        (("--run", run_dir, *target, "--format", "torch-export"), "needs a name that ends in .pt2"),
        (("--run", run_dir, *target, "--tolerance", "1e-12"), "by more than the tolerance 1.0e-12"),
        (("--run", run_dir, *target, "model.poling=avg"), "did you mean `model.pooling`"),
    ]
    for arguments, message in cases:
        ended = command_line("export.py", *arguments)
        assert ended.status == 2 and ended.out == "", arguments
        assert ended.err.startswith("error: ") and message in ended.err, ended.err
    assert not list(tmp_path.iterdir())
    for arguments in (("--run", run_dir), target, ("--run", run_dir, *target, "--format", "tf")):
        ended = command_line("export.py", *arguments)
        assert ended.status == 2 and ended.err.startswith("usage: launch/export.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "launch/export.py runs as one process" in command_line("export.py", "--run", run_dir, *target).err
