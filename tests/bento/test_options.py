"""Options: fixed at build, overridden by variables, wrong ones named; and what every option does to the engine."""

from pathlib import Path

import pytest
import torch
from bentoml.exceptions import InvalidArgument

from bento.options import (
    BentoArgs,
    describe_variables,
    find_model,
    origins,
    refuse_for_vllm,
    refuse_without_champion,
    second_service,
    with_overrides,
)
from bento.serving import loading
from model.errors import PipelineError
from model.settings import ServingSettings
from tests.support.native import needs_native
from tests.support.tiny import save_tiny_model


def test_arguments_come_as_text_and_are_typed():
    args = BentoArgs.model_validate({"model": "a:1", "kv_cache": "false", "quantized": "true", "max_queue": "3"})
    assert (args.kv_cache, args.quantized, args.max_queue) == (False, True, 3)


def test_each_option_is_overridden_by_its_variable():
    variables = {
        "REX_MODEL": "b:2",
        "REX_DRAFT": "c:3",
        "REX_SERVED_MODEL_NAME": "gpt",
        "REX_CHAMPION": "rex-a",
        "REX_CHAMPION_POLL_S": "3",
        "REX_SHADOW_SHARE": "0.25",
        "REX_SHADOW_WINDOW_S": "60",
        "REX_ROLLBACK_WINDOW_S": "600",
        "REX_ROLLBACK_MAX_ERROR_RATE": "0.1",
        "REX_ROLLBACK_MAX_SLOWDOWN": "2",
        "REX_ROLLBACK_MIN_GENERATIONS": "20",
        "REX_DEVICE": "cpu",
        "REX_KV_CACHE": "false",
        "REX_QUANTIZED": "false",
        "REX_PRECISION": "bfloat16",
        "REX_MAX_BATCH_SIZE": "3",
        "REX_KV_CACHE_MIB": "7",
        "REX_PREFILL_CHUNK": "32",
        "REX_SPECULATIVE_TOKENS": "5",
        "REX_MAX_QUEUE": "5",
        "REX_MAX_QUEUE_TOKENS": "900",
        "REX_QUEUE_TIMEOUT_S": "2.5",
        "REX_REQUEST_TIMEOUT_S": "1.5",
        "REX_STEP": "reference",
        "REX_ENGINE": "vllm",
        "REX_VLLM_PYTHON": "/opt/vllm/bin/python",
        "REX_STEP_TIMEOUT_S": "9",
        "REX_DRAIN_TIMEOUT_S": "0",
        "REX_CLAMP_MAX_TOKENS": "false",
        "REX_RECEIVE_TIMEOUT_S": "4",
        "REX_KEEP_ALIVE_S": "20",
        "REX_MAX_CONNECTIONS": "50",
        "REX_MAX_BODY_BYTES": "100",
        "REX_CORS_ORIGINS": "https://a.example",
        "REX_COMPARE_WITH": "http://b.example:3000",
        "REX_ALLOW_ANONYMOUS": "true",
        "REX_THREADS": "2",
    }
    expected = BentoArgs(
        model="b:2",
        draft="c:3",
        served_model_name="gpt",
        champion="rex-a",
        champion_poll_s=3,
        shadow_share=0.25,
        shadow_window_s=60,
        rollback_window_s=600,
        rollback_max_error_rate=0.1,
        rollback_max_slowdown=2,
        rollback_min_generations=20,
        device="cpu",
        kv_cache=False,
        quantized=False,
        precision="bfloat16",
        step="reference",
        engine="vllm",
        vllm_python="/opt/vllm/bin/python",
        max_batch_size=3,
        kv_cache_mib=7,
        prefill_chunk=32,
        speculative_tokens=5,
        max_queue=5,
        max_queue_tokens=900,
        queue_timeout_s=2.5,
        request_timeout_s=1.5,
        step_timeout_s=9,
        drain_timeout_s=0,
        clamp_max_tokens=False,
        receive_timeout_s=4,
        keep_alive_s=20,
        max_connections=50,
        max_body_bytes=100,
        cors_origins="https://a.example",
        compare_with="http://b.example:3000",
        allow_anonymous=True,
        threads=2,
    )
    assert with_overrides(BentoArgs(model="a:1"), variables) == expected
    assert set(variables) == {f"REX_{name.upper()}" for name in BentoArgs.model_fields}


