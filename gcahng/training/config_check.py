"""Which values are impossible: limits of single settings, and rules between settings.

Nothing here raises: every function returns what is wrong, so that the loader can report all faults
at once. To add a rule, add a row to `LIMITS` or `RELATIONS`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from gcahng.components import is_component_path
from gcahng.data.images.transform_settings import PRESETS, transform_settings
from gcahng.data.plans.plan import SAMPLERS, WITHOUT_PASSES
from gcahng.errors import ConfigError
from gcahng.training.config_schema import TransformConfig
from gcahng.training.config_types import show


class Limit(NamedTuple):
    """A rule for one setting."""

    holds: Callable[[Any], bool]
    text: str
    """Completes the sentence "must ..."."""


def _at_least(bound: float) -> Limit:
    return Limit(lambda value: value >= bound, f"be at least {bound:g}")


def _between(low: float, high: float) -> Limit:
    return Limit(lambda value: low <= value <= high, f"lie in [{low:g}, {high:g}]")


def _name_or_path(*names: str) -> Limit:
    return Limit(
        lambda value: value in names or is_component_path(value),
        f"be one of {', '.join(names)}, or a dotted path `package.module:Name`",
    )


def _ordered_pair(low: float, high: float) -> Limit:
    return Limit(
        lambda pair: low < pair[0] <= pair[1] <= high,
        f"be two increasing numbers above {low:g}" + (f" and at most {high:g}" if math.isfinite(high) else ""),
    )


def _increasing(values: tuple[int, ...]) -> bool:
    return all(a < b for a, b in zip((0, *values), values, strict=False))


_POSITIVE = Limit(lambda value: value > 0, "be above 0")
_NOT_NEGATIVE = _at_least(0)
_NOT_EMPTY = Limit(lambda value: value.strip() != "", "not be empty")
_DISTINCT = Limit(
    lambda names: all(name.strip() for name in names) and len(set(names)) == len(names), "be different names"
)
_SHARE = Limit(lambda value: 0 <= value < 1, "lie in [0, 1)")
_LOSSES = ("n_pair", "n_pair_plus", "proxy_anchor", "hn", "shn", "sct")
_PML_MEMORY = 1024  # what pml.CrossBatchMemory holds unless told

LIMITS: tuple[tuple[str, Limit], ...] = (
    ("seed", Limit(lambda value: 0 <= value < 2**63, "lie in [0, 2**63)")),
    ("data.dir", _NOT_EMPTY),
    ("data.validation", _SHARE),
    ("data.num_workers", _NOT_NEGATIVE),
    ("data.cache_dir", _NOT_EMPTY),
    ("data.cache_bytes", _NOT_NEGATIVE),
    (
        "data.transform.preset",
        Limit(lambda name: name in PRESETS, f"be one of {', '.join(PRESETS)}"),
    ),
    ("data.transform.image_size", _at_least(1)),
    ("data.transform.crop", _at_least(1)),
    ("data.transform.train_resize", _at_least(1)),
    ("data.transform.eval_resize", _at_least(1)),
    ("data.transform.eval_crop", _at_least(1)),
    ("data.transform.scale", _ordered_pair(0, 1)),
    ("data.transform.ratio", _ordered_pair(0, math.inf)),
    ("data.transform.flip", _between(0, 1)),
    ("data.transform.mean", Limit(lambda m: all(0 <= x <= 1 for x in m), "lie in [0, 1] each")),
    ("data.transform.std", Limit(lambda deviations: min(deviations) > 0, "be above 0 each")),
    ("batch.num_classes", _at_least(2)),
    ("batch.num_samples", _at_least(2)),
    ("batch.sampler", _name_or_path(*SAMPLERS)),
    ("batch.passes", _at_least(1)),
    ("model.backbone", _NOT_EMPTY),
    (
        "model.weights",
        Limit(
            lambda f: f.endswith((".safetensors", ".pth", ".pt")),
            "end in .safetensors, .pth or .pt",
        ),
    ),
    ("model.embedding_dim", _at_least(2)),
    ("graph.num_layers", _at_least(1)),
    ("graph.num_heads", _at_least(1)),
    ("graph.dropout", _SHARE),
    ("graph.neighbours", _at_least(1)),
    ("generation.alpha", _NOT_NEGATIVE),
    ("generation.beta", _NOT_NEGATIVE),
    ("generation.weights.*", _NOT_NEGATIVE),
    ("generation.generator.hidden", Limit(lambda widths: all(w >= 1 for w in widths), "be widths of at least 1")),
    ("generation.generator.reconstruction", _NOT_NEGATIVE),
    ("generation.generator.classification", _NOT_NEGATIVE),
    ("loss.metric", _name_or_path(*_LOSSES, "pml.NAME of pytorch-metric-learning")),
    ("loss.miner", Limit(is_component_path, "be pml.NAME of pytorch-metric-learning, or a dotted path")),
    ("optim.*.name", _name_or_path("adamw", "sgd")),
    ("optim.*.lr", _POSITIVE),
    ("optim.*.weight_decay", _NOT_NEGATIVE),
    ("optim.*.momentum", _SHARE),
    ("optim.*.schedule.step_size", _at_least(1)),
    ("optim.*.schedule.gamma", Limit(lambda value: 0 < value <= 1, "lie in (0, 1]")),
    ("optim.*.schedule.milestones", Limit(_increasing, "be increasing epochs of at least 1")),
    ("optim.clip_value", _POSITIVE),
    ("train.epochs", _at_least(1)),
    ("train.warm_up_epochs", _NOT_NEGATIVE),
    (
        "train.resume",
        Limit(
            lambda value: value in ("never", "auto") or "/" in value,
            "be never, auto, or the path of a checkpoint folder (with a `/`)",
        ),
    ),
    ("train.init_from", _NOT_EMPTY),
    ("train.log_every", _at_least(1)),
    ("train.record_every", _NOT_NEGATIVE),
    ("train.save_every_steps", _at_least(1)),
    ("train.keep_last", _at_least(1)),
    ("health.skip_non_finite", _NOT_NEGATIVE),
    ("health.keep_dumps", _NOT_NEGATIVE),
    ("monitor.port", _between(1, 65535)),
    ("monitor.address", _NOT_EMPTY),
    ("monitor.textfile", Limit(lambda name: name.endswith(".prom"), "end in .prom, as node_exporter wants it")),
    ("train.max_steps_per_epoch", _at_least(1)),
    ("distributed.timeout_seconds", _at_least(1)),
    ("accumulation.micro_batch", _at_least(1)),
    ("eval.every_epochs", _at_least(1)),
    (
        "eval.ks",
        Limit(lambda ks: len(ks) > 0 and _increasing(ks), "be increasing numbers of at least 1"),
    ),
    ("eval.batch_size", _at_least(1)),
    ("eval.memory_mb", _at_least(1)),
    ("eval.precision_ks", Limit(_increasing, "be increasing numbers of at least 1")),
    ("eval.split", _NOT_EMPTY),
    ("eval.gallery_split", _NOT_EMPTY),
    ("eval.galleries", _DISTINCT),
    ("eval.distractor_splits", _DISTINCT),
    ("eval.coarse_label", _NOT_EMPTY),
    (
        "eval.coarse_ks",
        Limit(lambda ks: len(ks) > 0 and _increasing(ks), "be increasing numbers of at least 1"),
    ),
    ("run.dir", _NOT_EMPTY),
)


class Relation(NamedTuple):
    """A rule between settings, reported at the first of its keys."""

    keys: tuple[str, ...]
    broken: Callable[..., bool]
    text: str
    """What is wrong and how to repair it; `{0}`, `{1}`, ... stand for the values."""


def _optimizer_relations(part: str) -> Iterator[Relation]:
    key = f"optim.{part}"
    yield Relation(
        (f"{key}.momentum", f"{key}.name"),
        lambda momentum, name: momentum != 0 and name == "adamw",
        f"AdamW takes no momentum: got {{0}}. Remove it or set {key}.name=sgd",
    )
    yield Relation(
        (f"{key}.schedule.milestones", f"{key}.schedule.name"),
        lambda milestones, name: name == "milestones" and not milestones,
        "must list at least one epoch for the schedule `milestones`: got an empty list",
    )


_TRANSFORM_KEYS = tuple(f"data.transform.{field.name}" for field in fields(TransformConfig))


def _transform_fault(*values: Any) -> str | None:
    """What the transforms themselves say about preset and replaced values together."""
    names = [key.rpartition(".")[2] for key in _TRANSFORM_KEYS]
    given = TransformConfig(**dict(zip(names, values, strict=True))).arguments()
    try:
        transform_settings(**given)
    except ConfigError as error:
        return str(error).rstrip(".")
    return None


_GENERATOR_RELATIONS = (
    Relation(
        ("generation.method", "generation.enabled"),
        lambda method, enabled: method == "generator" and not enabled,
        "is {0}, but generation.enabled is false. Set generation.enabled=true or generation.method=interpolation",
    ),
    Relation(
        ("generation.method", "generation.enabled", "generation.coefficients"),
        lambda method, enabled, kind: method == "generator" and enabled and kind != "single",
        "is {0}, which goes on from single-coefficient interpolation: got generation.coefficients={2}. Set "
        "generation.coefficients=single",
    ),
    Relation(
        ("graph.neighbours", "generation.method"),
        lambda neighbours, method: neighbours is not None and method == "generator",
        "must be null with generation.method=generator, which generates a negative of every class: got {0}",
    ),
    Relation(
        ("generation.generator.reconstruction", "generation.generator.classification", "generation.method"),
        lambda recon, soft, method: method == "generator" and recon == 0 and soft == 0,
        "and generation.generator.classification are both 0: the generator would learn nothing. Set one above 0",
    ),
)

_EVAL_RELATIONS = (
    Relation(
        ("eval.gallery_split", "eval.protocol", "eval.split", "eval.galleries"),
        lambda gallery, protocol, split, several: (
            protocol == "query_gallery" and not several and gallery in (None, split)
        ),
        "must name another split than eval.split for eval.protocol=query_gallery: got {0}",
    ),
    Relation(
        ("eval.gallery_split", "eval.galleries"),
        lambda gallery, several: gallery is not None and bool(several),
        "names one gallery, eval.galleries ({1}) several: got {0}. Set one of the two to null or []",
    ),
    Relation(
        ("eval.galleries", "eval.split"),
        lambda several, split: split in several,
        "must name other splits than eval.split: got {0}",
    ),
    Relation(
        ("eval.gallery_split", "eval.protocol"),
        lambda gallery, protocol: protocol == "self" and gallery is not None,
        "eval.protocol=self searches no other split: got {0}. Set it to null, or eval.protocol=query_gallery",
    ),
    Relation(
        ("eval.galleries", "eval.protocol"),
        lambda several, protocol: protocol == "self" and bool(several),
        "eval.protocol=self searches no other split: got {0}. Set it to [], or eval.protocol=query_gallery",
    ),
    Relation(
        ("eval.distractor_splits", "eval.split", "eval.gallery_split", "eval.galleries"),
        lambda distractors, split, gallery, several: not {split, gallery, *several}.isdisjoint(distractors),
        "must name other splits than those of queries and galleries: got {0}",
    ),
)


def _memories(objects: Any) -> Iterator[int]:
    """Sizes of the memories in nested arguments of losses."""
    if isinstance(objects, list):
        objects = dict(enumerate(objects))
    for name, value in objects.items() if isinstance(objects, Mapping) else ():
        if name == "pml.CrossBatchMemory":
            size = value.get("memory_size", _PML_MEMORY) if isinstance(value, Mapping) else _PML_MEMORY
            if isinstance(size, int):
                yield size
        yield from _memories(value)


_LOSS_RELATIONS = (
    Relation(
        ("loss.metric", "batch.num_samples"),
        lambda metric, samples: metric == "n_pair" and samples != 2,
        "the original N-pair loss takes batch.num_samples=2: got {1}. Set loss.metric=n_pair_plus",
    ),
    Relation(
        ("loss.miner", "loss.metric"),
        lambda miner, metric: miner is not None and metric in _LOSSES,
        "chooses pairs for a loss `pml.NAME`, or one of your own that takes an `indices_tuple`: got {0} for "
        "loss.metric {1}. Set it to null, or name such a loss",
    ),
    Relation(
        ("loss.miner_args", "loss.miner"),
        lambda args, miner: bool(args) and miner is None,
        "are the arguments of a miner, but loss.miner is null: got {0}. Name a miner, or set them to {{}}",
    ),
    Relation(
        ("loss.args", "loss.metric", "batch.num_classes", "batch.num_samples"),
        lambda args, metric, classes, samples: any(n < classes * samples for n in _memories({metric: args})),
        "the memory of pml.CrossBatchMemory must hold a batch of {2} x {3} samples: got {0}. Set its memory_size",
    ),
)

RELATIONS: tuple[Relation, ...] = (
    *_LOSS_RELATIONS,
    Relation(
        ("batch.passes", "batch.sampler"),
        lambda passes, sampler: passes is not None and sampler in WITHOUT_PASSES,
        "an epoch of the sampler {1} does not consist of passes: got {0}. Set it to null, or batch.sampler=sample",
    ),
    Relation(
        ("graph.num_heads", "model.embedding_dim", "graph.enabled"),
        lambda heads, dim, enabled: enabled and dim % heads != 0,
        "must divide model.embedding_dim ({1}): got {0}. Change one of the two",
    ),
    Relation(
        ("graph.neighbours", "graph.enabled"),
        lambda neighbours, enabled: neighbours is not None and not enabled,
        "is about the edges of the graph network, but graph.enabled is false: got {0}. Set it to null",
    ),
    Relation(
        ("graph.neighbours", "graph.backend"),
        lambda neighbours, backend: neighbours is not None and backend == "scatter",
        "must be null with graph.backend=scatter, which computes every pair: got {0}. Set graph.backend=auto",
    ),
    Relation(
        ("generation.coefficients", "generation.enabled", "graph.enabled"),
        lambda kind, enabled, graph: enabled and kind == "channel" and not graph,
        "channel coefficients come from the graph network, but graph.enabled is false. Set "
        "graph.enabled=true, generation.coefficients=single or generation.enabled=false",
    ),
    Relation(
        ("model.pretrained", "model.backbone", "model.weights"),
        lambda pretrained, name, weights: pretrained and name == "small_conv" and weights is None,
        "small_conv has no published weights. Set model.pretrained=false, or model.weights=FILE",
    ),
    *(
        relation
        for part in ("metric_model", "graph", "classifier", "generator", "proxies")
        for relation in _optimizer_relations(part)
    ),
    Relation(
        ("train.warm_up_epochs", "train.epochs"),
        lambda warm_up, epochs: warm_up > epochs,
        "must not exceed train.epochs ({1}): got {0}",
    ),
    Relation(
        ("train.precision", "train.device"),
        lambda precision, device: precision == "fp16" and device == "cpu",
        "fp16 needs CUDA, but train.device is cpu. Set train.precision=bf16 or fp32",
    ),
    Relation(
        ("monitor.each_rank", "monitor.port"),
        lambda each, port: each and port is None,
        "needs a port for rank 0 to count from: got monitor.port=null. Set monitor.port",
    ),
    *_GENERATOR_RELATIONS,
    *_EVAL_RELATIONS,
)


def limit_fault(key: str, value: Any) -> str | None:
    """Say what is impossible about one well-typed value, or return None."""
    if value is None:
        return None
    entries = value if isinstance(value, tuple) else (value,)
    if any(isinstance(entry, float) and not math.isfinite(entry) for entry in entries):
        return f"must be finite: got {show(value)}"
    for pattern, limit in LIMITS:
        if _matches(key, pattern) and not limit.holds(value):
            return f"must {limit.text}: got {show(value)}"
    return None


def _matches(key: str, pattern: str) -> bool:
    """Compare part by part; `*` stands for one part, dots excluded (unlike in file globs)."""
    names, wanted = key.split("."), pattern.split(".")
    return len(names) == len(wanted) and all(part in ("*", name) for name, part in zip(names, wanted, strict=True))


def relation_faults(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, fault) for every broken rule between settings.

    Args:
        values: Sound values by dotted key; a rule about a key that is absent is passed over.
    """
    for relation in RELATIONS:
        if all(key in values for key in relation.keys):
            found = [values[key] for key in relation.keys]
            if relation.broken(*found):
                yield relation.keys[0], relation.text.format(*map(show, found))
    if all(key in values for key in _TRANSFORM_KEYS):
        fault = _transform_fault(*(values[key] for key in _TRANSFORM_KEYS))
        if fault is not None:
            yield "data.transform", fault
