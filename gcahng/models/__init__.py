"""Metric models: backbones, pooling, embedding heads, weight files."""

from gcahng.models.backbone import Backbone
from gcahng.models.build import build_backbone, build_embedder, check_backbone_name
from gcahng.models.embedder import Embedder
from gcahng.models.pooling import pool
from gcahng.models.small_conv import SmallConv

__all__ = ["Backbone", "Embedder", "SmallConv", "build_backbone", "build_embedder", "check_backbone_name", "pool"]
