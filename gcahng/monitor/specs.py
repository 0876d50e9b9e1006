"""Every metric that a run exports; docs/monitoring.md shows this table, and a test compares the two.

Counters and histograms count what this process has done, from 0: whoever scrapes takes a restart for the reset it is.
Where the run stands, which a resume takes from its checkpoint, is in gauges.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram", "info"]
STATES = ("running", "finished", "interrupted", "failed")

_STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_WAIT_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)
_SAVE_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0)


@dataclass(frozen=True)
class Spec:
    """One metric.

    Attributes:
        name: As it is exported.
        kind: A gauge is exported from its first value on, counters and histograms from the start.
        unit: Of its values.
        meaning: Its HELP text.
        labels: Names of its labels.
        each_rank: Concerns one process: every rank with an endpoint exports its own. Else of all ranks together, and
            on rank 0 alone.
        cuda: Only where CUDA computes.
        buckets: Upper bounds, of a histogram.
    """

    name: str
    kind: Kind
    unit: str
    meaning: str
    labels: tuple[str, ...] = ()
    each_rank: bool = False
    cuda: bool = False
    buckets: tuple[float, ...] = ()


_OF_PROCESS = (
    Spec(
        "gcahng_step_seconds",
        "histogram",
        "seconds",
        "A step: waiting for its batch, and its work. On CUDA the host runs ahead of the device: sums are right, "
        "single steps are not.",
        each_rank=True,
        buckets=_STEP_BUCKETS,
    ),
    Spec(
        "gcahng_data_wait_seconds",
        "histogram",
        "seconds",
        "Of those the waiting for the batch.",
        each_rank=True,
        buckets=_WAIT_BUCKETS,
    ),
    Spec(
        "gcahng_last_step_timestamp_seconds",
        "gauge",
        "unix seconds",
        "When the last step ended; before the first one, when training began.",
        each_rank=True,
    ),
    Spec("gcahng_evaluating", "gauge", "0 or 1", "1 while an evaluation runs.", each_rank=True),
    Spec(
        "gcahng_checkpoint_pause_seconds",
        "histogram",
        "seconds",
        "How long a save stopped the training.",
        each_rank=True,
        buckets=_SAVE_BUCKETS,
    ),
    Spec("gcahng_resident_memory_bytes", "gauge", "bytes", "Resident memory of the process.", each_rank=True),
    Spec("gcahng_gpu_memory_allocated_bytes", "gauge", "bytes", "Memory that tensors hold.", each_rank=True, cuda=True),
    Spec(
        "gcahng_gpu_memory_reserved_bytes",
        "gauge",
        "bytes",
        "Memory that the allocator holds of the device.",
        each_rank=True,
        cuda=True,
    ),
    Spec(
        "gcahng_gpu_memory_peak_bytes",
        "gauge",
        "bytes",
        "Most memory that tensors have held.",
        each_rank=True,
        cuda=True,
    ),
    Spec(
        "gcahng_run_state",
        "gauge",
        "0 or 1",
        f"1 for the present one: {', '.join(STATES)}.",
        ("state",),
        each_rank=True,
    ),
    Spec(
        "gcahng_rank_info",
        "info",
        "1",
        "Which process this is.",
        ("rank", "local_rank", "world_size", "device"),
        each_rank=True,
    ),
    Spec("gcahng_build_info", "info", "1", "Versions.", ("version", "torch", "python", "cuda"), each_rank=True),
)
_OF_RUN = (
    Spec("gcahng_run_info", "info", "1", "What is trained.", ("run", "backbone", "loss", "seed", "precision")),
    Spec("gcahng_steps_total", "counter", "steps", "Steps that this process has done."),
    Spec("gcahng_images_total", "counter", "images", "Images of those steps, on all ranks."),
    Spec("gcahng_step", "gauge", "steps", "Steps of the run so far, those before a resume included."),
    Spec("gcahng_planned_steps", "gauge", "steps", "Steps of the whole run."),
    Spec("gcahng_epoch", "gauge", "epochs", "Epochs finished."),
    Spec("gcahng_planned_epochs", "gauge", "epochs", "Epochs of the whole run."),
    Spec(
        "gcahng_mean_step_seconds",
        "gauge",
        "seconds",
        "Mean step of the slowest rank over the last train.log_every steps; right on CUDA, too.",
    ),
    Spec("gcahng_mean_data_wait_seconds", "gauge", "seconds", "Mean waiting for data, likewise."),
    Spec("gcahng_loss", "gauge", "none", "Losses of the last logged step: X for X_loss of metrics.jsonl.", ("name",)),
    Spec("gcahng_learning_rate", "gauge", "none", "Learning rates.", ("part",)),
    Spec("gcahng_pull_factor", "gauge", "none", "How far negatives are pulled, from the mean metric loss."),
    Spec("gcahng_synthetic_weight", "gauge", "none", "Weight of the loss on synthetic negatives."),
    Spec(
        "gcahng_hard_negative_ratio",
        "gauge",
        "share",
        "Share of anchors nearer to another class than to their own, in the last logged step.",
    ),
    Spec(
        "gcahng_embedding_std",
        "gauge",
        "none",
        "Standard deviation of unit embeddings over the batch, times the square root of their channels: 1 on a uniform "
        "sphere, 0 in one point.",
    ),
    Spec("gcahng_effective_rank", "gauge", "dimensions", "Directions that the batch's embeddings fill."),
    Spec(
        "gcahng_class_directions",
        "gauge",
        "dimensions",
        "Directions that the classes of a batch can span: min(P - 1, D).",
    ),
    Spec("gcahng_active_synthetic_ratio", "gauge", "share", "Share of synthetic negatives with weight in their loss."),
    Spec("gcahng_mean_positive_distance", "gauge", "none", "Mean distance of anchors to their positives."),
    Spec("gcahng_mean_negative_distance", "gauge", "none", "Mean distance of anchors to their negatives."),
    Spec("gcahng_coefficient_spread", "gauge", "none", "Standard deviation of the pull coefficients."),
    Spec("gcahng_recall_at_k", "gauge", "share", "Recall@k of the last evaluation.", ("split", "k")),
    Spec("gcahng_precision_at_k", "gauge", "share", "Precision@k, with eval.precision_ks.", ("split", "k")),
    Spec("gcahng_map_at_r", "gauge", "share", "MAP@R of the last evaluation.", ("split",)),
    Spec("gcahng_r_precision", "gauge", "share", "R-Precision of the last evaluation.", ("split",)),
    Spec("gcahng_last_evaluation_seconds", "gauge", "seconds", "How long the last evaluation took."),
    Spec("gcahng_skipped_images_total", "counter", "images", "Unreadable images that were replaced."),
    Spec("gcahng_repaired_draws_total", "counter", "draws", "Draws that gave way to others, see docs/data.md."),
    Spec("gcahng_non_finite_steps_total", "counter", "steps", "Steps with numbers that are not finite, left out."),
    Spec(
        "gcahng_checkpoint_seconds",
        "histogram",
        "seconds",
        "Until a checkpoint was whole on the disk.",
        buckets=_SAVE_BUCKETS,
    ),
    Spec("gcahng_checkpoint_failures_total", "counter", "saves", "Saves that failed."),
    Spec(
        "gcahng_last_checkpoint_timestamp_seconds",
        "gauge",
        "unix seconds",
        "When the newest checkpoint was written by this process; before the first one, when training began.",
    ),
)
SPECS = (*_OF_PROCESS, *_OF_RUN)
# Gauges that are a value of a logged row under the same name, without `gcahng_`.
SIGNALS = (
    "pull_factor",
    "synthetic_weight",
    "hard_negative_ratio",
    "embedding_std",
    "effective_rank",
    "active_synthetic_ratio",
    "mean_positive_distance",
    "mean_negative_distance",
    "coefficient_spread",
)
