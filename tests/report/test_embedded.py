"""The evaluated images of runs: the numbers of the run's own evaluation, and reasons where there are none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_cases import convert_patterns, draw_patterns

from gcahng.data.shards.writer import Sample, ShardWriter
from gcahng.errors import ConfigError, DataError
from gcahng.metrics import retrieval
from gcahng.report.embedded import EmbeddedRun, EmbeddedRuns, embed_run, embed_runs


def test_the_numbers_are_those_of_the_runs_own_evaluation(embedded_runs, report_runs) -> None:
    assert list(embedded_runs) == [run.name for run in report_runs]
    assert embedded_runs.reasons == {}
    for run in report_runs:
        result, logged = embedded_runs[run.name].result, run.results["last"]
        assert result.map_at_r == pytest.approx(logged["map_at_r"], rel=1e-9)
        assert result.recall_at_k[1] == pytest.approx(logged["recall_at_1"], rel=1e-9)


def test_images_keys_and_classes_belong_together(embedded_runs, report_runs) -> None:
    run = embedded_runs["baseline"]
    assert len(run.rows) == len(run.embeddings) == len(run.labels) == 48
    for index in (0, 17, 47):
        row = int(run.rows[index])
        assert run.query.shards.read(row)[:4] == b"\x89PNG"
        assert run.key(index) == run.query.shards.key(row)
        source = Path(run.query.shards.source(row))
        assert source.parent.name == run.query.class_name(index) == run.class_name(int(run.labels[index]))
        with Image.open(Path(report_runs[0].config.data.dir).with_name("images") / source) as want:
            assert np.array_equal(np.asarray(run.image(index)), np.asarray(want))


def test_neighbours_are_right_by_class_and_scored_by_cosine(embedded_runs) -> None:
    run = embedded_runs["baseline"]
    assert run.is_self
    for query in range(0, 48, 7):
        scores = torch.cosine_similarity(run.embeddings[query], run.embeddings, dim=1)
        scores[query] = -2
        assert run.neighbours[query].tolist() == scores.argsort(descending=True)[:8].tolist()
        for neighbour in run.neighbours[query].tolist():
            assert run.similarity(query, neighbour) == pytest.approx(float(scores[neighbour]), abs=1e-6)
            assert run.is_right(query, neighbour) == (run.labels[query] == run.labels[neighbour])


def test_a_run_without_checkpoint_or_data_has_a_reason_and_the_others_are_embedded(report_runs, tmp_path) -> None:
    first, second = report_runs
    away = replace(second, config=replace(second.config, data=replace(second.config.data, dir=str(tmp_path / "gone"))))
    unfinished = replace(first, folder=tmp_path, name="unfinished")
    found = embed_runs([unfinished, away, first], num_neighbours=2)
    assert list(found) == ["baseline"]
    assert found["baseline"].neighbours.shape == (48, 2)
    assert "has no checkpoint `last` yet" in found.reasons["unfinished"]
    assert "gone" in found.reasons[second.name]
    with pytest.raises(ConfigError, match="no checkpoint"):
        embed_run(unfinished)
    with pytest.raises(DataError, match="gone"):
        embed_run(away)


def test_a_damaged_checkpoint_has_a_reason(report_runs, tmp_path) -> None:
    run = report_runs[0]
    (tmp_path / "last").mkdir()
    for file in run.checkpoint.iterdir():
        content = file.read_bytes()
        (tmp_path / "last" / file.name).write_bytes(
            content[:-1] if file.name == "metric_model.safetensors" else content
        )
    assert "is damaged" in embed_runs([replace(run, folder=tmp_path)]).reasons[run.name]


@pytest.fixture(scope="module")
def street_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first images of eight classes query the last ones of six of them; two more classes distract."""
    images = draw_patterns(tmp_path_factory.mktemp("street") / "images")
    folder = images.with_name("shards")
    folder.mkdir()
    writer = ShardWriter(folder)
    classes = sorted(images.iterdir())

    def write(split: str, members: list[Path], part: slice) -> None:
        for member in members:
            for file in sorted(member.iterdir())[part]:
                writer.write(Sample(file.read_bytes(), "png", member.name, split, str(file)))

    write("train", classes[:6], slice(None))
    write("query", classes[8:], slice(0, 2))
    write("gallery", classes[8:14], slice(2, None))
    write("others", classes[6:8], slice(None))
    writer.finish("street", 0, {})
    return folder


def test_a_gallery_and_distractors(report_runs, street_folder) -> None:
    run = report_runs[0]
    settings = {"protocol": "query_gallery", "split": "query", "gallery_split": "gallery"}
    evaluated = replace(run.config.eval, **settings, distractor_splits=("others",))
    config = replace(run.config, data=replace(run.config.data, dir=str(street_folder)), eval=evaluated)
    found = embed_run(replace(run, config=config), num_neighbours=30)
    assert not found.is_self
    assert (len(found.query), len(found.gallery)) == (16, 24 + 12)
    query, gallery = found.query, found.gallery
    want = retrieval(query.embeddings, query.labels, gallery.embeddings, gallery.labels, ks=(1,), num_neighbours=30)
    assert torch.equal(found.neighbours, want.neighbours)
    assert found.result.map_at_r == pytest.approx(want.map_at_r, rel=1e-12)
    assert found.result.num_without_reference == 4
    names = {gallery.class_name(n) for n in found.neighbours.flatten().tolist()}
    assert {"hue-06", "hue-08"} < names  # of the distractors and of the gallery


def only(*runs: EmbeddedRun) -> EmbeddedRuns:
    return EmbeddedRuns({run.run.name: run for run in runs})


def test_compared_are_a_run_that_generates_and_one_that_does_not(embedded_runs, report_runs, tmp_path) -> None:
    baseline, generating = embedded_runs.values()
    again = replace(generating, run=replace(generating.run, name="again"))
    assert embedded_runs.compared() == (baseline, generating)
    assert only(again, generating, baseline).compared() == (baseline, again)
    assert only(generating, again).compared() == (again, generating)
    assert only(baseline).compared() == (None, baseline)
    assert EmbeddedRuns({}).compared() is None

    other = convert_patterns(draw_patterns(tmp_path / "images", 4), tmp_path / "shards")
    data = replace(baseline.run.config.data, dir=str(other))
    elsewhere = embed_run(replace(baseline.run, name="elsewhere", config=replace(baseline.run.config, data=data)))
    assert only(elsewhere, generating).compared() == (None, generating)
