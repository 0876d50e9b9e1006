import pytest

from gcahng.training.config import settings_help
from gcahng.training.config_help import setting_meaning
from gcahng.training.config_load import walk_settings


def test_every_setting_has_a_meaning():
    for key, _, _ in walk_settings():
        assert len(setting_meaning(key)) > 10, key


def test_help_lists_key_type_default_and_meaning():
    text = settings_help()
    assert "batch.num_classes: int, default 27\n    P, different classes per batch" in text
    assert "data.dir: str, required\n" in text
    assert "graph.edge_dropout: tied | independent, default 'tied'\n" in text
    assert "model.weights: str | None, default null\n" in text
    assert "optim.classifier.lr: float, default 0.001\n" in text


def test_unknown_setting_has_none():
    with pytest.raises(KeyError):
        setting_meaning("batch.num_class")
