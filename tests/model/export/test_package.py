"""What `python -m model.export` writes."""

import copy
import json
import shutil
import subprocess
from itertools import chain
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Glm4Config, PreTrainedTokenizerFast

from model.artifact import MANIFEST, content_hash, file_digests
from model.errors import PipelineError
from model.export.__main__ import main
from model.export.gguf import reason_against, write_gguf
from model.export.ollama import modelfile
from model.export.package import export
from model.export.stored import as_stored
from model.generation.requests import SamplingParameters
from model.settings import TokenizerSettings
from model.text.chat.template import MARKS, end_ids
from model.text.tokenizer import train_tokenizer
from model.weights import int4, int8
from model.weights.loading import FORMAT_VERSION, QUANTIZATION, load_model
from tests.support.tiny import PLAIN_TEMPLATE, ROPE_SCALING, TEXT, save_tiny_model, tiny_model, tiny_tokenizer

GO: dict[str, Any] = json.loads(Path(__file__).with_name("rendered.json").read_text())
"""Ollama's templates, conversations, and what Go renders of them: releases 1.19 and 1.27 render alike."""


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TokenizerSettings(vocab_size=280, chat=True, sequence_length=96), [TEXT] * 8)


def test_the_recipe_of_ollama_renders_what_the_chat_template_renders(chat_tokenizer) -> None:
    """Go's renderings are kept beside this file; a test below makes them again where there is Go."""
    recipe = modelfile(tiny_model(chat_tokenizer), chat_tokenizer)
    assert recipe.split('"""')[1] == GO["template"]
    assert set(chain.from_iterable((m["role"] for m in turns) for turns in GO["conversations"].values())) > set(MARKS)
    for name, turns in GO["conversations"].items():
        ours = chat_tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert GO["rendered"][name] == ours


def test_the_recipe_of_a_checkpoint_from_before_role_marks_renders_its_chat_template(chat_tokenizer) -> None:
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = PLAIN_TEMPLATE
    recipe = modelfile(tiny_model(tokenizer), tokenizer)
    assert recipe.split('"""')[1] == GO["template_before_marks"]
    for name, turns in GO["conversations"].items():
        ours = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert GO["rendered_before_marks"][name] == ours


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(not shutil.which("go"), reason="no Go, which renders Ollama's templates (Debian's golang-go)")
@pytest.mark.parametrize("kind", ["", "_before_marks"])
def test_go_renders_the_recipe_of_ollama_as_it_is_kept(kind: str) -> None:
    asked = json.dumps({"template": GO[f"template{kind}"], "conversations": GO["conversations"]})
    command = ["go", "run", str(Path(__file__).with_name("render.go"))]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == GO[f"rendered{kind}"]


def test_the_recipe_of_ollama_stops_where_the_service_does_and_samples_like_it(chat_tokenizer) -> None:
    lines = modelfile(tiny_model(chat_tokenizer), chat_tokenizer).splitlines()
    parameters = [tuple(line.split(" ", 2)[1:]) for line in lines if line.startswith("PARAMETER ")]
    stops = [json.loads(value) for name, value in parameters if name == "stop"]
    assert sorted(map(chat_tokenizer.convert_tokens_to_ids, stops)) == sorted(end_ids(chat_tokenizer))
    sampling, named = SamplingParameters(), dict(parameters)
    for name in ("temperature", "top_k", "top_p"):
        assert float(named[name]) == getattr(sampling, name)
    assert (named["repeat_penalty"], named["min_p"], named["num_ctx"]) == ("1", "0", "96")


def test_a_chat_template_of_another_project_is_left_to_ollama(chat_tokenizer) -> None:
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    recipe = modelfile(tiny_model(tokenizer), tokenizer)
    assert "TEMPLATE" not in recipe and 'PARAMETER stop "<|endoftext|>"' in recipe


def test_the_command_writes_every_format_with_card_modelfile_and_checksums(tmp_path: Path, capsys) -> None:
    save_tiny_model(tmp_path / "rex")
    assert main([str(tmp_path / "rex"), str(tmp_path / "out"), "--name", "mine"]) == 0
    assert capsys.readouterr().out.count("\n") == 4
    modelfile = (tmp_path / "out/gguf/Modelfile").read_text()
    assert modelfile.startswith("FROM ./model-q8_0.gguf\n") and 'PARAMETER stop "<|endoftext|>"' in modelfile
    assert "ollama create mine -f gguf/Modelfile" in (tmp_path / "out/README.md").read_text()
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=tmp_path / "out",
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0 and "gguf/model-f32.gguf: OK" in checked.stdout
    assert not list((tmp_path / "out").rglob("*.py"))


