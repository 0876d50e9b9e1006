"""Settings of how a run goes: length, ranks, memory, evaluation, health, monitoring, files. See `config_schema.py`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, precision and bookkeeping of a training run."""

    epochs: int = 100
    """Passes over the training images."""
    warm_up_epochs: int = 0
    """First epochs in which only the embedding head of the metric model is trained."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Matrix products of the step; weights, norms and losses stay fp32. fp16 needs CUDA."""
    resume: str = "never"
    """`never`, `auto` (the newest whole checkpoint of `run.dir`), or a checkpoint folder."""
    init_from: str | None = None
    """Checkpoint whose weights start a new run; the classes may differ."""
    log_every: int = 10
    """Steps between two logged steps."""
    record_every: int | None = None
    """Steps between two records of how hard the negatives are (`hardness.jsonl`), from the first step on; null: the
    first step of each epoch; 0: none."""
    save_every_steps: int | None = None
    """Steps between two checkpoints within an epoch, besides the one at its end; null: that one alone."""
    save_in_background: bool = True
    """Write checkpoints while training goes on: a save stops it only for a copy in memory."""
    keep_last: int = 2
    """Newest checkpoints kept, besides the best ones. With 2 or more there is one to go back to if the newest file is
    damaged."""
    max_steps_per_epoch: int | None = None
    """Cut every epoch to this many steps; null: whole epochs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: CUDA if there is one."""


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Several processes (ranks), started by `accelerate launch` or `torchrun`."""

    timeout_seconds: int = 120
    """How long ranks wait for each other before the run ends with an error; also while one writes a checkpoint,
    downloads weights, or is late with its data."""
    batch_norm: Literal["global", "local"] = "global"
    """Batch statistics of the metric model's BatchNorms in training: of all ranks' images, or of each rank's own."""
    shard_classes: bool = False
    """Spread the rows of proxies and classifiers over the ranks instead of keeping all on each: for classes by the
    million. Same numbers."""


@dataclass(frozen=True, kw_only=True)
class AccumulationConfig:
    """Batches larger than memory: embed in small batches, relate all embeddings at once, embed again for gradients."""

    micro_batch: int | None = None
    """Images that a rank sends through the backbone at once; null: its whole part of the batch, once."""
    microbatch_statistics: bool = False
    """Let BatchNorms of the backbone take their statistics from each small batch: other numbers than without."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Retrieval on unseen classes."""

    every_epochs: int = 2
    """Epochs between two evaluations; the last epoch is always evaluated."""
    ks: tuple[int, ...] = (1, 2, 4, 8)
    """Values of k of Recall@k, increasing."""
    batch_size: int = 128
    """Images embedded at once."""
    memory_mb: int = 512
    """Memory that the search may take beside the embeddings, on each rank; results do not depend on it."""
    precision_ks: tuple[int, ...] = ()
    """Values of k of Precision@k, increasing; none by default."""
    protocol: Literal["self", "query_gallery"] = "self"
    """Every image queries all the others, or one split queries others (the training split, say)."""
    split: str = "test"
    """Split that is evaluated; with `query_gallery` the split of the queries."""
    gallery_split: str | None = None
    """Split that is searched (`query_gallery` only)."""
    galleries: tuple[str, ...] = ()
    """Several splits in place of gallery_split: each is searched alone and reported under its name; the first one's
    metrics are those of the run."""
    distractor_splits: tuple[str, ...] = ()
    """Splits that are searched as well, and show none of the queries' classes."""
    coarse_label: str | None = None
    """Column of the classes with a coarser label: `chain_name` of Hotels-50K, `super_class` of Stanford Online
    Products. Adds the share of queries with that label among the k nearest (chain accuracy)."""
    coarse_ks: tuple[int, ...] = (1, 3, 5)
    """Values of k for it, increasing."""
    clustering: bool = False
    """launch/evaluate.py adds NMI and AMI of k-means clusters; not in training."""


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """What happens when training goes wrong."""

    skip_non_finite: int = 0
    """Steps of the whole run that may meet a loss or gradient that is not finite and are left out, before one more
    ends it; 0: the first one ends it. Above 0 each step waits for the device."""
    keep_dumps: int = 1
    """Steps that met such numbers, written to the run folder for launch/replay.py: so many of them; 0: none."""
    collapse_warning: bool = True
    """Warn when the embeddings of a logged step say that the model has collapsed."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Live metrics for Prometheus; docs/monitoring.md lists them."""

    port: int | None = None
    """Port of rank 0's endpoint; null: none."""
    address: str = "127.0.0.1"
    """Address that the endpoint listens on; 0.0.0.0 shows it to the whole network."""
    each_rank: bool = False
    """An endpoint for every rank, on port + local rank, with what concerns that rank alone."""
    textfile: str | None = None
    """File that rank 0 rewrites at each logged step, for node_exporter's textfile collector (NAME.prom)."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run leaves its files."""

    dir: str
    """Run folder: resolved configuration, logs, checkpoints."""
