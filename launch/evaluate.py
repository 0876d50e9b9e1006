"""Evaluate a run or a checkpoint.

`python launch/evaluate.py --run runs/NAME [--which last|best|best_test]`
`python launch/evaluate.py --checkpoint runs/NAME/step-N --data data/OTHER [section.key=value ...]`
`python launch/evaluate.py --checkpoint runs/NAME/step-N --tars 'DIR/test-*.tar' [--label-field NAME]`
"""

import argparse
import json
from pathlib import Path

from gcahng.errors import ConfigError
from gcahng.training.checkpoint import CONFIG
from gcahng.training.config import load_config
from gcahng.training.evaluate_checkpoint import evaluate_checkpoint
from gcahng.training.evaluation import TarSets
from gcahng.training.launched import require_one_process
from gcahng.training.results import metric_columns
from gcahng.training.saved_embeddings import check_target
from gcahng.training.trainer import SELECTION_NOTE
from launch.cli import run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="launch/evaluate.py", description="Retrieval metrics.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run folder")
    source.add_argument("--checkpoint", type=Path, help="checkpoint folder step-N, or a file in it")
    parser.add_argument("--which", default="last", choices=("last", "best", "best_test"))
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data", help="shard folder or its URL; by default the one of the run")
    data.add_argument(
        "--tars",
        action="append",
        help="plain WebDataset tars instead: a quoted 'DIR/*.tar' or 'https://.../test-{000..003}.tar'; repeatable",
    )
    parser.add_argument("--gallery-tars", action="append", help="tars that are searched (eval.protocol=query_gallery)")
    parser.add_argument("--label-field", help="field of the tars' .json members that holds the class")
    parser.add_argument("--save-embeddings", type=Path, metavar="FILE.npz", help="write embeddings, labels and keys")
    parser.add_argument("--json", type=Path, help="write the metrics to this file")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(arguments)


def chosen_path(options: argparse.Namespace) -> Path:
    """The checkpoint that the options mean.

    Raises:
        ConfigError: The run has no such checkpoint, or `--checkpoint` names a run folder.
    """
    if options.checkpoint is not None:
        checkpoint: Path = options.checkpoint
        if (checkpoint / "last").exists():
            raise ConfigError(f"`--checkpoint` {checkpoint} is a run folder, no checkpoint: use --run {checkpoint}.")
        return checkpoint
    path: Path = options.run / options.which
    last = options.run / "last" / CONFIG
    if not path.exists() and last.is_file():
        if options.which == "best" and not load_config(last).data.validation:
            raise ConfigError(
                f"`--run` {options.run}: this run has no `best`: it trained without data.validation; use --which last "
                "or best_test."
            )
        raise ConfigError(
            f"`--run` {options.run}: this run has no `{options.which}`: no epoch was evaluated yet; use --which last."
        )
    return path


def chosen_tars(options: argparse.Namespace) -> TarSets | None:
    """The plain tars that the options name.

    Raises:
        ConfigError: Options of tars without tars, or a pattern that was not quoted.
    """
    if options.tars is None:
        for name in ("gallery_tars", "label_field"):
            if getattr(options, name) is not None:
                raise ConfigError(f"`--{name.replace('_', '-')}` goes with --tars, which is missing. Add it.")
        return None
    loose = [word for word in options.overrides if "=" not in word]
    if loose:
        raise ConfigError(
            f"`--tars` takes one path, {loose[0]!r} comes after it. Put the pattern in quotes: --tars 'DIR/*.tar'."
        )
    return TarSets(options.tars, options.gallery_tars, options.label_field)


def main() -> int:
    """Run the command; returns the exit status."""
    options = parse()
    require_one_process("launch/evaluate.py")
    tars = chosen_tars(options)
    path = chosen_path(options)
    if options.save_embeddings is not None:
        check_target(options.save_embeddings)
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigError(f"`--json` {options.json}: the folder does not exist. Create it first.")
    overrides = list(options.overrides)
    if options.data is not None:
        overrides.append(f"data.dir={json.dumps(options.data, ensure_ascii=False)}")
    row = evaluate_checkpoint(
        path, overrides, tars=tars, save_to=options.save_embeddings, progress_bars=not options.quiet
    )
    if "best_test" in (path.name, path.parent.name):  # the link, or a file in it
        row["note"] = SELECTION_NOTE
    print("  ".join(f"{name} {value:.2f}" for name, value in metric_columns(row).items()))
    print(f"{row['num_queries']} queries, {row['num_without_reference']} without a reference")
    if "note" in row:
        print(row["note"])
    if options.json is not None:
        options.json.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
