"""A Hydra sweeper that searches for the best point with Optuna: `hydra/sweeper=optuna`.

    python -m llm_assets.sweep --multirun experiment=smoke hydra/sweeper=optuna hydra.sweeper.n_trials=20 \
        'training.muon_learning_rate=tag(log,interval(0.005,0.1))' training.optim=muon,adamw

Overrides are Hydra's own: a choice (`a,b`), a `range(start,stop,step)`, or an `interval(low,high)`, with `tag(log, ..)`
on a logarithmic scale; an override with one value is fixed. Trials run one after the other; a failed one counts, and
the search goes on. The package hydra-optuna-sweeper is not used: its last release needs Optuna below 3, this one runs
with Optuna 5.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from model.errors import PipelineError

if TYPE_CHECKING:
    from optuna import Trial


@dataclass
class OptunaSweeperOptions:
    """`hydra.sweeper`."""

    _target_: str = f"{__name__}.OptunaSweeper"
    n_trials: int = 20
    seed: int = 0


class OptunaSweeper(Sweeper):  # type: ignore[misc]
    """Minimizes the number that the task returns; Optuna's TPE sampler chooses each next point."""

    def __init__(self, n_trials: int, seed: int) -> None:
        if n_trials < 1:
            raise PipelineError(f"hydra.sweeper.n_trials is {n_trials}: expected a number greater than 0")
        self._trials, self._seed = n_trials, seed

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self._parser = OverridesParser.create(config_loader=hydra_context.config_loader)

    def sweep(self, arguments: list[str]) -> float:
        """Run the trials; returns the best value. Raises PipelineError if Optuna is missing or no trial succeeded."""
        try:
            import optuna
        except ImportError:
            raise PipelineError(
                "hydra/sweeper=optuna needs the package optuna: pip install '.[sweep]', or try all points without it"
            ) from None
        overrides = self._parser.parse_overrides(arguments)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="minimize", sampler=optuna.samplers.TPESampler(seed=self._seed))
        for _ in range(self._trials):
            trial = study.ask()
            point = [_suggest(trial, override) for override in overrides]
            try:
                (done,) = self._launcher.launch([point], initial_job_idx=trial.number)
                study.tell(trial, float(done.return_value))
            except (SystemExit, TypeError, ValueError):  # a failed run, or one without a score
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
        if not [trial for trial in study.trials if trial.value is not None]:
            raise PipelineError(f"none of {self._trials} trials has a score: see the reasons in var/logs")
        return float(study.best_value)


def _suggest(trial: "Trial", override: Override) -> str:
    """The override with one value, chosen by Optuna if it has several."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return f"{key}={override.get_value_element_as_str()}"
    sweep: Any = override.value()
    is_log = "log" in sweep.tags
    if override.is_interval_sweep():
        is_whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
        if is_whole:
            return f"{key}={trial.suggest_int(key, sweep.start, sweep.end, log=is_log)}"
        # Six digits: names and tables show the value, and a person who repeats the run types it.
        short = float(f"{trial.suggest_float(key, sweep.start, sweep.end, log=is_log):.6g}")
        return f"{key}={min(max(short, sweep.start), sweep.end)}"
    if is_log:
        raise PipelineError(f"{override.input_line}: only tag(log, interval(low, high)) has a logarithmic scale")
    choices = [str(value) for value in override.sweep_iterator(transformer=Transformer.encode)]
    return f"{key}={trial.suggest_categorical(key, choices)}"


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaSweeperOptions, provider="rex-pipeline")
Plugins.instance().register(OptunaSweeper)
