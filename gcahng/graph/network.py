"""The graph network of GCA-HNG: how all samples of a batch relate, read out as one pull coefficient per channel.

Letters: B samples, D channels, N training classes, L layers, H heads.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gcahng.errors import InputError
from gcahng.graph import reference
from gcahng.graph.backends import check_backend_name, choose_backend, make_kernels
from gcahng.graph.blocks import EdgeBlock, NodeBlock, frozen_bias_batch_norm
from gcahng.graph.coefficients import (
    Coefficients,
    ConstantCoefficients,
    PairCoefficients,
    TableCoefficients,
)
from gcahng.graph.dropout import EdgeDropout
from gcahng.graph.edge_layout import EdgeLayout, edge_layout
from gcahng.graph.edge_messages import EdgePass, edge_to_node_sums
from gcahng.graph.edge_moments import EdgeMoments
from gcahng.graph.edge_source import EdgeSource, ProductEdges, StoredEdges
from gcahng.graph.edge_update import EndTerms, update_edges
from gcahng.graph.features import unit_centred
from gcahng.graph.kernels import EagerKernels
from gcahng.graph.output import GraphOutput
from gcahng.graph.pairs import PairPlan, block_classes, pair_plan
from gcahng.graph.precision import autocast_dtype, linear, node_dtype
from gcahng.graph.read_out import ReadOut, running_statistics, update_running
from gcahng.layout import check_embeddings, check_labels

log = logging.getLogger(__name__)

# The batch size of the papers: `edge_aggregation="scaled"` makes every other act like it.
REFERENCE_BATCH = 80
# From here on plain sums of edge messages are called large, once.
LARGE_SUM = 2 * REFERENCE_BATCH
# What an edge operation keeps for its backward pass instead of computing it again; D = 512 in float32: B up to 250.
KEEP_BYTES = 256 << 20

_CHOICES = {
    "edge_dropout": ("tied", "independent"),
    "norm": ("gelu_layer_norm", "layer_norm"),
    "edge_aggregation": ("sum", "mean", "scaled"),
}

Reducer = Callable[[Tensor], Tensor]


def identity(partial: Tensor) -> Tensor:
    """The reducer of one process: its partial sums are the sums."""
    return partial


@dataclass(frozen=True)
class _Pass:
    """One call of the graph; see `GraphNetwork.forward`."""

    plan: PairPlan
    dropout: EdgeDropout | None
    need_coefficients: bool
    coefficient_gradient: bool
    reduce: Reducer
    dtype: torch.dtype | None


class GraphNetwork(nn.Module):
    """Message propagation over all B² ordered pairs of a batch (GCA-HNG, IJCV 2024, section 3).

    Differs from the released code: one dropout mask per unordered pair by default (`edge_dropout="tied"`), norms of
    constant embeddings floored, half of the edges computed. Without dropout the numbers are the same.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        num_layers: int = 1,
        num_heads: int = 2,
        *,
        dropout: float = 0.1,
        edge_dropout: Literal["tied", "independent"] = "tied",
        backend: Literal["auto", "triton", "compiled", "eager", "scatter"] = "auto",
        norm: Literal["gelu_layer_norm", "layer_norm"] = "gelu_layer_norm",
        node_propagation: bool = True,
        edge_to_node: bool = True,
        edge_aggregation: Literal["sum", "mean", "scaled"] = "sum",
    ) -> None:
        """
        Args:
            embedding_dim, num_classes, num_layers: D, N, L.
            num_heads: H of the node attention; must divide D. The edge attention has one head.
            dropout: Probability on the two attention weights of an edge.
            edge_dropout: "tied": the two directions of a pair share their mask. "independent": the released law.
            backend: Who computes the edges: Triton's kernels, compiled functions or plain torch over unordered
                pairs, "scatter" the edge-list reference; "auto" takes the fastest that the device allows.
            norm: "gelu_layer_norm" as released, "layer_norm" as the paper writes.
            node_propagation: False: no messages between nodes, an edge sees its two ends only.
            edge_to_node: False: no sum of edge messages into nodes (the paper's "Hadamard product addition").
            edge_aggregation: How edge messages come together at a node: "sum" as released, which grows with B;
                "mean"; "scaled": the sum times 80 / B, alike at every batch size.
        Raises:
            InputError: An argument is out of its range, or the backend cannot do what is asked.
        """
        super().__init__()
        _check_sizes(embedding_dim, num_classes, num_layers, num_heads, dropout)
        _check_choices(backend, edge_dropout=edge_dropout, norm=norm, edge_aggregation=edge_aggregation)
        if edge_to_node and not node_propagation:
            log.info("edge_to_node has no effect without node_propagation: nodes receive nothing.")
        self.embedding_dim = embedding_dim
        self.dropout = dropout
        self.tied = edge_dropout == "tied"
        self.backend = backend
        self.edge_aggregation = edge_aggregation
        self._kernels: dict[tuple[torch.device, int], EagerKernels] = {}
        self.keep_bytes = KEEP_BYTES
        gelu_norm = norm == "gelu_layer_norm"
        self.reduction = nn.Linear(embedding_dim, embedding_dim)
        self.node_blocks = nn.ModuleList(
            NodeBlock(
                embedding_dim,
                num_heads,
                gelu_norm=gelu_norm,
                node_propagation=node_propagation,
                edge_to_node=edge_to_node,
            )
            for _ in range(num_layers)
        )
        self.edge_blocks = nn.ModuleList(EdgeBlock(embedding_dim, gelu_norm=gelu_norm) for _ in range(num_layers))
        self.node_norm = frozen_bias_batch_norm(embedding_dim)
        self.node_classifier = nn.Linear(embedding_dim, num_classes)
        self.edge_norm = frozen_bias_batch_norm(embedding_dim)
        self.edge_out = nn.Linear(embedding_dim, embedding_dim)

    def __getstate__(self) -> dict[str, Any]:
        # Kernels belong to a machine: who loads the network elsewhere may not even be able to make them.
        return {**self.__dict__, "_kernels": {}}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trained parameters by the passes that reach them: "both", "metric" only, "generation" only.

        The metric pass uses detached coefficients, so the last edge block and the edge read-out have no gradient in
        it (nor any edge block whose result no node sees); the generation pass has no node classification.
        """
        feeds_nodes = any(block.sums_edges for block in self._nodes())
        last = len(self.edge_blocks) - 1
        generation = [*self.edge_norm.parameters(), *self.edge_out.parameters()]
        both = list(self.reduction.parameters()) + list(self.node_blocks.parameters())
        for layer, block in enumerate(self.edge_blocks):
            target = both if feeds_nodes and layer < last else generation
            target.extend(block.parameters())
        metric = [*self.node_norm.parameters()]
        if self.classifies_nodes:
            metric += self.node_classifier.parameters()
        groups = {"both": both, "metric": metric, "generation": generation}
        return {name: [p for p in group if p.requires_grad] for name, group in groups.items()}

    @property
    def classifies_nodes(self) -> bool:
        """Whether the node classifier is here."""
        return "node_classifier" in self._modules

    def take_node_classifier(self) -> nn.Linear:
        """Take the node classifier away, for a caller who scores `GraphOutput.node_features` with it (N too large)."""
        classifier = self.node_classifier
        del self.node_classifier
        return classifier

    def plan(self, batch_size: int, device: torch.device | str = "cpu") -> PairPlan:
        """A plan for samples in any order: blocks of consecutive samples."""
        block = block_classes(batch_size, 1, torch.device(device).type)
        return pair_plan(torch.arange(batch_size, device=device), block)

    def kernels(self, plan: PairPlan, device: torch.device) -> EagerKernels:
        """The inner loops for batches of a plan on a device; made at the first use, then kept.

        Raises:
            InputError: The backend was asked for by name and cannot run there.
        """
        key = (device, plan.block_size)
        if key not in self._kernels:
            choice = choose_backend(self.backend, device, self.embedding_dim, plan.block_size)
            self._kernels[key] = make_kernels(choice.name, device)
        return self._kernels[key]

    def forward(
        self,
        z: Tensor,
        labels: Tensor,
        *,
        dropout_key: int | None = None,
        plan: PairPlan | None = None,
        need_coefficients: bool = True,
        coefficient_gradient: bool = True,
        reduce: Reducer = identity,
        check_values: bool = True,
    ) -> GraphOutput:
        """Relate all samples of the global batch.

        Args:
            z: (B, D) embeddings, not normalised; B >= 2.
            labels: (B,) int64; samples of one class do not attend to each other.
            dropout_key: Key of the dropout masks in training (see `gcahng.random.stream_key`); by default a new one
                is drawn from torch's global generator.
            plan: Block pairs that this process computes; by default all of them, in blocks that do not suit the
                losses of `gcahng.generation`: those need one from `class_major_plan` or `neighbour_plan`.
            need_coefficients: False skips the last edge block and the edge read-out.
            coefficient_gradient: False computes them without gradient (the metric pass).
            reduce: Differentiable sum of partial sums over processes.
            check_values: False leaves it to the caller that embeddings are finite: the check waits for the device.
        Raises:
            InputError: Shapes or dtypes do not fit, or an embedding is not finite.
        """
        self._check_batch(z, labels, check_values)
        dropout = None
        if self.training and self.dropout > 0:
            key = int(torch.randint(2**62, ()).item()) if dropout_key is None else dropout_key
            dropout = EdgeDropout(self.dropout, key, self.tied)
        plan = self.plan(z.shape[0], z.device) if plan is None else plan
        if plan.batch_size != z.shape[0]:
            raise InputError(f"`plan` is for {plan.batch_size} samples: got {z.shape[0]} embeddings. Make another.")
        if self.backend == "scatter" and not plan.dense:
            raise InputError(
                "backend scatter computes every pair, but the plan lists some (graph.neighbours). Use backend auto."
            )
        dtype = autocast_dtype(z)
        z = z if dtype is None else z.float()
        call = _Pass(plan, dropout, need_coefficients, coefficient_gradient, reduce, dtype)
        run = self._scatter if self.backend == "scatter" else self._pairs
        with torch.autocast(z.device.type, enabled=False):
            h, coefficients = run(z, labels, call)
            features = self.node_norm(h)
            logits = None
            if self.classifies_nodes:
                logits = linear(features, self.node_classifier, node_dtype(h, dtype))
        return GraphOutput(features, logits, coefficients)

    def _pairs(self, z: Tensor, labels: Tensor, call: _Pass) -> tuple[Tensor, Coefficients | None]:
        plan = call.plan
        # A sparse graph is for batches whose (B, B) mask would be too large.
        other_class = labels[:, None] != labels[None, :] if plan.dense else None
        layout = edge_layout(plan, call.dropout, len(self.node_blocks))
        kernels = self.kernels(plan, z.device)
        edge_pass = EdgePass(layout, kernels, call.dtype, _storage(z, call.dtype), self.keep_bytes)
        source: EdgeSource = ProductEdges(plan.positions(unit_centred(z)))
        low = node_dtype(z, call.dtype)
        h = linear(z, self.reduction, low)
        last = len(self.node_blocks) - 1
        moments: EdgeMoments | None = None
        for layer, (node_block, edge_block) in enumerate(zip(self._nodes(), self._edges(), strict=True)):
            attended = None
            if node_block.attends and other_class is not None:
                attended = node_block.attend(h, other_class, low)
            elif node_block.attends:
                attended = node_block.attend_listed(h, labels, plan, low, call.reduce)
            message = None
            if node_block.sums_edges:
                summed = edge_to_node_sums(
                    source, node_block.edge_to_node.weight, node_block.edge_to_node.bias, edge_pass
                )
                message = call.reduce(summed) * self._aggregation_factor(plan)
            h = node_block.update(h, attended, message, low)
            if layer == last and not call.need_coefficients:
                return h, None
            gradient = torch.is_grad_enabled() and (call.coefficient_gradient or layer < last)
            with torch.set_grad_enabled(gradient):
                terms = EndTerms(*(plan.positions(t) for t in edge_block.end_node_terms(h, low)))
                rule = edge_block.rule(layer, moments=layer == last and self.training)
                updated = update_edges(source, terms, edge_block.weights(), rule, edge_pass)
            norm = edge_block.norm.layer_norm
            source = StoredEdges(
                updated.raw, norm.weight, norm.bias, edge_block.norm.gelu, norm.eps, kernels, updated.values
            )
            moments = updated.moments
        assert isinstance(source, StoredEdges)
        return h, self._coefficients(layout, source, moments, call)

    def _coefficients(
        self, layout: EdgeLayout, edges: StoredEdges, moments: EdgeMoments | None, call: _Pass
    ) -> PairCoefficients | ConstantCoefficients:
        mean, variance = self._edge_statistics(layout.plan, moments, call.reduce)
        norm, out = self.edge_norm, self.edge_out
        # The BatchNorm's bias is not trained, but need not be zero in a loaded state.
        bias = nn.functional.linear(norm.bias, out.weight, out.bias)
        # In float16 the gradients of logits, made before a loss scaler can raise them, would be zero.
        low = None if call.dtype == torch.float16 else call.dtype
        read_out = ReadOut(layout, edges, mean, variance, self.training, norm.weight, norm.eps, out.weight, bias, low)
        if call.coefficient_gradient and torch.is_grad_enabled():
            return PairCoefficients(read_out)
        # Nobody needs the edges any more: the logits take their place.
        return ConstantCoefficients(layout, read_out.fill(edges.raw.detach()), bias.detach())

    def _edge_statistics(self, plan: PairPlan, moments: EdgeMoments | None, reduce: Reducer) -> tuple[Tensor, Tensor]:
        if moments is None:
            mean, variance = running_statistics(self.edge_norm)
            return mean.clone(), variance.clone()
        mean, variance = moments.over(reduce, plan.edge_count)
        update_running(self.edge_norm, mean, variance, plan.edge_count)
        return mean, variance

    def _aggregation_factor(self, plan: PairPlan) -> Tensor | float:
        """What the edge-to-node sums are multiplied by: one number, or (B, 1)."""
        if self.edge_aggregation == "sum":
            if plan.edge_count > LARGE_SUM * plan.batch_size and self._nodes()[0].sums_edges:
                _warn_of_large_sums()
            return 1.0
        size = 1.0 if self.edge_aggregation == "mean" else REFERENCE_BATCH
        if plan.degree is None:
            return size / plan.batch_size
        return (size / plan.degree.to(self.reduction.weight.dtype))[:, None]

    def _scatter(self, z: Tensor, labels: Tensor, call: _Pass) -> tuple[Tensor, Coefficients | None]:
        # The oracle computes every edge itself (nothing to reduce) and leaves precision to autocast, as released.
        with torch.autocast(z.device.type, dtype=call.dtype, enabled=call.dtype is not None):
            h, edges = reference.propagate(
                z,
                labels,
                self.reduction,
                list(self._nodes()),
                list(self._edges()),
                call.dropout,
                message_factor=self._aggregation_factor(call.plan),
                last_edge_gradient=call.coefficient_gradient,
            )
            if not call.need_coefficients:
                return h.to(z.dtype), None
            with torch.set_grad_enabled(torch.is_grad_enabled() and call.coefficient_gradient):
                values = torch.sigmoid(self.edge_out(self.edge_norm(edges.to(z.dtype))).to(z.dtype))
        size = z.shape[0]
        return h.to(z.dtype), TableCoefficients(call.plan, values.view(size, size, -1))

    def _nodes(self) -> list[NodeBlock]:
        return [block for block in self.node_blocks if isinstance(block, NodeBlock)]

    def _edges(self) -> list[EdgeBlock]:
        return [block for block in self.edge_blocks if isinstance(block, EdgeBlock)]

    def _check_batch(self, z: Tensor, labels: Tensor, check_values: bool) -> None:
        check_embeddings(z, "z", values=check_values)
        check_labels(labels, z.shape[0])
        if z.shape[0] < 2 or z.shape[1] != self.embedding_dim:
            raise InputError(
                f"`z` must have shape (B, D) with B >= 2 and D = {self.embedding_dim}: got {tuple(z.shape)}."
            )


def _storage(z: Tensor, low: torch.dtype | None) -> torch.dtype:
    """Dtype of the edge buffer: where memory is scarce, bfloat16 if matrix products are.

    Never float16: gradients of logits stand there before a loss scaler raises them into its range.
    """
    return torch.bfloat16 if low == torch.bfloat16 and z.device.type != "cpu" else z.dtype


def _check_sizes(dim: int, num_classes: int, num_layers: int, num_heads: int, dropout: float) -> None:
    for value, name in (
        (dim, "embedding_dim"),
        (num_classes, "num_classes"),
        (num_layers, "num_layers"),
        (num_heads, "num_heads"),
    ):
        if value < 1:
            raise InputError(f"`{name}` must be at least 1: got {value}.")
    if dim % num_heads:
        raise InputError(f"`num_heads` must divide embedding_dim ({dim}): got {num_heads}.")
    if not 0 <= dropout < 1:
        raise InputError(f"`dropout` must lie in [0, 1): got {dropout}.")


@cache
def _warn_of_large_sums() -> None:
    log.warning(
        "Nodes add up more than %d edge messages each: the sum grows with the batch and drowns a node's own features. "
        "Set edge_aggregation to scaled, which acts like a batch of %d at every size.",
        LARGE_SUM,
        REFERENCE_BATCH,
    )


def _check_choices(backend: str, **given: str) -> None:
    check_backend_name(backend)
    for name, value in given.items():
        if value not in _CHOICES[name]:
            raise InputError(f"`{name}` must be one of {', '.join(_CHOICES[name])}: got {value!r}.")
