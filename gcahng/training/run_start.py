"""All that stands before the first step, on every rank: what it reads, whether it fits, and that all ranks agree."""

import hashlib
import importlib.metadata
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from gcahng.data.loader import TrainLoader
from gcahng.distributed import ONE, Ranks
from gcahng.distributed.agreement import agreed, check_same
from gcahng.distributed.batch_norm import use_statistics_of_all
from gcahng.errors import ConfigError
from gcahng.training import checkpoint
from gcahng.training.config import Config, resolved_yaml
from gcahng.training.config_load import walk_settings
from gcahng.training.config_types import show
from gcahng.training.data_setup import RunData, build_train_loader, open_data
from gcahng.training.evaluation import check_evaluation
from gcahng.training.launched import Launched
from gcahng.training.parts import choose_device, module_makers
from gcahng.training.preflight import preflight
from gcahng.training.resume import check_resumable, class_digest, setting_of
from gcahng.training.sharded_parts import shard_part

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class RunStart:
    """What a run begins with.

    Attributes:
        data: Shards and class tables.
        data_identity: What a checkpoint says of the data.
        loader: Training batches, this rank's part.
        modules: Parts by name on the CPU, as this rank trains them, with the weights that the run begins with.
        weights: Of several ranks, the checksum of each part's weights before this rank took its share of them.
        resume_from: Checkpoint to go on from.
    """

    data: RunData
    data_identity: dict[str, Any]
    loader: TrainLoader
    modules: dict[str, nn.Module]
    weights: dict[str, str]
    resume_from: Path | None


def alone(config: Config) -> Launched:
    """A run of this process by itself, whatever environment it has.

    Raises:
        ConfigError: CUDA is asked for and absent.
    """
    return Launched(ONE, choose_device(config.train.device), "plain")


def start_run(config: Config, launched: Launched, *, overwrite: bool) -> RunStart:
    """Read and check everything; nothing is written.

    Args:
        config: A checked configuration.
        launched: All ranks call this.
        overwrite: The run starts anew whatever `train.resume` says, and replaces the one in `run.dir`.
    Raises:
        InputError: Data, weights or settings cannot be used, here or on another rank; or the ranks have different
            settings, data, code or initial weights.
    """
    ranks = launched.ranks
    if ranks.size > 1:
        check_same(ranks, _settings(config) | {"--overwrite": str(overwrite)} | _versions())
    start = agreed(ranks, lambda: _read(config, launched, overwrite))
    if ranks.size > 1:
        check_same(ranks, _contents(start))
    return start


def _read(config: Config, launched: Launched, overwrite: bool) -> RunStart:
    preflight(config, overwrite=overwrite)
    data = open_data(config)
    check_evaluation(data.shards, config.eval)
    run_dir = Path(config.run.dir)
    resume_from = _find_resume(config, run_dir, overwrite)
    _check_run_dir(run_dir, resume_from, config.train.resume, overwrite)
    loader = build_train_loader(config, data, ranks=launched.ranks, pin_memory=launched.device.type == "cuda")
    identity = {
        "manifest": data.shards.manifest.digest(),
        "classes": class_digest(data),
        "num_classes": data.table.num_classes,
    }
    if resume_from is not None:
        saved = checkpoint.read_state(resume_from)["data"]
        check_resumable(resume_from, saved, identity, config, checkpoint.optimizer_parts(resume_from))
    modules, weights = make_parts(config, identity, resume_from, launched.ranks)
    return RunStart(data, identity, loader, modules, weights, resume_from)


