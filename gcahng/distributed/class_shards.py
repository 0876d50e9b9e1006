"""Rows of classes spread over the ranks: proxies and classifiers of which each rank holds, and moves, its own slice.

A part that inherits from `ClassShard` has a contiguous slice of the rows of every parameter; slices differ by one row
at most. Nobody wraps it, averages its gradients or makes it the same on all ranks (`own_rows`): parameters, gradients
and the optimiser's state are 1/W of the replicated ones on each rank. Its numbers are those of the replicated part.

The gradient of own rows (the rule: `gcahng.distributed`): what is differentiated is the sum of all W ranks' losses, all
of which depend on these rows, and no average follows. So what comes back is W times the gradient, and `own` divides it,
in the one place through which every use of a shard's parameters goes.

Letters: B samples of the global batch, D channels, N classes, n of them on this rank, W ranks.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gcahng.data.ranks import rank_part
from gcahng.distributed.ranks import Ranks
from gcahng.errors import ConfigError, InputError
from gcahng.generation import ConstantClassifier
from gcahng.graph.precision import autocast_dtype, node_dtype, product, without_autocast
from gcahng.layout import check_labels

# Logits of one slice of classes, of which the backward pass has two at once. CPU: they stay in cache.
LOGIT_BYTES = {"cpu": 16 << 20}
LOGIT_BYTES_ELSEWHERE = 128 << 20


class ClassShard(nn.Module):
    """A part whose parameters are this rank's rows of the replicated part's, under the same names.

    Attributes:
        own_rows: For backends: no wrapper, no average over ranks.
        ranks: All ranks.
        num_classes: N.
        rows: Classes of this rank.
    """

    own_rows: ClassVar[bool] = True

    def __init__(self, whole: Mapping[str, Tensor], ranks: Ranks) -> None:
        """
        Args:
            whole: The replicated part's parameters by name, each (N, ...), alike on all ranks: rank r keeps its rows,
                so that the start does not depend on W.
            ranks: All ranks.
        Raises:
            ConfigError: There are fewer classes than ranks.
        """
        super().__init__()
        self.num_classes = next(iter(whole.values())).shape[0]
        if self.num_classes < ranks.size:
            raise ConfigError(
                f"`distributed.shard_classes` needs a training class for every rank: expected {ranks.size} or more, "
                f"got {self.num_classes}. Set it to false; so few rows need no sharding."
            )
        self.ranks = ranks
        self.rows = rank_part(self.num_classes, ranks.rank, ranks.size)
        for name, values in whole.items():
            # A copy: a view would keep all rows in memory.
            setattr(self, name, nn.Parameter(values.detach()[self.rows].clone()))

    def own(self, parameter: Tensor) -> Tensor:
        """The parameter, with its gradient divided by W."""
        return parameter if self.ranks.size == 1 else _DividedGradient.apply(parameter, self.ranks.size)


class ShardedLinear(ClassShard):
    """A linear classifier of which each rank holds some classes; its cross-entropy takes all ranks at once."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear, ranks: Ranks) -> None:
        """
        Args:
            layer: The replicated classifier, alike on all ranks; what is not kept of it can be freed.
            ranks: All ranks.
        """
        super().__init__(dict(layer.named_parameters()), ranks)
        if layer.bias is None:
            self.bias = None

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over all N classes; all ranks call it with the same features and labels.

        Args:
            features: (B, D).
            labels: (B,) int64 in [0, N).
        Returns:
            Scalar loss in the weights' dtype, the same on every rank.
        Raises:
            InputError: Shapes do not fit, or a label that lies on the CPU is out of range (elsewhere a look would wait
                for the device).
        """
        self._check(features, labels)
        low = node_dtype(features, autocast_dtype(features))
        bias = None if self.bias is None else self.own(self.bias)
        with torch.autocast(features.device.type, enabled=False):
            return sharded_cross_entropy(
                features.to(self.weight.dtype), self.own(self.weight), bias, labels, self.rows.start, self.ranks, low
            )

    def _check(self, features: Tensor, labels: Tensor) -> None:
        if features.dim() != 2 or features.shape[1] != self.weight.shape[1]:
            raise InputError(
                f"`features` must have shape (B, D) with D = {self.weight.shape[1]}: got {tuple(features.shape)}."
            )
        check_labels(labels, features.shape[0])
        _check_values(labels, self.num_classes)

    @torch.no_grad()
    def constant(self, low: torch.dtype | None) -> ConstantClassifier:
        """The whole classifier as a constant, for a judge whose work differs from rank to rank; all ranks call it.

        The judge's rows are a rank's own block pairs, in chunks whose number the ranks do not share, so no exchange
        fits between them: the weights come to the rows. Costs, per call: N x D numbers in `low` received and held
        (N = 1,000,000, D = 512 in bfloat16: 1 GB) until the classifier is let go of, nothing of it kept for a backward
        pass. The products, rows x N x D, are those of the replicated classifier.

        Args:
            low: Dtype of the operands of matrix products, and of what is exchanged; None for the weights' own.
        """
        bias = None if self.bias is None else all_rows(self.bias, self)
        weight = self.weight if low is None else self.weight.to(low)
        return ConstantClassifier(all_rows(weight, self), bias, low)


def all_rows(own: Tensor, shard: ClassShard) -> Tensor:
    """(N, ...) from each rank's (n, ...), without gradient: slices that need no padding, one broadcast of each."""
    ranks = shard.ranks
    if ranks.size == 1:
        return own.detach()
    whole = own.new_empty(shard.num_classes, *own.shape[1:])
    parts = [whole[rank_part(shard.num_classes, rank, ranks.size)] for rank in range(ranks.size)]
    parts[ranks.rank].copy_(own.detach())
    sent = [dist.broadcast(part, group=ranks.group, group_src=rank, async_op=True) for rank, part in enumerate(parts)]
    for work in sent:
        if work is not None:  # None: no member of the group
            work.wait()
    return whole


