"""`metrics.jsonl` and TensorBoard: one row per event, whole after a crash, nothing twice after a resume."""

import json
import logging
import math
from pathlib import Path

import pytest
from full_disk import files_of_at_most
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gcahng.errors import TrainingError
from gcahng.training.run_log import HARDNESS_FILE, METRICS_FILE, RunLog, read_rows


def curve(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def write_steps(log: RunLog, steps: range, slope: float = 0.5) -> None:
    for step in steps:
        log.write("step", step, {"epoch": 0, "loss": slope * step})


def test_rows_are_json_objects_in_order(tmp_path) -> None:
    with RunLog(tmp_path) as log:
        write_steps(log, range(1, 3))
        log.write("evaluation", 2, {"split": "test", "map_at_r": 0.25, "num_queries": 7})
        # Readable while the run goes on.
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == read_rows(tmp_path / "metrics.jsonl")
    assert rows == [
        {"kind": "step", "step": 1, "epoch": 0, "loss": 0.5},
        {"kind": "step", "step": 2, "epoch": 0, "loss": 1.0},
        {"kind": "evaluation", "step": 2, "split": "test", "map_at_r": 0.25, "num_queries": 7},
    ]
    assert curve(tmp_path, "step/loss") == [(1, 0.5), (2, 1.0)]
    assert curve(tmp_path, "evaluation/test/map_at_r") == [(2, 0.25)]


def test_splits_have_curves_of_their_own(tmp_path) -> None:
    with RunLog(tmp_path) as log:
        for split, value in (("test", 0.25), ("validation", 0.5)):
            log.write("evaluation", 3, {"split": split, "map_at_r": value})
    assert curve(tmp_path, "evaluation/test/map_at_r") == [(3, 0.25)]
    assert curve(tmp_path, "evaluation/validation/map_at_r") == [(3, 0.5)]


def test_numbers_that_json_lacks_become_text(tmp_path) -> None:
    with RunLog(tmp_path) as log:
        log.write("step", 1, {"a": math.nan, "b": -math.inf, "c": 1.0})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert row == {"kind": "step", "step": 1, "a": "nan", "b": "-inf", "c": 1.0}


def test_a_continued_log_drops_later_steps_and_keeps_the_rest(tmp_path) -> None:
    with RunLog(tmp_path) as log:
        write_steps(log, range(1, 6))
        log.write("evaluation", 3, {"split": "test", "map_at_r": 0.125})
    with RunLog(tmp_path, from_step=3) as log:
        write_steps(log, range(4, 8), slope=2.0)
    rows = read_rows(tmp_path / "metrics.jsonl")
    want = [(1, 0.5), (2, 1.0), (3, 1.5), (4, 8.0), (5, 10.0), (6, 12.0), (7, 14.0)]
    assert [(row["step"], row["loss"]) for row in rows if row["kind"] == "step"] == want
    assert curve(tmp_path, "step/loss") == want
    # The evaluation at the step of the checkpoint was before it.
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == [3]
    assert curve(tmp_path, "evaluation/test/map_at_r") == [(3, 0.125)]


def test_a_new_log_forgets_an_earlier_one(tmp_path) -> None:
    with RunLog(tmp_path) as log:
        write_steps(log, range(1, 6))
    with RunLog(tmp_path) as log:
        write_steps(log, range(1, 3), slope=2.0)
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == [2.0, 4.0]
    assert curve(tmp_path, "step/loss") == [(1, 2.0), (2, 4.0)]


def test_a_line_that_a_crash_cut_is_left_out(tmp_path) -> None:
    with RunLog(tmp_path) as log:
        write_steps(log, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "step", "step": 3, "lo')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    with RunLog(tmp_path, from_step=2) as log:
        write_steps(log, range(3, 4))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert not list(tmp_path.glob("*.partial"))


def test_no_file_has_no_rows(tmp_path) -> None:
    assert read_rows(tmp_path / "metrics.jsonl") == []
    with RunLog(tmp_path, from_step=4):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_event_files_begun_at_once_still_sort_by_age(tmp_path) -> None:
    """TensorBoard reads them by name: seconds first, and a counter whose 10 sorts before its 9."""
    for number in range(3):
        with RunLog(tmp_path, from_step=number or None) as run_log:
            run_log.write("step", number + 1, {"total_loss": 1.0})
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len({f.name.split(".")[3] for f in files}) == 3
    assert files == sorted(files, key=lambda f: f.stat().st_mtime_ns)


def test_rows_that_the_disk_refuses_are_written_later_once_and_whole(tmp_path, caplog) -> None:
    path = tmp_path / METRICS_FILE
    with RunLog(tmp_path) as log:
        write_steps(log, range(1, 3))
        size = path.stat().st_size
        with files_of_at_most(size + 10):  # the next row fits in part
            write_steps(log, range(3, 6))
            assert path.stat().st_size == size
            assert [json.loads(row)["step"] for row in log.unwritten()[METRICS_FILE]] == [3, 4, 5]
            with pytest.raises(TrainingError, match=r"3 rows of .*metrics\.jsonl cannot be written, but"):
                log.finish()
        write_steps(log, range(6, 7))
        assert log.unwritten() == {}
        log.finish()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(step, step / 2) for step in range(1, 7)]
    assert curve(tmp_path, "step/loss") == [(step, step / 2) for step in range(1, 7)]
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len([text for text in errors if f"{path} cannot be written" in text and "File too large" in text]) == 1


def test_a_resumed_log_has_the_rows_that_waited_once(tmp_path) -> None:
    """Some of them came into the file after the checkpoint was made."""
    with RunLog(tmp_path) as log:
        write_steps(log, range(1, 3))
        with files_of_at_most(10):
            write_steps(log, range(3, 5))
            log.write_hardness(4, {"d": 0.5})
            waiting = log.unwritten()
    kept = (tmp_path / METRICS_FILE).read_text().splitlines()[:3]
    (tmp_path / METRICS_FILE).write_text("\n".join(kept) + "\n")
    (tmp_path / HARDNESS_FILE).write_text("")
    for _ in range(2):
        with RunLog(tmp_path, from_step=4, unwritten=waiting):
            pass
        assert [row["step"] for row in read_rows(tmp_path / METRICS_FILE)] == [1, 2, 3, 4]
        assert read_rows(tmp_path / HARDNESS_FILE) == [{"step": 4, "d": 0.5}]


def test_a_log_that_cannot_be_begun_is_an_error(tmp_path) -> None:
    with pytest.raises(TrainingError, match=r"logs of .* cannot be written \(.*No such file.*\): make room"):
        RunLog(tmp_path / "absent")