def make_parts(
    config: Config, identity: Mapping[str, Any], resume_from: Path | None, ranks: Ranks
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The parts that this rank trains, with their first weights, and of several ranks the checksums of these.

    One part is made, loaded and cut after the other: with classes by the million no rank holds two of them whole.
    """
    begun_from = None if resume_from is not None else _begun_from(config)
    same_classes = (
        begun_from is not None and checkpoint.read_state(begun_from)["data"]["classes"] == identity["classes"]
    )
    own_weights = resume_from is None and begun_from is None
    makers = module_makers(config, identity["num_classes"], load_weights=own_weights)
    modules: dict[str, nn.Module] = {}
    weights: dict[str, str] = {}
    fresh: list[str] = []

    def make_part(name: str) -> None:
        module = makers[name]()
        if resume_from is not None:
            checkpoint.load_module(module, resume_from, name)
        elif begun_from is not None:
            fresh.extend(checkpoint.start_from({name: module}, begun_from, same_classes=same_classes))
        if ranks.size > 1:
            weights[name] = weight_digest(module)
            modules.update(_of_rank(name, module, config, ranks))
        else:
            modules[name] = module

    for name in makers:
        make_part(name)
    if begun_from is not None:
        log.info("Started from %s; fresh: %s.", begun_from, ", ".join(fresh) or "none")
    return modules, weights


def _of_rank(name: str, module: nn.Module, config: Config, ranks: Ranks) -> dict[str, nn.Module]:
    """What one of several ranks trains in place of a part that is alike on all of them, by name."""
    if name == "metric_model" and config.distributed.batch_norm == "global":
        # Small batches: ranks may go through the backbone unequally often, so its statistics stay their own.
        whole = config.accumulation.micro_batch is None
        use_statistics_of_all(module if whole else module.get_submodule("head"), ranks)
    return shard_part(name, module, ranks) if config.distributed.shard_classes else {name: module}


def _find_resume(config: Config, run_dir: Path, overwrite: bool) -> Path | None:
    setting = config.train.resume
    if setting == "never" or overwrite:
        return None
    if setting == "auto":
        folder = checkpoint.newest_whole(run_dir)
        return None if folder is None else folder.resolve()
    folder = checkpoint.find_checkpoint(Path(setting))
    checkpoint.verify(folder)
    return folder


def _check_run_dir(run_dir: Path, resume_from: Path | None, setting: str, overwrite: bool) -> None:
    newest = checkpoint.newest_checkpoint(run_dir)
    # `auto` may have gone back behind damaged ones: they are set aside.
    continues = resume_from is not None and (setting == "auto" or resume_from == (newest and newest.resolve()))
    if newest is not None and not overwrite and not continues:
        raise ConfigError(
            f"`run.dir` {run_dir} already holds a run, the newest checkpoint being {newest.name}. "
            "Continue it with train.resume=auto, replace it with --overwrite, or choose another run.dir."
        )
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"`run.dir` {run_dir} cannot be written: expected a folder that may be written to, got "
            f"{existing}. Choose another run.dir."
        )


def _begun_from(config: Config) -> Path | None:
    """The checkpoint of `train.init_from`, whose files are as they were written."""
    if config.train.init_from is None:
        return None
    folder = checkpoint.find_checkpoint(Path(config.train.init_from))
    checkpoint.verify(folder)
    return folder


def _settings(config: Config) -> dict[str, str]:
    """Every setting as text."""
    tree = yaml.safe_load(resolved_yaml(config))
    return {f"`{key}`": show(setting_of(tree, key)) for key, _, _ in walk_settings()}


def _versions() -> dict[str, str]:
    try:
        version = importlib.metadata.version("gcahng")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    return {"gcahng": f"{version} ({source_digest()[:12]})", "torch": str(torch.__version__)}


def source_digest() -> str:
    """Checksum (hexadecimal sha256) of the package's source files, with their names."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(PACKAGE).as_posix()}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _contents(start: RunStart) -> dict[str, str]:
    """What was read, as short checksums."""
    resumed = None if start.resume_from is None else start.resume_from / checkpoint.MANIFEST
    return {
        "data (manifest)": start.data_identity["manifest"][:12],
        "training classes": start.data_identity["classes"][:12],
        "checkpoint to go on from": "none" if resumed is None else f"{resumed.parent.name} ({_of_file(resumed)})",
    } | {f"weights of {name}": digest[:12] for name, digest in start.weights.items()}


def _of_file(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def weight_digest(module: nn.Module) -> str:
    """Checksum (hexadecimal sha256) of a part's parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
