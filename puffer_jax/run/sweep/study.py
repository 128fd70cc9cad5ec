"""An Optuna study of trials: opened or resumed, asked for the next ones, told what they gave."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from puffer_jax.base.files import write_atomically
from puffer_jax.base.packages import require
from puffer_jax.base.text import to_json
from puffer_jax.run.sweep.space import Parameter, Real, Space

INSTALL = "'puffer_jax[sweep]'"

# As many as TPE draws before it begins to model.
_FIRST = 10


class Proposal(NamedTuple):
    """A trial to be run: Optuna's, and the values by the parameters' names."""

    trial: Any
    values: dict[str, Real]


class Study:
    """What was tried, in `folder/study.db`; several processes may work on it at once.

    Args:
        folder: made if missing.
        space: what is searched.
        fixed: everything else that a trial's result depends on; a study goes on only with the same.
        seed: of the sampler, and of the first trials.
        sampler: "tpe", or "random".
        shared: names of the parameters that have one value in all of the first trials.

    Raises:
        ValueError: the folder has a study of something else.
        ImportError: optuna is missing.
    """

    def __init__(
        self,
        folder: Path,
        space: Space,
        fixed: Mapping[str, Any],
        *,
        seed: int = 0,
        sampler: str = "tpe",
        shared: Sequence[str] = (),
    ):
        self.folder, self.space = folder, space
        self._optuna = optuna = require("optuna", "puffer-jax sweep", INSTALL)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        folder.mkdir(parents=True, exist_ok=True)
        samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        self.optuna = optuna.create_study(
            storage=f"sqlite:///{folder / 'study.db'}",
            study_name="sweep",
            direction="maximize" if space.maximize else "minimize",
            sampler=samplers[sampler](seed=seed),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=_FIRST),
            load_if_exists=True,
        )
        self.distributions = {p.title: _distribution(optuna, p) for p in space.parameters}
        self._settle(dict(fixed), seed, shared)

    def _settle(self, fixed: dict[str, Any], seed: int, shared: Sequence[str]) -> None:
        searched = [vars(parameter) for parameter in self.space.parameters]
        about = to_json({"space": [self.space.metric, self.space.maximize, searched], **fixed})
        found = self.optuna.user_attrs.get("about")
        if found is not None and found != about:
            raise ValueError(
                f"{self.folder} has a study with another space or other options; go on with its "
                "own, or give another --name"
            )
        if found is None:
            self.optuna.set_user_attr("about", about)
            rng = np.random.default_rng(seed)
            centre = {p.title: p.centre() for p in self.space.parameters}
            kept = {p.title: centre[p.title] for p in self.space.parameters if p.name in shared}
            for place in range(_FIRST):
                drawn = {p.title: p.draw(rng) for p in self.space.parameters}
                self.optuna.enqueue_trial(drawn | kept if place else centre)

    def count(self) -> int:
        """Trials that were begun, those of processes that died included."""
        waiting = self._optuna.trial.TrialState.WAITING
        return sum(trial.state != waiting for trial in self.optuna.trials)

    def ask(self, count: int, shared: Sequence[str] = ()) -> list[Proposal]:
        """The next trials.

        Args:
            count: how many.
            shared: names of parameters that have one value in all of them; one of the first trials,
                which are settled, may differ.
        """
        first = self._proposal()
        proposals, sampler = [first], self.optuna.sampler
        titles = {p.title for p in self.space.parameters if p.name in shared}
        same = {title: x for title, x in first.trial.params.items() if title in titles}
        if same:
            with self._experiments():
                partial = self._optuna.samplers.PartialFixedSampler
                self.optuna.sampler = partial(same, sampler)
        try:
            proposals += [self._proposal() for _ in range(count - 1)]
        finally:
            self.optuna.sampler = sampler
        return proposals

    def _proposal(self) -> Proposal:
        trial = self.optuna.ask(self.distributions)
        values = {p.name: p.value(trial.params[p.title]) for p in self.space.parameters}
        return Proposal(trial, values)

    def tell(self, trial: Any, score: Real, seconds: Real) -> None:
        """What a trial gave; one whose score is not finite has failed."""
        trial.set_user_attr("seconds", float(seconds))
        if np.isfinite(score):
            self.optuna.tell(trial, float(score))
        else:
            self.optuna.tell(trial, state=self._optuna.trial.TrialState.FAIL)

    def prune(self, trial: Any, seconds: Real) -> None:
        """A trial was given up."""
        trial.set_user_attr("seconds", float(seconds))
        self.optuna.tell(trial, state=self._optuna.trial.TrialState.PRUNED)

    def fail(self, trial: Any) -> None:
        """A trial came to nothing, unless it was told before."""
        failed = self._optuna.trial.TrialState.FAIL
        self.optuna.tell(trial, state=failed, skip_if_finished=True)

    def done(self) -> list[Any]:
        """The trials that were finished, the best first."""
        complete = self._optuna.trial.TrialState.COMPLETE
        trials = [trial for trial in self.optuna.trials if trial.state == complete]
        return sorted(trials, key=lambda t: -t.value if self.space.maximize else t.value)

    def values(self, trial: Any) -> dict[str, Real]:
        """A finished trial's values by the parameters' names."""
        return {p.name: p.value(trial.params[p.title]) for p in self.space.parameters}

    def table(self, most: int | None = None) -> str:
        """The best trials, one a line: number, score, seconds, values."""
        names = [parameter.name for parameter in self.space.parameters]
        rows = [["trial", self.space.metric, "seconds", *names]]
        for trial in self.done()[:most]:
            numbers = [trial.value, trial.user_attrs["seconds"], *self.values(trial).values()]
            rows.append([str(trial.number), *(f"{x:.4g}" for x in numbers)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        )

    def importances(self) -> dict[str, float]:
        """How much of the score each parameter explains, by Optuna's PED-ANOVA; {} if unknown."""
        if len({trial.value for trial in self.done()}) < 4:
            return {}
        importance = self._optuna.importance
        with self._experiments():
            evaluator = importance.PedAnovaImportanceEvaluator()
            return importance.get_param_importances(self.optuna, evaluator=evaluator)

    @contextmanager
    def _experiments(self) -> Iterator[None]:
        """What Optuna may still change is no news to those who only run a command."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            yield

    def plot(self, path: Path) -> None:
        """Draw the scores in their order, importances, and scores against seconds.

        Raises:
            ImportError: matplotlib is missing.
        """
        require("matplotlib", "the plot")
        from matplotlib.figure import Figure

        trials = sorted(self.done(), key=lambda trial: trial.number)
        numbers, scores = [t.number for t in trials], np.array([t.value for t in trials])
        seconds = np.array([t.user_attrs["seconds"] for t in trials])
        best = np.maximum if self.space.maximize else np.minimum
        figure = Figure(figsize=(13, 4), layout="constrained")
        history, bars, costs = figure.subplots(1, 3)
        history.plot(numbers, scores, ".", color="tab:blue")
        history.plot(numbers, best.accumulate(scores), color="tab:orange")
        history.set(xlabel="trial", ylabel=self.space.metric, title="history")
        shares = dict(reversed(self.importances().items()))
        bars.barh([*shares], [*shares.values()])
        bars.set(xlabel="share of the score explained", title="importances")
        costs.plot(seconds, scores, ".", color="tab:blue")
        order = np.argsort(seconds)
        costs.step(seconds[order], best.accumulate(scores[order]), where="post", color="tab:orange")
        costs.set(xlabel="seconds", ylabel=self.space.metric, title="cost against score")
        suffix = path.suffix.removeprefix(".")
        write_atomically(path, lambda file: figure.savefig(file, format=suffix, dpi=110))


def _distribution(optuna: Any, parameter: Parameter) -> Any:
    low, high = parameter.ends
    if parameter.kind.whole:
        return optuna.distributions.IntDistribution(round(low), round(high))
    return optuna.distributions.FloatDistribution(low, high, log=parameter.kind.log)
