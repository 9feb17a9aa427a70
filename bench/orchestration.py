"""The overhead of Dagster: six assets as one run, against the same stages as plain scripts.

    python -m bench.orchestration [--experiment smoke] [--rounds 3]

A round runs the plain scripts, one process per stage, as without an orchestrator, and then the Dagster run. The
difference divided by six is the overhead of a step: its process, the event log, MLflow, digests and publishing. (The
assets that call BentoML and other engines start separate processes either way.) The import of the definitions is timed
first.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from model.errors import ends_in_one_line
from model.settings import ExperimentSettings

STAGES = ("corpus", "tokenized_dataset", "trained_checkpoint", "quantized_model", "exported_model", "benchmark_report")


def run_stage(stage: str, experiment: ExperimentSettings, folder: Path) -> None:
    """One stage as a plain script: read the folders of earlier stages and write one."""
    corpus, dataset, checkpoint, quantized, exported, report = (folder / name for name in STAGES)
    length = experiment.tokenizer.sequence_length
    if stage == "corpus":
        from model.text.corpus import build_corpus

        build_corpus(experiment.corpus, corpus)
    elif stage == "tokenized_dataset":
        from model.text.tokens import build_tokenized_dataset

        build_tokenized_dataset(experiment.tokenizer, corpus, dataset)
    elif stage == "trained_checkpoint":
        from model.training.train import train

        train(experiment, dataset, checkpoint, folder / "scratch")
    elif stage == "quantized_model":
        from model.quantization import quantize_checkpoint

        quantize_checkpoint(experiment.quantization, checkpoint, dataset, quantized, sequence_length=length)
    elif stage == "exported_model":
        from model.export.certified import export_with_certificates

        export_with_certificates(
            checkpoint, quantized, dataset, exported, sequence_length=length, name=experiment.name, provenance={}
        )
    else:
        from bench.report.report import build_report

        build_report(experiment, checkpoint, quantized, dataset, report, exported_dir=exported)


def resolve(name: str) -> ExperimentSettings:
    """The experiment's settings, as the project's own command prints them."""
    command = [sys.executable, "-m", "llm_assets.experiments", name]
    printed = yaml.safe_load(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return ExperimentSettings.from_record(printed)


def timed(command: list[str], **environment: str) -> float:
    """Seconds that a command takes; its output is shown only if it fails."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - started


def measure(name: str) -> tuple[float, float]:
    """Seconds of the plain scripts and of the Dagster run."""
    with tempfile.TemporaryDirectory() as folder:
        plain = [sys.executable, "-m", "bench.orchestration", "--experiment", name, "--folder", folder, "--stage"]
        plain_s = sum(timed([*plain, stage]) for stage in STAGES)
    with tempfile.TemporaryDirectory() as folder:
        dagster = [sys.executable, "-m", "dagster", "asset", "materialize", "-m", "llm_assets.definitions"]
        dagster += ["--select", ",".join(STAGES), "--partition", name]
        dagster_s = timed(dagster, LLM_ASSETS_VAR=folder, DAGSTER_HOME="")
    return plain_s, dagster_s


@ends_in_one_line
def main() -> int:
    """Print each round's seconds and the overhead of a step."""
    parser = argparse.ArgumentParser(prog="python -m bench.orchestration", description=__doc__.split("\n")[0])
    parser.add_argument("--experiment", default="smoke", help="default: smoke")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--stage", choices=STAGES, help="run one stage as a plain script, in --folder")
    parser.add_argument("--folder", type=Path, default=Path())
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(arguments.stage, resolve(arguments.experiment), arguments.folder)
        return 0
    program = "import time; t = time.perf_counter(); import llm_assets.definitions; print(time.perf_counter() - t)"
    command = [sys.executable, "-c", program]
    seconds = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(5)]
    print(f"import llm_assets.definitions: median {statistics.median(seconds):.2f} s of {len(seconds)}")
    costs = []
    for number in range(arguments.rounds):
        plain_s, dagster_s = measure(arguments.experiment)
        costs.append((dagster_s - plain_s) / len(STAGES))
        print(
            f"round {number + 1}: scripts {plain_s:.1f} s, Dagster {dagster_s:.1f} s, "
            f"a step costs {costs[-1]:.2f} s more"
        )
    print(f"median: a step costs {statistics.median(costs):.2f} s more")
    return 0


if __name__ == "__main__":
    sys.exit(main())
