"""A conversion that failed goes on where it ended, and the result is that of an undisturbed one."""

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conversion_cases import Pictures, contents, encoded, pictures

from gcahng.data.conversion.convert import convert
from gcahng.data.conversion.image_file import EncodeSettings
from gcahng.data.conversion.journal import Journal
from gcahng.data.conversion.partial_folder import PartialFolder
from gcahng.data.shards.manifest import Manifest
from gcahng.data.sources.source import SourceItem
from gcahng.errors import DataError, InputError

SHARD_BYTES = 10_000
BAD = 30  # place of the image that cannot be read, in writing order


def birds() -> Pictures:
    return pictures({"train": ["owl", "gull", "tern", "wren"], "test": ["crow", "finch", "kite"]})


def run(source: Pictures, out: Path, **options: object) -> Manifest:
    return convert(source, out, shard_bytes=SHARD_BYTES, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of all images in the order of writing."""
    source = birds()
    run(source, tmp_path_factory.mktemp("order") / "out")
    return source.loaded


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed conversion."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(birds(), out)
    return contents(out)


def fail(out: Path, order: list[str], place: int = BAD, **options: object) -> str:
    """Convert until an image cannot be read; returns the message."""
    source = birds()
    source.unreadable = {order[place]}
    with pytest.raises(DataError) as error:
        run(source, out, **options)
    return str(error.value)


def finished_items(out: Path) -> int:
    return Journal(out.with_name("out.partial")).tars[-1].items


def test_only_the_rest_is_loaded_and_the_bytes_are_the_same(
    tmp_path: Path, order: list[str], whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    message = fail(out, order)
    partial = tmp_path / "out.partial"
    tars = Journal(partial).tars
    assert len(tars) > 2
    images = sum(tar.shard.num_samples for tar in tars)
    assert message.startswith(f"Cannot convert {order[BAD]}: ")
    assert message.endswith(
        f"{partial} keeps what is finished ({len(tars)} tars, {images} images): the same command continues there."
    )
    assert not out.exists()
    source = birds()
    manifest = run(source, out)
    assert source.loaded == order[images:]
    assert contents(out) == whole
    assert manifest == Manifest.load(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failure_before_the_first_finished_tar_leaves_nothing(tmp_path: Path, order: list[str]) -> None:
    assert "continues" not in fail(tmp_path / "out", order, place=3)
    assert list(tmp_path.iterdir()) == []


def test_number_of_workers_may_change(tmp_path: Path, order: list[str], whole: dict[str, bytes]) -> None:
    fail(tmp_path / "out", order, workers=2)
    fail(tmp_path / "out", order, place=len(order) - 1)
    run(birds(), tmp_path / "out", workers=2)
    assert contents(tmp_path / "out") == whole


def test_left_out_images_stay_left_out(tmp_path: Path, order: list[str]) -> None:
    def source(*bad: int) -> Pictures:
        made = birds()
        made.unreadable = {order[place] for place in (2, 3, 11, 40, *bad)}
        return made

    run(source(), tmp_path / "whole", on_error="skip")
    with pytest.raises(DataError):
        run(source(), tmp_path / "out", on_error="fail")
    # Skip, then die of a full disk or anything else: here, of a fault that the source raises as none.
    stopped = source()
    stopped.contents = {order[BAD]: b"x"}
    stopped.load = stopping(stopped, order[BAD])  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(stopped, tmp_path / "out", on_error="skip")
    tars = Journal(tmp_path / "out.partial").tars
    assert [place for tar in tars for place in tar.left_out] == [2, 3, 11]
    rest = source()
    run(rest, tmp_path / "out", on_error="skip")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert rest.loaded == [*(order[i] for i in (2, 3, 11)), *order[tars[-1].items :]]


def stopping(source: Pictures, name: str) -> Callable[[SourceItem], bytes]:
    load = source.load

    def load_or_stop(item: SourceItem) -> bytes:
        if item.source == name:
            raise KeyboardInterrupt
        return load(item)

    return load_or_stop


@pytest.fixture
def skipped_one(tmp_path: Path, order: list[str]) -> Path:
    """A conversion that left out image 8 and was stopped later."""
    source = birds()
    source.unreadable = {order[8]}
    source.load = stopping(source, order[BAD])  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", on_error="skip")
    return tmp_path / "out"


def test_fail_after_skip_stops_at_what_was_left_out(skipped_one: Path, order: list[str]) -> None:
    source = birds()
    source.unreadable = {order[8]}
    with pytest.raises(DataError, match=rf"Cannot convert {order[8]}: .*the same command continues there"):
        run(source, skipped_one, on_error="fail")
    assert source.loaded == [order[8]]


def test_left_out_image_that_can_be_read_now_is_taken(
    skipped_one: Path, order: list[str], whole: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    source = birds()
    run(source, skipped_one, on_error="skip")
    assert contents(skipped_one) == whole
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{order[8]} can be read now: going back to")
    assert 1 < len(source.loaded) <= len(order)


def test_left_out_images_before_one_that_can_be_read_now_are_listed_once(tmp_path: Path, order: list[str]) -> None:
    def source(*bad: int) -> Pictures:
        made = birds()
        made.unreadable = {order[place] for place in bad}
        return made

    stopped = source(7, 8)
    stopped.load = stopping(stopped, order[BAD])  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(stopped, tmp_path / "out", on_error="skip")
    run(source(7), tmp_path / "out", on_error="skip")
    run(source(7), tmp_path / "undisturbed", on_error="skip")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 3}, "`seed` 3 instead of 0"),
        ({"window_bytes": 99}, "`window_bytes` 99 instead of 8589934592"),
        ({"encode": EncodeSettings(None, 80)}, "`quality` 80 instead of None"),
        (
            {"seed": 3, "encode": EncodeSettings(50, 80)},
            "`seed` 3 instead of 0, `max_side` 50 instead of None, `quality` 80 instead of None",
        ),
    ],
)
def test_other_options_are_refused_by_name(
    tmp_path: Path, order: list[str], whole: dict[str, bytes], options: dict[str, object], message: str
) -> None:
    out = tmp_path / "out"
    fail(out, order)
    done = finished_items(out)
    expected = (
        rf"out\.partial holds another conversion, of which {done} images are done: expected the same source and "
        rf"options, got {message}\. Repeat the earlier command .* --overwrite to start anew, or give another --out\.$"
    )
    with pytest.raises(DataError, match=expected):
        run(birds(), out, **options)
    run(birds(), out)
    assert contents(out) == whole


def changed(change: Callable[[Pictures], None]) -> Pictures:
    source = birds()
    change(source)
    return source


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.__setattr__("size", 32), "`source's size` 32 instead of None"),
        (lambda s: s.__setattr__("items", s.items[:-1]), "`images` 41 instead of 42"),
        (lambda s: s.__setattr__("items", [*s.items[1:], s.items[0]]), "lists other images"),
        (lambda s: s.parts.__setitem__("extra", {"option": 1}), "lists other images, classes, columns or options"),
        (lambda s: s.parts.__setitem__("class_columns", {"owl": {"size": "big"}}), "lists other images"),
        (
            lambda s: s.__setattr__(
                "items", [SourceItem(i.class_name, i.split, i.source, {"view": "left"}) for i in s.items]
            ),
            "lists other images",
        ),
    ],
)
def test_another_source_is_refused(
    tmp_path: Path, order: list[str], change: Callable[[Pictures], None], message: str
) -> None:
    fail(tmp_path / "out", order)
    with pytest.raises(DataError, match=f"holds another conversion.*{message}"):
        run(changed(change), tmp_path / "out")


def test_overwrite_starts_anew(tmp_path: Path, order: list[str], whole: dict[str, bytes]) -> None:
    fail(tmp_path / "out", order)
    run(birds(), tmp_path / "out", seed=3, overwrite=True)
    assert contents(tmp_path / "out") != whole
    fail(tmp_path / "other", order)
    source = birds()
    run(source, tmp_path / "other", overwrite=True)
    assert source.loaded == order


def test_the_same_command_with_overwrite_continues(tmp_path: Path, order: list[str], whole: dict[str, bytes]) -> None:
    run(birds(), tmp_path / "out", seed=3)
    before = contents(tmp_path / "out")
    fail(tmp_path / "out", order, overwrite=True)
    assert contents(tmp_path / "out") == before
    source = birds()
    run(source, tmp_path / "out", overwrite=True)
    assert len(source.loaded) < len(order)
    assert contents(tmp_path / "out") == whole


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut_last_line(partial: Path) -> None:
    cut(partial / "journal.jsonl", (partial / "journal.jsonl").stat().st_size - 5)


def damage_second_line(partial: Path) -> None:
    lines = (partial / "journal.jsonl").read_bytes().split(b"\n")
    lines[1] = b"{}"
    (partial / "journal.jsonl").write_bytes(b"\n".join(lines))


@pytest.mark.parametrize(
    ("damage", "kept", "notice"),
    [
        (cut_last_line, -1, None),
        (damage_second_line, 0, r"journal\.jsonl is damaged in line 2"),
        (lambda p: (p / "journal.jsonl").unlink(), 0, None),
        (lambda p: cut(p / "journal.jsonl", 10), 0, None),
        (lambda p: flip(p / "shards" / "shard-000001.tar", 700), 1, r"shard-000001\.tar is damaged"),
        (lambda p: cut(p / "shards" / "shard-000001.tar", 512), 1, r"shard-000001\.tar is damaged"),
        (lambda p: (p / "shards" / "shard-000002.tar").unlink(), 2, r"shard-000002\.tar is damaged"),
        (lambda p: (p / "shards" / "shard-000001.index.npy").unlink(), 1, r"shard-000001\.tar is damaged"),
        (lambda p: flip(p / "shards" / "shard-000001.index.npy", 150), 1, r"shard-000001\.tar is damaged"),
        (lambda p: flip(p / "digests.bin", 3), 0, r"shard-000000\.tar is damaged"),
        (lambda p: (p / "digests.bin").unlink(), 0, r"shard-000000\.tar is damaged"),
        (lambda p: (p / "shards" / "manifest.json").write_text("{}"), None, None),
        (lambda p: (p / "shards" / "notes").write_text("?"), None, None),
        (lambda p: (p / "digests.bin").write_bytes((p / "digests.bin").read_bytes() + b"more"), None, None),
    ],
)
def test_what_is_damaged_is_done_again(
    tmp_path: Path,
    order: list[str],
    whole: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], object],
    kept: int | None,
    notice: str | None,
) -> None:
    fail(tmp_path / "out", order)
    tars = Journal(tmp_path / "out.partial").tars
    damage(tmp_path / "out.partial")
    source = birds()
    with caplog.at_level(logging.WARNING):
        run(source, tmp_path / "out")
    assert contents(tmp_path / "out") == whole
    count = len(tars) if kept is None else kept % len(tars)
    assert source.loaded == order[tars[count - 1].items if count else 0 :]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (notice is not None)
    if notice:
        assert caplog.records[0].levelno == logging.WARNING
        assert re.search(notice, messages[0])


def test_source_that_is_away_for_a_while(tmp_path: Path, order: list[str], whole: dict[str, bytes]) -> None:
    fail(tmp_path / "out", order)
    away = birds()

    def listing() -> None:
        raise DataError("Source folder x cannot be read.")

    away.listing = listing  # type: ignore[assignment, method-assign]
    with pytest.raises(DataError, match=r"Source folder x cannot be read\.$"):
        run(away, tmp_path / "out")
    run(birds(), tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_wrong_arguments_do_not_touch_what_is_there(tmp_path: Path, order: list[str]) -> None:
    fail(tmp_path / "out", order)
    before = contents(tmp_path / "out.partial" / "shards")
    with pytest.raises(InputError):
        run(birds(), tmp_path / "out", workers=0)
    assert contents(tmp_path / "out.partial" / "shards") == before


def test_duplicates_and_skipped_entries_of_both_runs_are_counted(tmp_path: Path, order: list[str]) -> None:
    def source() -> Pictures:
        made = birds()
        made.contents = {order[place]: encoded(9) for place in (1, 4, 35)}
        made.unreadable = {order[0], order[36]}
        return made

    stopped = source()
    stopped.load = stopping(stopped, order[BAD])  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(stopped, tmp_path / "out", on_error="skip")
    extra = run(source(), tmp_path / "out", on_error="skip").extra
    assert [entry["source"] for entry in extra["skipped"]] == [order[0], order[36]]
    assert (extra["duplicates"]["within_class"], extra["duplicates"]["across_splits"]) == (1, 1)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["extra"] == extra


def test_another_process_at_the_same_place_is_refused(tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    message = rf"Another conversion is writing to .*out\.partial \(process {os.getpid()}\)\. Wait .* another --out"
    folder = PartialFolder(out)
    folder.__enter__()
    with pytest.raises(DataError, match=message):
        run(birds(), out)
    assert folder.path.is_dir()
    folder.__exit__(RuntimeError, None, None)
    run(birds(), out)
    assert contents(out) == whole
