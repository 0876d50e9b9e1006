"""The correlation graph over a batch."""

from gcahng.graph.coefficients import (
    Coefficients,
    ConstantCoefficients,
    PairCoefficients,
    TableCoefficients,
    UnitCoefficients,
)
from gcahng.graph.network import GraphNetwork, GraphOutput, identity
from gcahng.graph.pairs import PairPlan, block_classes, pair_plan

__all__ = [
    "Coefficients",
    "ConstantCoefficients",
    "GraphNetwork",
    "GraphOutput",
    "PairCoefficients",
    "PairPlan",
    "TableCoefficients",
    "UnitCoefficients",
    "block_classes",
    "identity",
    "pair_plan",
]
