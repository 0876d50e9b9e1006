"""Find the stored images nearest to others.

  python launch/search.py INDEX IMAGE [IMAGE ...] [--k 10] [--picture FILE.png] [--json FILE] [--approximate ivf]

INDEX is a folder of launch/embed.py, or a file of embeddings (.npz, .parquet) with --checkpoint; IMAGE a JPEG, PNG or
WebP file, or a folder of them. The images go through the model that made the index, from the checkpoint that it names.
Where the model of that one is code from outside this library, it is run only with --trust-components.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gcahng.errors import ConfigError, DataError
from gcahng.search.approximate import KINDS, load_faiss
from gcahng.search.lookup import (
    Match,
    approximate_index,
    embed_files,
    image_files,
    load_query_model,
    matches,
    nearest_stored,
    printable,
    read_image,
)
from gcahng.search.store import EmbeddingStore
from gcahng.search.stored_images import draw_matches, stored_images
from gcahng.training.canvas import require_matplotlib
from gcahng.training.evaluation_report import write_json
from gcahng.training.launched import require_one_process
from gcahng.training.output_files import check_output
from launch.checkpoints import add_trust_option
from launch.cli import run

FOUND = 10
"""Images that are found for each by default."""
MOST_DRAWN = 20
"""Query images that a picture shows."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="launch/search.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("index", type=Path, metavar="INDEX", help="index folder, or a file .npz or .parquet")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image, or a folder of images")
    parser.add_argument("--k", type=int, help="images to find for each; default: 10, or all where INDEX has fewer")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="where the checkpoint is now; by default as the index says",
    )
    parser.add_argument("--data", help="where the embedded shard folder is now, for --picture")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw what was found")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found to this file")
    parser.add_argument(
        "--approximate",
        nargs="?",
        const="ivf",
        choices=KINDS,
        help="search by faiss, in an index that is built at the first search and kept in INDEX; default: ivf",
    )
    parser.add_argument("--verify", action="store_true", help="compare the checksums of INDEX first")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="setting of the model; repeatable"
    )
    add_trust_option(parser)
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Refuse what could not be written or done in the end.

    Raises:
        InputError: A file cannot be written, a name has another ending, or a library is missing.
    """
    for name, file in (("--picture", options.picture), ("--json", options.json)):
        if file is not None:
            check_output(name, file)
    if options.picture is not None:
        if options.picture.suffix != ".png":
            raise ConfigError(f"`--picture` {options.picture}: expected a name that ends in .png. Rename it.")
        require_matplotlib()
    if options.approximate is not None and not options.index.is_dir():
        raise ConfigError("`--approximate` keeps its index in the folder INDEX: expected a folder. Leave it out.")
    if options.approximate is not None:
        load_faiss()


def report(name: str, found: Sequence[Match]) -> str:
    """What was found for one image, in lines."""
    lines = [f"{printable(name)}\n  rank   score  class  key  shard"]
    lines += [
        f"  {m.rank:4}  {m.score:6.4f}  {printable(m.row.class_name)}  {printable(m.row.key)}  {printable(m.row.shard)}"
        for m in found
    ]
    return "\n".join(lines)


def as_json(name: str, found: Sequence[Match]) -> dict[str, Any]:
    """What was found for one image, for a program."""
    rows = [{"rank": m.rank, "score": m.score, "row": m.index} | m.row._asdict() for m in found]
    return {"image": name, "found": rows}


def draw(options: argparse.Namespace, store: EmbeddingStore, files: list[Path], found: list[list[Match]]) -> None:
    """Draw the picture, or say why there is none: what was found has been printed already."""
    drawn = found[:MOST_DRAWN]
    try:
        images = stored_images(store.info, [match for row in drawn for match in row], options.data)
    except DataError as error:
        print(f"no picture: {error}")
        return
    queries = [(str(Path(*file.parts[-2:])), read_image(file)) for file in files[:MOST_DRAWN]]
    draw_matches(options.picture, queries, drawn, images.__getitem__, f"Nearest in {options.index}")
    note = f" (the first {MOST_DRAWN} of {len(files)} images)" if len(files) > MOST_DRAWN else ""
    print(f"picture: {options.picture}{note}")


def main() -> int:
    """Run the command; returns the exit status."""
    options = parse()
    require_one_process("launch/search.py")
    check(options)
    store = EmbeddingStore.open(options.index, verify=options.verify)
    k = min(FOUND, store.count) if options.k is None else options.k
    if not 1 <= k <= store.count:
        raise ConfigError(f"`--k` must be from 1 to the {store.count} images of {options.index}, got {k}.")
    files = image_files(options.images)
    model, settings = load_query_model(
        store.info, options.checkpoint, options.set, trust_components=options.trust_components
    )
    embeddings = embed_files(model, files, settings)
    record: dict[str, Any] = {"index": str(options.index), "k": k}
    notes = []
    if options.approximate is None:
        found = matches(store, *nearest_stored(store, embeddings, k, device=settings.device))
    else:
        answer = approximate_index(store, options.approximate).search(embeddings, k)
        found = matches(store, answer.scores, answer.indices)
        recall = asdict(answer.measured)
        record |= {"approximate": options.approximate, "measured": recall}
        about = "approximate ({}): recall at {k} measured on {num_queries} stored images: {recall_at_k}"
        notes = [about.format(options.approximate, **recall)]
    names = [str(file) for file in files]
    for name, of_query in zip(names, found, strict=True):
        print(report(name, of_query))
    for note in notes:
        print(note)
    if options.json is not None:
        record["queries"] = [as_json(name, of_query) for name, of_query in zip(names, found, strict=True)]
        write_json(options.json, record)
    if options.picture is not None:
        draw(options, store, files, found)
    return 0


if __name__ == "__main__":
    run(main)
