"""The authors' released checkpoints: read into our models, and written back as they were."""

from gcahng.compat.convert import ReleasedState, from_released, to_released
from gcahng.compat.files import read_released
from gcahng.compat.names import Naming, naming_of_model
from gcahng.compat.released import ReleasedModel, export_released, import_released

__all__ = [
    "Naming",
    "ReleasedModel",
    "ReleasedState",
    "export_released",
    "from_released",
    "import_released",
    "naming_of_model",
    "read_released",
    "to_released",
]
