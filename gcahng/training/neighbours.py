"""The picture of a checkpoint: test queries with their nearest neighbours."""

from pathlib import Path

from PIL import Image

from gcahng.data.images.decode import decode_image
from gcahng.data.shards.reader import ShardSet
from gcahng.metrics import retrieval
from gcahng.training.data_setup import data_store
from gcahng.training.evaluate_checkpoint import embedding_settings, load_metric_model
from gcahng.training.evaluation import embed_rows
from gcahng.training.pictures import Neighbour, Query, choose_queries, neighbour_picture


def draw_neighbours(
    checkpoint: Path, path: Path, *, title: str, num_worst: int = 4, num_typical: int = 4, num_neighbours: int = 8
) -> Path:
    """Write a PNG of the worst and of typical test queries of a checkpoint, right and wrong neighbours marked.

    Args:
        checkpoint: Checkpoint folder.
        path: The PNG.
        title: Drawn on top.
        num_worst, num_typical: Queries to show, by MAP@R.
        num_neighbours: Neighbours of each; fewer where the split has fewer other images.
    Returns:
        `path`.
    Raises:
        InputError: The checkpoint or its data set cannot be used, or an image is unreadable.
    """
    model, config = load_metric_model(checkpoint)
    shards = ShardSet.open(config.data.dir, store=data_store(config.data))
    rows = shards.split_samples(config.eval.split)
    embeddings, labels = embed_rows(model, shards, rows, embedding_settings(config))
    num_neighbours = min(num_neighbours, len(rows) - 1)  # all others of a small split
    result = retrieval(embeddings, labels, ks=(1,), num_neighbours=num_neighbours)
    assert result.neighbours is not None
    unit = embeddings / embeddings.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def image(index: int) -> Image.Image:
        row = int(rows[index])
        return decode_image(shards.read(row), name=f"Sample {shards.key(row)} of {config.data.dir}")

    def name(index: int) -> str:
        return shards.classes[int(labels[index])].name

    queries, ranked = [], []
    for query, note in choose_queries(result.query_map_at_r, num_worst, num_typical):
        queries.append(Query(image(query), name(query), note))
        ranked.append(
            [
                Neighbour(image(n), name(n), bool(labels[n] == labels[query]), float(unit[query] @ unit[n]))
                for n in result.neighbours[query].tolist()
            ]
        )
    return neighbour_picture(path, queries, ranked, title)
