"""Templates of the page. Everything put into them is escaped, names of classes, keys and runs above all."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from gcahng.errors import InputError
from gcahng.report.section import Table

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDER = Path(__file__).parent / "templates"
# Control characters, halves of pairs, and marks that turn the direction of whatever follows.
_NOT_SHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NUMBER = re.compile(r"[-+]?[\d,]+(\.\d+)?( ± \d+(\.\d+)?)?( ?%)?|[-\u2013]")


@cache
def environment() -> "Environment":
    """The templates, with autoescape.

    Raises:
        InputError: jinja2 is missing.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise InputError(
            "The report needs jinja2, which is not installed. Install it with: pip install 'gcahng[report]'"
        ) from error
    made = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=readable,
    )
    made.tests["number_text"] = lambda text: _NUMBER.fullmatch(text) is not None
    return made


def readable(value: Any) -> Any:
    """What is put into a page: of texts that others wrote, letters that would change or break the rest are replaced."""
    return _NOT_SHOWN.sub("\ufffd", value) if isinstance(value, str) and not isinstance(value, Markup) else value


def table_markup(table: Table, own_rows: Sequence[int] = ()) -> Markup:
    """A table whose rows of these numbers stand out."""
    module = environment().get_template("parts.html").make_module()
    return Markup(module.table(table, frozenset(own_rows)))  # type: ignore[attr-defined]
