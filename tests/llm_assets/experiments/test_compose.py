"""Composing experiments: each one resolves, each option is explained, each mistake is one clear line."""

import re
import shutil
import subprocess
import sys

import pytest
import yaml

from llm_assets.experiments.compose import CONFIG_DIR, compose, experiment_names, main, to_yaml
from llm_assets.experiments.explain import as_yaml
from model.errors import PipelineError
from model.settings import GROUPS, options


@pytest.fixture
def config_dir(tmp_path):
    """The configuration with one experiment: listing all of them composes all of them."""
    copy = tmp_path / "configs"
    shutil.copytree(CONFIG_DIR, copy)
    for path in (copy / "experiment").glob("*.yaml"):
        if path.stem != "smoke":
            path.unlink()
    return copy


OPTION_FILES = sorted(path for group in GROUPS for path in (CONFIG_DIR / group).glob("*.yaml"))


@pytest.mark.parametrize("name", experiment_names())
def test_every_experiment_composes_and_prints(name):
    settings = compose(name)
    assert settings.name == name and settings.description
    assert yaml.safe_load(to_yaml(settings))["training"]["max_steps"] == settings.training.max_steps


@pytest.mark.parametrize("path", OPTION_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_file_holds_what_differs_from_the_defaults(path):
    defaults = {item.name: item.default for item in options(GROUPS[path.parent.name])}
    given = yaml.safe_load(path.read_text()) or {}
    assert not {name for name in given if given[name] == defaults[name]} - {"source", "kind", "method"}


def test_every_option_is_explained_beside_its_resolved_value():
    settings = compose("stdlib_chat")
    text = as_yaml(settings)
    assert yaml.safe_load(text) == yaml.safe_load(to_yaml(settings))
    assert all(item.text for kind in GROUPS.values() for item in options(kind))


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b"corpus:\n\tmax_bytes: 1\n", 3, "spaces instead of a tab"),
        (b"training: {seed: 1}\ntraining: {seed: 2}\n", 3, "given twice, first on line 2"),
        (b"corpus:\n  paths: [*.txt]\n", 3, "quotes around a text"),
        (b"description: \xff\n", 2, "not UTF-8"),
        (b"- a\n- b\n", 2, "a list at the top"),
        (b"training: {max_step: 3}\n", 2, "did you mean 'max_steps'"),
        (b"training:\n  max_steps: 0\n", 3, "expected a number greater than 0"),
        (b"tokenizer: {vocab_size: 1000000000000}\n", 2, "at most 1,048,576"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_its_place_and_the_other_experiments_go_on(
    content, line, says, config_dir, capsys
):
    (config_dir / "experiment" / "broken.yaml").write_bytes(b"# @package _global_\n" + content)
    with pytest.raises(PipelineError, match=f"broken.yaml, line {line}: .*{re.escape(says)}") as caught:
        compose("broken", config_dir=config_dir)
    assert "\n" not in str(caught.value)
    assert main(["--list", "--config-dir", str(config_dir)]) == 1
    printed = capsys.readouterr()
    assert "smoke" in printed.out and len(printed.err.splitlines()) == 1


@pytest.mark.parametrize("content", [b"7\n", b"", b"# only this\n"])
def test_a_file_without_options_is_refused_in_one_line(content, config_dir):
    (config_dir / "experiment" / "broken.yaml").write_bytes(content)
    with pytest.raises(PipelineError, match=r"broken.yaml, line 1: .*expected options"):
        compose("broken", config_dir=config_dir)


def test_a_name_that_no_registry_takes_is_refused_where_the_files_are_read(config_dir, capsys):
    (config_dir / "experiment" / "my run.yaml").write_text("description: a\n")
    assert "my run" not in experiment_names(config_dir)
    assert main(["--list", "--config-dir", str(config_dir)]) == 1
    assert "my run.yaml: 'my run' is not a valid experiment name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "overrides", "says"),
    [
        ("smok", [], r"no experiment 'smok'.*did you mean 'smoke'\?"),
        ("smoke", ["training.max_step=3"], "Key 'max_step' not in 'TrainingSettings'"),
        ("smoke", ["training.arguments.tf32=false"], r"Key 'tf32' is not in struct; .* as '\+OPTION.NAME=VALUE'"),
        ("smoke", ["+training.max_step=3"], "Key 'max_step' not in 'TrainingSettings'"),
        ("smoke", ["training.max_steps=many"], "'many' of type 'str' could not be converted to Integer"),
        ("smoke", ["training.max_steps=0"], "training.max_steps is 0: expected a number greater than 0"),
        ("smoke", ["training.optim=lion"], r"Invalid value 'lion', expected one of \['muon', 'adamw'\]"),
        ("smoke", ["model=enormous"], "Could not find 'model/enormous'"),
        ("smoke", ["model.num_attention_heads=3"], "model.hidden_size is 64: expected a multiple of"),
        ("smoke", ["model.num_key_value_heads=3"], "model.num_attention_heads is 4: expected a multiple of"),
        (
            "smoke",
            ["++model.rope_scaling={rope_type:su}"],
            "model.rope_scaling.rope_type is 'su': expected one of linear",
        ),
        (
            "smoke",
            ["++model.rope_scaling={rope_type:llama3}"],
            "expected factor, low_freq_factor, .* with the type llama3",
        ),
        (
            "smoke",
            ["++model.rope_scaling={rope_type:linear,factor:2,base:3}"],
            "'base': 3}: expected factor with the type",
        ),
        (
            "smoke",
            ["++model.rope_scaling={rope_type:linear,factor:0.5}"],
            "rope_scaling.factor is 0.5: expected at least 1",
        ),
        (
            "smoke",
            ["model.partial_rotary_factor=0.2"],
            "expected an even share of a head's 16 numbers, not 3, as rotary",
        ),
        (
            "smoke",
            ["model.partial_rotary_factor=0.5", "model.post_norm=false", "model.qk_norm=true"],
            "model.partial_rotary_factor is 0.5: expected 1, or model.qk_norm=false",
        ),
        ("smoke", ["tokenizer.sequence_length=512"], "sequence_length is 512: expected at most .*256"),
        ("smoke", ["corpus.validation_fraction=1.5"], "validation_fraction is 1.5: expected a fraction"),
        ("smoke", ["tokenizer.vocab_size=100"], "vocab_size is 100: expected at least 258"),
        ("smoke", ["training.learning_rate=nan"], "learning_rate is nan: expected a number greater than 0"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_value(name, overrides, says):
    with pytest.raises(PipelineError, match=says) as caught:
        compose(name, overrides)
    assert "\n" not in str(caught.value)


def test_an_override_reaches_the_settings():
    settings = compose("smoke", ["training.max_steps=7", "quantization=none", "+training.arguments.tf32=false"])
    assert settings.training.max_steps == 7
    assert settings.quantization.method == "none"
    assert settings.training.arguments == {"tf32": False}


@pytest.mark.processes
def test_the_command_prints_the_settings_and_fails_in_one_line():
    command = [sys.executable, "-m", "llm_assets.experiments"]
    good = subprocess.run([*command, "smoke", "training.seed=5"], capture_output=True, text=True, check=True)
    assert yaml.safe_load(good.stdout)["training"]["seed"] == 5
    assert good.stderr == ""
    bad = subprocess.run([*command, "nope"], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: no experiment 'nope'") and len(bad.stderr.splitlines()) == 1
