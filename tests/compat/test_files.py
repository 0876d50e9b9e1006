"""Released files: what is read of them and what is refused, checkpoints made of them, and files made of checkpoints."""

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from released_cases import SMALL, assert_same_state, small_extractor, small_state
from run_cases import base_settings, convert_patterns, draw_patterns, make_trainer, with_overrides
from safetensors.torch import save_file
from torch import Tensor

from gcahng.compat import ReleasedModel, export_released, from_released, import_released, read_released
from gcahng.errors import ConfigError, DataError
from gcahng.training.checkpoint import read_state
from gcahng.training.evaluate_checkpoint import CheckpointModel, load_metric_model

CPU = torch.device("cpu")
EXTRACTOR = "feature_extractor."


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    return convert_patterns(draw_patterns(folder / "images"), folder / "shards")


def write_config(folder: Path, shards: Path, settings: dict[str, Any] | None = None) -> Path:
    changed = SMALL | (settings or {})
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(with_overrides(base_settings(shards, folder / "run"), changed)))
    return path


@pytest.fixture
def config(tmp_path: Path, shards: Path) -> Path:
    return write_config(tmp_path, shards)


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "bestR_1.pth")
    return folder / "bestR_1.pth"


def load(file: Path, config: Path, *overrides: str) -> dict[str, Tensor]:
    model, _ = ReleasedModel(file, config).load(overrides, CPU)
    return model.state_dict()


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "safetensors"])
def test_files_alone_or_wrapped(tmp_path, config, wrapper, caplog) -> None:
    state = {f"module.{name}": tensor for name, tensor in small_state().items()}
    if wrapper == "safetensors":
        file = tmp_path / "best.safetensors"
        save_file(state, file)
    else:
        file = saved(tmp_path, state if wrapper is None else {wrapper: state, "epoch": 3, "r1": 0.7})
    with caplog.at_level(logging.INFO, logger="gcahng"):
        got = load(file, config)
    assert_same_state(got, dict(from_released(state).parts["metric_model"]))
    assert ("beside the state dictionary, not read: epoch, r1" in caplog.text) == (wrapper in ("state_dict", "model"))
    assert "in no use: module.gnn.gnn.0.node_model.layers.0.update_node.bias, module.gnn.gnn.0" in caplog.text
    assert "not needed to evaluate: graph, classifier" in caplog.text


def test_the_model_that_is_read_embeds_as_theirs(tmp_path, config) -> None:
    state = {name: t for name, t in small_state().items() if name.startswith(EXTRACTOR)}
    model, settings = ReleasedModel(saved(tmp_path, state), config).load([], CPU)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert not model.training and settings.model.backbone == SMALL["model.backbone"]
    with torch.no_grad():
        torch.testing.assert_close(model(images), small_extractor()(images), rtol=1e-5, atol=1e-5)