def test_an_empty_variable_changes_nothing():
    assert with_overrides(BentoArgs(model="a:1"), {"REX_MODEL": ""}) == BentoArgs(model="a:1")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("REX_KV_CACHE", "maybe"),
        ("REX_QUANTIZED", "int4"),
        ("REX_DEVICE", "tpu"),
        ("REX_MAX_QUEUE", "0"),
        ("REX_REQUEST_TIMEOUT_S", "nan"),
    ],
)
def test_a_wrong_variable_is_named_in_one_line(variable, value):
    with pytest.raises(InvalidArgument, match=f"^{variable} is '{value}': ") as refusal:
        with_overrides(BentoArgs(), {variable: value})
    assert "\n" not in str(refusal.value)


def test_a_long_value_is_cut_and_a_path_of_two_lines_is_shown_in_one():
    with pytest.raises(InvalidArgument, match=r"^REX_MAX_QUEUE is 'x+\.\.\.': ") as refusal:
        with_overrides(BentoArgs(), {"REX_MAX_QUEUE": "x" * 100_000})
    assert len(str(refusal.value)) < 400
    with pytest.raises(InvalidArgument) as refusal:
        find_model("/two\nlines")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("name", "value"), [("kv_cache", False), ("step", "native"), ("draft", "a:1")])
def test_an_option_that_vllm_does_not_have_is_refused_by_its_name(name, value):
    refuse_for_vllm(BentoArgs(**{name: value}))
    refuse_for_vllm(BentoArgs(engine="vllm"))
    with pytest.raises(InvalidArgument, match=rf"^REX_{name.upper()} is {value!r}, and REX_ENGINE is vllm, "):
        refuse_for_vllm(BentoArgs(engine="vllm", **{name: value}))


def test_the_engine_vllm_without_an_interpreter_that_has_it_is_one_line(tmp_path):
    with pytest.raises(PipelineError, match=r"^REX_ENGINE is vllm, and REX_VLLM_PYTHON is 'no/python': expected the "):
        loading.start_engine(BentoArgs(engine="vllm", vllm_python="no/python"), save_tiny_model(tmp_path))


def test_the_pipelines_serving_settings_are_all_options():
    assert set(ServingSettings.__dataclass_fields__) <= set(BentoArgs.model_fields)


def test_the_pipelines_defaults_are_the_services():
    defaults = {name: field.default for name, field in BentoArgs.model_fields.items()}
    for name, field in ServingSettings.__dataclass_fields__.items():
        # The pipeline serves what it quantized; a directory given by hand is served as it is.
        assert name == "quantized" or defaults[name] == field.default, name


def test_origins_are_split_and_checked():
    assert origins("") == ()
    assert origins(" https://a.example, http://localhost:8080 ") == ("https://a.example", "http://localhost:8080")
    assert origins("*") == ("*",)
    for wrong in ("a.example", "https://a.example/", "https://a b"):
        with pytest.raises(InvalidArgument, match="REX_CORS_ORIGINS"):
            origins(wrong)


def test_the_description_names_every_variable():
    text = describe_variables()
    assert all(f"`REX_{name.upper()}`" in text for name in BentoArgs.model_fields)


@pytest.mark.parametrize("model", ["", "/nowhere/model", "./nowhere", "never-made:1", "Not a tag!"])
def test_a_missing_model_is_one_line_with_the_remedy(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidArgument) as refusal:
        find_model(model)
    assert "\n" not in str(refusal.value)
    assert not model or repr(model) in str(refusal.value)


def test_a_directory_is_found_by_its_path(tmp_path):
    (tmp_path / "config.json").touch()
    assert find_model(str(tmp_path)) == tmp_path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start_engine(model_dir, monkeypatch):
    monkeypatch.setenv("REX_MODEL", str(model_dir))
    from bento.serving.loading import start_engine as start_one

    threads, engines = torch.get_num_threads(), []

    def start(draft_dir=None, **options):
        engines.append(start_one(BentoArgs(model=str(model_dir), device="cpu", **options), model_dir, draft_dir))
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()
    torch.set_num_threads(threads)


