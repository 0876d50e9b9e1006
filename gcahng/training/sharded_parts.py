"""The parts of a run whose class rows are spread over ranks, and what of them checkpoints hold (`shard_classes`).

Sharded are the proxies of Proxy-Anchor, the classifier, and the graph's node classifier, which becomes a part of its
own, "node_classifier": the graph itself is replicated, and wrapped as a whole. Checkpoints hold the replicated form, so
that they fit any number of ranks and a run without shards (`joined`, `joined_optimizers`). A run that goes on from one
loads it into replicated parts, then shards them; optimisers and schedules take their share by `optimizer_of_saved` and
`schedule_of_saved`.

Letters: B samples of the global batch, D channels, N classes, n of them on this rank, W ranks.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.distributed import Ranks
from gcahng.distributed.class_shards import ClassShard, ShardedLinear
from gcahng.errors import ConfigError, InputError
from gcahng.generation import ConstantClassifier
from gcahng.graph import GraphNetwork
from gcahng.layout import BatchLayout
from gcahng.losses import ProxyAnchorLoss
from gcahng.losses.proxy_anchor import proxy_anchor_loss
from gcahng.training.optimizers import ALL_PASSES

GRAPH, NODE_CLASSIFIER = "graph", "node_classifier"
# The pass that reaches the node classifier, as the graph's parameter groups name it. It stands last in that group.
METRIC = "metric"
NODE_CLASSIFIER_TENSORS = 2  # weight and bias


class ShardedProxyAnchorLoss(ClassShard):
    """`ProxyAnchorLoss` with this rank's proxies: its sums over proxies are added up over ranks, three numbers."""

    proxies: nn.Parameter

    def __init__(self, loss: ProxyAnchorLoss, ranks: Ranks) -> None:
        """
        Args:
            loss: The replicated one, alike on all ranks; what is not kept of it can be freed.
            ranks: All ranks.
        """
        super().__init__({"proxies": loss.proxies}, ranks)
        self.scale = loss.scale
        self.margin = loss.margin

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        candidates: Tensor | None = None,
        candidate_labels: Tensor | None = None,
        *,
        layout: BatchLayout | None = None,
    ) -> Tensor:
        """As `ProxyAnchorLoss.forward`; all ranks call it with the same batch, and get the same loss."""
        if candidates is not None or candidate_labels is not None:
            raise InputError("`candidates` must be None: ProxyAnchorLoss compares embeddings with its proxies.")
        return proxy_anchor_loss(
            self.own(self.proxies),
            embeddings,
            labels,
            scale=self.scale,
            margin=self.margin,
            num_classes=self.num_classes,
            first_class=self.rows.start,
            reduce=self.ranks.sum,
            check_values=layout is None,
        )


def shard_part(name: str, module: nn.Module, ranks: Ranks) -> dict[str, nn.Module]:
    """The part or parts that take the place of a replicated one.

    Args:
        name: Of the part.
        module: The replicated part with its initial weights, alike on all ranks. A sharded part keeps copies of its
            rows, so that the memory of all rows, (N, D), is free again before the next part is made.
        ranks: All ranks.
    Returns:
        Parts by name; the same module where it has no rows of classes.
    Raises:
        ConfigError: A metric loss of the user's own has parameters; or there are fewer classes than ranks.
    """
    if name == "classifier":
        return {name: ShardedLinear(cast(nn.Linear, module), ranks)}
    if name == GRAPH:
        taken = cast(GraphNetwork, module).take_node_classifier()
        return {name: module, NODE_CLASSIFIER: ShardedLinear(taken, ranks)}
    if name != "metric_loss" or not any(True for _ in module.parameters()):
        return {name: module}
    # A subclass may use its proxies in other ways.
    if type(module) is not ProxyAnchorLoss:
        loss = getattr(module, "name", type(module).__name__)
        raise ConfigError(
            f"`distributed.shard_classes` cannot spread the parameters of loss.metric {loss} over "
            "ranks: expected proxy_anchor or a loss without parameters. Set it to false, or use such a loss."
        )
    return {name: ShardedProxyAnchorLoss(module, ranks)}


