"""Who searches what: several galleries, distractors, coarser labels, query against train; what cannot be answered."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hotel_cases import CHAINS, write_hotels
from official_layouts import write_hotels as write_official_hotels
from official_layouts import write_inshop
from run_cases import make_config, make_trainer, read_metrics
from tar_cases import picture, write_tar

from gcahng.data.conversion.convert import convert
from gcahng.data.shards.reader import ShardSet
from gcahng.data.sources.hotel50k import Hotel50K
from gcahng.data.sources.inshop import InShop
from gcahng.distributed import ONE
from gcahng.errors import ConfigError, DataError
from gcahng.metrics import retrieval
from gcahng.metrics.per_class import per_class
from gcahng.models import Embedder
from gcahng.training.config import EvalConfig, load_config
from gcahng.training.evaluate_checkpoint import embedding_settings
from gcahng.training.evaluation import TarSets, as_row, check_evaluation, embed_rows, evaluate, evaluate_tars
from gcahng.training.evaluation_report import full_report, summary_lines
from gcahng.training.parts import build_metric_model
from gcahng.training.protocols import EmbeddedSet, coarse_accuracy, search_sets, unused_labels

MODEL = {"model.backbone_args": {"widths": [4]}}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    torch.manual_seed(0)
    return build_metric_model(make_config(shards, tmp_path_factory.mktemp("model"), MODEL).model).eval()


@pytest.fixture(scope="module")
def settings(shards: Path, tmp_path_factory: pytest.TempPathFactory):
    return embedding_settings(make_config(shards, tmp_path_factory.mktemp("settings"), MODEL))


@pytest.fixture(scope="module")
def hotel_folder(pattern_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hotels(pattern_folder, tmp_path_factory.mktemp("hotels") / "shards")


@pytest.fixture(scope="module")
def hotels(hotel_folder: Path) -> ShardSet:
    return ShardSet.open(hotel_folder)


AGAINST_TRAIN = EvalConfig(protocol="query_gallery", gallery_split="train", ks=(1, 5), precision_ks=(3,))


def embedded(model, hotels, settings, split: str):
    return embed_rows(model, hotels, hotels.split_samples(split), settings)


def test_test_images_search_the_training_images(hotels, model, settings) -> None:
    """By hotel and by chain: an image of another hotel of the chain counts, hotels of no chain are left out."""
    check_evaluation(hotels, replace(AGAINST_TRAIN, coarse_label="chain_name"))
    found = evaluate(model, hotels, replace(AGAINST_TRAIN, coarse_label="chain_name", coarse_ks=(1, 3)), settings)
    query, labels = embedded(model, hotels, settings, "test")
    gallery, gallery_labels = embedded(model, hotels, settings, "train")
    want = retrieval(query, labels, gallery, gallery_labels, ks=(1, 5), precision_ks=(3,), num_neighbours=3)
    row = as_row(found)
    assert {name: row[name] for name in as_row(want)} == as_row(want)
    hits = []
    for neighbours, label in zip(want.neighbours.tolist(), labels.tolist(), strict=True):
        chain = CHAINS.get(hotels.classes[label].name)
        if chain is not None:
            others = [CHAINS.get(hotels.classes[int(gallery_labels[n])].name) for n in neighbours]
            hits.append([chain == other for other in others])
    assert row["num_coarse_queries"] == len(hits) == 5
    assert row["coarse_recall_at_1"] == sum(hit[0] for hit in hits) / 5
    assert row["coarse_recall_at_3"] == sum(any(hit) for hit in hits) / 5
    assert row["coarse_recall_at_1"] > row["recall_at_1"] and found.result.neighbours is None
    text = "\n".join(summary_lines(found, coarse_label="chain_name"))
    assert f"chain_name@1 {100 * row['coarse_recall_at_1']:.2f}" in text and "P@3" in text
    assert text.endswith("6 queries, 0 without a reference, 5 with a chain_name to find")


def test_a_coarser_label_by_hand() -> None:
    # Gallery labels by place; a query of label 9, which is nowhere, and one without label are left out.
    gallery = torch.tensor([0, 0, 1, 2, 1])
    query = torch.tensor([0, 1, 2, 9, -1])
    neighbours = torch.tensor([[2, 0], [0, 4], [0, 1], [0, 1], [0, 1]])
    found = coarse_accuracy(neighbours, query, gallery, (1, 2), excluded=0)
    assert (found.num_queries, found.recall_at_k) == (3, {1: 0, 2: 2 / 3})
    # Searching each other, the only image of label 2 has nothing to find.
    found = coarse_accuracy(torch.tensor([[1], [0], [4], [0], [2]]), gallery, gallery, (1,), excluded=1)
    assert (found.num_queries, found.recall_at_k) == (4, {1: 1})
    nothing = coarse_accuracy(neighbours, torch.full((5,), -1), gallery, (1, 2), excluded=0)
    assert (nothing.num_queries, nothing.recall_at_k) == (0, {})


def test_a_distractor_has_no_coarser_label() -> None:
    """It lies nearer than the only image of the gallery, which has the query's."""

    def of(vectors: list[list[float]], label: int, coarse: int | None) -> EmbeddedSet:
        labels = torch.full((len(vectors),), label)
        return EmbeddedSet(torch.tensor(vectors), labels, str, str, None if coarse is None else labels * 0 + coarse)

    query, gallery, stranger = of([[1.0, 0.0]], 4, 0), of([[0.0, 1.0]], 4, 0), of([[1.0, 0.1]], 9, None)
    config = EvalConfig(protocol="query_gallery", ks=(1,), coarse_ks=(1, 2))
    _, coarse = search_sets(query, {"g": gallery}, [stranger], config, device=CPU, ranks=ONE)
    assert coarse["g"].recall_at_k == {1: 0, 2: 1} and coarse["g"].num_queries == 1


