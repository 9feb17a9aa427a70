"""How each documented command is run by a test, or why none runs it: the table of `tests/test_documented_runs.py`.

The first line whose pattern matches the whole command counts. A command without a line, or a line without a command,
fails a test.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Reads:
    """Runs in the ordinary suite on the finished `smoke` run that the end-to-end tests share."""


@dataclass(frozen=True)
class Runs:
    """Runs in the ordinary suite, with these words after it."""

    words: str = ""


@dataclass(frozen=True)
class Resolves:
    """Goes through make, the shell and Hydra with DRY_RUN=true in the ordinary suite.

    nightly: overrides with which `make test-nightly` runs it whole; without, `why_not` says why it does not, or names
    the test that does.
    """

    nightly: str = ""
    why_not: str = ""


@dataclass(frozen=True)
class Nightly:
    """Runs in `make test-nightly` with these words after it, on a run of `stdlib` and two of `smoke`.

    answers: the route that a server answers with 200; it is then ended. {port} in `words` is a free one.
    """

    words: str = ""
    answers: str = ""


@dataclass(frozen=True)
class TestedBy:
    """Another test runs it."""

    __test__ = False
    name: str


@dataclass(frozen=True)
class NotRun:
    """What a machine for development lacks."""

    reason: str


Way = Reads | Runs | Resolves | Nightly | TestedBy | NotRun

SHORT = "training.max_steps=10 training.warmup_steps=1 benchmark=quick corpus.max_bytes=1000000"
README = TestedBy("tests/e2e/test_readme.py::test_the_first_commands_of_the_readme_end_in_text")
EXPORTED = TestedBy("tests/e2e/test_pipeline.py::test_the_documented_use_of_an_export_works")
EXAMPLES = TestedBy("tests/bento/test_examples.py::test_the_examples_of_the_service_work")
IMAGE = TestedBy("tests/e2e/test_container_image.py::test_the_image_is_labelled_and_small_and_has_cpu_torch_alone")
USAGE = TestedBy("tests/test_docs.py::test_a_documented_module_says_how_it_is_used")
VLLM = TestedBy(
    "tests/bento/serving/test_vllm.py::test_the_service_answers_behind_its_keys_and_limits_and_ends_with_vllm"
)
STACK = "tests/e2e/test_stack.py::"
SUITE = NotRun("it is the suite itself, or a part of it")
PROGRAM = NotRun("the program is not among the project's packages")
INDEX = NotRun("it needs a package index, and changes the environment or the lock that the tests run with")
GIGABYTES = NotRun("it downloads gigabytes from a package index")

TABLE: dict[str, Way] = {
    # What reads a finished run, and short commands.
    r"make help": Runs(),
    r"python -m model\.native\.build": Runs(),
    r"\.venv/bin/pytest --timeout 1800": Runs("--collect-only -q tests/test_clocks.py"),
    r"\.venv/bin/pytest .*": Nightly("--collect-only -q"),
    r"\S*python -m llm_assets\.latest smoke --image cpu": IMAGE,
    r"python -m (llm_assets\.(experiments|latest|origin|champion show)|model\.export) \S.*": Reads(),
    r"cd .*": EXPORTED,
    r"python -c .*": EXPORTED,
    # Runs of the pipeline.
    r"make pipeline( .*)? .*s3://.*": Resolves(why_not="it names a bucket of the reader"),
    r"make pipeline EXPERIMENT=(gpt2_124m|llama_350m) .*": Resolves(why_not="it takes days without eight GPUs"),
    r"make pipeline EXPERIMENT=NAME": Resolves(why_not="the name stands for any experiment"),
    r"make pipeline .*engine=vllm": Resolves(
        why_not="tests/e2e/test_vllm_image.py::test_the_service_answers_with_vllm_behind_its_key_limits_names_and_metrics"
    ),
    r"make pipeline( .*)?": Resolves(nightly=SHORT),
    r"make sweep .*": Resolves(nightly=SHORT),
    r"python -m llm_assets\.sweep .*n_trials=20 .*": Resolves(nightly=f"hydra.sweeper.n_trials=2 {SHORT}"),
    r"make image( .*)? DEVICE=gpu": Resolves(
        why_not="tests/e2e/test_container_image.py::test_the_gpu_image_is_laid_out_with_cuda_packages"
    ),
    r"make image( .*)?": Resolves(why_not=IMAGE.name),
    r"make evaluation .*\[mine\].*": Resolves(nightly=SHORT),
    r"make evaluation( .*)?": Resolves(why_not="the tasks read their data from the Hugging Face hub"),
    r"python -m llm_assets\.champion (promote|rollback) .*": TestedBy(
        "tests/llm_assets/versions/test_promotion.py::test_promotion_and_rollback_by_hand_are_recorded_and_stay"
    ),
    # Servers.
    r"make serve BENTO=.*": Nightly("BENTO={bento} PORT={port}", answers="/readyz"),
    r"make serve( .*)?": README,
    r"curl -s \S+/generate .*": README,
    r"curl .*": EXAMPLES,
    r"REX_MODEL=\S+ REX_ENGINE=vllm .*": VLLM,
    r"('REX_MODEL=.* )?bentoml serve( bento\.service:RexService)?": EXAMPLES,
    r"bentoml serve TAG .*": TestedBy("tests/e2e/test_service.py::test_generate_answers_json_with_usage"),
    r"make ui": TestedBy("tests/e2e/test_ui.py::test_make_ui_prints_two_addresses_and_leaves_no_process"),
    r"dagster dev( .*)": Nightly("--port {port}", answers="/server_info"),
    r"dagster dev": TestedBy("tests/test_documented_runs.py::test_a_nightly_command_runs"),
    # Containers.
    r"docker run .*": TestedBy("tests/e2e/test_container_image.py::test_it_may_do_nothing_but_serve"),
    r"dagster job execute -m llm_assets\.images .*": IMAGE,
    r"dagster job execute": TestedBy("tests/e2e/test_pipeline.py::test_an_unknown_experiment_names_the_known_ones"),
    r"(REX_\w+=\S+ )?docker compose .*generate(-previous)?": TestedBy(
        f"{STACK}test_another_version_serves_beside_and_going_back_is_one_command"
    ),
    r"make (up|logs|down)": TestedBy(
        f"{STACK}test_history_and_model_survive_down_and_up_and_dead_runs_are_marked_failed"
    ),
    r"docker compose --profile gpu .*": NotRun("it needs a GPU"),
    r"docker compose (exec -T|up --detach) (postgres|code|mlflow).*": NotRun(
        "it needs a composed stack with data to lose"
    ),
    r"make stack-image": TestedBy(f"{STACK}test_before_the_first_run_the_service_waits_for_a_champion"),
    r"make stack-image .*": GIGABYTES,
    # Measurements, as small as they can be.
    r"python -m bench\.tokenizing": Nightly("--megabytes 2 --memory-megabytes 1 --rounds 1"),
    r"python -m bench\.decode": Nightly("{checkpoint} --tokens 16 --repeats 1"),
    r"python -m bench\.orchestration": Nightly("--rounds 1"),
    r"python -m bench\.training speed": Nightly("--rounds 1 --steps 1"),
    r"python -m bench\.engine": Nightly("--shape 2m --precision float32 --workloads one_stream --rounds 1"),
    r"python -m bench\.engine\.speculation": Nightly(
        "{checkpoint} --draft {checkpoint} --rounds 1 --streams 1 --tokens 16"
    ),
    r"python -m bench\.serving": Nightly("--rounds 1 --seconds 1 --turns 1 --load-tokens 4 --starts 1"),
    r"python -m bench\.rollover": Nightly("--seconds 2 --promotions 1"),
    r"python -m bench\.soak .*": Nightly("--seconds 10"),
    r"python -m bench\.replicas": Nightly("--seconds 2 --rounds 1 --simulated 100"),
    r"python -m bench\.scale .*": Nightly("--megabytes 8 --grown 20"),
    r"python -m bench\.containers\.\w+": NotRun("it builds images without a cache, for half an hour"),
    r"python -m bench\.training quality": Nightly("--shape tiny --minutes 0.5 --learning-rates 3e-3"),
    r"make bench": NotRun("it is the measurements above, for an hour"),
    r"make bench-gpu .*": NotRun("it is for a machine with a GPU"),
    r"python -m bench\.\w+ .*(llama\.cpp|nanogpt|vllm).*": PROGRAM,
    # Other programs and environments.
    r"(ollama|llama-completion|vllm) .*": PROGRAM,
    r"make vllm": GIGABYTES,
    r"make aider": INDEX,
    r"make export-vllm": TestedBy("tests/model/export/test_vllm.py::test_vllm_runs_the_same_model"),
    r"make setup( .*)?": INDEX,
    r"make lock( .*)?": INDEX,
    r"python -m llm_assets\.instance\.install \w+": INDEX,
    r"make (test(-\w+)?|coverage|lint|releases)": SUITE,
    r"python -m [\w.]+( show)?": USAGE,
}


def way_of(command: str) -> tuple[str, Way] | None:
    """The first line of the table that matches a command: its pattern, and how the command is run."""
    return next(((pattern, way) for pattern, way in TABLE.items() if re.fullmatch(pattern, command)), None)
