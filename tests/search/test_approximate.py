"""Approximate search: against exact search, what is measured, files that are damaged, arguments that do not fit."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gcahng.errors import DataError, InputError
from gcahng.metrics import nearest
from gcahng.search.approximate import KINDS, ApproximateIndex, MeasuredRecall, measured_recall, tune

faiss = pytest.importorskip("faiss")
G, D, Q = 1200, 16, 40
QUERIES = torch.arange(Q) * 7


@pytest.fixture(scope="module")
def gallery() -> Tensor:
    """Of many lengths, around centres, with three equal directions."""
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(60, D, generator=generator)
    found = centres[torch.randint(60, (G,), generator=generator)] + 0.7 * torch.randn(G, D, generator=generator)
    found *= 0.01 + 50 * torch.rand(G, 1, generator=generator)
    found[[300, 900]] = 2 * found[14]
    return found


@pytest.fixture(scope="module")
def indexes(gallery: Tensor) -> dict[str, ApproximateIndex]:
    return {kind: ApproximateIndex.build(gallery, kind, seed=3) for kind in KINDS}


def test_flat_is_exact(gallery: Tensor, indexes: dict[str, ApproximateIndex]) -> None:
    for exclude in (None, QUERIES):
        found = indexes["flat"].search(gallery[QUERIES], 5, exclude=exclude)
        scores, indices = nearest(gallery[QUERIES], gallery, 5, exclude=exclude)
        assert torch.equal(found.indices, indices)
        torch.testing.assert_close(found.scores, scores, rtol=0, atol=1e-6)
        assert (found.indices.dtype, found.scores.dtype) == (torch.int64, torch.float32)
    assert indexes["flat"].measured.recall_at_k == 1


def test_equal_scores_lower_index_first(gallery: Tensor, indexes: dict[str, ApproximateIndex]) -> None:
    for kind in ("flat", "ivf", "hnsw"):
        assert indexes[kind].search(gallery[14:15], 3).indices.tolist() == [[14, 300, 900]], kind
        found = indexes[kind].search(gallery[14:15], 2, exclude=torch.tensor([300]))
        assert found.indices.tolist() == [[14, 900]], kind


@pytest.mark.parametrize("kind", KINDS)
def test_recall_is_the_share_of_the_exact_answer(
    gallery: Tensor, indexes: dict[str, ApproximateIndex], kind: str
) -> None:
    index = indexes[kind]
    measured = measured_recall(index, gallery[QUERIES], gallery, 10, exclude=QUERIES)
    answer = index.search(gallery[QUERIES], 10, exclude=QUERIES)
    _, exact = nearest(gallery[QUERIES], gallery, 10, exclude=QUERIES)
    shared = sum(len(set(a) & set(b)) for a, b in zip(answer.indices.tolist(), exact.tolist(), strict=True))
    assert measured.recall_at_k == pytest.approx(shared / (10 * Q), abs=2 / (10 * Q))
    assert answer.measured == index.measured == measured
    assert (measured.k, measured.num_queries, measured.effort) == (10, Q, index.effort)


def test_equal_items_at_the_cut_count_alike(gallery: Tensor) -> None:
    # Ten copies of one item: any two of them are right.
    same = gallery.clone()
    same[100:110] = same[100]
    index = ApproximateIndex.build(same, "hnsw")
    assert measured_recall(index, same[100:101], same, 2).recall_at_k == 1


def test_more_effort_finds_more(gallery: Tensor, indexes: dict[str, ApproximateIndex]) -> None:
    index = indexes["ivf"]
    shares = [measured_recall(index, gallery[QUERIES], gallery, 20, effort=effort).recall_at_k for effort in (1, 4)]
    assert shares[0] < shares[1] < 1
    assert measured_recall(index, gallery[QUERIES], gallery, 20, effort=index.most_effort).recall_at_k == 1
    index.set_effort(2)
    assert index.measured == MeasuredRecall(effort=2)


def test_what_is_not_found_is_marked(gallery: Tensor) -> None:
    index = ApproximateIndex.build(gallery, "ivf", lists=30, effort=1)
    found = index.search(gallery[QUERIES], G - 1, exclude=QUERIES)
    nothing = found.indices < 0
    assert bool(nothing.any(dim=1).all())
    assert bool((found.scores[nothing] == -torch.inf).all())
    assert bool((found.scores[~nothing] >= -1.000001).all())
    assert bool((found.scores.diff(dim=1).nan_to_num(0) <= 0).all())
    assert not bool((found.indices == QUERIES.unsqueeze(1)).any())
    found_items = found.indices[0][found.indices[0] >= 0]
    assert len(found_items.unique()) == len(found_items)
    # Of all that is there, all that was found is right.
    share = float((~nothing).double().mean())
    assert measured_recall(index, gallery[QUERIES], gallery, G - 1, exclude=QUERIES).recall_at_k == pytest.approx(share)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_tune_takes_the_least_effort(gallery: Tensor, indexes: dict[str, ApproximateIndex], kind: str) -> None:
    index = indexes[kind]
    queries = gallery[QUERIES] + 0.1
    found = tune(index, queries, gallery, 10, recall=0.9)
    assert index.measured == found
    assert found.recall_at_k is not None and found.recall_at_k >= 0.9
    assert found.effort == index.effort < index.most_effort
    if found.effort > 1:
        assert measured_recall(index, queries, gallery, 10, effort=found.effort - 1).recall_at_k < 0.9


def test_tune_says_what_is_out_of_reach(gallery: Tensor, indexes: dict[str, ApproximateIndex]) -> None:
    index = indexes["ivf_sq8"]
    before, measured = index.effort, index.measured
    with pytest.raises(InputError, match=r"out of reach for kind 'ivf_sq8': expected 1.0 at k = 50, got 0\.9\d+"):
        tune(index, gallery, gallery, 50, recall=1.0)
    assert (index.effort, index.measured) == (before, measured)
    assert tune(indexes["flat"], gallery[QUERIES], gallery, 3, recall=1.0).recall_at_k == 1
    with pytest.raises(InputError, match="`recall` must lie above 0 and be at most 1: got 0"):
        tune(index, gallery, gallery, recall=0)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_built_again_is_the_same(
    gallery: Tensor, indexes: dict[str, ApproximateIndex], kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "gallery.faiss"
    again = ApproximateIndex.build(gallery, kind, seed=3)
    again.save(path)
    saved = path.read_bytes()
    ApproximateIndex.build(gallery, kind, seed=3).save(path)
    assert path.read_bytes() == saved
    loaded = ApproximateIndex.load(path)
    assert (loaded.kind, loaded.num_items, loaded.dim, loaded.seed) == (kind, G, D, 3)
    assert (loaded.effort, loaded.measured) == (again.effort, again.measured)
    one, two = (index.search(gallery[QUERIES], 7) for index in (again, loaded))
    assert torch.equal(one.indices, two.indices) and torch.equal(one.scores, two.scores)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gallery.faiss", "gallery.faiss.json"]


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_another_seed_is_another_index(gallery: Tensor, kind: str, tmp_path: Path) -> None:
    for seed in (3, 4):
        ApproximateIndex.build(gallery, kind, seed=seed, effort=1).save(tmp_path / str(seed))
    assert (tmp_path / "3").read_bytes() != (tmp_path / "4").read_bytes()


def test_building_leaves_the_threads_alone(gallery: Tensor) -> None:
    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(2)
        ApproximateIndex.build(gallery[:50], "hnsw")
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(before)


def test_tiny_galleries() -> None:
    two = ApproximateIndex.build(torch.eye(2), "hnsw")
    assert two.search(torch.tensor([[1.0, 0.2]]), 2).indices.tolist() == [[0, 1]]
    assert (two.measured.k, two.measured.num_queries) == (1, 2)
    ApproximateIndex.build(torch.rand(39, 4), "ivf")


@pytest.fixture
def saved(gallery: Tensor, indexes: dict[str, ApproximateIndex], tmp_path: Path) -> Path:
    indexes["ivf"].save(tmp_path / "index")
    return tmp_path / "index"


def test_damaged_files_are_refused(saved: Path, indexes: dict[str, ApproximateIndex]) -> None:
    about = saved.with_name("index.json")
    content, text = saved.read_bytes(), about.read_text()
    flipped = bytearray(content)
    flipped[len(flipped) // 2] ^= 1
    for damaged in (content[:-1], bytes(flipped), b""):
        saved.write_bytes(damaged)
        with pytest.raises(DataError, match=r"index is damaged or belongs to another index\.json"):
            ApproximateIndex.load(saved)
    saved.unlink()
    with pytest.raises(DataError, match="index cannot be read"):
        ApproximateIndex.load(saved)
    saved.write_bytes(content)
    about.write_text("{")
    with pytest.raises(DataError, match="not readable JSON"):
        ApproximateIndex.load(saved)
    about.unlink()
    with pytest.raises(DataError, match=r"index\.json cannot be read"):
        ApproximateIndex.load(saved)
    about.write_text(text)
    assert ApproximateIndex.load(saved).kind == "ivf"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "expected format 'gcahng-approximate', version 1, got 'other'"),
        ({"version": 2}, "version 2"),
        ({"kind": "pq"}, "`kind` must be one of flat, ivf, ivf_sq8, hnsw, got 'pq'"),
        ({"kind": "hnsw"}, "is another index than index.json says: expected IndexHNSWFlat of 1200 x 16"),
        ({"dim": 17}, "expected IndexIVFFlat of 1200 x 17"),
        ({"num_items": 1201}, "expected IndexIVFFlat of 1201 x 16"),
        ({"num_items": True}, "`num_items` must be a whole number, got True"),
        ({"normalised": False}, "`normalised` must be true, got False"),
        ({"effort": 0}, "`effort` must be 1 to 1200, got 0"),
        ({"effort": 1200}, "`effort` must be at most 30, got 1200"),
        ({"measured": None}, "`measured` must hold effort, recall_at_k, k, num_queries, got None"),
        ({"measured": {"effort": 1, "recall_at_k": "1", "k": 1, "num_queries": 1}}, "recall_at_k` must be float"),
    ],
)
def test_files_that_say_something_else(saved: Path, changes: dict[str, object], message: str) -> None:
    about = saved.with_name("index.json")
    about.write_text(json.dumps(json.loads(about.read_text()) | changes))
    with pytest.raises(DataError, match=message):
        ApproximateIndex.load(saved)


def test_a_file_with_the_right_checksum_that_is_no_index(saved: Path) -> None:
    import hashlib

    about = saved.with_name("index.json")
    saved.write_bytes(b"IwFl not an index")
    changes = {"bytes": 17, "sha256": hashlib.sha256(saved.read_bytes()).hexdigest()}
    about.write_text(json.dumps(json.loads(about.read_text()) | changes))
    with pytest.raises(DataError, match="index is no index that this faiss reads"):
        ApproximateIndex.load(saved)


def test_an_index_that_cannot_be_written(indexes: dict[str, ApproximateIndex], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Cannot write .*gallery"):
        indexes["flat"].save(tmp_path / "absent" / "gallery")
    (tmp_path / "index").mkdir()
    with pytest.raises(DataError, match="Cannot write"):
        indexes["flat"].save(tmp_path / "index")
    assert [file.name for file in tmp_path.iterdir()] == ["index"]


def test_without_faiss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    for call in (lambda: ApproximateIndex.build(torch.rand(5, 4)), lambda: ApproximateIndex.load(tmp_path / "x")):
        with pytest.raises(InputError, match=r"Approximate search needs faiss: pip install 'gcahng\[search\]'"):
            call()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (38, {}, "too few to train 1 list of kind 'ivf': expected at least 39, got 38"),
        (100, {"lists": 3}, "too few to train 3 lists of kind 'ivf': expected at least 117, got 100"),
        (100, {"kind": "pq"}, "`kind` must be one of flat, ivf, ivf_sq8, hnsw: got 'pq'"),
        (100, {"kind": "hnsw", "lists": 3}, "`lists` belongs to kind 'ivf'"),
        (100, {"lists": 0}, "`lists` must be an integer from 1"),
        (100, {"effort": 3}, "`effort` must be an integer from 1 to 2: got 3"),
        (100, {"kind": "flat", "effort": 3}, "`effort` has no meaning for kind 'flat'"),
        (100, {"kind": "hnsw", "links": 1}, "`links` must be an integer from 2 to 256: got 1"),
        (100, {"seed": 1.0}, "`seed` must be an integer from 0"),
        (1, {"kind": "flat"}, "`embeddings` must have at least 2 rows: got 1"),
    ],
)
def test_galleries_that_cannot_be_indexed(rows: int, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ApproximateIndex.build(torch.rand(rows, 4), **options)  # type: ignore[arg-type]


def test_values_that_cannot_be_indexed(gallery: Tensor, indexes: dict[str, ApproximateIndex]) -> None:
    bad = gallery.clone()
    bad[5, 2] = torch.nan
    for kind in ("flat", "ivf"):
        with pytest.raises(InputError, match="`embeddings` must be finite: row 5"):
            ApproximateIndex.build(bad, kind, **({"lists": 2} if kind == "ivf" else {}))
    with pytest.raises(InputError, match="`queries` must be finite: row 5"):
        indexes["flat"].search(bad, 1)


@pytest.mark.parametrize(
    ("queries", "k", "exclude", "message"),
    [
        (torch.rand(2, D + 1), 1, None, f"expected {D}, got {D + 1}"),
        (torch.rand(2, D), G + 1, None, f"`k` must be an integer from 1 to {G}: got {G + 1}"),
        (torch.rand(2, D), G, torch.tensor([0, 1]), f"`k` must be an integer from 1 to {G - 1}: got {G}"),
        (torch.rand(2, D), 1, torch.tensor([0]), r"`exclude` must have one int64 gallery index per query"),
        (torch.rand(1, D), 1, torch.tensor([0.0]), r"expected shape \(1,\), got torch.float32"),
        (torch.rand(1, D), 1, torch.tensor([G]), f"`exclude` must lie between -1 .none. and {G - 1}: got {G} to {G}"),
    ],
)
def test_searches_that_do_not_fit(
    indexes: dict[str, ApproximateIndex], queries: Tensor, k: int, exclude: Tensor | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        indexes["flat"].search(queries, k, exclude=exclude)


def test_another_gallery_is_refused(gallery: Tensor, indexes: dict[str, ApproximateIndex]) -> None:
    with pytest.raises(InputError, match=r"`gallery` must be what was indexed: expected shape \(1200, 16\)"):
        measured_recall(indexes["flat"], gallery[:5], gallery[:-1], 3)
