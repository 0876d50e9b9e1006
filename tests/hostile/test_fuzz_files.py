"""Plain tars, images, configurations, checkpoints, run logs and stored embeddings that a stranger may have made."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fuzzing import EVIL, YAML_BOMBS, encode_tree, fuzz, many, mutate_bytes, mutate_tree
from run_cases import base_settings
from store_files import vectors, write_index
from tar_cases import open_tar, picture, write_tar

from gcahng.data.images.decode import decode_image, decode_picture
from gcahng.data.tars.labels import read_label
from gcahng.data.tars.samples import image_of, tar_samples
from gcahng.search.index_info import INDEX
from gcahng.search.store import EmbeddingStore
from gcahng.training import checkpoint
from gcahng.training.config import load_config
from gcahng.training.config_yaml import read_yaml
from gcahng.training.run_log import read_rows

Record = Callable[[str, object], None]
MAX_PIXELS = 4_000_000  # of a decoded image here: more takes long, not another way


@many(1200)
def test_plain_tars(fast_folder: Path, examples: int, record_property: Record) -> None:
    record = json.dumps({"class": "x", "columns": {"a": "b"}}).encode()
    members = {
        "a/1.jpg": picture(0),
        "a/1.cls": b"1",
        "a/2.png": picture(1, "PNG"),
        "a/2.json": record,
        "n" * 90 + "/" + "n" * 60: b"",
    }
    tars = [write_tar(fast_folder / f"{f}.tar", members, tar_format=f).read_bytes() for f in (0, 1, 2)]
    path = fast_folder / "changed.tar"

    def read(draw: Random) -> None:
        path.write_bytes(mutate_bytes(draw, _changed_header(draw, draw.choice(tars))))
        for sample in tar_samples(open_tar(path, max_member_bytes=1 << 20, part_bytes=1 << 16)):
            read_label(sample, None, "the sample")
            decode_image(image_of(sample, "the sample"), name="the image", max_pixels=MAX_PIXELS)

    assert fuzz("plain tar", examples, read, record_property).refused


def _changed_header(draw: Random, content: bytes) -> bytes:
    """At times another value in a header, with a checksum that fits: damage alone would be noticed by that."""
    if draw.randint(0, 2) == 0:
        return content
    block = bytearray(content[:512])
    field, length = draw.choice(((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
    values = (
        b"../x.jpg",
        b"/etc/x.jpg",
        b"\xff" * length,
        b"7" * length,
        b"\x80" + b"\xff" * 11,
        b"",
        b"x",
        b"L",
        b"K",
    )
    value = draw.choice((*values, *(bytes([kind]) for kind in b"0123456gSxX")))[:length]
    block[field : field + length] = value + bytes(length - len(value))
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + content[512:]


@many(2500)
def test_images(examples: int, record_property: Record) -> None:
    kinds = ("JPEG", "PNG", "WEBP")
    images = [picture(seed, kind) for kind in kinds for seed in range(2)]

    def read(draw: Random) -> None:
        content = mutate_bytes(draw, draw.choice(images))
        found = draw.choice((decode_image, decode_picture))(content, name="the image", max_pixels=MAX_PIXELS)
        assert np.asarray(found).ndim == 3

    assert fuzz("image", examples, read, record_property).refused


@many(400)
def test_configurations(fast_folder: Path, examples: int, record_property: Record) -> None:
    tree, path = base_settings(Path("shards"), Path("run")), fast_folder / "config.yaml"

    def read(draw: Random) -> None:
        if draw.randint(0, 9) == 0:
            text = draw.choice(YAML_BOMBS) + draw.choice(("", "train: {epochs: 1}\n", yaml.safe_dump(tree)))
            content = text.encode()
        else:
            changed = mutate_tree(draw, tree)
            text = json.dumps(changed) if draw.randint(0, 1) else yaml.safe_dump(json.loads(json.dumps(changed)))
            content = mutate_bytes(draw, text.encode()) if draw.randint(0, 1) else text.encode()
        path.write_bytes(content)
        read_yaml(path)
        if draw.randint(0, 1):
            load_config(path)
        else:
            load_config(path, [f"{draw.choice(('seed', 'model.backbone_args.x', 'eval.ks', 'x'))}={draw.choice(EVIL)}"])

    assert fuzz("configuration", examples, read, record_property).refused


@pytest.mark.parametrize("text", YAML_BOMBS, ids=range(len(YAML_BOMBS)))
def test_every_bomb_of_yaml_alone(fast_folder: Path, text: str) -> None:
    path = fast_folder / "config.yaml"
    path.write_text(text)
    assert fuzz("", 1, lambda _: load_config(path), lambda *_: None).refused == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small module; never written to."""
    module = _module()
    module(torch.zeros(1, 3)).sum().backward()
    optimizer = torch.optim.AdamW(module.parameters())
    optimizer.step()
    return checkpoint.save_checkpoint(
        tmp_path_factory.mktemp("checkpoint"),
        3,
        modules={"metric_model": module.state_dict()},
        optimizers={"metric_model": optimizer.state_dict()},
        state={"progress": {"step": 3, "epoch": 1}, "classes": ["a"]},
        config_yaml="seed: 1\n",
        ranks={"0/torch": torch.zeros(4)},
    )


