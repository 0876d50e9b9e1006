"""Names from files in messages: nothing of them moves a terminal's cursor, colours it or renames its window."""

import logging

import pytest

from gcahng.errors import ConfigError
from launch import cli

NAME = "a\x1b]0;title\x07\x1b[2J\r\u202eb\udc80 é 龍\n\tc"
SHOWN = "a\\x1b]0;title\\x07\\x1b[2J\\r\\u202eb\\udc80 é 龍\n\tc"


def test_errors(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise ConfigError(NAME)

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 2 and capsys.readouterr().err == f"error: {SHOWN}\n"


def test_warnings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)

    def main() -> int:
        logging.getLogger("gcahng.test").warning("class %s", NAME)
        return 0

    with pytest.raises(SystemExit):
        cli.run(main)
    assert capsys.readouterr().err == f"WARNING: class {SHOWN}\n"
