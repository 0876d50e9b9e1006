from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from gcahng.errors import ConfigError
from gcahng.training.config import (
    Config,
    DataConfig,
    ModelConfig,
    RunConfig,
    check_config,
    config_from_mapping,
    load_config,
    resolved_yaml,
)

SMALLEST = "data: {dir: shards}\nrun: {dir: runs/x}\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def faults_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_smallest_file_takes_the_released_defaults(tmp_path):
    config = load_config(write(tmp_path / "a.yaml", SMALLEST))
    assert config.data.dir == "shards"
    assert (config.batch.num_classes, config.batch.num_samples) == (27, 3)
    assert (config.graph.num_layers, config.graph.num_heads) == (2, 4)
    # defaults that belong to a part, not to the class of all parts
    assert config.optim.metric_model.schedule.name == "step"
    assert config.optim.graph.schedule.name == "cosine"
    assert config.optim.classifier.lr == 1e-3
    assert config.optim.classifier.weight_decay == 1e-2
    assert config.optim.proxies.lr == pytest.approx(100 * config.optim.metric_model.lr)
    assert config.graph.edge_dropout == "tied"


def test_values_take_the_type_of_their_field(tmp_path):
    text = (
        "data: {dir: shards, transform: {scale: [0.5, 1]}}\nrun: {dir: r}\n"
        "generation: {alpha: 5}\noptim: {graph: {lr: 1e-4}, clip_value: null}\n"
        "eval: {ks: [1, 10]}\n"
    )
    config = load_config(write(tmp_path / "a.yaml", text))
    assert type(config.generation.alpha) is float and config.generation.alpha == 5.0
    assert config.optim.graph.lr == 1e-4  # not text, as in YAML 1.1
    assert config.optim.clip_value is None
    assert config.eval.ks == (1, 10)
    assert config.data.transform.scale == (0.5, 1.0)
    # the other defaults of a part survive a file that sets one of its values
    assert config.optim.graph.schedule.name == "cosine"


def test_config_is_frozen_and_keyword_only():
    config = config_from_mapping({"data": {"dir": "a"}, "run": {"dir": "b"}})
    with pytest.raises(FrozenInstanceError):
        config.seed = 1
    with pytest.raises(TypeError):
        RunConfig("b")


def test_overrides_are_yaml_and_win_in_order(tmp_path):
    path = write(tmp_path / "a.yaml", SMALLEST + "train: {epochs: 5}\n")
    config = load_config(
        path,
        [
            "train.epochs=7",
            "train.epochs=9",
            "model.backbone=small_conv",
            "eval.ks=[1, 2]",
            "model.weights=null",
            "graph.enabled=false",
            "generation.enabled=false",
            "data.dir=a=b",
            "generation.weights={similarity: 10}",
        ],
    )
    assert config.train.epochs == 9
    assert config.model.backbone == "small_conv"
    assert config.eval.ks == (1, 2)
    assert config.graph.enabled is False
    assert config.data.dir == "a=b"
    assert config.generation.weights.similarity == 10.0
    assert config.generation.weights.diversity == 60.0


def test_base_is_merged_deeply_and_relative_to_the_file(tmp_path):
    write(tmp_path / "base" / "root.yaml", "seed: 3\ntrain: {epochs: 5, precision: bf16}\n")
    write(tmp_path / "base" / "mid.yaml", "base: root.yaml\nloss: {args: {a: 1, b: 2}}\n")
    path = write(
        tmp_path / "x.yaml",
        "base: base/mid.yaml\n" + SMALLEST + "train: {epochs: 8}\nloss: {args: {c: 3}}\n",
    )
    config = load_config(path)
    assert (config.seed, config.train.epochs, config.train.precision) == (3, 8, "bf16")
    # arguments belong to the component named beside them: a later file replaces them whole
    assert config.loss.args == {"c": 3}
    assert load_config(path, ["loss.args.d=4"]).loss.args == {"c": 3, "d": 4}
    assert load_config(path, ["model.backbone_args.img_size=64"]).model.backbone_args == {"img_size": 64}


def test_empty_section_and_empty_file(tmp_path):
    config = load_config(write(tmp_path / "a.yaml", SMALLEST + "graph:\n  # all of it left out\n"))
    assert config.graph.num_layers == 2
    faults = faults_of(write(tmp_path / "b.yaml", "# nothing\n"))
    assert [fault.split(":")[0] for fault in faults] == ["data.dir", "run.dir"]
    assert "required and missing. Add it to the file, or pass data.dir=VALUE." in faults[0]


