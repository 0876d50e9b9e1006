"""The metric model for other runtimes, checked against the model it came from."""

from gcahng.export.check import Agreement
from gcahng.export.checkpoint import Exported, ExportSettings, export_checkpoint

__all__ = ["Agreement", "ExportSettings", "Exported", "export_checkpoint"]