def test_the_evaluations_of_in_shop_and_hotels_fit_their_conversions(model, settings, tmp_path) -> None:
    """What the experiment files ask for is what the converted official layouts have."""
    configs = Path(__file__).parents[2] / "configs"
    write_inshop(tmp_path / "In-shop" / "img", tmp_path / "In-shop" / "Eval")
    convert(InShop(tmp_path / "In-shop"), tmp_path / "inshop", allow_mismatch=True)
    config = replace(load_config(configs / "inshop_resnet50.yaml").eval, ks=(1,))
    shards = ShardSet.open(tmp_path / "inshop")
    check_evaluation(shards, config)
    found = evaluate(model, shards, config, settings).result
    assert found.num_references.tolist() == [2, 2] and found.num_without_reference == 0
    write_official_hotels(tmp_path / "Hotels-50K", {1: 3, 2: 2, 3: 2}, {1: 2, 2: 1})
    convert(Hotel50K(tmp_path / "Hotels-50K"), tmp_path / "hotels")
    config = replace(load_config(configs / "hotel50k_resnet50.yaml").eval, ks=(1, 7))
    shards = ShardSet.open(tmp_path / "hotels")
    check_evaluation(shards, config)
    row = as_row(evaluate(model, shards, config, settings))
    assert (row["num_queries"], row["num_without_reference"], row["recall_at_7"]) == (3, 0, 1)
    assert row["num_coarse_queries"] == 2, "hotel 2 is of no chain"
    assert row["coarse_recall_at_5"] == 1 and "coarse_recall_at_3" in row


def test_several_galleries_are_searched_alone(hotels, model, settings) -> None:
    config = EvalConfig(protocol="query_gallery", galleries=("near", "train"), ks=(1, 2))
    check_evaluation(hotels, config)
    found = evaluate(model, hotels, config, settings)
    row = as_row(found)
    for name in config.galleries:
        want = as_row(
            retrieval(*embedded(model, hotels, settings, "test"), *embedded(model, hotels, settings, name), ks=(1, 2))
        )
        assert {key: row[f"{name}/{key}"] for key in want} == want
        assert name == "train" or {key: row[key] for key in want} == want
    # Four hotels are not in `near`.
    assert row["num_without_reference"] == row["near/num_without_reference"] == 4
    report = full_report(found, num_worst=9)
    assert [query["key"] for query in report["without_reference"]] == [
        hotels.key(int(hotels.split_samples("test")[place])) for place in found.result.without_reference.tolist()
    ]
    assert [query["class_name"] for query in report["without_reference"]] == [f"hotel-{n}" for n in range(2, 6)]
    assert report["galleries"]["near"]["worst_queries"] == report["worst_queries"] and len(report["worst_queries"]) == 2
    assert len(report["galleries"]["train"]["worst_queries"]) == 6
    lines = list(summary_lines(found))
    assert lines[0].startswith(f"near: R@1 {100 * row['near/recall_at_1']:.2f}  ")
    assert lines[2] == "near: 6 queries, 4 without a reference"