def test_switches_do_what_they_say(start_engine):
    plain = start_engine()
    assert plain.is_ready and plain._kv_cache
    assert plain.precision == "float32"
    assert not start_engine(kv_cache=False)._kv_cache
    assert start_engine(quantized=True).precision == "int8"
    assert start_engine(precision="bfloat16").precision == "bfloat16"
    assert start_engine(precision="float32").precision == "float32"
    both = start_engine(quantized=True, precision="bfloat16")
    assert both.is_ready and both.precision == "int8, bfloat16"


def test_limits_reach_the_engine(start_engine):
    engine = start_engine(max_batch_size=3, prefill_chunk=32, max_queue=5, max_queue_tokens=900, step_timeout_s=9.0)
    assert engine.stats().cache_capacity_tokens == 3 * engine.context_length
    kept = (engine._prefill_chunk, engine._queue._max_requests, engine._queue._max_tokens, engine._step_timeout_s)
    assert kept == (32, 5, 900, 9.0)
    assert start_engine(speculative_tokens=0)._speculative_tokens == 0
    assert start_engine(speculative_tokens=3)._speculative_tokens == 3


@needs_native
def test_a_draft_reaches_the_engine(model_dir, start_engine):
    assert start_engine()._draft is None
    assert start_engine(draft_dir=model_dir)._draft is not None


def test_threads_are_taken_over_by_the_engine(start_engine):
    start_engine(threads=2)
    assert torch.get_num_threads() == 2
    start_engine()
    assert torch.get_num_threads() == 1  # a small model


@pytest.mark.parametrize("name", ["shadow_share", "rollback_window_s"])
def test_an_option_of_champions_needs_one(name):
    with pytest.raises(InvalidArgument, match=f"REX_{name.upper()} is 1, but there is no REX_CHAMPION"):
        refuse_without_champion(BentoArgs.model_validate({name: 1.0}))
    refuse_without_champion(BentoArgs.model_validate({name: 1.0, "champion": "rex-a"}))
    refuse_without_champion(BentoArgs.model_validate({}))


@pytest.mark.parametrize(
    "address", ["b.example", "ftp://b", "http://b;script-src *", "http://b/a b", 'http://b/"', "http://"]
)
def test_an_address_that_would_change_the_pages_policy_is_refused_in_one_line(address):
    with pytest.raises(InvalidArgument, match=r"REX_COMPARE_WITH is .*: expected scheme and host") as refusal:
        second_service(address)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("address", ["", "http://b", "https://b.example:3000/", "http://[::1]:3000/rex"])
def test_the_address_of_a_second_service_is_taken(address):
    assert second_service(address) == address


def test_a_variable_of_a_former_name_is_refused():
    with pytest.raises(InvalidArgument, match=r"REX_MIXED_PRECISION is set, .*: set REX_PRECISION=bfloat16"):
        with_overrides(BentoArgs(model="a:1"), {"REX_MIXED_PRECISION": "true"})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("REX_MAX_BATCHSIZE", "REX_MAX_BATCH_SIZE"),
        ("REX_THREAD", "REX_THREADS"),
        ("REX_KV_CACHE_MB", "REX_KV_CACHE_MIB"),
        ("REX_MAX_BATCH_SIZES", "REX_MAX_BATCH_SIZE"),
    ],
)
def test_a_misspelled_variable_is_refused_by_name(name, meant):
    with pytest.raises(InvalidArgument, match=f"^{name} is set, .* not an option: did you mean {meant}.$"):
        with_overrides(BentoArgs(model="a:1"), {name: "1"})


def test_variables_of_others_that_begin_alike_are_not_options():
    others = ["REX_NATIVE_INSTRUCTIONS", "REX_NATIVE_LIBRARY", "REX_RUN_ENGINE", "REX_BIND", "REX_GPU_IMAGE"]
    assert with_overrides(BentoArgs(model="a:1"), dict.fromkeys(others, "1")) == BentoArgs(model="a:1")
