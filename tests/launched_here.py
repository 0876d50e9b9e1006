"""What a launcher would have made of a process of `rank_group.run_ranks`."""

import os

import torch

from gcahng.distributed import Ranks
from gcahng.training.config_schema import BatchConfig, Config, DataConfig, DistributedConfig, RunConfig, TrainConfig
from gcahng.training.launched import Launched, launched


def small_config(*, num_classes: int = 8, precision: str = "fp32", device: str = "cpu") -> Config:
    """As much of a configuration as a launch looks at."""
    return Config(
        data=DataConfig(dir="nowhere"),
        run=RunConfig(dir="nowhere"),
        batch=BatchConfig(num_classes=num_classes),
        train=TrainConfig(precision=precision, device=device),  # type: ignore[arg-type]
        distributed=DistributedConfig(timeout_seconds=60),
    )


def launched_here(ranks: Ranks, config: Config | None = None) -> Launched:
    """`launched()` of this rank, over the process group that it has already."""
    if ranks.size == 1:
        return Launched(ranks, torch.device("cpu"), "plain")
    size, rank = str(ranks.size), str(ranks.rank)
    os.environ |= {"WORLD_SIZE": size, "RANK": rank, "LOCAL_WORLD_SIZE": size, "LOCAL_RANK": rank}
    os.environ["OMP_NUM_THREADS"] = "1"
    return launched(config or small_config())
