"""Saved REX checkpoints: tied weights, both ways of loading, and the code that travels with the weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from model.modeling_rex import RexConfig, RexForCausalLM, RexModel
from tests.model.test_modeling_rex import tiny_model, tokens

LOAD_AS_A_STRANGER = """
import importlib.util, sys, torch
from transformers import AutoModelForCausalLM, AutoModel
assert importlib.util.find_spec("model") is None, "the package must not be importable here"
loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
ids = torch.load(sys.argv[2])
body = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save({
    "logits": loaded(ids).logits,
    "hidden": body(ids).last_hidden_state,
    "generated": loaded.generate(ids, max_new_tokens=8, do_sample=False),
    "tied": loaded.lm_head.weight is loaded.model.embed_tokens.weight,
}, sys.argv[3])
loaded.save_pretrained(sys.argv[4])
"""


def saved_names(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return set(file.keys())


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.processes
def test_a_clean_process_loads_a_checkpoint_with_the_code_saved_beside_it(tmp_path: Path) -> None:
    model, ids, saved = tiny_model(), tokens(2, 7), tmp_path / "checkpoint"
    model.save_pretrained(saved)
    torch.save(ids, tmp_path / "ids.pt")
    (tmp_path / "elsewhere").mkdir()
    # -S: without site-packages' startup files, which put an editable install on the path.
    packages = [path for path in sys.path if path.endswith("site-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages), "HF_HOME": str(tmp_path / "hf")}
    arguments = [saved, tmp_path / "ids.pt", tmp_path / "out.pt", tmp_path / "resaved"]
    done = subprocess.run(
        [sys.executable, "-S", "-c", LOAD_AS_A_STRANGER, *map(str, arguments)],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = torch.load(tmp_path / "out.pt")
    assert torch.equal(made["logits"], model(ids).logits)
    assert torch.equal(made["hidden"], model.model(ids).last_hidden_state)
    assert torch.equal(made["generated"], model.generate(ids, max_new_tokens=8, do_sample=False))
    assert made["tied"]
    for name in ("configuration_rex.py", "modeling_rex.py"):
        assert (tmp_path / "resaved" / name).read_text() == (saved / name).read_text()


@torch.no_grad()
@pytest.mark.parametrize("auto_class", [RexForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("tied", [True, False])
def test_the_package_loads_what_it_saved(tmp_path: Path, auto_class: type, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is RexForCausalLM
    assert torch.equal(loaded(tokens(2, 40)).logits, model(tokens(2, 40)).logits)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert loaded.generation_config.eos_token_id == 0


def test_tied_weights_are_saved_once_and_loaded_tied(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "tied")
    tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    assert saved_names(tmp_path / "untied") - saved_names(tmp_path / "tied") == {"lm_head.weight"}
    tied = RexForCausalLM.from_pretrained(tmp_path / "tied")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = RexForCausalLM.from_pretrained(tmp_path / "untied")
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_a_checkpoint_carries_its_code_and_says_what_is_in_it(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for auto_class, name in config["auto_map"].items():
        module, class_name = name.split(".")
        assert f"class {class_name}(" in (tmp_path / f"{module}.py").read_text(), auto_class
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert {path.name for path in tmp_path.glob("*.py")} == {"configuration_rex.py", "modeling_rex.py"}


def test_the_auto_classes_know_rex() -> None:
    config = AutoConfig.for_model("rex", hidden_size=32, num_hidden_layers=1)
    assert type(config) is RexConfig
    assert type(AutoModel.from_config(config)) is RexModel
    assert type(AutoModelForCausalLM.from_config(config)) is RexForCausalLM


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_loads_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = RexForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert torch.equal(loaded(tokens(1, 40)).logits, tiny_model().to(dtype)(tokens(1, 40)).logits)
