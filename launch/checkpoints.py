"""Options that several command lines share: which checkpoint, and which images it embeds."""

import argparse
import json
from pathlib import Path

from gcahng.errors import ConfigError
from gcahng.training.checkpoint import CONFIG, LINKS, MANIFEST, STATE
from gcahng.training.config import load_config
from gcahng.training.trusted import OPTION


def add_checkpoint_options(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Let a command line name a run or a checkpoint (see `chosen_path`), or what is added to the returned group."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run folder")
    source.add_argument("--checkpoint", type=Path, help="checkpoint folder step-N, or a file in it")
    parser.add_argument("--which", choices=LINKS, help="checkpoint of --run; default: last")
    return source


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Let a command line vouch for the code that the configuration of a checkpoint or a run names."""
    parser.add_argument(
        OPTION,
        action="store_true",
        help="run code from outside this library that the configuration of a checkpoint or run names (your own "
        "backbone, say); without it such a one is refused",
    )


def add_released_options(parser: argparse.ArgumentParser, option: str) -> None:
    """Let a command line name a released file by `option`, and the configuration that goes with it."""
    source = add_checkpoint_options(parser)
    source.add_argument(
        option, dest="released", type=Path, metavar="FILE", help="checkpoint of the authors' code, .pth"
    )
    parser.add_argument("--config", type=Path, help=f"configuration that {option} belongs to: architecture and data")


def released_with_config(options: argparse.Namespace, option: str) -> tuple[Path, Path] | None:
    """The released file and its configuration; None where a run or a checkpoint is named.

    Raises:
        ConfigError: One of both options is missing, or `--which` was given.
    """
    if (options.released is None) != (options.config is None):
        there, missing = (option, "--config") if options.config is None else ("--config", option)
        raise ConfigError(f"`{there}` goes with {missing}, which is missing. Add it.")
    if options.released is None:
        return None
    if options.which is not None:
        raise ConfigError(f"`--which` {options.which} chooses a checkpoint of --run, not of {option}. Leave it out.")
    return options.released, options.config


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Let a command line name other images than the run's; see `image_settings` and `check_pattern`."""
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data", help="shard folder or its URL; by default the one of the run")
    data.add_argument(
        "--tars",
        action="append",
        help="plain WebDataset tars instead: a quoted 'DIR/*.tar' or 'https://.../test-{000..003}.tar'; repeatable",
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Let a command line replace settings of the run."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="setting of the run to replace, for example data.num_workers=8; all of them: launch/train.py --help",
    )


def chosen_path(options: argparse.Namespace) -> Path:
    """The checkpoint that the options mean.

    Raises:
        ConfigError: The run has no such checkpoint, or one option names what the other is for.
    """
    if options.checkpoint is not None:
        checkpoint: Path = options.checkpoint
        if options.which is not None:
            raise ConfigError(
                f"`--which` {options.which} chooses a checkpoint of --run, but --checkpoint names one. Leave it out."
            )
        if (checkpoint / "last").exists():
            raise ConfigError(f"`--checkpoint` {checkpoint} is a run folder, no checkpoint: use --run {checkpoint}.")
        return checkpoint
    run: Path = options.run
    which: str = options.which or "last"
    if not run.is_dir():
        raise ConfigError(f"`--run` {run}: there is no such folder. Check the path.")
    if (run / MANIFEST).is_file() and (run / STATE).is_file():
        raise ConfigError(f"`--run` {run} is a checkpoint, no run folder: use --checkpoint {run}.")
    last = run / "last" / CONFIG
    if not (run / which).exists() and last.is_file():
        if which == "best" and not load_config(last).data.validation:
            raise ConfigError(
                f"`--run` {run}: this run has no `best`: it trained without data.validation; use --which last or "
                "best_test."
            )
        raise ConfigError(f"`--run` {run}: this run has no `{which}`: no epoch was evaluated yet; use --which last.")
    return run / which


def image_settings(options: argparse.Namespace) -> list[str]:
    """The overrides, `--data` included."""
    data = [] if options.data is None else [f"data.dir={json.dumps(options.data, ensure_ascii=False)}"]
    return [*options.overrides, *data]


def check_pattern(options: argparse.Namespace) -> None:
    """Refuse what a shell made of a pattern that was not quoted.

    Raises:
        ConfigError: Paths come after the one of `--tars`.
    """
    loose = [word for word in options.overrides if "=" not in word]
    if options.tars is not None and loose:
        raise ConfigError(
            f"`--tars` takes one path, {loose[0]!r} comes after it. Put the pattern in quotes: --tars 'DIR/*.tar'."
        )
