import json

import pytest

from gcahng.data.conversion.convert import convert, summary
from gcahng.data.shards.info import describe, describe_text
from gcahng.data.shards.reader import ShardSet
from gcahng.data.shards.skipped import IN_MANIFEST, num_skipped
from gcahng.data.shards.verify import verify
from gcahng.data.sources import Fault, Listing, SourceItem
from gcahng.data.sources.glyph_fonts import matplotlib_fonts
from gcahng.data.sources.glyph_picture import draw_glyph
from gcahng.errors import DataError


class Partly:
    """Two pictures, and entries that were not downloaded."""

    name = "partly"

    def __init__(self, missing: int) -> None:
        self.missing = missing

    def listing(self) -> Listing:
        faults = [Fault(f"gone/{i}", "it was not downloaded.") for i in range(self.missing)]
        return Listing([SourceItem("a", "train", "65"), SourceItem("b", "test", "66")], faults)

    def load(self, item: SourceItem) -> bytes:
        return draw_glyph(matplotlib_fonts() / "DejaVuSans.ttf", int(item.source), 16)


def test_few_entries_stand_in_the_manifest(tmp_path):
    manifest = convert(Partly(IN_MANIFEST), tmp_path / "out", on_error="skip")
    assert len(manifest.extra["skipped"]) == num_skipped(manifest.extra) == IN_MANIFEST
    assert not (tmp_path / "out/skipped.jsonl").exists()


def test_many_entries_stand_in_a_file_that_is_checked(tmp_path):
    out = tmp_path / "out"
    manifest = convert(Partly(IN_MANIFEST + 1), out, on_error="skip")
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [entry["source"] for entry in lines] == [f"gone/{i}" for i in range(IN_MANIFEST + 1)]
    assert manifest.extra["skipped"] == lines[:IN_MANIFEST]
    for text in (summary(manifest, out), describe_text(describe(ShardSet.open(out), str(out)))):
        assert (
            f"skipped: {IN_MANIFEST + 1}\n" in text and f"{IN_MANIFEST - 9} more, all listed in skipped.jsonl" in text
        )
    report = verify(out)
    assert report.is_whole and not report.warnings

    content = bytearray((out / "skipped.jsonl").read_bytes())
    content[20] ^= 1
    (out / "skipped.jsonl").write_bytes(content)
    assert any("skipped.jsonl differs from the manifest" in fault for fault in verify(out).faults)
    (out / "skipped.jsonl").unlink()
    assert any(fault.startswith("skipped.jsonl") for fault in verify(out).faults)


def test_a_stopping_fault_says_how_many_there_are(tmp_path):
    with pytest.raises(DataError, match=r"gone/0.* Faults in the listing: 7\."):
        convert(Partly(7), tmp_path / "out")
