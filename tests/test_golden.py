"""The golden files replay, and the command that replays them tells good files from bad ones."""

import os
import subprocess
import sys
from pathlib import Path

import check_golden
import numpy as np
import pytest
from golden_replay import TOLERANCE, replay

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["cub_like", "sop_like", "four_per_class", "retrieval"])
def test_every_quantity_of_a_golden_file_is_met(name: str) -> None:
    rows = replay(GOLDEN / f"{name}.npz")
    late = [f"{quantity}: {error:.1e}" for quantity, error in rows if not error <= TOLERANCE]
    assert not late
    if name != "retrieval":
        for backend in ("eager", "scatter"):
            mine = [quantity for quantity, _ in rows if quantity.startswith(f"[{backend}]")]
            assert any("iter2/J_gen" in quantity for quantity in mine)
            for part in ("metric_model", "graph", "classifier"):
                assert any(f"final {part}" in quantity for quantity in mine)


def command(path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / "check_golden.py"), str(path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )


def altered(source: str, key: str, target: Path) -> Path:
    """A copy of a golden file with one number moved by a millionth of the largest."""
    with np.load(GOLDEN / source) as archive:
        content = dict(archive)
    values = content[key].copy()
    values.reshape(-1)[0] += 1e-6 * np.abs(values).max()
    np.savez(target, **(content | {key: values}))
    return target


def test_command_passes_a_good_file() -> None:
    done = command(GOLDEN / "retrieval.npz")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    assert all(line.startswith("ok") for line in lines[:-1])
    assert "6 quantities" in lines[-1]


def test_command_fails_a_file_with_one_wrong_number(tmp_path: Path) -> None:
    done = command(altered("retrieval.npz", "qg_recall", tmp_path / "altered.npz"))
    assert done.returncode == 1, done.stderr
    assert [line.split()[-2:] for line in done.stdout.splitlines() if line.startswith("FAIL")] == [
        ["qg", "recall_at_k"]
    ]


@pytest.mark.parametrize("key", ["stage/coef", "stage/grad_syn_z", "iter1/J_gen"])
def test_one_wrong_number_of_a_configuration_file_fails(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = altered("four_per_class.npz", key, tmp_path / "altered.npz")
    assert check_golden.main([str(path)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    # Every reading of that number fails (both backends, table and blocks), and nothing else.
    assert len(failed) >= 2
    assert all(key.removeprefix("stage/") in line for line in failed)


def test_command_refuses_a_file_of_unknown_kind(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", something=np.zeros(3))
    done = command(tmp_path / "other.npz")
    assert done.returncode == 2
    assert "neither a configuration file" in done.stderr


def test_command_refuses_what_is_no_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.npz"
    text.write_text("not an archive")
    cut = tmp_path / "cut.npz"
    cut.write_bytes((GOLDEN / "sct.npz").read_bytes()[:1000])
    for path in (text, cut, tmp_path / "missing.npz"):
        assert check_golden.main([str(path)]) == 2
        assert path.name in capsys.readouterr().err
    assert check_golden.main([]) == 2
