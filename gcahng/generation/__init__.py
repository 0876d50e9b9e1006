"""Synthetic hard negatives by channel-adaptive interpolation, and the losses on them."""

from gcahng.generation.constant_classifier import ConstantClassifier
from gcahng.generation.fusion import fusion_shares
from gcahng.generation.generation_loss import GenerationLoss, LossFactors, generation_loss
from gcahng.generation.interpolation import Interpolation
from gcahng.generation.negatives import generate_negatives
from gcahng.generation.synthesis import Synthesis
from gcahng.generation.synthetic_loss import synthetic_loss

__all__ = [
    "ConstantClassifier",
    "GenerationLoss",
    "Interpolation",
    "LossFactors",
    "Synthesis",
    "fusion_shares",
    "generate_negatives",
    "generation_loss",
    "synthetic_loss",
]
