"""A challenger that answers copies in the shadow, and the rollback of a champion that fails, on a real registry."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import httpx
import pytest
from starlette.testclient import TestClient

from bento.serving.champion import ModelRegistry
from bento.serving.shadow import ChallengerWatcher, Outcomes, Rollback, Shadow
from llm_assets.versions.promotion import history
from model.generation.engine import Engine
from model.generation.requests import Finished, GenerationRequest, SamplingParameters
from model.settings import TokenizerSettings
from model.text.tokenizer import train_tokenizer
from tests.bento.openai_service import MODEL, Service, refusal, running_service
from tests.bento.serving.registry import Registered, mlflow_server, save_version
from tests.model.generation.engines import StepHook
from tests.support.tiny import TEXT, tiny_model, tiny_tokenizer

NAME = "rex-tiny"
BODY = {"prompt": "def main", "max_tokens": 6, "temperature": 0}
BOUNDS = {"window_s": 60.0, "max_error_rate": 0.1, "max_slowdown": 2.0, "min_generations": 4}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service() as running:
        yield running


@pytest.fixture(params=["the same tokenizer", "another tokenizer"])
def challenger(request) -> Iterator[Engine]:
    tokenizer = tiny_tokenizer()
    if request.param == "another tokenizer":
        tokenizer = train_tokenizer(TokenizerSettings(vocab_size=262, sequence_length=96), [TEXT] * 8)
    engine = Engine(tiny_model(tokenizer, seed=7), tokenizer, max_batch_size=2, end_of_text_ids=frozenset())
    yield engine
    engine.stop()


@dataclass
class Phase:
    service: Service
    shadow: Shadow

    def metrics(self) -> dict[str, float]:
        rows = TestClient(self.service.app).get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (r.rsplit(" ", 1) for r in rows if r.startswith("rex_shadow"))}

    def wait_for(self, count: int) -> None:
        end = time.monotonic() + 30
        while self.shadow.of_challenger.total < count:
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.fixture
def phase(service: Service, challenger: Engine) -> Iterator[Phase]:
    shadow = service.app.state.models.shadow = Shadow(1.0, 60.0)
    shadow.serve(challenger, "7")
    yield Phase(service, shadow)
    service.app.state.models.shadow = None


def test_copies_are_answered_by_the_challenger_and_nobody_sees_it(phase, challenger):
    phase.shadow.challenger = None
    alone = phase.service.post("/v1/completions", **BODY).json()["choices"]
    phase.shadow.challenger = (challenger, "7")
    beside = phase.service.post("/v1/completions", **BODY, n=2).json()["choices"]
    assert [one["text"] for one in beside] == [alone[0]["text"]] * 2
    phase.wait_for(2)
    metrics = phase.metrics()
    for model in ("champion", "challenger"):
        assert metrics[f'rex_shadow_generations_total{{model="{model}",outcome="answered"}}'] == 2
        assert metrics[f'rex_shadow_generations_total{{model="{model}",outcome="failed"}}'] == 0
        assert metrics[f'rex_shadow_seconds_per_token{{model="{model}"}}'] > 0
    assert "version 7: 2 copies, 0 failed" in phase.shadow.report()
    assert phase.service.post("/v1/completions", **BODY, stream=True).status_code == 200


def test_a_failing_challenger_does_not_affect_the_client(phase, challenger):
    def fail(*_: object) -> None:
        raise ValueError("broken")

    hook = StepHook(challenger, before=fail)
    answer = phase.service.post("/v1/completions", **BODY)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 6
    phase.wait_for(1)
    assert phase.metrics()['rex_shadow_generations_total{model="challenger",outcome="failed"}'] == 1
    assert hook is not None


def test_a_copy_is_skipped_when_the_challenger_is_full(phase, challenger):
    challenger.stop()
    assert phase.service.post("/v1/completions", **BODY).status_code == 200
    assert phase.metrics()["rex_shadow_skipped_total"] == 1 and phase.shadow.of_champion.total == 0


def test_a_request_that_names_the_challenger_is_answered_by_it_alone(phase, challenger):
    with TestClient(phase.service.app) as client:
        listed = client.get("/v1/models").json()["data"]
        assert [(one["id"], one["version"]) for one in listed] == [(MODEL, None), (f"{NAME}@challenger", "7")]
        assert client.get(f"/v1/models/{NAME}@challenger").json()["id"] == f"{NAME}@challenger"
        for name in (f"{NAME}@challenger", f"{NAME}:7"):
            answer = client.post("/v1/completions", json={**BODY, "model": name}).json()
            assert answer["model"] == f"{NAME}@challenger" and answer["system_fingerprint"].startswith("fp_7_")
            prompt = challenger.encode(BODY["prompt"])
            *pieces, _ = challenger.submit(GenerationRequest(prompt, 6, SamplingParameters(temperature=0)))
            assert answer["choices"][0]["text"] == "".join(one.text for one in pieces)
        tokens = client.post("/tokenize", json={"prompt": "def main", "model": f"{NAME}@challenger"}).json()["tokens"]
        assert tokens == challenger.encode("def main")
        assert client.post("/v1/embeddings", json={"input": "x", "model": f"{NAME}:7"}).status_code == 200
    assert phase.shadow.of_challenger.total == phase.shadow.of_champion.total == 0
    phase.shadow.challenger = None
    assert refusal(phase.service.post("/v1/completions", **BODY, model=f"{NAME}:7"), 404)["code"] == "model_not_found"


def test_without_a_shadow_phase_there_is_no_trace_of_it(service):
    models = service.app.state.models
    assert models.shadow is None and models.rollback is None
    assert "rex_shadow" not in TestClient(service.app).get("/metrics").text


def test_a_share_of_zero_copies_no_request_and_a_fraction_copies_that_fraction(service, challenger):
    shadow = Shadow(0.5, 60.0)
    shadow.serve(challenger, "7")
    copied = [shadow.copy(service.engine, []) is not None for _ in range(400)]
    assert 120 < sum(copied) < 280


def finished(reason: str = "length", tokens: int = 10) -> Finished:
    return Finished(reason, prompt_tokens=1, generated_tokens=tokens, cached_tokens=0)  # type: ignore[arg-type]


def test_outcomes_exclude_canceled_and_refused_generations():
    outcomes = Outcomes(60.0)
    for reason, seconds in (("length", 1.0), ("stop", 2.0), ("error", 9.0), ("timeout", 9.0), ("cancelled", 9.0)):
        outcomes.add(finished(reason), seconds)
    summary = outcomes.summary()
    assert (summary.generations, summary.failed, summary.seconds_per_token) == (4, 2, pytest.approx(0.15))
    assert Outcomes(-1.0).summary().error_rate == 0


@pytest.fixture(scope="module")
def registered(tmp_path_factory) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("shadow")
    with mlflow_server(folder) as uri:
        made = Registered(uri, NAME)
        for seed in (0, 1):
            save_version(folder / str(seed), seed=seed, vocab_size=280)
            made.promote(folder / str(seed))
        yield SimpleNamespace(registry=ModelRegistry(uri, {}), client=made.client)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("results", "reason"),
    [
        ([("error", 1.0)] * 2 + [("length", 1.0)] * 4, "2 of 6 generations failed within 60 s (at most 10.0%)"),
        ([("length", 3.0)] * 6, "300.0 ms per token, version 1 took 100.0 (at most 2 times that)"),
        ([("length", 1.9)] * 6, None),
        ([("error", 1.0)] * 3, None),
    ],
)
def test_a_champion_beyond_a_bound_is_replaced_by_the_former_one(registered, results, reason):
    registry, client = registered.registry, registered.client
    client.set_registered_model_alias(NAME, "champion", "1")
    former = registry.champion(NAME)
    client.set_registered_model_alias(NAME, "champion", "2")
    rollback = Rollback(registry, NAME, **BOUNDS)
    for _ in range(5):
        rollback.add(finished(), 1.0)
    rollback.took_over(former, registry.champion(NAME))
    rollback.check()
    assert registry.champion(NAME).number == "2"
    for finish, seconds in results:
        rollback.add(finished(finish), seconds)
    rollback.check()
    assert registry.champion(NAME).number == ("1" if reason else "2")
    if reason:
        assert history(client, NAME)[-1]["version"] == "1" and reason in history(client, NAME)[-1]["reason"]
        tags = {number: client.get_model_version(NAME, number).tags["champion_decision"] for number in ("1", "2")}
        assert tags == {"1": f"champion again: {reason}", "2": f"withdrawn by the service: {reason}"}
        assert client.get_registered_model(NAME).tags["champion_decided"] == "1"


@pytest.mark.e2e
def test_a_version_that_a_person_chose_meanwhile_stays(registered):
    registry, client = registered.registry, registered.client
    client.set_registered_model_alias(NAME, "champion", "2")
    withdrawn = registry.champion(NAME)
    client.set_registered_model_alias(NAME, "champion", "1")
    assert not registry.roll_back(NAME, withdrawn, registry.champion(NAME), "slow")


@pytest.mark.e2e
def test_the_alias_challenger_is_followed(registered, service):
    registry, client = registered.registry, registered.client
    client.set_registered_model_alias(NAME, "champion", "1")
    shadow, loaded = Shadow(1.0, 60.0), []

    def load(directory, version):
        loaded.append(version)
        assert (directory / "config.json").is_file()
        tokenizer = tiny_tokenizer()
        return Engine(tiny_model(tokenizer), tokenizer)

    watcher = ChallengerWatcher(registry, NAME, shadow, load=load, poll_s=60, report_s=60)
    watcher.follow()
    assert shadow.challenger is None and not loaded
    for number, expected in (("2", "2"), ("2", "2"), ("1", None)):
        client.set_registered_model_alias(NAME, "challenger", number)
        watcher.follow()
        assert (shadow.challenger and shadow.challenger[1]) == expected
    client.set_registered_model_alias(NAME, "challenger", "2")
    watcher.follow()
    assert shadow.challenger
    client.set_registered_model_alias(NAME, "champion", "2")
    watcher.follow()
    assert shadow.challenger is None  # it is the champion itself now
    client.set_registered_model_alias(NAME, "champion", "1")
    client.delete_registered_model_alias(NAME, "challenger")
    watcher.follow()
    assert loaded == ["2", "2"] and shadow.challenger is None


@pytest.mark.e2e
def test_a_challenger_whose_download_failed_is_loaded_by_a_later_poll_and_the_reason_logged_once(
    registered, monkeypatch, caplog
):
    registry, client = registered.registry, registered.client
    client.set_registered_model_alias(NAME, "champion", "1")
    client.set_registered_model_alias(NAME, "challenger", "2")
    engine = Engine(tiny_model(tiny_tokenizer()), tiny_tokenizer())
    shadow = Shadow(1.0, 60.0)
    watcher = ChallengerWatcher(registry, NAME, shadow, load=lambda *_: engine, poll_s=60, report_s=60)
    with monkeypatch.context() as cut:
        cut.setattr(registry, "_fetch", lambda *_: _refuse())
        watcher.follow()
        watcher.follow()
    assert shadow.challenger is None and caplog.text.count("the line is cut") == 1
    watcher.follow()
    assert shadow.challenger == (engine, "2")
    watcher.stop()
    client.delete_registered_model_alias(NAME, "challenger")


def _refuse() -> None:
    raise httpx.ConnectError("the line is cut")
