"""Composing experiments: each one resolves, each option is explained, each mistake is one clear line."""

import dataclasses
import re
import subprocess
import sys

import pytest
import yaml
from omegaconf import OmegaConf

from llm_assets.experiments.compose import CONFIG_DIR, compose, experiment_names, to_yaml
from model.errors import PipelineError
from model.settings import ExperimentSettings

GROUPS = {f.name: f.type for f in dataclasses.fields(ExperimentSettings) if f.name not in ("name", "description")}
OPTION_FILES = sorted(path for group in GROUPS for path in (CONFIG_DIR / group).glob("*.yaml"))


@pytest.mark.parametrize("name", experiment_names())
def test_every_experiment_composes_and_prints(name):
    settings = compose(name)
    assert settings.name == name and settings.description
    assert yaml.safe_load(to_yaml(settings))["training"]["max_steps"] == settings.training.max_steps


@pytest.mark.parametrize("path", OPTION_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_option_stands_beside_its_true_default(path):
    settings_class = GROUPS[path.parent.name]
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    for line in lines:
        match = re.fullmatch(r"(\w+): .*  # (.+) \(default: (.+)\)", line)
        assert match, f"{path.name}: {line!r} does not explain itself"
        field = next(f for f in dataclasses.fields(settings_class) if f.name == match[1])
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        stated = match[3]
        if stated == "none":
            assert default in ("", None, [])
        else:
            assert OmegaConf.create(f"v: {stated}").v == default or stated == str(default), line


@pytest.mark.parametrize(
    ("name", "overrides", "says"),
    [
        ("smok", [], r"no experiment 'smok'.*did you mean 'smoke'\?"),
        ("smoke", ["training.max_step=3"], "Key 'max_step' not in 'TrainingSettings'"),
        ("smoke", ["+training.max_step=3"], "Key 'max_step' not in 'TrainingSettings'"),
        ("smoke", ["training.max_steps=many"], "'many' of type 'str' could not be converted to Integer"),
        ("smoke", ["training.max_steps=0"], "training.max_steps is 0: expected a number greater than 0"),
        ("smoke", ["training.optim=lion"], r"Invalid value 'lion', expected one of \['muon', 'adamw'\]"),
        ("smoke", ["model=enormous"], "Could not find 'model/enormous'"),
        ("smoke", ["model.num_attention_heads=3"], "model.hidden_size is 64: expected a multiple of"),
        ("smoke", ["model.num_key_value_heads=3"], "model.num_attention_heads is 4: expected a multiple of"),
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
