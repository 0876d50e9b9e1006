"""Each configuration file opens with the command that runs it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("configs", "configs/ablations", "configs/losses", "configs/sct")


def opening_fault(path: Path, root: Path) -> str | None:
    """What is wrong with the first line of a configuration file, or None."""
    lines = path.read_text(encoding="utf-8").splitlines()
    opening = lines[0] if lines else ""
    name = path.relative_to(root).as_posix()
    want = f"launch/train.py --config {name}"
    if opening.startswith("# accelerate launch ") and want in f"{opening} ":
        return None
    return f"{name} must open with '# accelerate launch {want}': got {opening!r}"


def test_every_configuration_opens_with_its_launch_command() -> None:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.yaml"))]
    assert {path.parent for path in paths} == {ROOT / folder for folder in FOLDERS}, "no configuration found"
    assert [fault for path in paths if (fault := opening_fault(path, ROOT))] == []


@pytest.mark.parametrize(
    ("first_line", "is_right"),
    [
        ("# accelerate launch launch/train.py --config configs/a.yaml", True),
        ("# accelerate launch launch/train.py --config configs/a.yaml data.shards=DIR", True),
        ("# accelerate launch launch/train.py --config configs/b.yaml", False),
        ("# python launch/train.py --config configs/a.yaml", False),
        ("seed: 0", False),
        ("", False),
    ],
)
def test_opening_line(tmp_path: Path, first_line: str, is_right: bool) -> None:
    path = tmp_path / "configs" / "a.yaml"
    path.parent.mkdir()
    path.write_text(f"{first_line}\nseed: 0\n" if first_line else "")
    assert (opening_fault(path, tmp_path) is None) == is_right
