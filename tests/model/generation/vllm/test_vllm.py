"""The engine with vLLM: over a process that speaks its protocol, and against our own engine over vLLM itself.

The routes over it: `tests/bento/serving/test_vllm.py`.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from model.errors import PipelineError
from model.generation.engine import Engine
from model.generation.grammar.grammar import DEAD_END, Kind
from model.generation.requests import (
    FAILED,
    EngineBusy,
    EngineStopped,
    Finished,
    Generation,
    GenerationRequest,
    PromptScores,
    SamplingParameters,
    TextPiece,
    TokenLogprob,
    UnsupportedValue,
)
from model.generation.vllm.engine import VllmEngine
from model.weights.loading import FORMAT_VERSION, QUANTIZATION
from tests.model.generation.vllm.stand_in import CRASH, FAILS, GARBLED, HANG, REFUSED
from tests.support.tiny import save_tiny_model, tiny_model, tiny_tokenizer
from tests.support.vllm import PYTHON, needs_vllm

pytestmark = pytest.mark.processes
STAND_IN = "tests.model.generation.vllm.stand_in"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def stand_in(model_dir: Path, **options: Any) -> VllmEngine:
    made = VllmEngine(model_dir, python=Path(sys.executable), worker=STAND_IN, **{"max_batch_size": 2, **options})
    made.warm_up()
    return made


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Iterator[VllmEngine]:
    made = stand_in(model_dir, max_queue=1)
    yield made
    made.stop()


def ask(engine: Engine, ids: list[int], max_tokens: int = 4, **options: Any) -> tuple[list[Any], Finished]:
    *events, last = engine.submit(GenerationRequest(ids, max_tokens, **options))
    assert isinstance(last, Finished)
    return events, last


def text(events: list[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextPiece))


def test_tokens_become_text_until_the_last_one_that_was_asked_for(engine: VllmEngine) -> None:
    start = engine.encode("a")
    events, last = ask(engine, start)
    assert [event.token_ids for event in events if event.token_ids] == [(start[0] + n,) for n in range(1, 5)]
    assert text(events) == engine.decode([start[0] + n for n in range(1, 5)]) == "bcde"
    assert (last.finish_reason, last.generated_tokens, last.prompt_tokens) == ("length", 4, 1)
    assert engine.step_name == "vllm" and engine.precision == "float32"


def test_a_stop_string_ends_the_text_and_the_request_in_vllm(engine: VllmEngine) -> None:
    events, last = ask(engine, engine.encode("a"), 50, stop=("de",))
    assert text(events) == "bc" and (last.finish_reason, last.stopped_by) == ("stop", "de")
    assert ask(engine, engine.encode("a"))[1].finish_reason == "length" and engine.stats().running == 0


def test_a_stop_token_is_not_part_of_the_text_unless_it_is_included(engine: VllmEngine) -> None:
    (token,) = engine.encode("d")
    events, last = ask(engine, engine.encode("a"), 50, stop_token_ids=frozenset({token}))
    assert (text(events), last.stopped_by, last.generated_tokens) == ("bc", token, 3)
    events, _ = ask(engine, engine.encode("a"), 50, stop_token_ids=frozenset({token}), include_stop=True)
    assert text(events) == "bcd"


def test_scores_are_those_asked_for_and_the_prompts_come_first(engine: VllmEngine) -> None:
    start = engine.encode("ab")
    events, _ = ask(engine, start, 1, logprobs=1, prompt_logprobs=1)
    assert events[0] == PromptScores((None, TokenLogprob.of(start[1], -1.0, [(5, -0.1)])))
    assert events[1].logprobs == (TokenLogprob.of(start[1] + 1, -0.5, [(start[1] + 1, -0.5)]),)
    events, last = ask(engine, start, 0, prompt_logprobs=0)
    assert [type(event) for event in events] == [PromptScores] and last.generated_tokens == 0


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("embedding: the engine vllm does not offer it", {"embedding": "mean", "max_tokens": 0}),
        ("temperature is 3: the engine vllm takes 0 to 2", {"sampling": SamplingParameters(temperature=3)}),
        (
            "presence_penalty is -2.5: the engine vllm takes -2 to 2",
            {"sampling": SamplingParameters(presence_penalty=-2.5)},
        ),
    ],
)
def test_what_vllm_does_not_offer_is_refused_by_its_name(engine: VllmEngine, message: str, options: dict) -> None:
    with pytest.raises(UnsupportedValue, match=rf"^{message}; serve the model with engine rex$"):
        ask(engine, [5], **options)


@pytest.mark.parametrize(
    ("kind", "source", "expected", "reason"),
    [
        ("regex", "(b|c)x{2}y?z", "bxxyz", "stop"),
        ("regex", "[p-r]{90}", "[p-r]{20,89}", "length"),
        ("json", '{"type": "boolean"}', "false", "stop"),
        ("grammar", 'start: "u" "v"', "uv", "stop"),
    ],
)
def test_a_form_of_the_text_decides_which_tokens_come_next(
    engine: VllmEngine, kind: Kind, source: str, expected: str, reason: str
) -> None:
    grammar = engine.compile_grammar(kind, source)
    events, last = ask(engine, engine.encode("a"), 20, grammar=grammar)
    assert re.fullmatch(expected, text(events)) and last.finish_reason == reason
    assert engine.stats().running == 0


def test_strings_that_must_not_appear_and_allowed_tokens_are_masks_too(engine: VllmEngine) -> None:
    assert text(ask(engine, engine.encode("a"), bad_words=("d",))[0]) == "bcef"
    allowed = frozenset(engine.encode("pqx"))
    assert text(ask(engine, engine.encode("a"), 5, allowed_token_ids=allowed)[0]) == "pqxpq"


def test_a_stop_token_ends_a_constrained_text_after_min_tokens(engine: VllmEngine) -> None:
    (stop,) = engine.encode("q")
    asked: dict[str, Any] = {
        "grammar": engine.compile_grammar("regex", "[p-r]+"),
        "stop_token_ids": frozenset({stop}),
    }
    events, last = ask(engine, engine.encode("a"), 20, **asked)
    assert text(events) == "p" and last.stopped_by == stop
    events, last = ask(engine, engine.encode("a"), 20, min_tokens=4, **asked)
    assert "q" not in text(events) and last.generated_tokens >= 4 and last.stopped_by == stop
    # A form that needs the stop token goes before min_tokens.
    asked["grammar"] = engine.compile_grammar("regex", "qx")
    assert text(ask(engine, engine.encode("a"), 20, min_tokens=2, **asked)[0]) == "qx"


def test_a_form_that_allows_no_token_fails_its_request_only(engine: VllmEngine) -> None:
    grammar = engine.compile_grammar("regex", "(b|c)x{2}y?z")
    _, last = ask(engine, engine.encode("a"), 20, grammar=grammar, allowed_token_ids=frozenset(engine.encode("b")))
    assert last.refusal == "grammar" and last.error == DEAD_END and last.generated_tokens == 1
    assert ask(engine, [5])[1].finish_reason == "length"


def test_a_request_that_vllm_refuses_or_answers_wrongly_fails_alone(engine: VllmEngine) -> None:
    _, last = ask(engine, [REFUSED, 5])
    assert last.is_refusal and last.error == "vLLM refuses the request: too bad"
    for token in (FAILS, GARBLED):
        _, last = ask(engine, [token, 5])
        assert (last.finish_reason, last.error, last.is_refusal) == ("error", FAILED, False)
    assert ask(engine, [5])[1].finish_reason == "length"
    assert engine.stats().restarts_total == 0


def test_an_error_after_the_end_of_a_request_ends_no_other_one(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Generation.finish

    def broken(self: Generation, *arguments: Any, **options: Any) -> None:
        finish(self, *arguments, **options)
        raise RuntimeError("after the end")

    with monkeypatch.context() as patch:
        patch.setattr(Generation, "finish", broken)
        assert ask(engine, [5])[1].finish_reason == "length"
        assert ask(engine, [5])[1].finish_reason == "length"
    assert ask(engine, [5])[1].finish_reason == "length"
    assert engine.stats().restarts_total == 0


def test_requests_wait_are_refused_beyond_the_queue_and_end_when_they_are_cancelled(engine: VllmEngine) -> None:
    endless = GenerationRequest([5], 90, SamplingParameters(), ignore_eos=True)
    with pytest.raises(EngineBusy):
        for _ in range(100):
            engine.submit_all([endless] * 3, lambda *_: None)
    waiting = engine.submit(GenerationRequest([5], 4, queue_timeout_s=0.0)) if not engine.stats().waiting else None
    while engine.stats().running or engine.stats().waiting:
        time.sleep(0.01)
    if waiting:
        assert [event.finish_reason for event in waiting if isinstance(event, Finished)] in (["timeout"], ["length"])
    cancelled = engine.submit(endless)
    cancelled.cancel()
    *_, last = cancelled
    assert last.finish_reason == "cancelled"


def test_a_dead_or_hanging_process_is_replaced_once_and_none_is_left(model_dir: Path) -> None:
    engine = stand_in(model_dir, step_timeout_s=0.5)
    first = engine.process_id
    _, last = ask(engine, [HANG])
    assert last.error == "the engine hung: it restarts, try again"
    assert ask(engine, [5])[1].finish_reason == "length"
    second = engine.process_id
    assert first and second and first != second and not psutil.pid_exists(first)
    _, last = ask(engine, [CRASH])
    assert last.error == "the engine died" and not engine.is_alive
    with pytest.raises(EngineStopped):
        ask(engine, [5])
    engine.stop()
    assert not psutil.pid_exists(second)


def test_a_process_that_is_killed_between_two_requests_is_replaced(model_dir: Path) -> None:
    engine = stand_in(model_dir)
    try:
        assert engine.process_id
        os.kill(engine.process_id, signal.SIGKILL)
        assert ask(engine, [5])[1].error == "the engine died: it restarts, try again"
        assert ask(engine, [5])[1].finish_reason == "length" and engine.is_ready
        assert engine.stats().restarts_total == 1
    finally:
        engine.stop()


def test_the_process_ends_with_the_one_that_started_it(model_dir: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from model.generation.vllm.process import VllmProcess\n"
        f"process = VllmProcess(Path(sys.executable), Path({str(model_dir)!r}), {{}}, variables={{}}, precision='', "
        f"bytes_per_token=1, worker={STAND_IN!r})\n"
        "process.start(); print(process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        worker = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
    worker.wait(30)


def test_a_start_that_fails_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"^vLLM cannot start: .*no/python.*; name the interpreter that has it$"):
        VllmEngine(model_dir, python=Path("no/python"))
    with pytest.raises(PipelineError, match=r"^vLLM cannot run .*: ModuleNotFoundError: No module named 'vllm'$"):
        VllmEngine(model_dir, python=Path(sys.executable))
    with pytest.raises(PipelineError, match=r"^device is 'cuda', and this vLLM is built for 'cpu'$"):
        stand_in(model_dir, device="cuda")
    with pytest.raises(PipelineError, match=r"^no config.json in "):
        stand_in(tmp_path)


def test_int4_weights_are_refused_and_an_export_is_served_as_it_is(model_dir: Path, tmp_path: Path) -> None:
    from model.generation.vllm.engine import readable_model

    (tmp_path / "config.json").write_text('{"model_type": "rex"}')
    (tmp_path / QUANTIZATION).write_text(f'{{"format_version": {FORMAT_VERSION}, "method": "int4"}}')
    with pytest.raises(PipelineError, match="has int4 weights, which the engine vllm does not read: set quantized to"):
        readable_model(tmp_path, tmp_path / "out", None)
    (tmp_path / "config.json").write_text('{"model_type": "glm4"}')
    assert readable_model(tmp_path, tmp_path / "out", None) == tmp_path
    with pytest.raises(PipelineError, match="is an export, served as it is"):
        readable_model(tmp_path, tmp_path / "out", True)
    assert '"quantized"' not in (readable_model(model_dir, tmp_path / "int8", True) / "config.json").read_text()
    assert "compressed-tensors" in (tmp_path / "int8/config.json").read_text()


@needs_vllm
@pytest.mark.slow
def test_vllm_answers_as_our_own_engine_does(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, stops=True, hidden_size=128, intermediate_size=128)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours, vllm = Engine(model, tokenizer), VllmEngine(tmp_path, python=PYTHON)
    try:
        vllm.warm_up()
        for options in (
            {},
            {"logprobs": 3},
            {"prompt_logprobs": 2},
            {"ignore_eos": True},
            {"min_tokens": 10},
            {"stop": ("e",), "include_stop": True},
            {"allowed_token_ids": frozenset(range(40, 60))},
            {"bad_words": ("e", "in")},
            {"grammar": "[a-z]{3,9}[0-9]"},
            {"grammar": "[a-z]{3,9}[0-9]", "min_tokens": 5, "stop_token_ids": frozenset(range(60, 70))},
            {"grammar": "[a-z]+", "logprobs": 2},
        ):
            if source := options.get("grammar"):
                options = {**options, "grammar": ours.compile_grammar("regex", source)}
            asked = {"sampling": SamplingParameters(temperature=0), **options}
            (events, last), (expected, expected_last) = (
                ask(engine, ours.encode("def main"), 20, **asked) for engine in (vllm, ours)
            )
            assert (text(events), last) == (text(expected), expected_last), options
            scores, expected_scores = (
                [score for event in found for score in getattr(event, "logprobs", ()) if score]
                for found in (events, expected)
            )
            assert [s.token_id for s in scores] == [s.token_id for s in expected_scores]
            for score, other in zip(scores, expected_scores, strict=True):
                assert score.logprob == pytest.approx(other.logprob, abs=1e-3)
                assert [token for token, _ in score.top] == [token for token, _ in other.top]
        (left, _), (right, _) = (ask(vllm, [5], 20, sampling=SamplingParameters(seed=7)) for _ in range(2))
        assert text(left) == text(right)
    finally:
        vllm.stop()
        ours.stop()


@needs_vllm
@pytest.mark.slow
def test_vllm_generates_with_int8_weights(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer, hidden_size=128, intermediate_size=128).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = VllmEngine(tmp_path, python=PYTHON, quantized=True)
    try:
        engine.warm_up()
        assert engine.precision == "int8, bfloat16"
        assert ask(engine, [5, 6], 20, ignore_eos=True)[1].generated_tokens == 20
    finally:
        engine.stop()