def class_loss(classifier: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of a classifier, sharded or not, in the features' dtype.

    Args:
        classifier: Of the part.
        features: (B, D).
        labels: (B,) int64 in [0, N).
    """
    if isinstance(classifier, ShardedLinear):
        return cast(Tensor, classifier(features, labels))
    return F.cross_entropy(classifier(features).to(features.dtype), labels)


def constant_classifier(classifier: nn.Module, low: torch.dtype | None) -> ConstantClassifier:
    """A classifier with its weights as constants; a sharded one is gathered (`ShardedLinear.constant`).

    Args:
        classifier: Of the part.
        low: Dtype of the operands of matrix products; None for the weights' own.
    """
    if isinstance(classifier, ShardedLinear):
        return classifier.constant(low)
    layer = cast(nn.Linear, classifier)
    return ConstantClassifier(layer.weight, layer.bias, low)


def saved_with(part: str) -> str:
    """The part of the replicated run with which a checkpoint holds this one."""
    return GRAPH if part == NODE_CLASSIFIER else part


def joined(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """State dictionaries by part as the replicated run has them: the node classifier's entries among the graph's."""
    found = {name: dict(state) for name, state in states.items() if name != NODE_CLASSIFIER}
    for key, value in states.get(NODE_CLASSIFIER, {}).items():
        found[GRAPH][f"{NODE_CLASSIFIER}.{key}"] = value
    return found


def joined_optimizers(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Optimiser states by part as the replicated run has them: the node classifier last in the graph's metric group."""
    found = {name: state for name, state in states.items() if name != NODE_CLASSIFIER}
    if NODE_CLASSIFIER not in states or not states[NODE_CLASSIFIER]:  # sharded states are on rank 0 alone
        return found
    own = states[NODE_CLASSIFIER]
    (own_group,) = own["param_groups"]
    order: list[tuple[Mapping[str, Any], int]] = []
    groups = []
    for group in found[GRAPH]["param_groups"]:
        members = [(found[GRAPH], number) for number in group["params"]]
        if group["reach"] == METRIC:
            members += [(own, number) for number in own_group["params"]]
        groups.append(group | {"params": list(range(len(order), len(order) + len(members)))})
        order += members
    found[GRAPH] = _renumbered(order, groups)
    return found


def optimizer_of_saved(name: str, module: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a part's optimiser, with all rows, from what the replicated run saved.

    Args:
        name: Of the part.
        module: The part.
        saved: State dictionary of the optimiser of the part `saved_with(name)`.
    """
    if name != NODE_CLASSIFIER and not _lacks_classifier(module):
        return dict(saved)
    order: list[tuple[Mapping[str, Any], int]] = []
    groups = []
    for group in saved["param_groups"]:
        kept, taken = list(group["params"]), []
        if group["reach"] == METRIC:
            kept, taken = kept[:-NODE_CLASSIFIER_TENSORS], kept[-NODE_CLASSIFIER_TENSORS:]
        if name == NODE_CLASSIFIER and not taken:
            continue
        numbers = taken if name == NODE_CLASSIFIER else kept
        marks = {"reach": ALL_PASSES} if name == NODE_CLASSIFIER else {}
        groups.append(group | {"params": list(range(len(order), len(order) + len(numbers)))} | marks)
        order += [(saved, number) for number in numbers]
    return _renumbered(order, groups)


def schedule_of_saved(name: str, schedules: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The state of a part's learning-rate schedule from those of the replicated run, by part.

    The graph's optimiser has several parameter groups with one rate, the node classifier's has one.
    """
    saved = dict(schedules[saved_with(name)])
    if name == NODE_CLASSIFIER:
        saved |= {key: list(saved[key])[:1] for key in ("base_lrs", "_last_lr") if key in saved}
    return saved


def _lacks_classifier(module: nn.Module) -> bool:
    return isinstance(module, GraphNetwork) and not module.classifies_nodes


def _renumbered(order: list[tuple[Mapping[str, Any], int]], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A state dictionary whose parameter i is the one that `order` says of which state dictionary."""
    state = {new: of["state"][old] for new, (of, old) in enumerate(order) if old in of["state"]}
    return {"state": state, "param_groups": groups}
