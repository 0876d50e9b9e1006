"""The correlation graph over a batch."""

from gcahng.graph.coefficients import Coefficients, PairCoefficients, TableCoefficients
from gcahng.graph.network import GraphNetwork, GraphOutput, identity
from gcahng.graph.pairs import PairPlan, block_classes, pair_plan

__all__ = [
    "Coefficients",
    "GraphNetwork",
    "GraphOutput",
    "PairCoefficients",
    "PairPlan",
    "TableCoefficients",
    "block_classes",
    "identity",
    "pair_plan",
]
