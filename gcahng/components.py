"""Own components by dotted path: a loss, a backbone, a sampler or a data source of the user's.

A configuration names such an object as `package.module:Name` or `package.module.Name`. The module
must be importable by the running Python: installed, or on `PYTHONPATH`.
"""

import difflib
import importlib
import re
from types import ModuleType
from typing import Any

from gcahng.errors import ConfigError

_NAME = r"[^\W\d]\w*"
_PATH = re.compile(rf"(?P<module>{_NAME}(\.{_NAME})*)(:|\.)(?P<attribute>{_NAME})")
_FORM = "Write it as `package.module:Name` or `package.module.Name`."


def is_component_path(text: str) -> bool:
    """Tell whether `text` has the form of a dotted path (nothing is imported)."""
    return _PATH.fullmatch(text) is not None


def load_component(path: str) -> Any:
    """Import the object that a dotted path names.

    Args:
        path: `package.module:Name` or `package.module.Name`.
    Returns:
        The object itself: a class, a function, whatever the module holds under that name.
    Raises:
        ConfigError: `path` has another form, its module cannot be imported, or the module has no
            such name. The message names the path, what failed, and the repair.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        raise ConfigError(f"Component `{path}` is no dotted path. {_FORM}")
    module = _import_module(path, match["module"])
    attribute = match["attribute"]
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        near = difflib.get_close_matches(attribute, public, n=1)
        hint = f"Did you mean `{near[0]}`?" if near else "Check the spelling."
        raise ConfigError(
            f"Component `{path}`: module `{module.__name__}` ({_origin(module)}) has no name `{attribute}`. {hint}"
        )
    return getattr(module, attribute)


def _import_module(path: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        # A module that exists but lacks one of its own dependencies needs another repair.
        if name == missing or name.startswith(f"{missing}."):
            raise ConfigError(
                f"Component `{path}`: no module `{missing}` can be imported. Install the package "
                f"that holds it, or add its folder to PYTHONPATH."
            ) from error
        raise ConfigError(
            f"Component `{path}`: importing `{name}` failed because it needs the module "
            f"`{missing}`, which is not installed. Install it."
        ) from error
    except Exception as error:  # whatever the user's own module raises while it loads
        raise ConfigError(
            f"Component `{path}`: importing `{name}` raised {type(error).__name__}: {error}. "
            f"Repair that module; `python -c 'import {name}'` shows the whole traceback."
        ) from error


def _origin(module: ModuleType) -> str:
    return str(getattr(module, "__file__", None) or "no file")
