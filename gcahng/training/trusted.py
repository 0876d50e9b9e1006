"""Code that a configuration names and that did not come with this library: run only if the user says so.

A checkpoint or a run folder may be somebody else's. The dotted paths of its configuration are imported and called when
its parts are built, so they could run anything.
"""

from pathlib import Path

from gcahng.components import is_component_path
from gcahng.errors import ConfigError
from gcahng.models.build import needs_no_trust
from gcahng.training.config import Config
from gcahng.training.pml_objects import is_pml

OPTION = "--trust-components"
"""What the commands call the user's word."""


def check_components(config: Config, where: Path, *, trusted: bool, whole: bool = False) -> None:
    """Refuse a configuration that came with a checkpoint, or a run folder, and needs trust; nothing is imported.

    Args:
        config: As it was read.
        where: What it came with.
        trusted: The user said so: nothing is refused.
        whole: More than the metric model is built of it: the metric loss with its miner, or the batches.
    Raises:
        ConfigError: It names a component by dotted path, or a backbone that opens files.
    """
    if trusted:
        return
    found = {}
    model = config.model
    if not needs_no_trust(model.backbone, model.backbone_args):
        arguments = f" with model.backbone_args {model.backbone_args!r:.200}" if model.backbone_args else ""
        found["model.backbone"] = f"{model.backbone!r:.200}{arguments}"
    if whole:
        others = {
            "batch.sampler": config.batch.sampler,
            "loss.metric": config.loss.metric,
            "loss.miner": config.loss.miner,
        }
        found |= {
            key: f"{name!r:.200}"
            for key, name in others.items()
            if name is not None and is_component_path(name) and not is_pml(name)
        }
    if found:
        raise ConfigError(
            f"`{where}` names code from outside this library, or files to open: "
            f"{', '.join(f'{key} {name}' for key, name in found.items())}. Nothing of it was run. If you know that "
            f"code and trust who made `{where}`, pass {OPTION} (in Python `trust_components=True`)."
        )
