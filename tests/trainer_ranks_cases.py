"""Whole runs of several ranks in one process group: what each rank returned, and what the run folders hold."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from launched_here import launched_here
from run_cases import make_config

from gcahng.data.shards.reader import ShardSet
from gcahng.distributed import Ranks
from gcahng.distributed.failures import EACH_RANK
from gcahng.training import embedding, run_start
from gcahng.training import trainer as trainer_module
from gcahng.training.evaluation import as_row, evaluate
from gcahng.training.precheck import forecast
from gcahng.training.run_start import source_digest
from gcahng.training.trainer import Trainer

WHOLE = {"train.epochs": 2, "train.warm_up_epochs": 1, "data.validation": 0.375, "batch.num_classes": 5}
# Constant rates: nothing depends on how many epochs there will be.
CUT = {"train.epochs": 1, "optim.graph.schedule.name": "constant", "loss.metric": "proxy_anchor"}
ENDS = CUT | {"train.epochs": 2, "train.resume": "auto"}
SHARDED = {"distributed.shard_classes": True}
FROZEN = {"model.freeze_batch_norm": True, "train.max_steps_per_epoch": 2}


def trainer_of(ranks: Ranks, shards: Path, run_dir: Path, settings: Mapping[str, Any]) -> Trainer:
    config = make_config(shards, run_dir, settings)
    return Trainer(config, launched=launched_here(ranks, config), progress_bars=False)


def run(ranks: Ranks, shards: Path, run_dir: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    trainer = trainer_of(ranks, shards, run_dir, settings)
    results = trainer.run()
    trainer.close()
    return results


def failure(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def runs(ranks: Ranks, shards: Path, folder: Path) -> dict[str, Any]:
    """The cases; `folder` is shared by the ranks, and holds the run `begun-by-one` that one process began."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"whole": run(ranks, shards, folder / "whole", WHOLE)}
    found["begun by one"] = run(ranks, shards, folder / "begun-by-one", ENDS)
    cases: dict[str, Callable[[Ranks, Path, Path], Any]] = {
        "evaluation": evaluation,
        "skipped": skipped,
        "unreadable": unreadable,
        "not finite": not_finite,
        "other settings": other_settings,
    }
    if ranks.size == 2:
        run(ranks, shards, folder / "begun-by-shards", CUT | SHARDED)
        run(ranks, shards, folder / "begun-by-shards", ENDS)
        run(ranks, shards, folder / "sharded", CUT | SHARDED)
        run(ranks, shards, folder / "sharded", ENDS | SHARDED)
        run(ranks, shards, folder / "ended-by-one", CUT)
        run(ranks, shards, folder / "small-batches", FROZEN | {"accumulation.micro_batch": 2})
        cases |= {
            "local statistics": local_statistics,
            "forecast": forecast_of,
            "crashed": crashed,
            "disk full": disk_full,
            "other weights": other_weights,
            "other code": other_code,
            "no data here": no_data_here,
            "draws": draws,
        }
    for name, case in cases.items():
        found[name] = case(ranks, shards, folder / name.replace(" ", "-"))
        ranks.wait()
    return found


def local_statistics(ranks: Ranks, shards: Path, folder: Path) -> dict[str, Any]:
    return run(ranks, shards, folder, {"distributed.batch_norm": "local", "train.max_steps_per_epoch": 2})


def evaluation(ranks: Ranks, shards: Path, folder: Path) -> list[dict[str, Any]]:
    """Rows of a split and of 7 rows, fewer than two per rank in places."""
    trainer = trainer_of(ranks, shards, folder, {})
    settings = trainer_module.embedding_settings(trainer.config, device=trainer.device)
    model, data, config = trainer.parts.metric_model, trainer.data.shards, trainer.config.eval
    rows = [None, data.split_samples("test")[:7]]
    return [as_row(evaluate(model, data, config, settings, rows=r, ranks=trainer.ranks)) for r in rows]


def forecast_of(ranks: Ranks, shards: Path, folder: Path) -> tuple[Any, bool]:
    found = forecast(trainer_of(ranks, shards, folder, {"data.num_workers": 0}), steps=2)
    return found, folder.exists()


def damaged(shards: Path, copy: Path, rows: list[int], ranks: Ranks) -> Path:
    """A copy of the shards in which these rows cannot be read."""
    if ranks.first:
        shutil.copytree(shards, copy)
        data = ShardSet.open(copy)
        for row in rows:
            file = copy / data.shard_name(row)
            content = bytearray(file.read_bytes())
            content[data.record(row).offset + 40] ^= 0xFF
            file.write_bytes(content)
    ranks.wait()
    return copy


def skipped(ranks: Ranks, shards: Path, folder: Path) -> tuple[list[str], int, list[dict[str, Any]]]:
    """What this rank warned of; the count that it knows at the end; and the rows of the run."""
    rows = ShardSet.open(shards).split_samples("train")[[0, 9, 20, 33]].tolist()
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(EACH_RANK).addHandler(handler)
    copy = damaged(shards, folder.with_name("skipped-data"), rows, ranks)
    trainer = trainer_of(ranks, copy, folder, {"data.on_error": "skip", "train.log_every": 2})
    trainer.run()
    logging.getLogger(EACH_RANK).removeHandler(handler)
    return heard, trainer.progress.skipped, rows


