"""Pickles that run a command, wherever a file of a stranger is read: none of them runs."""

import hashlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from store_files import write_index
from tar_cases import open_tar, picture, write_tar

from gcahng.compat.files import read_released
from gcahng.data.tars.samples import tar_samples
from gcahng.errors import ConfigError, DataError
from gcahng.models.weights import read_state_dict
from gcahng.search.index_info import INDEX
from gcahng.search.store import EmbeddingStore
from gcahng.training import checkpoint
from gcahng.training.config import load_config


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """What a bomb would make."""
    return tmp_path / "ran"


def test_the_bomb_is_one(ran: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(ran)))
    assert ran.is_dir()


@pytest.mark.parametrize("is_zip", [True, False])
def test_optimisers(tmp_path: Path, ran: Path, is_zip: bool) -> None:
    file = tmp_path / "optimizer-graph.pt"
    torch.save({"param_groups": [], "state": Bomb(ran)}, file, _use_new_zipfile_serialization=is_zip)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    with pytest.raises(DataError, match="holds more than tensors and plain values, or is damaged: it is not read"):
        checkpoint.read_optimizer(tmp_path, "graph", optimizer)
    assert not ran.exists()


@pytest.mark.parametrize("is_zip", [True, False])
def test_weights_and_released_files(tmp_path: Path, ran: Path, is_zip: bool) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1), "b": Bomb(ran)}, file, _use_new_zipfile_serialization=is_zip)
    for read in (lambda: read_state_dict(file, "model.weights"), lambda: read_released(file)):
        with pytest.raises(ConfigError, match="it is not read, since that could run code"):
            read()
    assert not ran.exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_pickle_under_another_name(tmp_path: Path, ran: Path, suffix: str) -> None:
    (tmp_path / f"metric_model.{suffix}").write_bytes(pickle.dumps(Bomb(ran), protocol=2))
    if suffix == "safetensors":
        with pytest.raises(DataError, match="is no whole safetensors file"):
            checkpoint.load_module(torch.nn.Linear(1, 1), tmp_path, "metric_model")
    else:
        with pytest.raises(ConfigError, match="it is not read, since that could run code"):
            read_state_dict(tmp_path / "metric_model.pt", "model.weights")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["embeddings", "labels", "row_offsets"])
def test_arrays_of_objects(tmp_path: Path, ran: Path, name: str) -> None:
    """numpy pickles them."""
    write_index(tmp_path / "index", (3,), 2)
    file = tmp_path / "index" / f"{name}.npy"
    np.save(file, np.array([Bomb(ran)] * 3, dtype=object), allow_pickle=True)
    facts = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    info = json.loads((tmp_path / "index" / INDEX).read_text())
    info["files"][file.name] = facts
    (tmp_path / "index" / INDEX).write_text(json.dumps(info))
    with pytest.raises(DataError, match="is no array that can be mapped"):
        EmbeddingStore.open(tmp_path / "index", verify=True)
    np.savez(tmp_path / "saved.npz", **dict.fromkeys(("embeddings", "labels", "keys"), np.array([Bomb(ran)], object)))
    with pytest.raises(DataError):
        EmbeddingStore.open(tmp_path / "saved.npz")
    with zipfile.ZipFile(tmp_path / "member.npz", "w") as archive:
        archive.writestr("embeddings.npy", pickle.dumps(Bomb(ran)))
    with pytest.raises(DataError):
        EmbeddingStore.open(tmp_path / "member.npz")
    assert not ran.exists()


def test_members_of_tars(tmp_path: Path, ran: Path) -> None:
    """webdataset's decoder unpickles these."""
    names = [f"a.{extension}" for extension in ("pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "mp", "ten")]
    path = write_tar(tmp_path / "a.tar", [("a.jpg", picture(0)), *((name, pickle.dumps(Bomb(ran))) for name in names)])
    passed: list[str] = []
    (sample,) = tar_samples(open_tar(path), passed_over=passed.append)
    assert list(sample.members) == ["jpg"] and passed == [name.removeprefix("a") for name in names]
    assert not ran.exists()


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [{}]",
        "!!python/object/new:os.mkdir [{}]",
        "!!python/name:os.mkdir",
        "!!python/module:os",
        "!!python/tuple [1]",
    ],
)
def test_tags_of_yaml(tmp_path: Path, ran: Path, value: str) -> None:
    (tmp_path / "config.yaml").write_text(f"seed: {value.format(ran)}\n")
    with pytest.raises(ConfigError, match="could not determine a constructor for the tag"):
        load_config(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "config.yaml", [f"seed={value.format(ran)}"])
    assert not ran.exists()


def test_what_torch_would_unpack_without_end(tmp_path: Path) -> None:
    """torch reads compressed members, and one member under many names; it writes neither."""
    torch.save({"param_groups": [], "state": torch.zeros(1 << 20)}, tmp_path / "whole.pt")
    packed, manifold = tmp_path / "optimizer-graph.pt", tmp_path / "manifold.pth"
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole:
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for member in whole.infolist():
                archive.writestr(member.filename, whole.read(member))
        shutil.copy(tmp_path / "whole.pt", manifold)
        with zipfile.ZipFile(manifold, "a") as archive:
            (data,) = (member for member in archive.infolist() if member.filename.endswith("/data/0"))
            archive.filelist += [data] * 3
            archive._didModify = True  # type: ignore[attr-defined]
    assert packed.stat().st_size < 1 << 16
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    with pytest.raises(DataError, match=r"cannot be read \(ValueError: its \d+ bytes unpack to \d{7}: expected"):
        checkpoint.read_optimizer(tmp_path, "graph", optimizer)
    for file in (packed.rename(tmp_path / "packed.pth"), manifold):
        for read in (lambda: read_state_dict(file, "model.weights"), lambda: read_released(file)):  # noqa: B023
            with pytest.raises(ConfigError, match=r"bytes unpack to \d{7,8}: expected a file as torch.save writes it"):
                read()


def test_files_of_a_checkpoint_lie_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "step-1"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"x")
    for name in ("../secret", str(tmp_path / "secret"), "a/b", "..", "\0", "\ud800", "x" * 300):
        listing = {name: {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
        (folder / checkpoint.MANIFEST).write_text(json.dumps(listing))
        with pytest.raises(DataError, match="expected files of its own folder"):
            checkpoint.verify(folder)