def test_a_quantized_model_is_exported_in_the_values_of_its_weights(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "rex")
    quantized = int8.quantize(load_model(tmp_path / "rex"))
    shutil.copytree(tmp_path / "rex", tmp_path / "int8")
    save_file(quantized.state_dict(), tmp_path / "int8/model.safetensors")
    (tmp_path / "int8" / QUANTIZATION).write_text(json.dumps({"format_version": FORMAT_VERSION, "method": "int8"}))
    export(tmp_path / "int8", tmp_path / "out", ["hf"])
    ids = torch.arange(24)[None]
    expected = load_model(tmp_path / "int8", quantized=False)(ids).logits
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out/hf")(ids).logits
    torch.testing.assert_close(exported, expected, atol=1e-5, rtol=0)


def test_the_model_card_says_what_the_manifest_of_the_checkpoint_does(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "rex")
    files = file_digests(tmp_path / "rex")
    version = content_hash(files)
    made = {"asset": "trained_checkpoint", "experiment": "mine", "content_hash": version, "config": {"model": {"a": 1}}}
    origin = {**made, "upstream": {"tokenized_dataset": "cd34"}, "registration": {"bits_per_byte": 1.25}}
    (tmp_path / "rex" / MANIFEST).write_text(json.dumps({**origin, "files": files}))
    export(tmp_path / "rex", tmp_path / "out", ["hf"])
    lines = (tmp_path / "out/README.md").read_text().splitlines()
    assert "- experiment: mine" in lines and "- bits per byte: `1.25`" in lines
    upstream = json.dumps({"tokenized_dataset": "cd34", "trained_checkpoint": version})
    assert f"- upstream versions: `{upstream}`" in lines
    assert '- configuration: `{"model": {"a": 1}}`' in lines and any(line.startswith("- commit: ") for line in lines)


@pytest.mark.parametrize("name", ["", "my model", '"', "-x", "a\nb", "../a"])
def test_a_name_that_ollama_does_not_take_is_refused(tmp_path: Path, capsys, name: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), str(tmp_path / "out"), f"--name={name}"])
    assert "expected letters, digits" in capsys.readouterr().err


def test_only_the_format_asked_for_is_written(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "rex")
    assert main([str(tmp_path / "rex"), str(tmp_path / "out"), "--to", "gguf"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gguf", "README.md", "SHA256SUMS"}


def test_a_gguf_in_four_bits_is_written_where_it_is_asked_for_and_the_recipe_takes_the_smallest(
    tmp_path: Path, capsys
) -> None:
    save_tiny_model(tmp_path / "rex")
    assert main([str(tmp_path / "rex"), str(tmp_path / "out"), "--to", "gguf", "--gguf", "q4_0", "full"]) == 0
    assert [line.split("/")[-1] for line in capsys.readouterr().out.splitlines()] == [
        "model-f32.gguf  float32",
        "model-q4_0.gguf  q4_0",
    ]
    assert not (tmp_path / "out/gguf/model-q8_0.gguf").exists()
    assert (tmp_path / "out/gguf/Modelfile").read_text().startswith("FROM ./model-q4_0.gguf\n")
    assert "llama-completion -m gguf/model-q4_0.gguf" in (tmp_path / "out/README.md").read_text()


def test_the_weights_of_a_gguf_are_refused_where_none_is_written(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), str(tmp_path / "out"), "--to", "hf", "--gguf", "q4_0"])
    assert "--gguf is for --to gguf or all, and --to is hf" in capsys.readouterr().err


def test_compressed_tensors_holds_the_integers_of_the_int8_model(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "rex")
    export(tmp_path / "rex", tmp_path / "out", ["compressed-tensors"])
    stored = load_file(tmp_path / "out/compressed-tensors/model.safetensors")
    quantized = int8.quantize(load_model(tmp_path / "rex")).state_dict()
    down = "model.layers.1.mlp.down_proj"
    expected = next(value for name, value in quantized.items() if name.startswith(down) and value.dtype == torch.int8)
    assert torch.equal(stored[f"{down}.weight"], expected)
    assert stored[f"{down}.weight_scale"].shape == (len(expected), 1)
    assert stored["model.embed_tokens.weight"].dtype == torch.float32
    config = AutoConfig.from_pretrained(tmp_path / "out/compressed-tensors")
    assert type(config) is Glm4Config and config.quantization_config["format"] == "int-quantized"


