"""Further training of a checkpoint: on other text, and on conversations."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.errors import PipelineError
from model.modeling_rex import RexForCausalLM
from model.settings import CorpusSettings, ExperimentSettings, TokenizerSettings
from model.text.chat.template import MARKS, end_ids, turns_of
from model.text.corpus import build_corpus, read_documents
from model.text.tokenizer import load_tokenizer
from model.text.tokens import TokenDataset, build_tokenized_dataset
from model.training.failures import documents_of
from model.training.outputs.summary import TrainingSummary
from model.training.train import train
from model.weights.export import export_checkpoint
from tests.model.training.tiny import experiment

pytestmark = pytest.mark.medium

PAIRS = [(f"is {n} odd", "yes" if n % 2 else "no") for n in range(60)]


@pytest.fixture(scope="module")
def base(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    train(experiment(), dataset_dir, directory / "checkpoint", directory / "scratch")
    return directory / "checkpoint"


@pytest.fixture(scope="module")
def conversations(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("conversations")
    lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in PAIRS]
    (directory / "pairs.jsonl").write_text("\n".join(lines))
    corpus = CorpusSettings(
        source="files",
        paths=[str(directory / "pairs.jsonl")],
        text_field="prompt",
        response_field="response",
        validation_fraction=0.2,
    )
    build_corpus(corpus, directory / "corpus")
    build_tokenized_dataset(chat_tokenizer(base), directory / "corpus", directory / "dataset")
    return directory / "dataset"


def chat_tokenizer(base: Path) -> TokenizerSettings:
    return TokenizerSettings(kind="pretrained", path=str(base), chat=True, sequence_length=64)


def fine_tuning(base: Path, **training: object) -> ExperimentSettings:
    settings = experiment(init_from=str(base), per_device_train_batch_size=1, **training)
    settings = replace(settings, tokenizer=chat_tokenizer(base))
    settings.model.attention_dropout = 0.0
    return settings


@pytest.fixture(scope="module")
def tuned(base, conversations, tmp_path_factory) -> tuple[Path, TrainingSummary]:
    directory = tmp_path_factory.mktemp("tuned")
    settings = fine_tuning(base, max_steps=60, eval_steps=30, save_steps=30)
    summary = train(settings, conversations, directory / "checkpoint", directory / "scratch")
    return directory / "checkpoint", summary


@pytest.mark.parametrize("layout", ["rex", "glm4"])
def test_training_starts_from_the_checkpoint_and_goes_on_with_other_text(base, dataset_dir, tmp_path, layout):
    first: list[float] = []
    start = base
    if layout == "glm4":
        export_checkpoint(base, start := tmp_path / "glm4")
    train(
        experiment(init_from=str(start), max_steps=2, learning_rate=1e-9, muon_learning_rate=1e-9, weight_decay=0.0),
        dataset_dir,
        tmp_path / "output",
        tmp_path / "scratch",
        on_metrics=lambda step, metrics: first.append(metrics.get("eval_loss", 0.0)) if step == 0 else None,
    )
    scores = [entry["eval_loss"] for entry in json.loads((base / "curves.json").read_text()) if "eval_loss" in entry]
    assert first[0] == pytest.approx(scores[-1], abs=0.02)
    for name, tensor in load_file(tmp_path / "output" / "model.safetensors").items():
        torch.testing.assert_close(tensor, load_file(base / "model.safetensors")[name], atol=1e-6, rtol=0, msg=name)


def test_only_responses_are_learned_and_the_token_that_ends_them(conversations):
    tokenizer = load_tokenizer(conversations / "tokenizer")
    dataset = TokenDataset(conversations, "train", 64)
    learned: list[str] = []
    for index in range(len(dataset)):
        item = dataset[index]
        assert item["input_ids"].shape == item["labels"].shape == (64,)
        assert tokenizer.decode(item["input_ids"]).startswith(MARKS["user"])
        kept = item["labels"] >= 0
        assert torch.equal(item["labels"][kept], item["input_ids"][kept])
        learned += tokenizer.decode(item["labels"][kept]).split(tokenizer.eos_token)[:-1]
    assert len(learned) == len(dataset.document_offsets) - 1
    assert set(learned) == {"yes", "no"}
    assert sum(len(dataset.documents(i)) for i in range(len(dataset))) == len(learned)
    assert documents_of(dataset, [0]) == list(dataset.documents(0))


def test_the_model_is_asked_in_the_tokens_it_was_trained_on(conversations):
    tokenizer = load_tokenizer(conversations / "tokenizer")
    dataset = TokenDataset(conversations, "train", 64)
    start, response = int(dataset.document_offsets[0]), int(dataset.responses[0, 0])
    text = tokenizer.decode(dataset.tokens[start:response])
    prompt = text.removeprefix(MARKS["user"]).removesuffix(MARKS["assistant"])
    messages = [{"role": "user", "content": prompt}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert asked == text
    np.testing.assert_array_equal(tokenizer(asked).input_ids, dataset.tokens[start:response])
    told = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "no"}], tokenize=False)
    assert told == f"{text}no{tokenizer.eos_token}"


def test_a_fine_tuned_checkpoint_answers_and_stops(tuned):
    checkpoint, summary = tuned
    model, tokenizer = RexForCausalLM.from_pretrained(checkpoint), load_tokenizer(checkpoint)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "is 7 odd"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(asked, return_tensors="pt").input_ids
    answer = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) in (f"yes{tokenizer.eos_token}", f"no{tokenizer.eos_token}")
    assert summary.validation_loss < 1.0
    assert model.generation_config.eos_token_id == end_ids(tokenizer) and len(end_ids(tokenizer)) == 5


def test_a_checkpoint_of_another_shape_or_vocabulary_is_refused_by_what_differs(base, dataset_dir, tmp_path):
    settings = experiment(init_from=str(base))
    settings.model.hidden_size = 64
    with pytest.raises(
        PipelineError, match=r"init_from is .*: model.embed_tokens.weight is \[300, 32\] there and \[300, 64"
    ):
        train(settings, dataset_dir, tmp_path / "output", tmp_path / "scratch")
    with pytest.raises(PipelineError, match=r"init_from is '/nowhere': no model.safetensors there"):
        train(experiment(init_from="/nowhere"), dataset_dir, tmp_path / "output", tmp_path / "scratch2")
    other = shutil.copytree(base, tmp_path / "another vocabulary of the same size")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(PipelineError, match=r"its tokenizer \(300 tokens\) differs .*300 tokens, 4 entries differ"):
        train(experiment(init_from=str(other)), dataset_dir, tmp_path / "output", tmp_path / "scratch3")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "hello"}, r"line 1 has no field 'response'; found: prompt; set corpus.response_field"),
        ({"prompt": "hello", "response": ""}, r"line 1: found a string as prompt and an empty string as response"),
    ],
)
def test_a_record_that_is_no_conversation_is_refused_by_its_line(tmp_path, row, message):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    corpus = CorpusSettings(
        source="files", paths=[str(tmp_path / "pairs.jsonl")], text_field="prompt", response_field="response"
    )
    with pytest.raises(PipelineError, match=message):
        build_corpus(corpus, tmp_path / "corpus")


def test_a_conversation_stays_whole_where_the_corpus_is_cut(tmp_path):
    settings = CorpusSettings(source="docstrings", max_bytes=2000, split_by="position", validation_fraction=0.5)
    build_corpus(settings, tmp_path / "corpus")
    for split in ("train", "validation"):
        texts = list(read_documents(tmp_path / "corpus", split))
        assert texts and all([turn.role for turn in turns_of(text)] == ["user", "assistant"] for text in texts)


def test_plain_text_is_refused_as_conversations(base, tmp_path):
    (tmp_path / "a.txt").write_text("just text\n" * 40)
    build_corpus(
        CorpusSettings(source="files", paths=[str(tmp_path / "a.txt")], document_bytes=64, split_by="position"),
        tmp_path / "corpus",
    )
    with pytest.raises(PipelineError, match=r"a document of the corpus is not a conversation"):
        build_tokenized_dataset(chat_tokenizer(base), tmp_path / "corpus", tmp_path / "dataset")
