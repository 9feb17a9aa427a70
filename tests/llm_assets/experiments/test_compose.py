"""Composing experiments: each one resolves, each option is explained, each mistake is one clear line."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

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


def test_every_number_has_an_upper_bound():
    numbers = [
        item for kind in GROUPS.values() for item in options(kind) if {int, float} & {item.type, *get_args(item.type)}
    ]
    assert len(numbers) > 70
    unbounded = [
        item.full_name
        for item in numbers
        if item.bounds is None or (item.bounds.maximum is None and item.bounds.below is None)
    ]
    assert not unbounded


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b"corpus:\n\tmax_bytes: 1\n", 3, "spaces instead of a tab"),
        (b"training: {seed: 1}\ntraining: {seed: 2}\n", 3, "given twice, first on line 2"),
        (b"corpus:\n  paths: [*.txt]\n", 3, "quotes around a text"),
        (b"description: \xff\n", 2, "not UTF-8"),
        (b"- a\n- b\n", 2, "a list at the top"),
        (b"training: {max_step: 3}\n", 2, "Did you mean one of: 'max_steps'"),
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


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b"corpus: {license: a}\n\xef\xbb\xbftraining: {seed: 1}\n", 3, "a byte order mark"),
        (b"training: {'max_steps ': 3}\n", 2, "Key 'max_steps ' not in"),
        (b"training: {seed:1}\n", 2, "Did you mean: 'seed'"),
        (b"training:\n  seed:1\n", 3, "the value 'seed:1' for 'training'"),
        (b"training:\n  - seed: 1\n", 3, "a list for 'training'"),
        (b"training:\n", 2, "nothing for 'training'"),
        (b"training: ${model}\n", 2, "expected options as"),
        (b"training: {arguments: [1]}\n", 2, "a list for training.arguments: expected a mapping"),
        (b"training: {seed: 010}\n", 2, "which YAML reads as 8: expected digits alone"),
        (b"training: {seed: !!int x}\n", 2, "expected a value of the type int"),
        (b"training: {sample_prompts: [def, yes]}\n", 2, "is yes, which YAML reads as True: expected quotes: 'yes'"),
        (b"corpus: {license: '${a b}'}\n", 2, "expected `${group.option}`"),
        (b"training: {sample_prompts: ['${nope}']}\n", 2, "Interpolation key 'nope' not found"),
        (b"model: {rope_scaling: {rope_type: linear, factor: .nan}}\n", 2, "model.rope_scaling.factor is nan"),
        (b"corpus: {source: mixture, mixture: {a: 7}}\n", 2, "corpus.mixture.a is 7"),
        (b"corpus: {source: mixture, mixture: {a: {paths: x}}}\n", 2, "corpus.paths is 'x': expected a list of texts"),
        (b"corpus: {source: mixture, mixture: {a: {source: web}}}\n", 2, "corpus.source is 'web': expected stdlib"),
        (b"corpus: {source: mixture, mixture: {a: {paths: [x], max_bytes: many}}}\n", 2, "corpus.max_bytes is 'many'"),
        (b"name: other\n", 2, "the name is that of the file"),
        (b"? [a]\n: 1\n", 2, "a list in place of an option's name"),
        (b"defaults: 7\n", 2, "the value '7' as 'defaults'"),
        (b"defaults:\n  - 7\n", 3, "the value '7': expected `- override /GROUP: FILE`"),
        (b"defaults:\n  - broken\n", 3, "this experiment in its own defaults"),
        (b"defaults:\n  - override /corpus: 7\n", 3, "the value '7' for 'override /corpus': expected one of"),
        (b"defaults:\n  - override /corpus: [files, stdlib]\n", 3, "a list for 'override /corpus'"),
        (b"defaults:\n  - override corpus: files\n", 3, "GROUP one of corpus, tokenizer"),
        (b"defaults:\n  - {override /corpus: files, override /model: rex_2m}\n", 3, "several choices in one entry"),
        (
            b"training: {arguments: {%s}}\n" % b", ".join(b"k%d: 1" % n for n in range(9000)),
            2,
            "more than 5,000 values",
        ),
    ],
)
def test_a_mistake_of_any_kind_is_told_with_its_place(content, line, says, config_dir):
    (config_dir / "experiment" / "broken.yaml").write_bytes(b"# @package _global_\ndescription: a\n" + content)
    with pytest.raises(PipelineError, match=f"broken.yaml, line {line + 1}: .*{re.escape(says)}") as caught:
        compose("broken", config_dir=config_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("defaults:\n  - group\n", "line 1: 'defaults' in a file of the group training"),
        ("# @package model\nseed: 1\n", "line 1: a line '@package' in a file of the group training"),
        ("- seed\n", "line 1: a list at the top"),
    ],
)
def test_a_mistake_in_a_file_of_a_group_has_its_place(content, says, config_dir):
    (config_dir / "training" / "group.yaml").write_text(content)
    (config_dir / "experiment" / "broken.yaml").write_text(
        "# @package _global_\ndescription: a\ndefaults:\n  - override /training: group\n"
    )
    with pytest.raises(PipelineError, match=f"training/group.yaml, {says}"):
        compose("broken", config_dir=config_dir)


def test_two_experiments_in_the_defaults_of_each_other_are_one_line(config_dir):
    for name, other in (("one", "two"), ("two", "one")):
        (config_dir / "experiment" / f"{name}.yaml").write_text(
            f"# @package _global_\ndescription: a\ndefaults:\n  - {other}\n"
        )
    with pytest.raises(PipelineError, match="recursion") as caught:
        compose("one", config_dir=config_dir)
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize("name", [b"a\nb", b"a\xffb", b"Smoke", b"-x"])
def test_a_name_of_any_bytes_is_one_line_beside_the_list(name, config_dir, capsys):
    (config_dir / "experiment" / f"{os.fsdecode(name)}.yaml").write_text("description: a\n")
    assert main(["--list", "--config-dir", str(config_dir)]) == 1
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and printed.err.encode()
    assert "smoke" in printed.out


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Path.mkdir, "is a folder"),
        (lambda path: path.symlink_to("nowhere"), "cannot be read"),
        (lambda path: path.symlink_to(path.name), "cannot be read"),
        (os.mkfifo, "is a device or a pipe"),
    ],
    ids=["folder", "dangling", "cycle", "pipe"],
)
def test_what_is_no_file_is_one_line_and_the_other_experiments_go_on(make, says, config_dir, capsys):
    make(config_dir / "experiment" / "broken.yaml")
    with pytest.raises(PipelineError, match=rf"broken\.yaml {says}"):
        compose("broken", config_dir=config_dir)
    assert main(["--list", "--config-dir", str(config_dir)]) == 1
    printed = capsys.readouterr()
    assert "smoke" in printed.out and len(printed.err.splitlines()) == 1


def test_files_that_editors_keep_beside_an_experiment_are_passed_over(config_dir):
    before = experiment_names(config_dir)
    (config_dir / "experiment" / ".#smoke.yaml").symlink_to("somebody@host.1234")
    (config_dir / "experiment" / "._smoke.yaml").write_bytes(b"\0\5\x16\7")
    assert main(["--list", "--config-dir", str(config_dir)]) == 0
    assert experiment_names(config_dir) == before


@pytest.mark.parametrize(
    ("name", "overrides", "says"),
    [
        ("smok", [], r"no experiment 'smok'.*did you mean 'smoke'\?"),
        ("smoke", ["experiment=stdlib"], "'experiment=stdlib' would give 'smoke' another's settings"),
        ("smoke", ["++name=other"], "run that experiment"),
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