def test_a_character_tokenizer_is_left_out_of_gguf_with_the_reason(tmp_path: Path, capsys) -> None:
    tokenizer = train_tokenizer(TokenizerSettings(kind="char"), [TEXT])
    tiny_model(tokenizer).save_pretrained(tmp_path / "rex")
    tokenizer.save_pretrained(tmp_path / "rex")
    assert reason_against(load_model(tmp_path / "rex").config, tokenizer)
    made = export(tmp_path / "rex", tmp_path / "out")
    assert [file.path for file in made.files] == ["hf", "compressed-tensors"] and "character" in made.left_out["gguf"]
    assert main([str(tmp_path / "rex"), str(tmp_path / "out"), "--to", "gguf"]) == 1
    assert "error: no GGUF of this model: the tokenizer has one token per character" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"rope_scaling": ROPE_SCALING["llama3"]}, "'llama3' in Llama's layout alone, not in glm4"),
        ({"rope_scaling": {**ROPE_SCALING["yarn"], "truncate": False}}, "truncate False, and llama.cpp rounds"),
    ],
)
def test_rotary_embeddings_that_llama_cpp_lacks_are_left_out_of_gguf_with_the_reason(
    tmp_path: Path, capsys, shape: dict[str, Any], reason: str
) -> None:
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer, **shape).save_pretrained(tmp_path / "rex")
    tokenizer.save_pretrained(tmp_path / "rex")
    made = export(tmp_path / "rex", tmp_path / "out")
    assert [file.path for file in made.files] == ["hf", "compressed-tensors"] and reason in made.left_out["gguf"]
    capsys.readouterr()  # transformers' progress bars
    assert main([str(tmp_path / "rex"), str(tmp_path / "out"), "--to", "gguf"]) == 1
    assert reason in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_a_folder_without_a_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"^no config.json in .*: expected a REX checkpoint; train one first$"):
        export(tmp_path, tmp_path / "out")


def test_a_file_or_the_checkpoint_itself_is_no_folder_to_write_to(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "rex")
    card = (tmp_path / "rex/README.md").exists()
    for output in (tmp_path / "rex/config.json", tmp_path / "rex"):
        with pytest.raises(PipelineError, match=rf"^{output} is a file or the checkpoint's own folder: name another"):
            export(tmp_path / "rex", output)
    assert (tmp_path / "rex/README.md").exists() == card


def test_a_gguf_in_q4_0_holds_the_values_of_our_int4_and_int8_for_the_embedding(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, hidden_size=64, intermediate_size=96)
    write_gguf(model, tokenizer, tmp_path / "model.gguf", "q4_0", name="tiny")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0" and kinds["blk.0.ffn_norm.weight"] == "F32"
    down = tensors["blk.1.ffn_down.weight"]
    assert kinds["blk.1.ffn_down.weight"] == "Q4_0"
    expected = int4.quantize(model).model.layers[1].mlp.down_proj.dequantized()
    assert torch.equal(torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type)), expected)


def test_a_bfloat16_model_is_a_gguf_of_its_own_values(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "rex")
    tokenizer.save_pretrained(tmp_path / "rex")
    made = export(tmp_path / "rex", tmp_path / "out", ["gguf"], gguf_kinds=["full"])
    assert [(file.path, file.precision) for file in made.files] == [("gguf/model-bf16.gguf", "bfloat16")]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out/gguf/model-bf16.gguf").tensors}
    down = tensors["blk.1.ffn_down.weight"]
    assert down.tensor_type.name == "BF16" and tensors["blk.1.ffn_norm.weight"].tensor_type.name == "F32"
    expected = model.model.layers[1].mlp.down_proj.weight.float()
    assert torch.equal(torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["q8_0", "q4_0", "int8"])
def test_an_engine_is_compared_with_the_values_that_its_file_holds(
    tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, hidden_size=64, intermediate_size=96).to(dtype)
    model.save_pretrained(tmp_path / "rex")
    tokenizer.save_pretrained(tmp_path / "rex")
    stored = as_stored(model, precision)
    name, embedding = "model.layers.1.mlp.down_proj", stored.model.embed_tokens.weight
    if precision == "int8":
        export(tmp_path / "rex", tmp_path / "out", ["compressed-tensors"])
        tensors = load_file(tmp_path / "out/compressed-tensors/model.safetensors")
        written = tensors[f"{name}.weight"] * tensors[f"{name}.weight_scale"].float()
        assert torch.equal(embedding, tensors["model.embed_tokens.weight"].float())
    else:
        write_gguf(model, tokenizer, tmp_path / "model.gguf", precision, name="tiny")
        file = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
        written, embedded = (
            torch.from_numpy(gguf.quants.dequantize(file[key].data, file[key].tensor_type))
            for key in ("blk.1.ffn_down.weight", "token_embd.weight")
        )
        assert torch.equal(embedding, embedded)
    assert torch.equal(stored.get_submodule(name).weight, written)