def test_all_faults_come_at_once_with_key_and_file(tmp_path):
    base = write(tmp_path / "base.yaml", "graph: {num_layer: 3}\nbatch: {num_samples: 1}\n")
    path = write(
        tmp_path / "x.yaml",
        "base: base.yaml\ndata: {dir: d}\nrun: {dir: 7}\nlr: 3\n"
        "train: {epochs: 2.5, epochs: many}\nmodel: {pooling: avg+maxx, backbone_args: [1]}\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["eval.ks=[4, 2]", "foo", "optim.graph.lr=0", "a.b.c=1"])
    message = str(caught.value)
    expected = [
        f"Configuration `{path}` has 11 faults:",
        f"graph.num_layer ({base}): unknown key; did you mean `graph.num_layers`?",
        f"batch.num_samples ({base}): must be at least 2: got 1.",
        f"run.dir ({path}): must be text: got 7.",
        f"lr ({path}): unknown key; did you mean `optim.metric_model.lr` or `optim.graph.lr`",
        f"train.epochs ({path}, line 5): the key stands twice.",
        f"train.epochs ({path}): must be a whole number: got 'many'.",
        f"model.pooling ({path}): must be one of avg, max, avg+max, cls (did you mean `avg+max`?)",
        f"model.backbone_args ({path}): must be a mapping of names to plain YAML values: got [1].",
        "eval.ks (command line): must be increasing numbers of at least 1: got [4, 2].",
        "foo (command line): an override has the form section.key=value.",
        "optim.graph.lr (command line): must be above 0: got 0.0.",
        "a.b.c (command line): unknown key; known here: seed, data, batch",
    ]
    for line in expected[1:]:
        assert line in message
    assert message.startswith(f"Configuration `{path}` has {len(expected) - 1} faults:")


def test_section_given_as_a_value(tmp_path):
    faults = faults_of(write(tmp_path / "a.yaml", SMALLEST + "eval: 3\n"))
    assert faults[0].startswith(f"eval ({tmp_path / 'a.yaml'}): is a section with keys every_epochs")


def test_unknown_key_without_a_near_one_lists_the_known(tmp_path):
    faults = faults_of(write(tmp_path / "a.yaml", SMALLEST + "batch: {zzzz: 3}\n"))
    assert faults[0].endswith("unknown key; known here: num_classes, num_samples, sampler, passes.")


def test_override_that_is_no_yaml(tmp_path):
    faults = faults_of(write(tmp_path / "a.yaml", SMALLEST), "eval.ks=[1, 2", "eval.split=2024-13-01")
    assert faults == [
        "eval.ks (command line): '[1, 2' is no YAML value; quote it.",
        "eval.split (command line): '2024-13-01' is no YAML value; quote it.",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {dir: [", r"a.yaml`, line 1, column \d+ is no valid YAML: .*Repair that line"),
        ("- 1\n- 2\n", r"a.yaml` must be a mapping of sections: got list"),
        ("data: !!python/object:os.system {}\n", r"is no valid YAML: could not determine a constr"),
    ],
)
def test_unusable_files(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "a.yaml", text))


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml` cannot be read: .*No such file.* Give the path"):
        load_config(tmp_path / "none.yaml")


def test_base_faults(tmp_path):
    assert faults_of(write(tmp_path / "a.yaml", "base: gone.yaml\n" + SMALLEST)) == [
        f"base ({tmp_path / 'a.yaml'}): no file `{tmp_path / 'gone.yaml'}` (relative to this file)."
    ]
    assert "must be the name of one file: got [1]" in faults_of(write(tmp_path / "a.yaml", "base: [1]\n" + SMALLEST))[0]
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    path = write(tmp_path / "a.yaml", "base: b.yaml\n" + SMALLEST)
    assert faults_of(path) == [f"base ({tmp_path / 'b.yaml'}): `a.yaml` is based on this file itself."]


def test_resolved_yaml_round_trips(tmp_path):
    config = config_from_mapping(
        {
            "data": {"dir": "a: b", "transform": {"mean": [0.1, 0.2, 0.3]}},
            "run": {"dir": "b"},
            "model": {"backbone_args": {"img_size": 64, "nested": {"a": [1, "x"]}}},
            "optim": {"graph": {"lr": 1e-5, "schedule": {"name": "milestones", "milestones": [3, 5]}}},
        }
    )
    assert load_config(write(tmp_path / "r.yaml", resolved_yaml(config))) == config


def test_check_config_finds_faults_of_constructors():
    good = Config(data=DataConfig(dir="a"), run=RunConfig(dir="b"))
    check_config(good)
    bad = Config(
        data=DataConfig(dir="a", validation=1.5),
        model=ModelConfig(embedding_dim=510),
        run=RunConfig(dir="b"),
    )
    with pytest.raises(ConfigError, match=r"(?s)2 faults.*data.validation.*graph.num_heads"):
        check_config(bad)
