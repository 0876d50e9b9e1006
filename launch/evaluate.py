"""Evaluate a run or a checkpoint, with one process or several.

`python launch/evaluate.py --run runs/NAME [--which last|best|best_test]`
`torchrun --nproc_per_node 2 -- launch/evaluate.py --run runs/NAME`, or `accelerate launch` (docs/clusters.md)
`python launch/evaluate.py --checkpoint runs/NAME/step-N --data data/OTHER [section.key=value ...]`
`python launch/evaluate.py --checkpoint runs/NAME/step-N --tars 'DIR/test-*.tar' [--label-field NAME]`
"""

import argparse
import json
from pathlib import Path
from typing import Any

from gcahng.errors import ConfigError
from gcahng.search.evaluated import approximate_row, check_libraries, clustering_row
from gcahng.training.checkpoint import CONFIG
from gcahng.training.config import Config, load_config
from gcahng.training.evaluate_checkpoint import evaluation_config, evaluation_of
from gcahng.training.evaluation import Evaluation, TarSets
from gcahng.training.evaluation_report import (
    check_output,
    full_report,
    summary_lines,
    worst_lines,
    write_json,
    write_per_class,
)
from gcahng.training.launched import end, launched, launched_rank
from gcahng.training.saved_embeddings import check_target
from gcahng.training.trainer import SELECTION_NOTE
from launch.cli import run

WORST_IN_JSON = 20


def _whole_numbers(text: str) -> list[int]:
    """For instance 1,10,100."""
    return [int(number) for number in text.split(",")]


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
    parser.add_argument("--distractor-tars", action="append", help="tars searched as well, of none of the classes")
    parser.add_argument("--label-field", help="field of the tars' .json members that holds the class")
    parser.add_argument("--ks", type=_whole_numbers, metavar="1,10,100", help="the k of Recall@k; by default eval.ks")
    parser.add_argument(
        "--save-embeddings", type=Path, metavar="FILE.npz", help="write embeddings, labels and keys, no distractors"
    )
    parser.add_argument(
        "--json", type=Path, help="write metrics, classes, worst queries and those without a reference to this file"
    )
    parser.add_argument("--per-class", type=Path, metavar="FILE.csv", help="write a line for each class")
    parser.add_argument("--worst", type=int, metavar="N", help="print the N worst queries; --json lists them (or 20)")
    parser.add_argument("--clustering", action="store_true", help="NMI and AMI of k-means (as eval.clustering=true)")
    parser.add_argument("--approximate", metavar="KIND", help="search through faiss too (flat, ivf, ivf_sq8, hnsw)")
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
        for name in ("gallery_tars", "distractor_tars", "label_field"):
            if getattr(options, name) is not None:
                raise ConfigError(f"`--{name.replace('_', '-')}` goes with --tars, which is missing. Add it.")
        return None
    loose = [word for word in options.overrides if "=" not in word]
    if loose:
        raise ConfigError(
            f"`--tars` takes one path, {loose[0]!r} comes after it. Put the pattern in quotes: --tars 'DIR/*.tar'."
        )
    return TarSets(options.tars, options.gallery_tars, options.label_field, options.distractor_tars)


def chosen_settings(options: argparse.Namespace) -> list[str]:
    """The overrides, those that have an option of their own included."""
    overrides = list(options.overrides)
    if options.data is not None:
        overrides.append(f"data.dir={json.dumps(options.data, ensure_ascii=False)}")
    if options.ks is not None:
        overrides.append(f"eval.ks={options.ks}")
    if options.clustering:
        overrides.append("eval.clustering=true")
    return overrides


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse at once what could not be written or listed in the end.

    Raises:
        ConfigError: A file's folder does not exist, or `--worst` is no count.
    """
    if options.worst is not None and options.worst < 1:
        raise ConfigError(f"`--worst` must be at least 1: got {options.worst}. Leave it out to print none.")
    if launched_rank() != 0:
        return
    if options.save_embeddings is not None:
        check_target(options.save_embeddings)
    for name, path in (("--json", options.json), ("--per-class", options.per_class)):
        if path is not None:
            check_output(name, path)


def main() -> int:
    """Run the command; returns the exit status."""
    options = parse()
    tars = chosen_tars(options)
    path = chosen_path(options)
    check_outputs(options)
    overrides = chosen_settings(options)
    config = evaluation_config(path, overrides)
    check_libraries(clustering=config.eval.clustering, approximate=options.approximate)
    started = launched(config, training=False)
    evaluation = evaluation_of(
        path,
        overrides,
        started,
        tars=tars,
        save_to=options.save_embeddings,
        keep_embeddings=config.eval.clustering or options.approximate is not None,
        progress_bars=not options.quiet,
    )
    end(started)
    if started.ranks.first:
        # The link, or a file in it.
        say(evaluation, config, options, chosen_on_test="best_test" in (path.name, path.parent.name))
    return 0


def say(evaluation: Evaluation, config: Config, options: argparse.Namespace, *, chosen_on_test: bool) -> None:
    """Print and write what was found; on rank 0."""
    more: dict[str, Any] = {"note": SELECTION_NOTE} if chosen_on_test else {}
    print(*summary_lines(evaluation, coarse_label=config.eval.coarse_label), *more.values(), sep="\n")
    if config.eval.clustering:
        more |= clustering_row(evaluation)
        print("NMI {nmi:.4f}  AMI {ami:.4f}  ({num_clusters} clusters by {clustering_library})".format(**more))
    if options.approximate is not None:
        found = more["approximate"] = approximate_row(evaluation, options.approximate)
        measured = found["measured"]
        print(
            f"approximate ({found['kind']}): R@1 {100 * found['recall_at_1']:.2f}, {100 * measured['recall_at_k']:.2f} "
            f"% of the {measured['k']} nearest found ({measured['num_queries']} queries)"
        )
    if options.worst is not None:
        print(*worst_lines(evaluation, options.worst), sep="\n")
    if options.json is not None:
        write_json(options.json, full_report(evaluation, num_worst=options.worst or WORST_IN_JSON) | more)
    if options.per_class is not None:
        write_per_class(options.per_class, evaluation)


if __name__ == "__main__":
    run(main)
