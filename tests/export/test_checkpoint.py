"""Exports of a trained run: checked, whole, and described well enough to be used without this library."""

import errno
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from run_cases import convert_patterns, draw_patterns, train

from gcahng.data.images.transform_settings import transform_settings
from gcahng.data.shards.reader import ShardSet
from gcahng.errors import ConfigError, InputError
from gcahng.export import ExportSettings, export_checkpoint, formats
from gcahng.export.checkpoint import check_image_size
from gcahng.export.model import ExportedModel
from gcahng.models import build_embedder
from gcahng.training.embedding import embed_rows
from gcahng.training.evaluate_checkpoint import embedding_settings, load_metric_model

ONNX = ExportSettings()
PROGRAM = ExportSettings(format="torch-export")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch on pictures that evaluation scales down and crops, by sides that differ."""
    folder = tmp_path_factory.mktemp("exported")
    shards = convert_patterns(draw_patterns(folder / "images"), folder / "shards")
    train(shards, folder / "run", {"data.transform": {"preset": "glyphs", "image_size": 16, "eval_resize": 18}})
    return folder / "run"


def test_the_metadata_are_enough_to_embed_a_picture(run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.onnx"
    done = export_checkpoint(run_dir / "last", output, ONNX)
    assert done.files == [output] and done.notes == []
    counts = ["1 random image", "3 random images", "8 random images", f"8 images of {run_dir.parent / 'shards'}"]
    assert [found.what for found in done.agreements] == counts
    assert all(found.difference < 1e-5 and found.cosine > 1 - 1e-9 for found in done.agreements)

    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    held = session.get_modelmeta().custom_metadata_map
    resize, size, mean, std = (json.loads(held[name]) for name in ("resize_short_side", "image_size", "mean", "std"))
    model, config = load_metric_model(run_dir / "last")
    shards = ShardSet.open(config.data.dir)
    rows = shards.split_samples("test")[:3]
    want, _ = embed_rows(model, shards, rows, embedding_settings(config))
    source = {hue.name: hue for hue in (run_dir.parent / "images").iterdir()}
    for row, embedding in zip(rows.tolist(), want, strict=True):
        folder = source[shards.classes[int(shards.class_ids(np.array([row]))[0])].name]
        found = []
        for file in sorted(folder.iterdir()):
            picture = Image.open(file).resize((resize, resize), Image.Resampling.BILINEAR)
            edge = (resize - size) // 2
            pixels = np.asarray(picture.crop((edge, edge, edge + size, edge + size)), dtype=np.float32)
            batch = ((pixels / 255 - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)
            found.append(torch.from_numpy(session.run(["embeddings"], {"images": batch})[0]))
        # float32 in another order of sums
        assert min(float((z - embedding).abs().max()) for z in found) < 1e-5


def test_a_file_names_its_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.pt2"
    settings = replace(PROGRAM, preprocess=True, l2_normalise=True, image_size=24)
    done = export_checkpoint(run_dir / "last" / "metric_model.safetensors", output, settings)
    extra = {formats.METADATA_FILE: ""}
    torch.export.load(output, extra_files=extra)
    held = json.loads(extra[formats.METADATA_FILE])
    assert held == done.metadata
    manifest = json.loads((run_dir / "last" / "manifest.json").read_text())
    want = {
        "model": "gcahng.models.embedder.Embedder",
        "backbone": "small_conv",
        "embedding_dim": 8,
        "l2_normalised": True,
        "normalisation_included": True,
        "input_shape": ["batch", 24, 24, 3],
        "image_size": 24,
        "resize_short_side": 27,
        "mean": [0.5, 0.5, 0.5],
        "run": "run",
        "checkpoint": "step-5",
        "step": 5,
        "epoch": 1,
        "weights_sha256": manifest["metric_model.safetensors"]["sha256"],
    }
    assert {name: held[name] for name in want} == want


def test_weights_in_a_file_of_their_own_come_along(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for models over protobuf's 2 GB."""
    kind = formats.FORMATS["onnx"]
    monkeypatch.setitem(formats.FORMATS, "onnx", replace(kind, write=partial(kind.write, external_data=True)))
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "m.onnx"
    done = export_checkpoint(run_dir / "last", output, ONNX)
    assert done.files == [output, tmp_path / "out" / "m.onnx.data"]
    assert sorted(output.parent.iterdir()) == sorted(done.files)
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    (embedding,) = session.run(None, {"images": np.zeros((2, 3, 16, 16), np.float32)})
    assert embedding.shape == (2, 8) and np.isfinite(embedding).all()


