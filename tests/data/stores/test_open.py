import logging
import pickle
from pathlib import Path

import pytest
from store_cases import make_folder

from gcahng.data.stores import CacheSettings, open_store
from gcahng.data.stores.cached import CachedStore
from gcahng.data.stores.local import LocalStore
from gcahng.errors import ConfigError


@pytest.mark.parametrize("form", ["{0}", "file://{0}", "file:{0}", "file://localhost{0}", "local://{0}"])
def test_local_folders(tmp_path: Path, form: str) -> None:
    folder = make_folder(tmp_path / "a set", count=1)
    url = str(folder.path).replace(" ", "%20") if form.startswith("file:") else folder.path
    store = open_store(form.format(url))
    assert isinstance(store, LocalStore)
    assert store.read("s0.tar", 0, 9) == folder.content["s0.tar"][:9]


def test_a_path_object_and_a_path_with_a_colon(tmp_path: Path) -> None:
    assert open_store(tmp_path).location == str(tmp_path)
    assert isinstance(open_store("run:3/set"), LocalStore)


@pytest.mark.parametrize("url", ["http://host/set", "https://host:8443/set?key=1", "memory://bucket/set"])
def test_remote_places(url: str) -> None:
    store = open_store(url)
    assert isinstance(store, CachedStore)
    assert isinstance(pickle.loads(pickle.dumps(store)), CachedStore)


REFUSED = {
    "pipe:cat x": "`pipe:` is refused as a place of shards: it runs a command",
    "PIPE:cat x": "`pipe:` is refused",
    "pipe://x": "`pipe:` is refused",
    "gopher://host/set": r"'gopher://host/set': the scheme `gopher` is unknown\. Use a path, file:, http://",
    "simplecache::s3://bucket/set": "is refused as a place of shards: expected one place of files, got a chain",
    "s3://bucket/a::http://host/b": "got a chain or a wrapper",
    "reference://x": "got a chain or a wrapper",
    "http:///set": r"'http:///set' is no http\(s\) URL with a host",
    "http://host:port/set": "is no URL",
    "file://machine/set": "names the machine 'machine': expected a folder of this one",
    "s3://bucket/set": r"s3:// needs a package that is not installed .*Install it: `pip install s3fs`",
    "gs://bucket/set": "Install it: `pip install gcsfs`",
    "sftp://host/set": r"paramiko.*Install it: the package that it names",
}


@pytest.mark.parametrize("location", REFUSED)
def test_refused_places(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("s3fs", "gcsfs", "paramiko"):  # also where they are installed
        monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ConfigError, match=REFUSED[location]):
        open_store(location)


def test_a_url_that_went_through_path() -> None:
    with pytest.raises(ConfigError, match=r"lacks a slash after `https:/`: a URL must stay a string, not a Path"):
        open_store(Path("https://host/set"))


def test_secrets_stay_out_of_messages() -> None:
    assert open_store("https://me:secret@host/set?token=secret").location == "https://***@host/set?***"
    with pytest.raises(ConfigError) as caught:
        open_store("gopher://me:secret@host/set?token=secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "sometimes"}, "`mode` must be one of shards, direct, got 'sometimes'"),
        ({"max_bytes": -1}, "`max_bytes` must be 0 or more, got -1"),
        ({"part_bytes": 0}, "`part_bytes` must be 1 or more, got 0"),
    ],
)
def test_cache_settings_are_checked(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheSettings(**settings)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GCAHNG_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CacheSettings().folder() == tmp_path / ".cache" / "gcahng" / "shards"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert CacheSettings().folder() == tmp_path / "xdg" / "gcahng" / "shards"
    monkeypatch.setenv("GCAHNG_CACHE", "~/mine")
    assert CacheSettings().folder() == tmp_path / "mine"
    assert CacheSettings(dir=tmp_path / "given").folder() == tmp_path / "given"


def test_opening_asks_for_nothing(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.DEBUG):
        open_store("http://127.0.0.1:1/set", CacheSettings(dir=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
