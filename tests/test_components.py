import sys
from pathlib import Path

import pytest

from gcahng.components import is_component_path, load_component
from gcahng.errors import ConfigError

MODULE = '''
import torch
from torch import nn


class SquaredError(nn.Module):
    """An own metric loss."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, embeddings, labels):
        return self.scale * embeddings.square().mean()
'''


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of a user's, importable for the length of one test."""
    package = tmp_path / "my_parts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "losses.py").write_text(MODULE)
    (package / "broken.py").write_text("value = 1 / 0\n")
    (package / "needy.py").write_text("import a_module_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "my_parts"]:
        del sys.modules[name]


@pytest.mark.parametrize("path", ["my_parts.losses:SquaredError", "my_parts.losses.SquaredError"])
def test_loads_a_users_class_that_works(own_package, path):
    import torch

    loss = load_component(path)(scale=2.0)
    assert loss(torch.full((3, 4), 3.0), torch.arange(3)).item() == 18.0


def test_loads_from_the_standard_library():
    import collections

    assert load_component("collections:OrderedDict") is collections.OrderedDict


@pytest.mark.parametrize("path", ["", "plain", "a b.c", "my_parts.losses:", "a:b:c", "1a.b", "a..b"])
def test_refuses_another_form(path):
    assert not is_component_path(path)
    with pytest.raises(ConfigError, match=r"is no dotted path\. Write it as `package.module:Name`"):
        load_component(path)


def test_missing_module_names_path_and_repair():
    with pytest.raises(
        ConfigError,
        match=r"`no_such_package.losses:Loss`: no module `no_such_package` can be imported\. "
        r"Install .* PYTHONPATH",
    ):
        load_component("no_such_package.losses:Loss")


def test_missing_submodule_is_named(own_package):
    with pytest.raises(ConfigError, match=r"no module `my_parts\.loses` can be imported"):
        load_component("my_parts.loses:SquaredError")


def test_missing_dependency_is_not_taken_for_the_module_itself(own_package):
    with pytest.raises(
        ConfigError,
        match=r"importing `my_parts.needy` failed because it needs .*a_module_nobody_has",
    ):
        load_component("my_parts.needy:Loss")


def test_error_inside_the_module_is_reported(own_package):
    with pytest.raises(
        ConfigError,
        match=r"importing `my_parts.broken` raised ZeroDivisionError: division by zero\. Repair",
    ):
        load_component("my_parts.broken:value")


def test_missing_name_suggests_the_nearest(own_package):
    with pytest.raises(
        ConfigError,
        match=r"module `my_parts.losses` \(.*losses.py\) has no name `SquareError`\. Did you mean "
        r"`SquaredError`\?",
    ):
        load_component("my_parts.losses:SquareError")


def test_missing_name_without_a_near_one():
    with pytest.raises(ConfigError, match=r"has no name `Zzzzzz`\. Check the spelling"):
        load_component("collections:Zzzzzz")
