"""Evaluate a run or a checkpoint, with one process or several.

  python launch/evaluate.py --run runs/NAME [--which last|best|best_test]
  torchrun --nproc_per_node 2 -- launch/evaluate.py --run runs/NAME        (or accelerate launch, see docs/clusters.md)
  python launch/evaluate.py --checkpoint runs/NAME/step-N --data data/OTHER [section.key=value ...]
  python launch/evaluate.py --checkpoint runs/NAME/step-N --tars 'DIR/test-*.tar' [--label-field NAME]
  python launch/evaluate.py --released FILE.pth --config configs/cub_resnet50.yaml    a checkpoint of the authors' code

What searches what is set as in training, for example
  eval.protocol=query_gallery eval.split=query eval.gallery_split=gallery  one split searches another
  eval.protocol=query_gallery "eval.galleries=[small, large]"              several, each alone
  "eval.distractor_splits=[others]"                                        images of other classes, searched as well
  eval.coarse_label=super_class                                            a coarser label of the classes, too
"""

import argparse
from pathlib import Path
from typing import Any

from gcahng.compat import ReleasedModel
from gcahng.errors import ConfigError
from gcahng.search.evaluated import approximate_row, check_libraries, clustering_row
from gcahng.training.config import Config
from gcahng.training.evaluate_checkpoint import CheckpointModel, SavedModel, evaluation_of
from gcahng.training.evaluation import Evaluation, TarSets
from gcahng.training.evaluation_report import full_report, summary_lines, worst_lines, write_json, write_per_class
from gcahng.training.launched import end, launched, launched_rank
from gcahng.training.output_files import check_output
from gcahng.training.saved_embeddings import check_target
from gcahng.training.trainer import SELECTION_NOTE
from launch.checkpoints import (
    add_image_options,
    add_released_options,
    add_settings,
    add_trust_option,
    check_pattern,
    chosen_path,
    image_settings,
    released_with_config,
)
from launch.cli import run

WORST_IN_JSON = 20


def _whole_numbers(text: str) -> list[int]:
    """For instance 1,10,100."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers as in 1,10,100, got {text!r}") from None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="launch/evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_released_options(parser, "--released")
    add_image_options(parser)
    parser.add_argument("--gallery-tars", action="append", help="tars that those of --tars search; repeatable")
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
    add_trust_option(parser)
    add_settings(parser)
    return parser.parse_intermixed_args(arguments)


def chosen_model(options: argparse.Namespace) -> SavedModel:
    """The model that the options mean.

    Raises:
        ConfigError: See `chosen_path` and `released_with_config`.
    """
    released = released_with_config(options, "--released")
    if released is not None:
        return ReleasedModel(*released)
    return CheckpointModel(chosen_path(options), options.trust_components)


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
    check_pattern(options)
    return TarSets(options.tars, options.gallery_tars, options.label_field, options.distractor_tars)


def chosen_settings(options: argparse.Namespace) -> list[str]:
    """The overrides, those that have an option of their own included."""
    overrides = image_settings(options)
    if options.ks is not None:
        overrides.append(f"eval.ks={options.ks}")
    if options.clustering:
        overrides.append("eval.clustering=true")
    return overrides


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse at once what could not be written or listed in the end.

    Raises:
        ConfigError: A file cannot be written, or `--worst` is no count.
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
    saved = chosen_model(options)
    check_outputs(options)
    overrides = chosen_settings(options)
    config = saved.config(overrides)
    check_libraries(clustering=config.eval.clustering, approximate=options.approximate)
    started = launched(config, training=False)
    evaluation = evaluation_of(
        saved,
        overrides,
        started,
        tars=tars,
        save_to=options.save_embeddings,
        keep_embeddings=config.eval.clustering or options.approximate is not None,
        progress_bars=not options.quiet,
    )
    end(started)
    if started.ranks.first:
        say(evaluation, config, options, chosen_on_test=saved.chosen_on_test())
    return 0


def say(evaluation: Evaluation, config: Config, options: argparse.Namespace, *, chosen_on_test: bool) -> None:
    """Print and write what was found; on rank 0."""
    note = {"note": SELECTION_NOTE} if chosen_on_test else {}
    print(*summary_lines(evaluation, coarse_label=config.eval.coarse_label), *note.values(), sep="\n")
    if options.per_class is not None:
        write_per_class(options.per_class, evaluation)
    report: dict[str, Any] = {}
    if options.json is not None:
        report = full_report(evaluation, num_worst=options.worst or WORST_IN_JSON) | note
        write_json(options.json, report)  # before what may take long, or fail
    more = say_more(evaluation, config, options)
    if options.json is not None and more:
        write_json(options.json, report | more)
    if options.worst is not None:
        print(*worst_lines(evaluation, options.worst), sep="\n")


def say_more(evaluation: Evaluation, config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """Print what was asked for beside the metrics; returns it as values."""
    more: dict[str, Any] = {}
    if config.eval.clustering:
        more |= clustering_row(evaluation)
        how = "{num_clusters} clusters by {clustering_library}, initial {clustering_initial}".format(**more)
        print("NMI {nmi:.4f}  AMI {ami:.4f}  ({how})".format(**more, how=how))
    if options.approximate is not None:
        found = more["approximate"] = approximate_row(evaluation, options.approximate)
        measured = found["measured"]
        print(
            f"approximate ({found['kind']}): R@1 {100 * found['recall_at_1']:.2f}, {100 * measured['recall_at_k']:.2f} "
            f"% of the {measured['k']} nearest found ({measured['num_queries']} queries)"
        )
    return more


if __name__ == "__main__":
    run(main)