def _module() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4, track_running_stats=True).eval())


@many(600)
def test_checkpoints(saved: Path, fast_folder: Path, examples: int, record_property: Record) -> None:
    """Every file in turn, mostly with a manifest that vouches for it."""
    folder = Path(shutil.copytree(saved, fast_folder / "step-3"))
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    listing = json.loads(files[checkpoint.MANIFEST])
    optimizer = torch.optim.AdamW(_module().parameters())

    def read(draw: Random) -> None:
        name = draw.choice(sorted(files))
        for other, content in files.items():
            if (folder / other).read_bytes() != content:
                (folder / other).write_bytes(content)
        if name in (checkpoint.MANIFEST, checkpoint.STATE):
            content = encode_tree(draw, mutate_tree(draw, json.loads(files[name])))
        elif name.endswith(".safetensors") and draw.randint(0, 1):
            content = _changed_safetensors(draw, files[name])
        else:
            content = mutate_bytes(draw, files[name])
        (folder / name).write_bytes(content)
        if name != checkpoint.MANIFEST and draw.randint(0, 7):
            facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            (folder / checkpoint.MANIFEST).write_text(json.dumps(listing | {name: facts}))
        checkpoint.verify(checkpoint.find_checkpoint(folder))
        checkpoint.read_state(folder)
        checkpoint.load_module(_module(), folder, "metric_model")
        checkpoint.read_tensors(folder, checkpoint.RANKS)
        checkpoint.read_optimizer(folder, "metric_model", optimizer)

    assert fuzz("checkpoint", examples, read, record_property).refused


def _changed_safetensors(draw: Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = encode_tree(draw, mutate_tree(draw, json.loads(content[8 : 8 + length])))
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@many(1200)
def test_run_logs(fast_folder: Path, examples: int, record_property: Record) -> None:
    """A crash may have cut a line, so that lines that are no rows are left out."""
    rows: list[dict[str, Any]] = [{"kind": "step", "step": n, "total_loss": 0.5, "lr": [1, 2]} for n in range(3)]
    path = fast_folder / "metrics.jsonl"

    def read(draw: Random) -> None:
        changed = [mutate_tree(draw, row) if draw.randint(0, 1) else row for row in rows]
        path.write_bytes(mutate_bytes(draw, b"\n".join(encode_tree(draw, row) for row in changed)))
        assert all(type(row["step"]) is int for row in read_rows(path))

    assert fuzz("run log", examples, read, record_property).tried >= examples


@pytest.mark.parametrize("kind", ["npy", "parquet", "npz"])
@many(600)
def test_embeddings(fast_folder: Path, kind: str, examples: int, record_property: Record) -> None:
    folder = fast_folder / "index"
    if kind == "npz":
        folder.mkdir()
        arrays = {"embeddings": vectors(5, 3), "labels": np.arange(5), "class_ids": np.arange(5)}
        texts = {name: np.array([f"{name}{i}" for i in range(5)]) for name in ("keys", "shards", "class_names")}
        np.savez(folder / "saved.npz", **arrays, **texts)
    else:
        write_index(folder, (3, 2), 3, kind)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}

    def read(draw: Random) -> None:
        name = draw.choice(sorted(files))
        for other, content in files.items():
            (folder / other).write_bytes(content)
        if name == INDEX:
            content = encode_tree(draw, mutate_tree(draw, json.loads(files[name])))
        else:
            content = mutate_bytes(draw, files[name])
            if kind != "npz":  # so that it gets as far as the file
                info = json.loads(files[INDEX])
                info["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                (folder / INDEX).write_text(json.dumps(info))
        (folder / name).write_bytes(content)
        store = EmbeddingStore.open(folder / name if kind == "npz" else folder, verify=draw.randint(0, 1) == 1)
        if store.count <= 100:
            store.labels()
            [store.row(i) for i in range(store.count)]
            [block.sum() for _, block in store.blocks()]

    assert fuzz(f"embeddings as {kind}", examples, read, record_property).refused
