"""Checkpoints: whole or absent, checked before use, loaded exactly or with what differs listed."""

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import files_of_at_most, limit_of_files
from run_cases import convert_patterns, draw_patterns, make_trainer, train
from torch import nn

from gcahng.errors import ConfigError, DataError, TrainingError
from gcahng.training import checkpoint

STATE = {"progress": {"epoch": 1}}


def parts() -> tuple[dict[str, nn.Module], dict[str, torch.optim.Optimizer]]:
    """One trained part and one without parameters."""
    module = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return {"classifier": module, "metric_loss": nn.Identity()}, {"classifier": optimizer}


def save(run_dir: Path, step: int) -> Path:
    return checkpoint.save_checkpoint(run_dir, step, **states(*parts()), state=STATE, config_yaml="seed: 1\n")


def states(modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Any]:
    return {
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
    }


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path) -> None:
    modules, optimizers = parts()
    folder = checkpoint.save_checkpoint(
        tmp_path, 7, **states(modules, optimizers), state=STATE, config_yaml="seed: 1\n"
    )
    assert folder == tmp_path / "step-7"
    files = {"classifier.safetensors", "optimizer-classifier.pt", "state.json", "config.yaml"}
    assert {file.name for file in folder.iterdir()} == files | {"manifest.json"}
    checkpoint.verify(folder)
    assert checkpoint.read_state(folder) == STATE
    assert checkpoint.read_tensors(folder, "metric_loss") == {}
    others, other_optimizers = parts()
    checkpoint.load_module(others["classifier"], folder, "classifier")
    checkpoint.load_module(others["metric_loss"], folder, "metric_loss")
    other = other_optimizers["classifier"]
    other.load_state_dict(checkpoint.read_optimizer(folder, "classifier", like=other))
    for name, tensor in modules["classifier"].state_dict().items():
        assert torch.equal(others["classifier"].state_dict()[name], tensor)
    got, want = (o["classifier"].state_dict() for o in (other_optimizers, optimizers))
    assert got["param_groups"] == want["param_groups"]
    for number, entries in want["state"].items():
        for name, tensor in entries.items():
            assert torch.equal(got["state"][number][name], tensor)


def test_a_second_save_of_a_step_replaces_the_first(tmp_path) -> None:
    first = checkpoint.read_tensors(save(tmp_path, 3), "classifier")["weight"].clone()
    second = checkpoint.read_tensors(save(tmp_path, 3), "classifier")["weight"]
    assert not torch.equal(first, second)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_tied_weights_are_saved(tmp_path) -> None:
    module = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    module[1].weight = module[0].weight
    folder = checkpoint.save_checkpoint(tmp_path, 1, **states({"metric_model": module}, {}), state={}, config_yaml="")
    checkpoint.load_module(module, folder, "metric_model")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("classifier.safetensors", "flip", r"classifier\.safetensors is damaged: expected \d+ bytes"),
        ("optimizer-classifier.pt", "cut", r"optimizer-classifier\.pt is damaged: .* got \d+ bytes"),
        ("state.json", "remove", r"step-1 lacks state\.json"),
        ("config.yaml", "flip", r"config\.yaml is damaged"),
        ("manifest.json", "cut", r"manifest\.json is unreadable .*Use another checkpoint"),
        ("manifest.json", "list", r"manifest\.json is unreadable"),
    ],
)
def test_damage_is_found_and_the_file_named(tmp_path, name: str, damage: str, message: str) -> None:
    file = save(tmp_path, 1) / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0x10
    elif damage == "cut":
        content = content[:-20]
    elif damage == "list":
        content = bytearray(b"[1]")
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        checkpoint.verify(tmp_path / "step-1")


