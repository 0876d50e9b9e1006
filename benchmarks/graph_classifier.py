"""The classifier's part of a graph step: its arithmetic, and the largest tensor with a column per training class."""

from dataclasses import dataclass, replace
from typing import Any

from graph_arms import Arm, Backend, Problem, Size, arm_named
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class ClassifierWork:
    """What classifying the synthetic negatives takes.

    Attributes:
        flop: Operations, forward and backward.
        rows: Most rows of any tensor with N columns (logits, their gradients), weights left out.
    """

    flop: float
    rows: int


class RowsOfLogits(TorchDispatchMode):
    """Notes the most rows of any tensor with N columns that is not the classifier's weight."""

    def __init__(self, dim: int, training_classes: int) -> None:
        super().__init__()
        self.dim, self.training_classes = dim, training_classes
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[-1] == self.training_classes:
                rows = value.numel() // self.training_classes
                # (D, N) is the weight or its gradient, transposed.
                if tuple(value.shape) != (self.dim, self.training_classes):
                    self.rows = max(self.rows, rows)
        return result


def generation_flop(arm: Arm) -> float:
    """Operations of a generation pass, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        arm.generation_losses(arm.problem.z)["generation"].backward()
    arm.graph.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def classifier_work(name: str, size: Size, precision: str, backend: Backend = "auto") -> ClassifierWork:
    """Measure one arm on the CPU.

    The graph's own classifier of nodes gets P outputs, so that nothing else depends on N. Operations are linear in N:
    two runs with different N separate the classifier's from the graph's.

    Raises:
        ValueError: N is not larger than P.
    """
    if size.training_classes <= size.num_classes:
        raise ValueError(f"{size}: N must be larger than P.")

    def arm(training_classes: int) -> Arm:
        problem = Problem.of(replace(size, training_classes=training_classes), "cpu")
        return arm_named(name, replace(problem, node_classes=size.num_classes), precision, backend)

    more = generation_flop(arm(size.training_classes)) - generation_flop(arm(size.num_classes))
    flop = more * size.training_classes / (size.training_classes - size.num_classes)
    with RowsOfLogits(size.dim, size.training_classes) as noted:
        arm(size.training_classes).run()
    return ClassifierWork(flop, noted.rows)