def test_a_file_that_differs_is_not_published(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = formats.FORMATS["torch-export"]
    monkeypatch.setitem(
        formats.FORMATS, "torch-export", replace(kind, open=lambda path: lambda x: kind.open(path)(x) + 0.01)
    )
    with pytest.raises(InputError, match="differs from the model by more than the tolerance 1.0e-04. 1 random image"):
        export_checkpoint(run_dir / "last", tmp_path / "m.pt2", PROGRAM)
    assert not list(tmp_path.iterdir())
    done = export_checkpoint(run_dir / "last", tmp_path / "m.pt2", replace(PROGRAM, tolerance=0.9))
    assert done.agreements[0].difference > 1e-3


def test_without_the_data_of_the_run_noise_has_to_do(run_dir: Path, tmp_path: Path) -> None:
    done = export_checkpoint(run_dir / "last", tmp_path / "a.pt2", PROGRAM, ["data.dir=https://me:word@there/shards"])
    (note,) = done.notes
    assert note.startswith("Not compared on real images: `https://") and "word" not in note
    assert len(done.agreements) == 3
    done = export_checkpoint(run_dir / "last", tmp_path / "b.pt2", PROGRAM, [f'data.dir="{run_dir}"'])
    assert len(done.agreements) == 3 and "manifest.json is missing" in done.notes[0]


def test_what_cannot_be_exported(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.onnx").touch()
    (tmp_path / "left.onnx.data").touch()
    last = run_dir / "last"
    cases = [
        (last, "m.pt2", ONNX, "m.pt2: --format onnx needs a name that ends in .onnx"),
        (last, "m.onnx", PROGRAM, "m.onnx: --format torch-export needs a name that ends in .pt2"),
        (last, "none/m.onnx", ONNX, "the folder does not exist"),
        (last, "old.onnx", ONNX, "old.onnx exists. Name another"),
        (last, "left.onnx", ONNX, "left.onnx.data exists"),
        (last, "m.onnx", replace(ONNX, image_size=0), "`--image-size` must be at least 1 pixel, got 0"),
        (last, "m.onnx", replace(ONNX, tolerance=0.0), "`--tolerance` must lie between 0 and 1, got 0.0"),
        (last, "m.onnx", replace(ONNX, format="tf"), "must be one of onnx, torch-export: got 'tf'"),
        (run_dir, "m.onnx", ONNX, "is no checkpoint"),
    ]
    for path, name, settings, message in cases:
        with pytest.raises(InputError) as refused:
            export_checkpoint(path, tmp_path / name, settings)
        assert message in str(refused.value)
    with pytest.raises(ConfigError, match="does not fit part `metric_model`"):
        export_checkpoint(last, tmp_path / "m.onnx", ONNX, ["model.embedding_dim=4"])
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name.startswith("onnx") else name)
    with pytest.raises(InputError, match=r"needs onnx, onnxscript, onnxruntime, not.*'gcahng\[export\]'"):
        export_checkpoint(last, tmp_path / "m.onnx", ONNX)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_nothing(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(program: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(formats.FORMATS, "onnx", replace(formats.FORMATS["onnx"], write=write))
    with pytest.raises(InputError, match=r"m.onnx cannot be written \(No space left on device\)"):
        export_checkpoint(run_dir / "last", tmp_path / "m.onnx", ONNX)
    assert not list(tmp_path.iterdir())


def test_a_size_that_the_backbone_refuses(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = build_embedder("vit_tiny_patch16_224", embedding_dim=4, backbone_args={"img_size": 32, "depth": 1})
    model = ExportedModel(vit, transform_settings(image_size=48), l2_normalise=True)
    check_image_size(ExportedModel(vit, transform_settings(image_size=32)), torch.zeros(2, 3, 32, 32))
    with pytest.raises(InputError, match=r"cannot embed images of 48 x 48 pixels: Backbone `vit_tiny.* refuses"):
        check_image_size(model, torch.zeros(2, 3, 48, 48))
    _, config = load_metric_model(run_dir / "last")
    monkeypatch.setattr("gcahng.export.checkpoint.load_metric_model", lambda path, overrides, **options: (vit, config))
    with pytest.raises(InputError, match=r"`--image-size`: the model cannot embed images of 16 x 16 pixels"):
        export_checkpoint(run_dir / "last", tmp_path / "m.onnx", ONNX)
