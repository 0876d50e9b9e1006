"""Synthetic hard negatives by channel-adaptive interpolation."""

from gcahng.generation.fusion import fusion_shares
from gcahng.generation.interpolation import Interpolation
from gcahng.generation.negatives import generate_negatives

__all__ = ["Interpolation", "fusion_shares", "generate_negatives"]
