import json
from pathlib import Path

import pytest
import torch

from bench.report import tasks
from bench.report.tasks import check_names, read_scores, score_tasks
from model.errors import PipelineError
from model.modeling_rex import RexForCausalLM
from model.settings import EvaluationSettings
from model.text.tokenizer import load_tokenizer
from model.weights.loading import load_model
from tests.model.text.applied import in_any_order
from tests.support.harness import needs_harness
from tests.support.tiny import save_tiny_model

QUESTIONS = [("def main", "(x):", ")))", 0), ("return", "None", " 'größer", 1), ("print('", "日本", "语", 0)] * 2
TASK = """\
task: mine
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{[first, second]}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task and its data."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = ("question", "first", "second", "answer")
    rows = [dict(zip(names, row, strict=True)) for row in QUESTIONS]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(TASK.format(data=data))
    return tmp_path / "tasks"


@needs_harness
@pytest.mark.medium
@pytest.mark.processes
def test_a_task_of_a_yaml_file_is_scored_as_the_models_own_log_likelihoods_say(model_dir, folder, tmp_path):
    lines: list[str] = []
    settings = EvaluationSettings(tasks=["mine"], include_path=str(folder), batch_size=2)
    found = score_tasks(settings, model_dir, tmp_path, log=lines.append)
    model, tokenizer = load_model(model_dir), load_tokenizer(model_dir)

    def nats(context: str, continuation: str) -> float:
        prompt, whole = (tokenizer(text).input_ids for text in (context, context + continuation))
        log_p_TV = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(log_p_TV[at - 1, whole[at]].item() for at in range(len(prompt), len(whole)))

    right = [int(nats(q, second) > nats(q, first)) == answer for q, first, second, answer in QUESTIONS]
    (accuracy,) = [score for score in found if score.metric == "acc"]
    assert accuracy.value == pytest.approx(sum(right) / len(right))
    assert (accuracy.task, accuracy.documents, accuracy.higher_is_better) == ("mine", 6, True)
    assert accuracy.stderr is not None
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["scores"][0]["value"] == found[0].value
    assert f"| mine | acc | {accuracy.value:.4f}" in (tmp_path / "evaluation.md").read_text()


@needs_harness
@pytest.mark.medium
@pytest.mark.processes
def test_a_quantized_model_is_scored_and_a_limit_holds(model_dir, folder, tmp_path, monkeypatch):
    def stored_in_int8(path: Path) -> RexForCausalLM:
        model = load_model(path, quantized=True)
        model.config.quantization_config = {"quant_method": "rex_int8"}  # as in the config.json of a quantized model
        return model

    monkeypatch.setattr(tasks, "load_model", stored_in_int8)
    settings = EvaluationSettings(tasks=["mine"], include_path=str(folder), limit=4)
    (accuracy,) = [score for score in score_tasks(settings, model_dir, tmp_path) if score.metric == "acc"]
    assert accuracy.documents == 4


@needs_harness
@pytest.mark.medium
@pytest.mark.processes
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["mine"], "include_path": "nowhere"}, "include_path is 'nowhere': expected a folder"),
        ({"tasks": ["broken"]}, "evaluation.tasks broken failed in lm-eval: .*expected tasks whose data can be read"),
    ],
)
def test_tasks_that_cannot_run_are_one_line(model_dir, folder, tmp_path, options, message):
    (folder / "broken.yaml").write_text(TASK.format(data=tmp_path / "gone.jsonl").replace("task: mine", "task: broken"))
    settings = EvaluationSettings(**{"include_path": str(folder), **options})
    with pytest.raises(PipelineError, match=message) as caught:
        score_tasks(settings, model_dir, tmp_path)
    assert "\n" not in str(caught.value)


@needs_harness
@pytest.mark.medium
@pytest.mark.processes
def test_each_task_is_scored_by_itself_in_any_order(model_dir, folder, tmp_path):
    other = (folder / "mine.yaml").read_text().replace("task: mine", "task: other").replace("acc\n", "acc_norm\n")
    (folder / "other.yaml").write_text(other)
    options = {"include_path": str(folder), "batch_size": 4}
    settings = EvaluationSettings(tasks=["other", "mine"], **options)
    both = score_tasks(settings, model_dir, tmp_path)
    assert list(dict.fromkeys(score.task for score in both)) == ["other", "mine"]
    written = (tmp_path / "evaluation.json").read_bytes()
    score_tasks(settings, model_dir, tmp_path, apply=in_any_order)
    assert (tmp_path / "evaluation.json").read_bytes() == written
    alone = score_tasks(EvaluationSettings(tasks=["mine"], **options), model_dir, tmp_path)
    assert alone == [score for score in both if score.task == "mine"]


def test_an_unknown_task_is_named_with_those_that_are_like_it():
    check_names(["hellaswag", "arc_*"], ["hellaswag", "arc_easy"])
    with pytest.raises(PipelineError, match=r"names 'hellaswagg': .* did you mean hellaswag\?"):
        check_names(["hellaswagg"], ["hellaswag", "piqa"])


def test_no_task_and_no_harness_say_what_to_do(model_dir, tmp_path, monkeypatch):
    with pytest.raises(PipelineError, match=r"evaluation.tasks is empty: .*\[hellaswag,piqa\]"):
        score_tasks(EvaluationSettings(), model_dir, tmp_path)
    monkeypatch.setattr(tasks, "harness_release", lambda: "")
    with pytest.raises(PipelineError, match="not installed: run `make harness`"):
        score_tasks(EvaluationSettings(tasks=["piqa"]), model_dir, tmp_path)


def test_scores_of_groups_and_filters_are_read_without_their_names():
    found = {
        "results": {
            "a": {
                "alias": "a",
                "acc,none": 0.5,
                "acc_stderr,none": 0.1,
                "acc_norm,none": 0.25,
                "acc_norm_stderr,none": "N/A",
            },
            "b": {"exact_match,strict": 1.0, "exact_match_stderr,strict": 0.0},
        },
        "n-samples": {"a": {"original": 9, "effective": 4}},
        "higher_is_better": {"a": {"acc": True}},
    }
    scores = read_scores(found)
    assert [(s.task, s.metric, s.value, s.stderr, s.documents) for s in scores] == [
        ("a", "acc", 0.5, 0.1, 4),
        ("a", "acc_norm", 0.25, None, 4),
        ("b", "exact_match (strict)", 1.0, 0.0, 0),
    ]