@pytest.mark.parametrize("against", ["self", "gallery"])
def test_distractors_are_searched_and_never_found(hotels, model, settings, against: str) -> None:
    config = EvalConfig(split="train", ks=(1, 30), distractor_splits=("elsewhere",), precision_ks=(30,))
    if against == "gallery":
        config = replace(config, protocol="query_gallery", split="test", gallery_split="train", ks=(1, 48))
    check_evaluation(hotels, config)
    found = evaluate(model, hotels, config, settings, num_neighbours=48 - (against == "self") * 2).result
    x, labels = embedded(model, hotels, settings, config.split)
    others, _ = embedded(model, hotels, settings, "elsewhere")
    base, base_labels = (x, labels) if against == "self" else embedded(model, hotels, settings, "train")
    gallery = torch.nn.functional.normalize(torch.cat([base, others]).double())
    scores = torch.nn.functional.normalize(x.double()) @ gallery.T
    own = torch.cat([base_labels, torch.full((24,), -1)])
    map_at_r = []
    for query in range(len(x)):
        order = [n for n in scores[query].argsort(descending=True).tolist() if against == "gallery" or n != query]
        hits = [bool(own[n] == labels[query]) for n in order]
        total = sum(hits)
        assert int(found.first_hit_rank[query]) == hits.index(True) + 1 and int(found.num_references[query]) == total
        map_at_r.append(sum(sum(hits[: r + 1]) / (r + 1) for r in range(total) if hits[r]) / total)
        assert found.neighbours[query].tolist() == order[: found.neighbours.shape[1]]
    assert found.map_at_r == pytest.approx(sum(map_at_r) / len(map_at_r), rel=1e-9)
    assert (found.num_queries, found.num_without_reference) == (len(x), 0)
    assert len(found.query_labels) == len(found.query_map_at_r) == len(found.query_precision_at_k) == len(x)
    assert per_class(found).class_id.tolist() == sorted(set(labels.tolist()))
    assert int(found.neighbours.max()) == len(base) + 23, "distractors are not searched"


def test_labels_that_nothing_has() -> None:
    taken = torch.tensor([-1, -3, 5, -(2**63), 2**63 - 1, -3])
    free = unused_labels(taken, 4)
    assert len(set(free.tolist())) == 4 and set(free.tolist()).isdisjoint(taken.tolist())
    assert unused_labels(taken, 0).tolist() == []


def test_training_reports_galleries_and_chains(hotel_folder, tmp_path) -> None:
    config = {
        "batch.num_classes": 3,
        "data.validation": 0.5,
        "train.max_steps_per_epoch": 1,
        "eval.protocol": "query_gallery",
        "eval.galleries": ["train", "near"],
        "eval.distractor_splits": ["elsewhere"],
        "eval.coarse_label": "chain_name",
        "eval.ks": [1, 26],
        "eval.precision_ks": [1, 26],
    }
    results = make_trainer(hotel_folder, tmp_path / "run", config).run()
    test, validation = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "evaluation"]
    assert test["recall_at_26"] == test["train/recall_at_26"] and test["near/num_without_reference"] == 4
    assert 0 <= test["near/coarse_recall_at_1"] <= 1 and results["last"]["mrr"] == test["mrr"]
    # Held-out training classes search each other; a k that 12 images cannot answer is left out.
    assert validation["num_queries"] == 12 and "recall_at_26" not in validation and "precision_at_1" in validation
    assert not any(key.startswith(("coarse", "near/")) for key in validation)


