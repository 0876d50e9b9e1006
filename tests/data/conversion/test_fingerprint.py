"""Fingerprints: what makes two conversions different ones, and how the difference is told."""

import PIL
import pytest
from conversion_cases import Pictures, pictures

from gcahng.data.conversion.fingerprint import differences, fingerprint
from gcahng.data.sources.source import Fault


def of(source: Pictures) -> dict[str, object]:
    listing = source.listing()
    return fingerprint(source, listing, listing.items, seed=0, shard_bytes=1, window_bytes=2, encode=None)


def birds(*faults: Fault) -> Pictures:
    return pictures({"train": ["owl"], "test": ["crow"]}, images=2, faults=faults)


def test_equal_conversions_have_equal_fingerprints() -> None:
    assert of(birds()) == of(birds())


def test_only_plain_public_attributes_of_a_source_count() -> None:
    before = of(birds())
    source = birds()
    source._cache, source.path = 3, object()  # type: ignore[attr-defined]
    assert of(source) == before
    source.size = 64  # type: ignore[attr-defined]
    assert differences(before, of(source)) == "`source's size` 64 instead of None"


def test_another_encoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before, version = of(birds()), PIL.__version__
    monkeypatch.setattr(PIL, "__version__", "99.0")
    assert differences(before, of(birds())) == f"`Pillow` '99.0' instead of {version!r}"


def test_faults_of_the_listing_count() -> None:
    now = of(birds(Fault("owl/9.jpg", "it is gone.")))
    assert differences(of(birds()), now) == "a source that lists other images, classes, columns or options"


def test_many_differences_are_cut() -> None:
    before = {f"option {i}": i for i in range(9)}
    text = differences(before, dict.fromkeys(before, 100))
    assert text.startswith("`option 0` 100 instead of 0, ")
    assert text.endswith("`option 5` 100 instead of 5 and 3 more")
