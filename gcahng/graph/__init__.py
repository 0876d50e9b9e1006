"""The correlation graph over a batch."""

from gcahng.graph.coefficients import (
    Coefficients,
    ConstantCoefficients,
    PairCoefficients,
    TableCoefficients,
    UnitCoefficients,
)
from gcahng.graph.neighbours import neighbour_plan
from gcahng.graph.network import GraphNetwork, identity
from gcahng.graph.output import GraphOutput
from gcahng.graph.pairs import PairPlan, block_classes, class_major_plan, pair_plan

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
    "class_major_plan",
    "identity",
    "neighbour_plan",
    "pair_plan",
]