REFUSED = [
    ({"ks": (1, 25)}, ConfigError, r"`eval.ks` must not exceed what a query can find: expected at most 24, got 25\."),
    ({"precision_ks": (25,)}, ConfigError, r"`eval.precision_ks` .* expected at most 24, got 25\."),
    ({"coarse_ks": (25,), "coarse_label": "chain_name"}, ConfigError, r"`eval.coarse_ks` .* at most 24, got 25\."),
    (
        {"galleries": ("train", "near"), "ks": (3,)},
        ConfigError,
        r"can find in gallery 'near': expected at most 2, got 3",
    ),
    ({"distractor_splits": ("near",)}, ConfigError, "'near' and 'test' share 2, the first is 'hotel-0'"),
    ({"distractor_splits": ("nowhere",)}, DataError, "Split 'nowhere' does not exist"),
    ({"galleries": ("elsewhere",)}, DataError, "No image of split 'test' has another image of its class to find"),
    (
        {"coarse_label": "chain"},
        DataError,
        r"'chain': no class of split 'test' .* columns \['chain_id', 'chain_name'\]",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_what_cannot_be_answered_is_refused_before_anything_is_embedded(hotels, changes, error, message) -> None:
    with pytest.raises(error, match=message):
        check_evaluation(hotels, replace(AGAINST_TRAIN, **changes))


def test_distractors_widen_what_can_be_asked_for(hotels) -> None:
    check_evaluation(hotels, replace(AGAINST_TRAIN, ks=(48,), distractor_splits=("elsewhere",)))
    with pytest.raises(ConfigError, match="at most 48, got 49"):
        check_evaluation(hotels, replace(AGAINST_TRAIN, ks=(49,), distractor_splits=("elsewhere",)))


def tar_of(path: Path, numbers: range, *, labelled: bool) -> str:
    files = []
    for number in numbers:
        files.append((f"{number}.jpg", picture(number)))
        if labelled:
            files.append((f"{number}.cls", b"%d" % (number % 3 - 2)))
    return str(write_tar(path, files))


@pytest.mark.parametrize("protocol", ["self", "query_gallery"])
def test_distractor_tars_need_no_labels(model, settings, tmp_path, protocol: str) -> None:
    query = tar_of(tmp_path / "query.tar", range(6), labelled=True)
    gallery = tar_of(tmp_path / "gallery.tar", range(6, 14), labelled=True)
    strangers = tar_of(tmp_path / "strangers.tar", range(14, 20), labelled=False)
    config = EvalConfig(protocol=protocol, ks=(1,))
    tars = TarSets([query], None if protocol == "self" else [gallery], distractors=[strangers])
    found = evaluate_tars(model, tars, config, settings, num_neighbours=11).result
    base = 6 if protocol == "self" else 8
    assert found.num_queries == 6 and found.query_labels.tolist() == [-2, -1, 0] * 2
    assert found.neighbours.max() == base + 5, "distractors are not searched"
    labels = torch.tensor([number % 3 - 2 for number in range(6 if protocol == "self" else 14)][-base:])
    for query_place, neighbours in enumerate(found.neighbours.tolist()):
        same = [n < base and int(labels[n]) == int(found.query_labels[query_place]) for n in neighbours]
        assert int(found.first_hit_rank[query_place]) == same.index(True) + 1
    with pytest.raises(DataError, match="has no label: expected a .cls or .json member"):
        evaluate_tars(model, TarSets([strangers]), EvalConfig(ks=(1,)), settings)


def test_embeddings_of_several_galleries_are_no_one_file(hotels, model, settings, tmp_path) -> None:
    config = EvalConfig(protocol="query_gallery", galleries=("near", "train"), ks=(1,))
    with pytest.raises(ConfigError, match="holds one gallery, but eval.galleries names 2"):
        evaluate(model, hotels, config, settings, save_to=tmp_path / "e.npz")


def test_embeddings_are_returned_where_they_are_kept(hotels, model, settings) -> None:
    found = evaluate(model, hotels, AGAINST_TRAIN, settings, keep_embeddings=True)
    for name, split in (("query", "test"), ("gallery", "train")):
        assert torch.equal(found.embeddings[name], embedded(model, hotels, settings, split)[0])
    assert evaluate(model, hotels, AGAINST_TRAIN, settings).embeddings == {}


def test_memory_changes_no_value() -> None:
    draws = torch.Generator().manual_seed(0)
    x, labels = torch.randn(700, 6, generator=draws).round(), torch.randint(0, 90, (700,), generator=draws)
    images = EmbeddedSet(x, labels, str, str)
    found = [
        search_sets(images, {"a": None}, [], EvalConfig(memory_mb=memory), device=CPU, ranks=ONE)[0]["a"]
        for memory in (1, 512)
    ]
    assert as_row(found[0]) == as_row(found[1])
    assert torch.equal(found[0].first_hit_rank, found[1].first_hit_rank)