# The largest file that still can be written: none at all, the small optimiser, or the large weights.
@pytest.mark.parametrize(("width", "size"), [(4, 0), (4, 300), (4000, 20_000)])
def test_a_refused_write_leaves_the_run_as_it_was(tmp_path, width: int, size: int) -> None:
    save(tmp_path, 1)
    checkpoint.point(tmp_path, "last", tmp_path / "step-1")
    module = nn.Linear(width, 3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with (
        files_of_at_most(size),
        pytest.raises(TrainingError, match=r"step-2 cannot be written \(.+\): make room"),
    ):
        checkpoint.save_checkpoint(
            tmp_path,
            2,
            **states({"metric_model": module}, {"metric_model": optimizer}),
            state=STATE,
            config_yaml="",
        )
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "last"}
    checkpoint.verify(tmp_path / "last")


def test_a_failed_sync_leaves_the_run_as_it_was(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"step-1 cannot be written \(.*No space left on device"):
        save(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    checkpoint.verify(tmp_path / "step-1")


def test_a_full_disk_in_training_keeps_the_last_epoch(shards, tmp_path) -> None:
    settings = {"train.epochs": 2, "train.max_steps_per_epoch": 1, "graph.enabled": False}
    settings |= {"generation.enabled": False}
    trainer = make_trainer(shards, tmp_path / "run", settings)
    write = checkpoint.save_checkpoint
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with pytest.MonkeyPatch.context() as patch:

        def limited(run_dir: Path, step: int, **options: Any) -> Path:
            with limit_of_files(10**6 if step == 1 else 2000):
                return write(run_dir, step, **options)

        patch.setattr(checkpoint, "save_checkpoint", limited)
        with pytest.raises(TrainingError, match="step-2 cannot be written"):
            trainer.run()
    signal.signal(signal.SIGXFSZ, ignored)
    assert (tmp_path / "run" / "last").readlink() == Path("step-1")
    train(shards, tmp_path / "run", settings | {"train.resume": "auto"})
    assert (tmp_path / "run" / "last").readlink() == Path("step-2")


def test_a_link_moves_in_one_step(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    checkpoint.point(tmp_path, "last", tmp_path / "step-1")
    seen = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        seen.append((tmp_path / "last").resolve().name)
        moved = replace(self, target)
        seen.append((tmp_path / "last").resolve().name)
        return moved

    monkeypatch.setattr(Path, "replace", watched)
    (tmp_path / "last.partial").symlink_to("step-9")  # of a killed process
    checkpoint.point(tmp_path, "last", tmp_path / "step-2")
    assert seen == ["step-1", "step-2"]
    assert not (tmp_path / "last").readlink().is_absolute()


def test_old_checkpoints_go_and_linked_ones_stay(tmp_path) -> None:
    for step in (2, 9, 10, 100):
        save(tmp_path, step)
    (tmp_path / "step-by-step").mkdir()
    checkpoint.point(tmp_path, "best", tmp_path / "step-2")
    checkpoint.prune(tmp_path, keep_last=2)
    assert {f.name for f in tmp_path.glob("step-*")} == {"step-2", "step-10", "step-100", "step-by-step"}
    checkpoint.prune(tmp_path, keep_last=5)
    assert (tmp_path / "step-10").is_dir()


def refused(*_: object, **__: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_what_cannot_be_removed_does_not_fail_a_save(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS keeps the files that somebody still reads."""
    for step in (1, 2):
        save(tmp_path, step)
    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", refused)
        checkpoint.prune(tmp_path, 1)
    assert [f.name for f in checkpoint.checkpoints(tmp_path)] == ["step-2"]
    save(tmp_path, 3)
    assert sorted(f.name for f in tmp_path.glob("step-*")) == ["step-2", "step-3"]


def test_a_file_that_the_disk_does_not_give_back_is_damaged(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, 1)
    monkeypatch.setattr(checkpoint.hashlib, "file_digest", refused)
    with pytest.raises(DataError, match=r"step-1/.* is unreadable \(.*Input/output error\)\. Use another"):
        checkpoint.verify(folder)


def test_the_newest_checkpoint_is_the_newest_whole_one(tmp_path) -> None:
    assert checkpoint.newest_checkpoint(tmp_path / "absent") is None
    for step in (9, 10):
        save(tmp_path, step)
    (tmp_path / "step-11").mkdir()
    save(tmp_path, 12).rename(tmp_path / "step-12.partial")
    assert checkpoint.newest_checkpoint(tmp_path) == tmp_path / "step-10"


def test_a_checkpoint_is_found_by_folder_link_and_file(tmp_path) -> None:
    folder = save(tmp_path, 4)
    checkpoint.point(tmp_path, "best", folder)
    for path in (folder, tmp_path / "best", folder / "classifier.safetensors"):
        assert checkpoint.find_checkpoint(path) == folder.resolve()
    for path in (tmp_path, tmp_path / "step-5", tmp_path / "nothing.safetensors"):
        with pytest.raises(ConfigError, match="is no checkpoint: expected a folder step-N with"):
            checkpoint.find_checkpoint(path)


def test_all_that_does_not_fit_is_listed(tmp_path) -> None:
    folder = save(tmp_path, 1)
    module = nn.Linear(5, 3)
    del module.bias
    module.register_buffer("count", torch.zeros(2))
    with pytest.raises(ConfigError) as caught:
        checkpoint.load_module(module, folder, "classifier")
    assert str(caught.value) == (
        f"Checkpoint {folder} does not fit part `classifier`, expected 2 entries, got 2:\n"
        "  1 missing in the checkpoint: count\n"
        "  1 not in the model: bias\n"
        "  1 of another shape: weight has (3, 4), the model (3, 5)\n"
        "Use the configuration it was trained with, without other settings of the model."
    )


def test_of_many_that_do_not_fit_the_first_are_named_and_all_counted(tmp_path) -> None:
    folder = save(tmp_path, 1)
    module = nn.ParameterDict({f"p{number}": nn.Parameter(torch.zeros(1)) for number in range(7)})
    with pytest.raises(ConfigError, match=r"  7 missing in the checkpoint: p0, p1, p2, p3, p4, and 2 more\n  2 not in"):
        checkpoint.load_module(module, folder, "classifier")


def test_a_missing_optimiser_is_named(tmp_path) -> None:
    optimizer = parts()[1]["classifier"]
    with pytest.raises(DataError, match=r"lacks optimizer-graph\.pt: it cannot be resumed"):
        checkpoint.read_optimizer(save(tmp_path, 1), "graph", like=optimizer)


class Harmful:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_is_executed(tmp_path) -> None:
    folder = save(tmp_path, 1)
    torch.save({"state": Harmful(tmp_path / "harm")}, folder / "optimizer-classifier.pt")
    with pytest.raises(DataError, match=r"optimizer-classifier\.pt holds more than tensors"):
        checkpoint.read_optimizer(folder, "classifier", like=parts()[1]["classifier"])
    assert not (tmp_path / "harm").exists()


SETTINGS = {"train.max_steps_per_epoch": 2, "loss.metric": "proxy_anchor"}


@pytest.fixture(scope="module")
def source_run(shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "run"
    train(shards, folder, SETTINGS)
    return folder


@pytest.fixture(scope="module")
def other_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 classes, 6 of them for training."""
    folder = tmp_path_factory.mktemp("others")
    return convert_patterns(draw_patterns(folder / "images", num_classes=12), folder / "shards")


CLASS_ENTRIES = {
    "metric_loss.proxies",
    "graph.node_classifier.weight",
    "graph.node_classifier.bias",
    "classifier.weight",
    "classifier.bias",
}


def start_from(shards: Path, run_dir: Path, source: Path, **overrides: object) -> set[str]:
    """Start a run; returns the entries that equal the checkpoint's, the others being like a fresh run's."""
    settings = SETTINGS | {key.replace("__", "."): value for key, value in overrides.items()}
    fresh = make_trainer(shards, run_dir, settings)
    trainer = make_trainer(shards, run_dir, settings | {"train.init_from": str(source / "last")})
    equal = set()
    for part, module in trainer.parts.modules.items():
        saved = checkpoint.read_tensors((source / "last").resolve(), part)
        for name, tensor in module.state_dict().items():
            if name in saved and torch.equal(tensor, saved[name]):
                equal.add(f"{part}.{name}")
            else:
                assert torch.equal(tensor, fresh.parts.modules[part].state_dict()[name])
    assert trainer.progress.step == 0 and not run_dir.exists()
    return equal


def entries(source: Path) -> set[str]:
    folder = (source / "last").resolve()
    return {
        f"{file.stem}.{name}"
        for file in folder.glob("*.safetensors")
        if file.stem != checkpoint.RANKS
        for name in checkpoint.read_tensors(folder, file.stem)
    }


def test_another_number_of_classes_starts_fresh_what_depends_on_it(other_shards, tmp_path, source_run, caplog) -> None:
    caplog.set_level("INFO")
    equal = start_from(other_shards, tmp_path / "run", source_run)
    assert equal == entries(source_run) - CLASS_ENTRIES
    (line,) = [r.message for r in caplog.records if r.message.startswith("Started from")]
    assert set(line.split("fresh: ")[1].rstrip(".").split(", ")) == CLASS_ENTRIES


def test_as_many_other_classes_start_fresh_too(tmp_path, source_run) -> None:
    """Label 3 is another class now: its old proxy and classifier row mean nothing."""
    images = draw_patterns(tmp_path / "images")
    for number, folder in enumerate(sorted(images.iterdir())):
        folder.rename(images / f"other-{number}")
    shards = convert_patterns(images, tmp_path / "shards")
    equal = start_from(shards, tmp_path / "run", source_run)
    assert equal == entries(source_run) - CLASS_ENTRIES


def test_the_same_classes_keep_everything(shards, tmp_path, source_run) -> None:
    assert start_from(shards, tmp_path / "run", source_run) == entries(source_run)


def test_parts_may_come_and_go(shards, tmp_path, source_run) -> None:
    baseline = {"graph__enabled": False, "generation__enabled": False, "loss__metric": "n_pair_plus"}
    equal = start_from(shards, tmp_path / "baseline", source_run, **baseline)
    assert equal == {name for name in entries(source_run) if name.startswith("metric_model.")}
    settings = {key.replace("__", "."): value for key, value in baseline.items()}
    train(shards, tmp_path / "base", settings | {"train.max_steps_per_epoch": 1})
    equal = start_from(shards, tmp_path / "run", tmp_path / "base")
    assert equal == entries(tmp_path / "base")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__embedding_dim": 6}, r"part `metric_model`: head.linear.bias expected shape \(6,\), got"),
        ({"graph__num_layers": 2}, r"part `graph`: \S+ expected shape .*, got nothing"),
        ({"model__head": "linear"}, r"part `metric_model`: head.norm.bias expected nothing, got shape"),
    ],
)
def test_another_model_is_no_start(shards, tmp_path, source_run, overrides, message) -> None:
    with pytest.raises(ConfigError, match=rf"`train.init_from` .*step-2 does not fit {message}"):
        start_from(shards, tmp_path / "run", source_run, **overrides)


def test_published_weights_are_not_needed_once_there_is_a_checkpoint(shards, tmp_path, source_run) -> None:
    """They would be replaced; a resumed job may run where they cannot be fetched."""
    settings = SETTINGS | {"model.weights": f"{tmp_path}/gone.safetensors"}
    with pytest.raises(ConfigError, match="gone.safetensors` does not exist"):
        make_trainer(shards, tmp_path / "run", settings)
    started = settings | {"train.init_from": str(source_run / "last")}
    train(shards, tmp_path / "run", started)
    make_trainer(shards, tmp_path / "run", started | {"train.resume": "auto"})


def test_a_start_from_nowhere_or_from_damage_is_refused(shards, tmp_path, source_run) -> None:
    with pytest.raises(ConfigError, match="nowhere` is no checkpoint"):
        make_trainer(shards, tmp_path / "run", {"train.init_from": f"{tmp_path}/nowhere"})
    folder = save(tmp_path, 1)
    (folder / "config.yaml").write_text("changed")
    with pytest.raises(DataError, match=r"config\.yaml is damaged"):
        make_trainer(shards, tmp_path / "run", {"train.init_from": str(folder)})
