import pytest

from gcahng.data.stores.urls import WebFolder, redact

SHOWN = {
    "https://host/set": "https://host/set",
    "https://me:secret@host/set": "https://***@host/set",
    "https://host/set?token=secret": "https://host/set?***",
    "see http://me@host:80/a?b=secret&c=secret, then s3://k:secret@bucket/x": "see http://***@host:80/a?***"
    " then s3://***@bucket/x",
    "url: /set/a.tar?token=secret (refused)": "url: /set/a.tar?*** (refused)",
    "Is it so? /data/set": "Is it so? /data/set",
    "mail me@host about http://host/set": "mail me@host about http://host/set",
}


@pytest.mark.parametrize("text", SHOWN)
def test_secrets_are_hidden(text: str) -> None:
    assert redact(text) == SHOWN[text]


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("http://host/set", "http://host/set/a.tar"),
        ("http://host/set/", "http://host/set/a.tar"),
        ("http://host", "http://host/a.tar"),
        ("http://host:8000/a b/ü?x=1#part", "http://host:8000/a%20b/%C3%BC/a.tar?x=1"),
        ("http://host/a%20b", "http://host/a%20b/a.tar"),
        ("http://me:pw@host/set", "http://host/set/a.tar"),
        ("http://[::1]:80/set", "http://[::1]:80/set/a.tar"),
    ],
)
def test_urls_of_files(url: str, file: str) -> None:
    assert WebFolder.parse(url).file("a.tar") == file
