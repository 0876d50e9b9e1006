"""Tiny real training runs: a converted data set of drawn hues, and the configuration that trains on it in seconds.

16 classes of 6 pictures, 20 x 20 pixels: 8 training classes (48 images, 5 batches of 4 x 2 per epoch), 8 test classes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from gcahng.data.conversion.convert import convert
from gcahng.data.sources.folder import Folder
from gcahng.distributed import ONE
from gcahng.training.config import Config, config_from_mapping
from gcahng.training.launched import Launched
from gcahng.training.run_log import HARDNESS_FILE
from gcahng.training.trainer import Trainer

NUM_CLASSES = 16
IMAGES_PER_CLASS = 6
SIDE = 20
STEPS_PER_EPOCH = 5
# What a second run of the same settings may show otherwise.
CLOCK_KEYS = ("step_seconds", "data_seconds")
MEASURED = ("seconds_per_step", "peak_memory_bytes")
ALONE = Launched(ONE, torch.device("cpu"), "plain")


def draw_patterns(folder: Path, num_classes: int = NUM_CLASSES, images: int | list[int] = IMAGES_PER_CLASS) -> Path:
    """Write `folder/<class>/<n>.png`: a class is a hue; brightness and noise hide it from untrained weights."""
    draws = np.random.default_rng(7)
    chroma = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])
    for number in range(num_classes):
        angle = 2 * np.pi * number / num_classes
        hue = (40 if number % 2 else 24) * np.array([np.cos(angle), np.sin(angle)]) @ chroma
        class_folder = folder / f"hue-{number:02d}"
        class_folder.mkdir(parents=True)
        for index in range(images if isinstance(images, int) else images[number]):
            pixels = 128 + draws.normal(0, 20) + hue + draws.normal(0, 60, (SIDE, SIDE, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(class_folder / f"{index}.png")
    return folder


def convert_patterns(folder: Path, out: Path, test_share: float = 0.5) -> Path:
    convert(Folder(folder, seed=3, test_share=test_share), out, seed=3)
    return out


def base_settings(shards: Path, run_dir: Path) -> dict[str, Any]:
    """GCA-HNG at its smallest: every part takes part, an epoch takes a fraction of a second."""
    return {
        "seed": 1,
        "data": {
            "dir": str(shards),
            "num_workers": 0,
            "transform": {"preset": "glyphs", "image_size": 16},
        },
        "batch": {"num_classes": 4, "num_samples": 2},
        "model": {
            "backbone": "small_conv",
            "backbone_args": {"widths": [4, 8]},
            "pooling": "avg",
            "embedding_dim": 8,
        },
        "graph": {"num_layers": 1, "num_heads": 2},
        "loss": {"metric": "n_pair_plus"},
        "optim": {
            "metric_model": {"lr": 1e-2, "schedule": {"name": "step", "step_size": 1, "gamma": 0.5}},
            "graph": {"lr": 2e-3, "schedule": {"name": "cosine"}},
            "classifier": {"lr": 1e-3, "weight_decay": 1e-2},
            "proxies": {"lr": 1e-2, "schedule": {"name": "milestones", "milestones": [1], "gamma": 0.1}},
        },
        "train": {"epochs": 1, "log_every": 1, "device": "cpu"},
        "eval": {"every_epochs": 1, "ks": [1, 2, 4], "batch_size": 7},
        "run": {"dir": str(run_dir)},
    }


def with_overrides(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with `section.key` entries replaced."""
    changed: dict[str, Any] = json.loads(json.dumps(settings))
    for key, value in overrides.items():
        *sections, name = key.split(".")
        section = changed
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return changed


def make_config(shards: Path, run_dir: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    return config_from_mapping(with_overrides(base_settings(shards, run_dir), overrides or {}))


def make_trainer(shards: Path, run_dir: Path, overrides: Mapping[str, Any] | None = None, **options: bool) -> Trainer:
    return Trainer(make_config(shards, run_dir, overrides), progress_bars=False, **options)


def train(shards: Path, run_dir: Path, overrides: Mapping[str, Any] | None = None, **options: bool) -> dict[str, Any]:
    return make_trainer(shards, run_dir, overrides, **options).run()


def read_metrics(run_dir: Path, *, clocks: bool = False) -> list[dict[str, Any]]:
    """All rows of `metrics.jsonl`, without measured times unless asked for; every line must parse."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    dropped = () if clocks else CLOCK_KEYS
    return [{k: v for k, v in json.loads(line).items() if k not in dropped} for line in lines]


def read_state(run_dir: Path, link: str = "last") -> dict[str, Any]:
    state: dict[str, Any] = json.loads((run_dir / link / "state.json").read_text())
    return state


def saved_tensors(run_dir: Path, link: str = "last") -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, modules and optimisers, by file and name."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted((run_dir / link).iterdir()):
        if file.suffix == ".safetensors":
            found |= {f"{file.name}: {name}": value for name, value in load_file(file).items()}
        elif file.suffix == ".pt":
            state = torch.load(file, weights_only=True)["state"]
            for number, entries in state.items():
                found |= {f"{file.name}: {number}.{name}": value for name, value in entries.items()}
    return found


def assert_same_tensors(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert not different, different


def assert_same_run(got: Path, want: Path) -> None:
    """Bit for bit: checkpoints, links, logs and results, without what was measured."""
    for link in ("last", "best", "best_test"):
        if not (want / link).is_symlink() and link == "best":  # without validation
            assert not (got / link).is_symlink()
            continue
        assert (got / link).readlink() == (want / link).readlink()
        assert_same_tensors(saved_tensors(got, link), saved_tensors(want, link))
        assert read_state(got, link) == read_state(want, link)
        for file in (want / link).glob("optimizer-*.pt"):
            groups = [
                torch.load(folder / link / file.name, weights_only=True)["param_groups"] for folder in (got, want)
            ]
            assert groups[0] == groups[1]
    assert read_metrics(got) == read_metrics(want)
    assert (got / HARDNESS_FILE).read_text() == (want / HARDNESS_FILE).read_text() != ""
    results = [json.loads((folder / "results.json").read_text()) for folder in (got, want)]
    assert [{k: v for k, v in r.items() if k not in MEASURED} for r in results][0] == {
        k: v for k, v in results[1].items() if k not in MEASURED
    }
    assert {p.name for p in got.glob("step-*")} == {p.name for p in want.glob("step-*")}