def sharded_cross_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    first_class: int,
    ranks: Ranks,
    low: torch.dtype | None = None,
) -> Tensor:
    """Mean cross-entropy of a linear classifier whose rows are spread over the ranks.

    Exchanged per call: the largest logit and two sums of each sample, 3 B numbers, and as many gradients. Logits are
    there for one slice of classes at a time, and computed again in the backward pass.

    Args:
        features: (B, D), the same on all ranks.
        weight: (n, D) of the classes from `first_class` on.
        bias: (n,), or None.
        labels: (B,) int64 in [0, N).
        first_class: Class of the first row here.
        ranks: All ranks.
        low: Dtype of the operands of matrix products; None for the features' own.
    Returns:
        Scalar, the same on every rank.
    """
    log_sum, own = _ShardLogits.apply(features, weight, bias, labels.long() - first_class, low)
    best = log_sum.detach().clone()
    if ranks.size > 1:
        dist.all_reduce(best, dist.ReduceOp.MAX, group=ranks.group)
    odds, own = ranks.sum(torch.stack([(log_sum - best).exp(), own])).unbind()
    return (best + odds.log() - own).mean()


def _check_values(labels: Tensor, num_classes: int) -> None:
    if labels.device.type != "cpu":
        # Looking would wait for the device.
        return
    values = labels.numpy()
    if not 0 <= values.min() <= values.max() < num_classes:
        raise InputError(
            f"`labels` must lie in [0, {num_classes}), the classifier's outputs: got {values.min()} to {values.max()}. "
            "Number the training classes from 0."
        )


class _DividedGradient(torch.autograd.Function):
    """Identity; the gradient is divided by the number of ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, size: int) -> Tensor:
        ctx.size = size
        return rows.view_as(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.size, None


class _ShardLogits(torch.autograd.Function):
    """Of each sample the log of the summed odds of the classes here, and its own class's logit, 0 if that is not here.

    Labels are counted from the first class here; those of other ranks' classes lie outside [0, n).
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, low: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        own = features.new_zeros(features.shape[0])
        log_sums = []
        for classes in _slices(features, weight):
            logits = _logits(features, weight, bias, classes, low)
            here, column = _columns(labels, classes)
            own = torch.where(here, logits.gather(1, column[:, None])[:, 0], own)
            log_sums.append(torch.logsumexp(logits, 1))
        log_sum = torch.logsumexp(torch.stack(log_sums), 0)
        ctx.low = low
        ctx.save_for_backward(features, weight, bias, labels, log_sum)
        return log_sum, own

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, bias, labels, log_sum = ctx.saved_tensors
        by_sum, by_own = gradients
        low = ctx.low or features.dtype
        lowered = features.to(low)
        by_features = torch.zeros_like(features) if ctx.needs_input_grad[0] else None
        by_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        by_bias = None if bias is None else torch.empty_like(bias)
        for classes in _slices(features, weight):
            logits = _logits(features, weight, bias, classes, ctx.low)
            by_logits = logits.sub_(log_sum[:, None]).exp_().mul_(by_sum[:, None])
            here, column = _columns(labels, classes)
            by_logits.scatter_add_(1, column[:, None], torch.where(here, by_own, 0.0)[:, None])
            if by_bias is not None:
                by_bias[classes] = by_logits.sum(0)
            of_product = by_logits.to(low)
            if by_features is not None:
                by_features += (of_product @ weight[classes].to(low)).to(features.dtype)
            if by_weight is not None:
                by_weight[classes] = (of_product.T @ lowered).to(weight.dtype)
        return by_features, by_weight, by_bias, None, None


def _slices(features: Tensor, weight: Tensor) -> list[slice]:
    """Slices of the classes here whose logits have room."""
    room = LOGIT_BYTES.get(features.device.type, LOGIT_BYTES_ELSEWHERE)
    size = max(1, room // (features.shape[0] * features.element_size()))
    return [slice(start, min(start + size, weight.shape[0])) for start in range(0, weight.shape[0], size)]


def _logits(features: Tensor, weight: Tensor, bias: Tensor | None, classes: slice, low: torch.dtype | None) -> Tensor:
    """(B, classes of the slice), a tensor of its own."""
    return product(features, weight[classes], None if bias is None else bias[classes], low)


def _columns(labels: Tensor, classes: slice) -> tuple[Tensor, Tensor]:
    """(B,) whether a sample's class is in the slice, and its column there; any column where it is not."""
    column = labels - classes.start
    size = classes.stop - classes.start
    here = (column >= 0) & (column < size)
    return here, column.clamp(0, size - 1)
