"""Every setting of an experiment: names, types, defaults, units and meanings.

Here: data, model and method. How a run goes is in `config_run.py`.

The text under a field is its documentation; `config_help.settings_help` prints it. Limits of values
stand in `config_check.py`. Paths are relative to the folder the command runs in. The defaults are
the released settings for CUB with ResNet-50 where the method fixes a value; a configuration needs
only `data.dir` and `run.dir`.

Letters: P classes per batch, K samples per class, B = P * K, D embedding channels.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from gcahng.training.config_run import (
    AccumulationConfig,
    DistributedConfig,
    EvalConfig,
    HealthConfig,
    MonitorConfig,
    RunConfig,
    TrainConfig,
)


@dataclass(frozen=True, kw_only=True)
class TransformConfig:
    """Image transforms: a preset, and any of its values replaced."""

    preset: str = "gca_hng"
    """Named set of values to start from, see `gcahng.data.images.transform_settings`."""
    image_size: int | None = None
    """Side of the square image the network sees, in pixels: sets both crops, scales both resizes.
    Here and below null stands for the preset's value."""
    crop: int | None = None
    """Side of a training image in pixels."""
    train_crop: Literal["random_resized", "random"] | None = None
    """Training crop of random area and shape, resized; or a square of `crop` pixels."""
    train_resize: int | None = None
    """Shorter side in pixels before the training crop."""
    scale: tuple[float, float] | None = None
    """Smallest and largest share of the image area that a `random_resized` crop takes."""
    ratio: tuple[float, float] | None = None
    """Smallest and largest width / height of a `random_resized` crop."""
    flip: float | None = None
    """Probability of a horizontal flip in training."""
    eval_resize: int | None = None
    """Shorter side in pixels before the centre crop of evaluation."""
    eval_crop: int | None = None
    """Side of an evaluation image in pixels."""
    mean: tuple[float, float, float] | None = None
    """Red, green, blue means subtracted from values in [0, 1]."""
    std: tuple[float, float, float] | None = None
    """Red, green, blue deviations divided by."""

    def arguments(self) -> dict[str, Any]:
        """What is not null: the arguments of `gcahng.data.images.transform_settings`'s function."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from and how they are read."""

    dir: str
    """Folder of a converted data set (shards, indexes and manifest.json): a path, or a URL of http(s) or of a
    file system that fsspec knows, such as s3:// and gs://."""
    validation: float = 0.0
    """Share of the training classes held out for choosing a checkpoint, in [0, 1)."""
    small_classes: Literal["repeat", "drop"] = "repeat"
    """A class with fewer than K images: repeat its images, or leave the class out."""
    on_error: Literal["fail", "skip"] = "fail"
    """An unreadable image: stop with its key, or replace it, count it and report it."""
    num_workers: int = 4
    """Processes that read and decode images; 0: the training process itself."""
    remote: Literal["shards", "direct"] = "shards"
    """Shards of a URL: fetch whole ones ahead into a cache, or read each image from the remote place."""
    cache_dir: str | None = None
    """Folder of the cache, shared by the processes and runs of a machine; null: $GCAHNG_CACHE, else the user's
    cache folder. Shards of a local path are not cached."""
    cache_bytes: int = 64 << 30
    """Bound of the cache in bytes; three of the data set's windows should fit."""
    transform: TransformConfig = field(default_factory=TransformConfig)


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Shape of a training batch and how its samples are drawn."""

    num_classes: int = 27
    """P, different classes per batch over all ranks."""
    num_samples: int = 3
    """K, images per class."""
    sampler: str = "uniform"
    """`uniform`, `released` (the released code's draws), `filled` or `sample` (those of the SCT code), or the
    dotted path of an own sampler."""
    passes: int | None = None
    """Passes over the classes per epoch, for `filled`, `sample` and own samplers; null: 1."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The metric model: backbone, pooling, embedding head."""

    backbone: str = "resnet50.tv_in1k"
    """A timm name, `torchvision/googlenet`, `small_conv`, or the dotted path of an own backbone."""
    backbone_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the backbone, as its builder takes them (e.g. `img_size: 64`)."""
    pooling: Literal["avg", "max", "avg+max", "cls"] = "avg+max"
    """Feature map or tokens to one vector: mean, maximum, their sum, or the class token."""
    head: Literal["bn_linear", "linear"] = "bn_linear"
    """BatchNorm1d + Linear, or Linear alone."""
    head_init: Literal["default", "orthogonal"] = "default"
    """Start of the head's Linear: PyTorch's, or orthogonal rows with zero bias."""
    embedding_dim: int = 512
    """D, channels of an embedding."""
    pretrained: bool = False
    """Start the backbone from its published weights (a download, kept in the local cache)."""
    weights: str | None = None
    """Local weight file (.safetensors, .pth or .pt) for the backbone, in place of a download."""
    freeze_batch_norm: bool = False
    """Keep the running statistics of the backbone's BatchNorm2d layers fixed in training."""
    freeze_patch_embed: bool = False
    """Keep the patch embedding of a vision transformer untrained."""


@dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """The graph network over a batch."""

    enabled: bool = True
    """False: no graph network, hence no node loss and no channel-wise coefficients."""
    num_layers: int = 2
    """L, message-passing layers."""
    num_heads: int = 4
    """H, attention heads of a node block; divides D."""
    dropout: float = 0.1
    """Probability of dropping an attention weight of the edge blocks in training."""
    edge_dropout: Literal["tied", "independent"] = "tied"
    """One mask per unordered pair, or one per direction as in the released code."""
    backend: Literal["auto", "triton", "compiled", "eager", "scatter"] = "auto"
    """Who computes the edges: fused Triton kernels, functions of torch.compile or plain torch, all three over blocks
    of unordered pairs; the plain list of all edges, slow; or the fastest that fits."""
    node_propagation: bool = True
    """False: nodes exchange no messages; an edge sees only its two ends."""
    edge_to_node: bool = True
    """False: edges do not feed back into nodes (no sum over a node's edges)."""
    neighbours: int | None = None
    """Each sample keeps its edges to so many nearest other classes, for batches of tens of thousands: all losses are
    over these edges alone. null, or P - 1 and above: every pair."""
    edge_aggregation: Literal["sum", "mean", "scaled"] = "sum"
    """How a node's edge messages come together: their sum as released, which grows with B; their mean; or the sum
    times 80 / B, which acts like a batch of 80 at every B."""
    norm: Literal["gelu_layer_norm", "layer_norm"] = "gelu_layer_norm"
    """Normalisation in the blocks: LayerNorm(GELU(x)) as released, LayerNorm(x) as in the paper."""


@dataclass(frozen=True, kw_only=True)
class GenerationWeights:
    """Factors of the loss terms around the synthetic negatives.

    J_gen = 1/2 (classification * J_cls + similarity * J_sim + diversity * diversity_scale * J_div).
    """

    classifier: float = 10.0
    """Factor of the classifier's own cross-entropy on real embeddings."""
    classification: float = 20.0
    """Factor of J_cls: synthetic negatives are classified as the class they come from."""
    similarity: float = 20.0
    """Factor of J_sim: synthetic negatives lie near their anchor in angle."""
    diversity: float = 60.0
    """Factor of J_div: pull coefficients differ between negatives."""
    diversity_scale: float = 0.01
    """Common factor of J_div in front of `diversity`."""


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """The generator network of `generation.method` generator, as HDML (CVPR 2019) has it; see docs/generator.md.

    Its loss is reconstruction * J_recon + classification * J_soft, and `generation.beta` is on the scale of that.
    """

    hidden: tuple[int, ...] = (512,)
    """Widths of its hidden layers, between embedding and feature (the released code of HDML)."""
    reconstruction: float = 64.0
    """Factor of J_recon: squared distance of real features to those made from their embeddings, mean over samples."""
    classification: float = 5000.0
    """Factor of J_soft: generated features are classified as the class they come from."""
    classify: Literal["features", "embeddings"] = "features"
    """What the classifier takes: pooled features as in HDML, or embeddings as with `method` interpolation."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Synthetic hard negatives."""

    enabled: bool = True
    """False: no synthetic negatives, no classifier, no generation pass."""
    method: Literal["interpolation", "generator"] = "interpolation"
    """Synthetic negatives are interpolated embeddings, or what a generator network and the embedding head make of
    them (`coefficients` single only)."""
    alpha: float = 5.0
    """Pull strength: coefficients are scaled by exp(-alpha / mean metric loss of last epoch)."""
    beta: float = 20.0
    """Trust: J_syn is weighted 1 - exp(-beta / mean generation loss of last epoch)."""
    coefficients: Literal["channel", "single"] = "channel"
    """One pull coefficient per channel from the graph network, or one for all from alpha alone."""
    fusion: Literal["mix", "pick"] = "mix"
    """One negative per class from its K interpolations: mixed at random (random weighting), or one picked at random."""
    normalised_distance: bool = False
    """Measure anchor distances on L2-normalised embeddings (the paper) or on z (released code)."""
    weights: GenerationWeights = field(default_factory=GenerationWeights)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The metric loss J_m."""

    metric: str = "n_pair_plus"
    """`n_pair`, `n_pair_plus`, `proxy_anchor`, `hn`, `shn`, `sct`, a loss of pytorch-metric-learning
    (`pml.MultiSimilarityLoss`), or the dotted path of an own loss."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the loss (e.g. `scale: 32`; of `pml.*` also: `distance: {pml.LpDistance: {p: 1}}`)."""
    miner: str | None = None
    """A miner of pytorch-metric-learning (`pml.MultiSimilarityMiner`) or the dotted path of an own one, for losses
    `pml.*`: it chooses pairs or triplets of the global batch."""
    miner_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the miner (e.g. `epsilon: 0.1`)."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over epochs."""

    name: Literal["constant", "step", "milestones", "cosine"] = "constant"
    """`step`: times gamma every `step_size`; `milestones`: at each; `cosine`: to 0 at the end."""
    step_size: int = 10
    """Epochs between two steps (`step` only)."""
    gamma: float = 0.5
    """Factor of each step (`step` and `milestones`)."""
    milestones: tuple[int, ...] = ()
    """Epochs at which the rate is multiplied by gamma (`milestones` only), increasing."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimiser of one part."""

    name: str = "adamw"
    """`adamw`, `sgd`, or the dotted path of an own torch optimiser."""
    lr: float
    """Learning rate at the start."""
    weight_decay: float = 1e-4
    """Weight decay (decoupled in AdamW)."""
    momentum: float = 0.0
    """Momentum (not for `adamw`)."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


def _metric_model() -> OptimizerConfig:
    return OptimizerConfig(lr=1.5e-4, schedule=ScheduleConfig(name="step"))


def _graph() -> OptimizerConfig:
    return OptimizerConfig(lr=1.5e-4, schedule=ScheduleConfig(name="cosine"))


def _classifier() -> OptimizerConfig:
    return OptimizerConfig(lr=1e-3, weight_decay=1e-2)


def _generator() -> OptimizerConfig:
    # Of HDML's released code: Adam, lr_gen in FLAGS.py, neither decay nor schedule.
    return OptimizerConfig(lr=1e-2, weight_decay=0.0)


def _proxies() -> OptimizerConfig:
    # 100 times the metric model's rate, and the same steps, so that it stays 100 times.
    return OptimizerConfig(lr=1.5e-2, schedule=ScheduleConfig(name="step"))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """One optimiser per part."""

    metric_model: OptimizerConfig = field(default_factory=_metric_model)
    graph: OptimizerConfig = field(default_factory=_graph)
    classifier: OptimizerConfig = field(default_factory=_classifier)
    generator: OptimizerConfig = field(default_factory=_generator)
    proxies: OptimizerConfig = field(default_factory=_proxies)
    clip_value: float | None = 10.0
    """Bound on every gradient entry of metric model and graph network; null: no clipping."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment."""

    seed: int = 0
    """Seed of every random draw and of the initial weights."""
    data: DataConfig
    batch: BatchConfig = field(default_factory=BatchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    accumulation: AccumulationConfig = field(default_factory=AccumulationConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    run: RunConfig

    @property
    def local_statistics(self) -> bool:
        """Whether each rank's BatchNorms gather running statistics of its own images."""
        return self.distributed.batch_norm == "local" or self.accumulation.microbatch_statistics