class Attack:
    """A pickle that would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_file_with_code_is_refused_and_runs_nothing(tmp_path, config) -> None:
    target = tmp_path / "made"
    attack = saved(tmp_path, {"state_dict": small_state(), "optimizer": Attack(target)})
    with pytest.raises(ConfigError, match="holds other things than tensors, or is damaged; it is not read"):
        load(attack, config)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Attack(target), protocol=2))
    with pytest.raises(ConfigError, match=r"plain\.pth` holds other things"):
        load(tmp_path / "plain.pth", config)
    assert not target.exists()
    torch.load(attack, weights_only=False)  # the attack is a real one
    assert target.exists()


def test_files_that_are_none(tmp_path, config) -> None:
    whole = saved(tmp_path, small_state()).read_bytes()
    file = tmp_path / "cut.pth"
    for share in (0.0, 0.3, 0.9, 0.999):
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ConfigError, match=r"cut\.pth` .*(cannot be read|is damaged)"):
            load(file, config)
    file.write_text("not a checkpoint")
    with pytest.raises(ConfigError, match=r"cut\.pth`"):
        load(file, config)
    with pytest.raises(ConfigError, match=r"none\.pth` does not exist. Correct the path\."):
        load(tmp_path / "none.pth", config)
    for content in ([1, 2], {}, {"feature_extractor.fc.0.weight": 3}, torch.zeros(2)):
        with pytest.raises(ConfigError, match="must hold a state dictionary"):
            load(saved(tmp_path, content), config)
    with pytest.raises(ConfigError, match=r"bestR_1\.pth`: The file is no released checkpoint: .* got layer\.weight"):
        load(saved(tmp_path, {"layer.weight": torch.zeros(2)}), config)
    with pytest.raises(ConfigError, match="holds no metric model: got graph, classifier"):
        load(saved(tmp_path, {n: t for n, t in small_state().items() if not n.startswith(EXTRACTOR)}), config)
    odd = small_state() | {"feature_extractor.fc.1.bias": torch.zeros(8, device="meta")}
    with pytest.raises(ConfigError, match=r"without values of their own: feature_extractor\.fc\.1\.bias"):
        load(saved(tmp_path, odd), config)


def faulty(**changes: Tensor | None) -> dict[str, Tensor]:
    """The small state with entries of the metric model replaced, added or (None) left out; `_` stands for a dot."""
    state = small_state()
    for key, tensor in changes.items():
        name = EXTRACTOR + key.replace("__", ".")
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    return state


MISFITS: dict[str, tuple[dict[str, Tensor], str]] = {
    "missing": (
        faulty(backbone__norm__bias=None, fc__1__bias=None),
        r"2 missing in the file: feature_extractor\.backbone\.norm\.bias, feature_extractor\.fc\.1\.bias",
    ),
    "extra": (
        faulty(backbone__blocks__7__norm1__bias=torch.zeros(12)),
        r"1 not in the model: feature_extractor\.backbone\.blocks\.7\.norm1\.bias",
    ),
    "shape": (
        faulty(fc__1__weight=torch.zeros(6, 12)),
        r"1 of another shape: feature_extractor\.fc\.1\.weight \(6, 12\), the model's \(8, 12\)\n"
        r".*a vision transformer with BatchNorm and Linear from 12 features to 6 channels",
    ),
    "dtype": (
        faulty(fc__1__bias=torch.zeros(8, dtype=torch.float64)),
        r"1 of another dtype: feature_extractor\.fc\.1\.bias torch\.float64, the model's torch\.float32",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_listed(tmp_path, config, case: str) -> None:
    state, message = MISFITS[case]
    with pytest.raises(ConfigError, match=message):
        load(saved(tmp_path, state), config)


def test_another_architecture_than_the_configuration_says(tmp_path, config) -> None:
    file = saved(tmp_path, small_state())
    other = ["model.backbone=small_conv", "model.backbone_args={widths: [4, 8]}", "model.pooling=avg"]
    with pytest.raises(ConfigError) as caught:
        load(file, config, *other)
    message = str(caught.value)
    assert "missing in the file: feature_extractor.backbone.stem.0.weight" in message
    assert "not in the model: feature_extractor.backbone.cls_token" in message and " more\n" in message
    assert "The file holds a vision transformer with BatchNorm and Linear from 12 features to 8 channels" in message
    with pytest.raises(ConfigError, match=r"not in the model: feature_extractor\.fc\.0\.weight"):
        load(file, config, "model.head=linear")


def test_settings_that_no_weight_shows_are_warned_of(tmp_path, config, caplog) -> None:
    load(saved(tmp_path, small_state()), config)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    load(saved(tmp_path, small_state()), config, "model.pooling=avg")
    assert "model.pooling is avg, the authors' code computes cls" in caplog.text


def test_through_a_checkpoint_and_back_bit_for_bit(tmp_path, config) -> None:
    state = {f"module.{name}": tensor for name, tensor in small_state().items()}
    file = saved(tmp_path, {"state_dict": state})
    folder = import_released(file, config, tmp_path / "imported", ["eval.batch_size=5"])
    assert folder == tmp_path / "imported" / "step-0" and (tmp_path / "imported" / "last").resolve() == folder
    model, settings = load_metric_model(tmp_path / "imported" / "last")
    assert_same_state(model.state_dict(), dict(from_released(state).parts["metric_model"]))
    assert settings.eval.batch_size == 5 and settings.run.dir == str(tmp_path / "imported")
    about = read_state(folder)
    assert about["data"]["num_classes"] == 6 and about["released"]["file"] == "bestR_1.pth"
    # What the authors' code saves was chosen on the test classes, whatever it is evaluated as.
    assert CheckpointModel(folder).chosen_on_test() and ReleasedModel(file, config).chosen_on_test()
    assert export_released(folder, tmp_path / "back.pth") == []
    assert_same_state(torch.load(tmp_path / "back.pth", weights_only=True), state)
    (folder / "released_unused.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"released_unused\.safetensors is damaged"):
        export_released(folder, tmp_path / "back.pth")


def test_a_run_starts_from_an_imported_file(tmp_path, config, shards, caplog) -> None:
    folder = import_released(saved(tmp_path, small_state()), config, tmp_path / "imported")
    settings = SMALL | {"train.init_from": str(folder)}
    with caplog.at_level(logging.INFO, logger="gcahng"):
        trainer = make_trainer(shards, tmp_path / "run", settings)
    fresh = "fresh: graph.node_classifier.bias, graph.node_classifier.weight, classifier.bias, classifier.weight."
    assert fresh in caplog.text
    parts = from_released(small_state()).parts
    assert_same_state(trainer.parts.modules["metric_model"].state_dict(), dict(parts["metric_model"]))
    graph = trainer.parts.modules["graph"].state_dict()
    body = {name: tensor for name, tensor in parts["graph"].items() if not name.startswith("node_classifier.")}
    assert_same_state({name: graph[name] for name in body}, body)
    with pytest.raises(ConfigError, match="was made of a released file, which holds weights alone"):
        make_trainer(shards, tmp_path / "other", settings | {"train.init_from": None, "train.resume": str(folder)})


def test_parts_that_the_configuration_lacks_or_that_do_not_fit(tmp_path, shards, caplog) -> None:
    file = saved(tmp_path, small_state())
    config = write_config(tmp_path, shards, {"graph.num_layers": 1})
    with pytest.raises(ConfigError, match=r"does not fit part `graph` .*(?s:.)*not in the model: gnn\.gnn\.1\."):
        import_released(file, config, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()
    config = write_config(tmp_path, shards, {"graph.enabled": False, "generation.enabled": False})
    folder = import_released(file, config, tmp_path / "imported")
    assert "has no part `graph`" in caplog.text and "has no part `classifier`" in caplog.text
    export_released(folder, tmp_path / "back.pth")
    assert_same_state(torch.load(tmp_path / "back.pth", weights_only=True), small_state())
    with pytest.raises(ConfigError, match=r"imported exists. Name a new run folder"):
        import_released(file, config, tmp_path / "imported")


def test_what_the_authors_code_would_compute_otherwise_is_said_when_a_file_is_written(tmp_path, shards, caplog) -> None:
    file = saved(tmp_path, small_state())
    folder = import_released(file, write_config(tmp_path, shards, {"model.pooling": "avg"}), tmp_path / "imported")
    caplog.clear()
    export_released(folder, tmp_path / "back.pth")
    assert "model.pooling is avg, the authors' code computes cls" in caplog.text


def test_a_run_of_ours_under_the_authors_names(tmp_path, shards, caplog) -> None:
    settings = SMALL | {"train.max_steps_per_epoch": 1, "loss.metric": "proxy_anchor"}
    trainer = make_trainer(shards, tmp_path / "run", settings)
    trainer.run()
    assert not CheckpointModel(tmp_path / "run" / "last").chosen_on_test()
    assert export_released(tmp_path / "run" / "last", tmp_path / "ours.pth") == ["metric_loss"]  # the proxies
    assert "no weight shows" not in caplog.text
    released = read_released(tmp_path / "ours.pth")
    for part in ("metric_model", "graph", "classifier"):
        assert_same_state(dict(released.parts[part]), dict(trainer.parts.modules[part].state_dict()))
    # What the authors' module has and ours has not, they load without: their eval.py is not strict.
    theirs = small_extractor(seed=5)
    tensors = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert set(small_state()) - set(tensors) == {n for n in small_state() if "update_node" in n}
    theirs.load_state_dict({n.removeprefix(EXTRACTOR): t for n, t in tensors.items() if n.startswith(EXTRACTOR)})
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), trainer.parts.metric_model.eval()(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=r"ends in \.pth or \.pt"):
        export_released(tmp_path / "run" / "last", tmp_path / "ours.onnx")


def test_a_classifier_of_features_is_left_out(tmp_path, shards) -> None:
    """The authors' classifier takes embeddings: theirs would refuse ours, or take it for another where C is D."""
    generator = {"generation.method": "generator", "generation.coefficients": "single", "graph.enabled": False}
    settings = SMALL | generator | {"train.max_steps_per_epoch": 1}
    for classify, left_out in (("features", ["classifier", "generator"]), ("embeddings", ["generator"])):
        run = tmp_path / classify
        make_trainer(shards, run, settings | {"generation.generator.classify": classify}).run()
        assert export_released(run / "last", run / "ours.pth") == left_out
        assert ("classifier" in read_released(run / "ours.pth").parts) == (classify == "embeddings")
