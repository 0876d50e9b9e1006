"""Released files as models: evaluated at once, or turned into a checkpoint of ours and back."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gcahng.compat.convert import ReleasedState
from gcahng.compat.files import read_released, write_released
from gcahng.compat.fit import check_fit, unlike_released
from gcahng.compat.names import CLASSIFIER, GCA_HNG, GRAPH, METRIC_MODEL, Naming, naming_of_model
from gcahng.errors import ConfigError, DataError
from gcahng.models import Embedder
from gcahng.training import checkpoint
from gcahng.training.config import Config, load_config, resolved_yaml
from gcahng.training.evaluate_checkpoint import embedding_config
from gcahng.training.parts import build_metric_model, module_makers
from gcahng.training.progress import Progress

log = logging.getLogger(__name__)

UNUSED = "released_unused"
"""Name of the checkpoint file with what the released code saves and never uses."""
_CLASSES_BY = {GRAPH: "node_classifier.weight", CLASSIFIER: "weight"}


@dataclass(frozen=True)
class ReleasedModel:
    """The metric model of a released file, a `SavedModel` to evaluate.

    Attributes:
        file: See `read_released`.
        config_file: YAML file that names the architecture, and what is evaluated.
    """

    file: Path
    config_file: Path

    def config(self, overrides: Sequence[str]) -> Config:
        """See `embedding_config`."""
        return embedding_config(self.config_file, overrides)

    def load(self, overrides: Sequence[str], device: torch.device) -> tuple[Embedder, Config]:
        """The model, ready to embed, and its configuration.

        Raises:
            ConfigError: The file cannot be read, or is of another model than the configuration's.
        """
        config = self.config(overrides)
        state = self._state
        model = build_metric_model(config.model, load_weights=False)
        check_fit(state, METRIC_MODEL, model.state_dict())
        model.load_state_dict(dict(state.parts[METRIC_MODEL]))
        others = [part for part in state.parts if part != METRIC_MODEL]
        if others:
            log.info("%s, not needed to evaluate: %s.", self.file.name, ", ".join(others))
        _warn(state, config)
        return model.to(device).eval(), config

    def digest(self) -> str:
        """Of the file."""
        return _sha256(self.file)

    def chosen_on_test(self) -> bool:
        """See `_chosen_on_test`."""
        return _chosen_on_test(self._state)

    @functools.cached_property
    def _state(self) -> ReleasedState:
        return read_released(self.file)


def import_released(file: Path, config_file: Path, run_dir: Path, overrides: Sequence[str] = ()) -> Path:
    """Turn a released file into a checkpoint of ours, `run_dir/step-0`, with the link `last`.

    The tensors are written as they are, those in no use beside the parts. Nothing is known of the training classes'
    order: a run that starts from it (train.init_from) makes its classifiers anew. It cannot be resumed.

    Args:
        file: See `read_released`.
        config_file: YAML file that names the architecture.
        run_dir: Folder to make.
        overrides: `section.key=value`.
    Returns:
        The checkpoint's folder.
    Raises:
        ConfigError: The file cannot be read, does not fit, or the folder exists.
        TrainingError: The checkpoint cannot be written.
    """
    if run_dir.exists():
        raise ConfigError(f"`--out` {run_dir} exists. Name a new run folder.")
    config = load_config(config_file, overrides)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(run_dir)))
    state = read_released(file)
    num_classes = _num_classes(state)
    makers = module_makers(config, num_classes or 1, load_weights=False)
    for part in state.parts:
        if part in makers:
            check_fit(state, part, makers[part]().state_dict())
        else:
            log.warning("The configuration has no part `%s`: what the file holds of it is kept, unchecked.", part)
    _warn(state, config)
    modules = {**state.parts, **({UNUSED: state.unused} if state.unused else {})}
    about = {
        "file": file.name,
        "sha256": _sha256(file),
        "naming": dataclasses.asdict(state.naming),
        checkpoint.CHOSEN_ON_TEST: _chosen_on_test(state),
    }
    saved: dict[str, Any] = {
        "progress": vars(Progress()),
        "data": {"manifest": None, "classes": None, "num_classes": num_classes},
        checkpoint.RELEASED: about,
    }
    folder = checkpoint.save_checkpoint(
        run_dir, 0, modules=modules, optimizers={}, state=saved, config_yaml=resolved_yaml(config)
    )
    checkpoint.point(run_dir, "last", folder)
    counts = ", ".join(f"{part} ({len(tensors)} entries)" for part, tensors in state.parts.items())
    log.info("%s held %s.", file.name, counts)
    return folder


def export_released(path: Path, file: Path) -> list[str]:
    """Write a checkpoint's parts under the authors' names, in a file that their code loads.

    Of a checkpoint that `import_released` made, the file holds what the released one held, bit for bit. Of a run of
    ours it lacks what the authors' code saves and never uses; their `eval.py` loads it all the same (not strictly).

    Args:
        path: Checkpoint folder, a link to one, or a file inside.
        file: `.pth` or `.pt` file to write.
    Returns:
        The parts that were left out, since the authors' code has no place for some of their entries (proxies, say; a
        generator, and a classifier of features in place of embeddings).
    Raises:
        ConfigError: There is no checkpoint, the authors' code has no such model, or the file cannot be written.
        DataError: The checkpoint is damaged.
    """
    if file.suffix not in (".pth", ".pt"):
        raise ConfigError(f"`--out` {file}: expected a name that ends in .pth or .pt. Rename it.")
    folder = checkpoint.find_checkpoint(path)
    checkpoint.verify(folder)
    saved = sorted({file.stem for file in folder.glob("*.safetensors")} - {checkpoint.RANKS})
    parts = {part: checkpoint.read_tensors(folder, part) for part in saved if part != UNUSED}
    about = checkpoint.read_state(folder).get(checkpoint.RELEASED)
    config = load_config(folder / checkpoint.CONFIG)
    model = config.model
    naming = naming_of_model(model.backbone, model.head) if about is None else _naming_of(about, folder)
    without = () if about is not None or not _classifies_features(config) else (CLASSIFIER,)
    left_out = [
        part
        for part, tensors in parts.items()
        if part in without or (part != METRIC_MODEL and not _has_names(naming, part, tensors))
    ]
    kept = {part: tensors for part, tensors in parts.items() if part not in left_out}
    state = ReleasedState(naming, kept, checkpoint.read_tensors(folder, UNUSED))
    write_released("--out", file, state)
    _warn(state, config)
    return left_out


def _classifies_features(config: Config) -> bool:
    """Whether a run's classifier takes features, as HDML's does; the authors' takes embeddings."""
    generation = config.generation
    return generation.method == "generator" and generation.generator.classify == "features"


def _has_names(naming: Naming, part: str, names: Iterable[str]) -> bool:
    try:
        for name in names:
            naming.released_name(part, name)
    except KeyError:
        return False
    return True


def _naming_of(about: Any, folder: Path) -> Naming:
    try:
        return Naming(**about["naming"])
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{folder / checkpoint.STATE}: `released` is damaged ({error}). Import the file again."
        ) from None


def _chosen_on_test(state: ReleasedState) -> bool:
    """GCA-HNG's code saves the epoch of the best test R@1 and no other; SCT's saves the last one."""
    return state.naming.kind == GCA_HNG


def _num_classes(state: ReleasedState) -> int | None:
    """N, training classes, by the first part that shows it."""
    for part, name in _CLASSES_BY.items():
        tensor = state.parts.get(part, {}).get(name)
        if tensor is not None and tensor.ndim == 2:
            return int(tensor.shape[0])
    return None


def _warn(state: ReleasedState, config: Config) -> None:
    for line in unlike_released(state, config.model):
        log.warning("Settings that no weight shows: %s.", line)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
