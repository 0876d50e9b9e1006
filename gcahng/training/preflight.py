"""What a configuration asks of this machine, checked together before anything loads.

The schema's own faults are found when a configuration is read; here it is files, names and devices.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from gcahng.components import is_component_path, load_component
from gcahng.data.shards.reader import load_manifest
from gcahng.errors import ConfigError, InputError
from gcahng.graph.backends import require_backend
from gcahng.models import check_backbone_name
from gcahng.monitor.metrics import require_client
from gcahng.training import checkpoint
from gcahng.training.config import Config
from gcahng.training.data_setup import data_store
from gcahng.training.mined_loss import check_loss_name
from gcahng.training.parts import choose_device


def preflight(config: Config, *, overwrite: bool = False) -> None:
    """Raise one error that lists everything this machine lacks for a configuration.

    Args:
        config: A checked configuration.
        overwrite: The run starts anew whatever `train.resume` says.
    Raises:
        InputError: The data set, a weight file or a checkpoint is missing, a backbone or an own component has no such
            name, or the device is absent; several faults come as one ConfigError.
    """
    faults: list[InputError] = []
    for check in _checks(config, _starts_anew(config) or overwrite):
        try:
            check()
        except InputError as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise ConfigError(f"{len(faults)} things are missing:" + "".join(f"\n  {fault}" for fault in faults))


def _checks(config: Config, starts_anew: bool) -> Iterator[Callable[[], object]]:
    yield lambda: load_manifest(data_store(config.data))
    yield lambda: check_backbone_name(config.model.backbone)
    yield lambda: choose_device(config.train.device)
    if config.graph.enabled:
        yield lambda: _graph_backend(config)
    for setting in ("port", "textfile"):
        if getattr(config.monitor, setting) is not None:
            yield partial(require_client, f"monitor.{setting}")
    yield lambda: check_loss_name("loss.metric", config.loss.metric)
    yield lambda: check_loss_name("loss.miner", config.loss.miner)
    own = [config.batch.sampler]
    optim = config.optim
    own += [part.name for part in (optim.metric_model, optim.graph, optim.classifier, optim.generator, optim.proxies)]
    for path in own:
        if is_component_path(path):
            yield lambda path=path: load_component(path)  # type: ignore[misc]
    if not starts_anew:  # a checkpoint replaces what a run starts from
        if config.train.resume != "auto":
            yield lambda: checkpoint.find_checkpoint(Path(config.train.resume))
    elif config.train.init_from is not None:
        yield lambda: checkpoint.find_checkpoint(Path(str(config.train.init_from)))
    elif config.model.weights is not None:
        yield lambda: _weight_file(str(config.model.weights))


def _starts_anew(config: Config) -> bool:
    if config.train.resume == "auto":
        return checkpoint.newest_checkpoint(Path(config.run.dir)) is None
    return config.train.resume == "never"


def _graph_backend(config: Config) -> None:
    try:
        device = choose_device(config.train.device)
    except ConfigError:
        return  # reported by itself
    require_backend(config.graph.backend, device)


def _weight_file(path: str) -> None:
    if not Path(path).is_file():
        raise ConfigError(f"`model.weights`: `{path}` does not exist: expected a .safetensors, .pth or .pt file.")
