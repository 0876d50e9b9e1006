"""The images behind an index, where they still lie: read from the shard folder or the tars that it names."""

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from gcahng.data.images.decode import decode_image
from gcahng.data.shards.reader import ShardSet
from gcahng.data.stores import open_store
from gcahng.data.tars.locations import find_tars
from gcahng.data.tars.members import TarMembers
from gcahng.data.tars.samples import image_of, tar_samples
from gcahng.errors import DataError
from gcahng.search.image_parts import ShardParts
from gcahng.search.index_info import IndexInfo
from gcahng.search.lookup import Match
from gcahng.search.tar_parts import STREAMED
from gcahng.training.pictures import Neighbour, Query, neighbour_picture

_SIDE = 512
Queries = Sequence[tuple[str, Image.Image]]


def stored_images(info: IndexInfo | None, found: Sequence[Match], data: str | None = None) -> dict[int, Image.Image]:
    """Images of rows of an index, by row; large ones are reduced to 512 pixels.

    Args:
        info: What the index says of itself.
        found: The rows that are wanted.
        data: Where the shard folder is now. Without it only a folder of this machine is opened: an index, which may
            be somebody else's, makes nobody fetch a URL.
    Raises:
        DataError: The images are not there any more, or are others.
    """
    if info is None:
        raise DataError("These embeddings do not say where their images are.")
    reader = _of_shards if info.data.get("kind") == "shards" else _of_tars
    return reader(info, found, data)


def _of_shards(info: IndexInfo, found: Sequence[Match], data: str | None) -> dict[int, Image.Image]:
    location, split = data or info.data.get("location"), info.data.get("split")
    if not isinstance(location, str) or not isinstance(split, str) or (data is None and "://" in location):
        raise DataError(f"The images are at {location}. Name their place to read them (--data).")
    shards = ShardSet.open(location)
    if shards.manifest.digest() != info.data.get("manifest"):
        raise DataError(
            f"{location} is not the shard folder that was embedded: its manifest differs. Name it (--data)."
        )
    parts = ShardParts(shards, split, location)
    images = {}
    for match in found:
        row = int(parts.rows(match.index, match.index + 1)[0])
        if (shards.key(row), shards.shard_name(row)) != (match.row.key, match.row.shard):
            raise DataError(
                f"Row {match.index} of the index is not {match.row.key} of {location}. Make the index again."
            )
        name = f"Shard {match.row.shard}: the image of sample {match.row.key}"
        images[match.index] = _reduced(decode_image(shards.read(row), name=name))
    return images


def _of_tars(info: IndexInfo, found: Sequence[Match], data: str | None) -> dict[int, Image.Image]:
    places, tars = info.data.get("location"), info.data.get("tars")
    if data is not None or not isinstance(places, list) or not isinstance(tars, list):
        raise DataError("The images are in plain tars, which are read where they were embedded.")
    paths = {str(tar[0]): str(path) for path, tar in zip(places, tars, strict=False) if isinstance(tar, list) and tar}
    images: dict[int, Image.Image] = {}
    for shard in dict.fromkeys(match.row.shard for match in found):
        path = paths.get(shard, shard)
        if "://" in path or not Path(path).is_file():
            raise DataError(f"The images of {shard} are not on this machine any more.")
        wanted = {match.row.key: match.index for match in found if match.row.shard == shard}
        (tar,) = find_tars(path)
        members = TarMembers(open_store(tar.folder, STREAMED), tar.name, location=path)
        for sample in tar_samples(members):
            if sample.key in wanted:
                name = f"Tar {path}: the image of sample {sample.key!r}"
                images[wanted.pop(sample.key)] = _reduced(decode_image(image_of(sample, name), name=name))
            if not wanted:
                break
        if wanted:
            raise DataError(f"Tar {path} has no sample {next(iter(wanted))!r} any more.")
    return images


def _reduced(image: Image.Image) -> Image.Image:
    image.thumbnail((_SIDE, _SIDE))
    return image


def draw_matches(
    path: Path,
    queries: Queries,
    found: Sequence[Sequence[Match]],
    image: Callable[[int], Image.Image],
    title: str,
) -> Path:
    """Write a PNG: one row per query with what was found for it, nearest first.

    Args:
        path: The file to write; its folder must exist.
        queries: Name and image of each.
        found: What was found for each.
        image: Image of a row of the index.
        title: Drawn on top.
    Raises:
        InputError: matplotlib is missing, or the folder does not exist.
    """
    return neighbour_picture(
        path,
        [Query(picture, name) for name, picture in queries],
        [[Neighbour(image(m.index), m.row.class_name or m.row.key, None, m.score) for m in row] for row in found],
        title,
    )
