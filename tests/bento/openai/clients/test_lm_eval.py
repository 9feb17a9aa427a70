"""lm-eval's models of a server have the numbers and texts of its model of the same checkpoint in this process."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model.modeling_rex import RexForCausalLM
from model.text.chat.template import TEMPLATE, add_marks
from model.text.tokenizer import load_tokenizer
from model.weights.loading import load_model
from tests.bento.running_service import Server, serve
from tests.support.harness import needs_harness
from tests.support.tiny import tiny_model, tiny_tokenizer

pytestmark = [pytest.mark.processes, pytest.mark.slow, needs_harness]
CONTEXT = 256
ROWS = [
    {"question": question, "first": first, "second": second, "answer": 0}
    for question, first, second in [
        ("def main", "(x):", ")))"),
        ("return", " None", " 'größer"),
        ("print('", "日本", "语🦖 and much more"),
        ("a text that is longer than the others: " * 3, "yes", "no"),
    ]
] + [{"question": "def main():\n    return 'größer' " * 20, "first": "a", "second": "b", "answer": 1}]
"""The last is longer than the context: a rolling log-likelihood takes several windows."""
DATA = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
TASKS = {
    "choices": """\
output_type: multiple_choice
doc_to_text: "{{question[:60]}}"
doc_to_choice: "{{[first, second]}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "rolling": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
    "texts": """\
output_type: generate_until
doc_to_text: "{{question[:60]}}"
doc_to_target: "{{first}}"
generation_kwargs: {until: ["zz"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the project's chat template."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    add_marks(tokenizer)
    tiny_model(tokenizer, max_position_embeddings=CONTEXT).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("server"), checkpoint, REX_SERVED_MODEL_NAME="rex") as running:
        yield running


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """lm-eval's registry of the tasks of this file alone."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(DATA.format(name=name, data=data) + task)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def in_process(checkpoint: Path) -> Any:
    """lm-eval's model of the checkpoint."""
    from lm_eval.models.huggingface import HFLM

    model: RexForCausalLM = load_model(checkpoint)
    # Of a server's context, lm-eval keeps one token for the text that the server has to generate; its windows have one
    # for their context.
    return HFLM(pretrained=model, tokenizer=load_tokenizer(checkpoint), batch_size=2, max_length=CONTEXT - 2)


def answers(manager: Any, tasks: list[str], judge: Any, **options: Any) -> dict[str, list[Any]]:
    """What a model answered to each request of each task, in the order of the documents."""
    import lm_eval

    found = lm_eval.simple_evaluate(
        model=judge, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )
    assert found["results"].keys() == set(tasks)
    return {
        name: [answer for row in sorted(rows, key=lambda row: row["doc_id"]) for answer in row["resps"]]
        for name, rows in found["samples"].items()
    }


ON_DISK = {"tokenizer_backend": "huggingface"}


@pytest.mark.parametrize(
    ("options", "tasks"),
    [
        (ON_DISK, TASKS),
        ({**ON_DISK, "batch_size": 64, "num_concurrent": 4}, TASKS),
        # A window that ends inside a character is not a text.
        ({**ON_DISK, "batch_size": 3, "tokenized_requests": False}, ["choices", "texts"]),
        ({"tokenizer_backend": "remote"}, TASKS),
    ],
    ids=["one by one", "batches, four at once", "texts", "the server's tokenizer"],
)
def test_log_likelihoods_and_texts_of_completions_equal_those_in_process(
    server, checkpoint, manager, in_process, options, tasks
):
    if options["tokenizer_backend"] == "huggingface":
        options = {**options, "tokenizer": str(checkpoint)}
    arguments = {"base_url": f"{server.url}/v1/completions", "model": "rex", "max_length": CONTEXT, **options}
    served = answers(manager, list(tasks), "local-completions", model_args=arguments)
    local = answers(manager, list(tasks), in_process)
    assert served["texts"] == local["texts"]
    for name in {"choices", "rolling"} & set(tasks):
        ours, theirs = (torch.tensor([numbers(one) for one in found[name]]) for found in (served, local))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
        assert len(set(ours[:, 0].tolist())) == len(ours)


def test_texts_of_chats_equal_those_in_process(server, manager, in_process):
    arguments = {"base_url": f"{server.url}/v1/chat/completions", "model": "rex", "num_concurrent": 2}
    options = {"apply_chat_template": True, "system_instruction": "größer"}
    served = answers(manager, ["texts"], "local-chat-completions", model_args=arguments, **options)
    local = answers(manager, ["texts"], in_process, **options)
    assert served == local
    assert served != answers(manager, ["texts"], in_process)
    assert len({text for (text,) in served["texts"]}) > 1


def numbers(answer: Any) -> list[float]:
    """A log-likelihood in nats, and whether the text is the likeliest one where the task asks for it."""
    ((value, *is_greedy),) = [one if isinstance(one, (list, tuple)) else (one,) for one in answer]
    return [float(value), *map(float, is_greedy)]