def unreadable(ranks: Ranks, shards: Path, folder: Path) -> tuple[str, bool]:
    """A test image of rank 1's part: the failure, and whether the epoch was saved."""
    row = int(ShardSet.open(shards).split_samples("test")[-3])
    copy = damaged(shards, folder.with_name("unreadable-data"), [row], ranks)
    text = failure(lambda: run(ranks, copy, folder, {"train.max_steps_per_epoch": 1}))
    ranks.wait()
    return text, (folder / "last" / "state.json").is_file()


def crashed(ranks: Ranks, shards: Path, folder: Path) -> tuple[str, bool]:
    """Rank 1 fails in an evaluation by no fault of the input: the failure, and whether the epoch was saved."""
    loader = embedding.eval_loader

    def broken(*arguments: object, **options: object) -> Any:
        raise MemoryError("a loader process was killed")

    if ranks.rank == 1:
        embedding.eval_loader = broken
    text = failure(lambda: run(ranks, shards, folder, {"train.max_steps_per_epoch": 1}))
    embedding.eval_loader = loader
    ranks.wait()
    return text, (folder / "last" / "state.json").is_file()


def not_finite(ranks: Ranks, shards: Path, folder: Path) -> tuple[str, str]:
    """The last rank's second image makes no finite embedding: the failure, and that image's key."""
    trainer = trainer_of(ranks, shards, folder, {"model.head": "linear"})
    batch = next(iter(trainer.loader.epoch_iterator(0)))
    last = ranks.rank == ranks.size - 1

    def poison(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(0, torch.tensor([1]), torch.inf) if last else output

    trainer.parts.metric_model.head.register_forward_hook(poison)
    text = failure(lambda: trainer.run_step(batch.images, batch.labels, batch.rows))
    return text, ranks.all_of(trainer.data.shards.key(int(batch.rows[1])))[-1]


def disk_full(ranks: Ranks, shards: Path, folder: Path) -> str:
    trainer = trainer_of(ranks, shards, folder, {"train.max_steps_per_epoch": 1})

    def refused(*arguments: object, **options: object) -> Path:
        raise OSError(28, "No space left on device")

    if ranks.first:
        trainer_module.checkpoint.save_checkpoint, kept = refused, trainer_module.checkpoint.save_checkpoint
    text = failure(trainer.run)
    if ranks.first:
        trainer_module.checkpoint.save_checkpoint = kept
    return text


def other_settings(ranks: Ranks, shards: Path, folder: Path) -> str:
    settings = {"seed": 1 + ranks.rank, "optim.graph.lr": 0.5 if ranks.rank else 0.25}
    return failure(lambda: trainer_of(ranks, shards, folder, settings))


def other_weights(ranks: Ranks, shards: Path, folder: Path) -> str:
    makers = run_start.module_makers

    def other(*arguments: Any, **options: Any) -> Any:
        found = makers(*arguments, **options)
        graph = found["graph"]()
        with torch.no_grad():
            graph.node_classifier.bias[0] += ranks.rank * 1e-7
        return found | {"graph": lambda: graph}

    run_start.module_makers = other
    text = failure(lambda: trainer_of(ranks, shards, folder, {}))
    run_start.module_makers = makers
    return text


def other_code(ranks: Ranks, shards: Path, folder: Path) -> str:
    """Rank 1 imports the package from a folder in which one file has another line."""
    installed, copy = run_start.PACKAGE, folder / "gcahng"
    if ranks.first:
        shutil.copytree(installed, copy, ignore=shutil.ignore_patterns("__pycache__"))
    ranks.wait()
    digest = source_digest()
    if ranks.rank:
        run_start.PACKAGE = copy
        assert source_digest() == digest
    ranks.wait()
    if ranks.first:
        with open(copy / "losses" / "n_pair.py", "a") as source:
            source.write("# changed\n")
    ranks.wait()
    text = failure(lambda: trainer_of(ranks, shards, folder / "run", {}))
    run_start.PACKAGE = installed
    return text


def no_data_here(ranks: Ranks, shards: Path, folder: Path) -> str:
    """Each rank looks at its own link to the data; rank 1's names nothing."""
    here = folder / str(ranks.rank)
    here.mkdir(parents=True)
    os.chdir(here)
    (here / "data").symlink_to(shards if ranks.first else folder / "nowhere")
    return failure(lambda: trainer_of(ranks, Path("data"), folder / "run", {}))


def draws(ranks: Ranks, shards: Path, folder: Path) -> tuple[float, float]:
    """What a backbone would draw in step 3 and, again, in step 3."""
    trainer = trainer_of(ranks, shards, folder, {})
    batch = next(iter(trainer.loader.epoch_iterator(0)))
    seen: list[float] = []
    trainer.parts.metric_model.register_forward_hook(lambda *_: seen.append(float(torch.rand(()))))
    for _ in range(2):
        trainer.progress = replace(trainer.progress, step=3)
        trainer.run_step(batch.images, batch.labels, batch.rows)
    return seen[0], seen[1]
