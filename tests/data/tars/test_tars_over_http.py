"""Plain tars behind a web server: streamed in ranges, also with faults and with secrets in the URL."""

from pathlib import Path

import pytest
import torch
from faulty_server import Handler, Request, cut, serve
from tar_cases import picture, write_tar

from gcahng.data.images.transforms import transform_settings
from gcahng.data.stores import CacheSettings
from gcahng.data.tars import loader as loader_module
from gcahng.data.tars.loader import restore_order, tar_loader
from gcahng.errors import DataError

SETTINGS = transform_settings("gca_hng", image_size=16)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GCAHNG_CACHE", str(tmp_path / "cache"))
    for tar in range(2):
        files = []
        for number in range(4):
            key = f"{tar}{number}"
            files += [(f"{key}.jpg", picture(int(key))), (f"{key}.cls", key.encode())]
        write_tar(tmp_path / f"test-{tar}.tar", files)
    return tmp_path


def keys_of(url: str, num_workers: int = 0) -> list[str]:
    batches = list(tar_loader(url, SETTINGS, 3, num_workers))
    (keys,) = restore_order(torch.cat([b.order for b in batches]), [key for b in batches for key in b.keys])
    return keys


KEYS = [f"{tar}{number}" for tar in range(2) for number in range(4)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_tars_are_streamed_in_ranges(folder: Path, num_workers: int) -> None:
    """Braces stand for several; nothing is kept on this machine."""
    with serve(folder) as server:
        assert keys_of(f"{server.url}/test-{{0..1}}.tar?token=secret", num_workers) == KEYS
        assert all(request.range is not None and request.path.endswith("?token=secret") for request in server.requests)
    assert not (folder / "cache").exists()


def test_a_cut_answer_is_asked_for_again(folder: Path) -> None:
    cuts: list[Request] = []

    def cut_once(handler: Handler, request: Request) -> bool:
        if cuts or request.range is None or request.range[1] < 512:  # the question for the size is short
            return False
        cuts.append(request)
        return cut(handler, request)

    with serve(folder) as server:
        server.fault = cut_once
        assert keys_of(f"{server.url}/test-{{0..1}}.tar") == KEYS
    assert len(cuts) == 1


def test_a_cut_tar_is_named_without_its_secrets(folder: Path) -> None:
    path = folder / "test-1.tar"
    path.write_bytes(path.read_bytes()[:2048])
    with serve(folder) as server, pytest.raises(DataError) as caught:
        keys_of(f"{server.url.replace('://', '://user:word@')}/test-{{0..1}}.tar?token=secret")
    message = str(caught.value)
    assert "test-1.tar" in message and "is cut " in message and "the last whole member is '10.jpg'" in message
    assert "secret" not in message and "word" not in message


def test_a_tar_that_the_server_lacks(folder: Path) -> None:
    with serve(folder) as server, pytest.raises(DataError, match="test-2.tar"):
        keys_of(f"{server.url}/test-{{0..2}}.tar")


def test_streams_are_not_cached() -> None:
    assert CacheSettings(mode="direct") == loader_module._STREAMED
