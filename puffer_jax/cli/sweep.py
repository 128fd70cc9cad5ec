"""`puffer-jax sweep`."""

import dataclasses
import multiprocessing
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from flax import nnx

from puffer_jax.base.files import write_atomically
from puffer_jax.base.packages import require
from puffer_jax.cli.envs import make_envs, make_policy
from puffer_jax.cli.options import PolicyOptions, TrainOptions, VecOptions
from puffer_jax.cli.train import Train, fits, parse_arguments, train_defaults
from puffer_jax.environments import registry
from puffer_jax.nn.params import merge, split
from puffer_jax.ppo.config import PuffeRLConfig
from puffer_jax.ppo.presets import read_ini
from puffer_jax.run.sweep.population import METRICS, make_population
from puffer_jax.run.sweep.space import Real, Space, read_space
from puffer_jax.run.sweep.study import Proposal, Study
from puffer_jax.weights.files import save_weights

_GROUPS = {"train": TrainOptions, "policy": PolicyOptions, "vec": VecOptions}

Values = dict[str, Real]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Search hyper-parameters, with Optuna.

    What is searched is said by the [sweep] sections of --config, as in PufferLib; without, learning
    rate, entropy, discounts and clipping are. A trial's score is the mean of the metric over its
    last tenth. Everything is in DATA_DIR/NAME, and the same command goes on from there; it may also
    run several times at once. Trials of a JAX-native environment run BATCH at a time in one
    program, as far as they differ in numbers that may be traced.
    """

    env: str | None = None
    """As in `puffer-jax train`; by default, the file's."""
    env_arg: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE for the environment's constructor; may be given several times."""
    config: Path | None = None
    """A PufferLib .ini file."""
    name: str = "sweep"
    """The folder."""
    data_dir: Path = Path("runs")
    """Where it is."""
    trials: int = 50
    """How many trials the study is to have, earlier ones included."""
    steps: int | None = None
    """Steps of a trial, in place of the options' total_timesteps."""
    num_envs: int | None = None
    """As --vec.num-envs of `puffer-jax train`."""
    batch: int = 8
    """How many trials of a JAX-native environment run at once."""
    jobs: int = 1
    """Processes. More than one are for environments on the host."""
    sampler: Literal["tpe", "random"] = "tpe"
    """Optuna's."""
    seed: int = 0
    """Of the sampler, the environments and the weights."""

    def run(self) -> int:
        """Search, print what was found, and return the exit code."""
        for name in ("trials", "batch", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; must be positive")
        if Path(self.name).name != self.name:
            raise ValueError(f"--name {self.name} cannot name a folder")
        settings, space = self._start()
        require("matplotlib", "the plot")  # before the work
        study = self._study(settings, space, self.seed)
        if self.jobs == 1:
            self._work(settings, study)
        else:
            context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
            workers = [context.Process(target=_work, args=(self, i)) for i in range(self.jobs)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            if all(worker.exitcode for worker in workers):
                raise RuntimeError("none of the processes came to an end; see above")
        done = study.done()
        if not done:
            print("no trial has a score", file=sys.stderr)
            return 1
        table = study.table()
        path = study.folder / "table.txt"
        write_atomically(path, lambda file: file.write(f"{table}\n".encode()))
        study.plot(study.folder / "sweep.png")
        print("\n".join(table.splitlines()[:11]))
        for name, share in study.importances().items():
            print(f"{share:6.1%}  {name}")
        print(f"{len(done)} trials: {path}, {study.folder / 'sweep.png'}")
        print(f"the best: {self._command(settings, study.values(done[0]))}")
        return 0

    def _start(self) -> tuple[Train, Space]:
        """The options of all trials, and what is searched."""
        words = [] if self.config is None else ["--config", str(self.config)]
        words += [] if self.env is None else ["--env", self.env]
        settings = train_defaults(words)
        env = self.env or settings.env
        if env is None:
            raise ValueError("give --env, or a --config FILE that names one")
        arguments = (*(settings.env_arg if self.env in (None, settings.env) else ()), *self.env_arg)
        train, vec = settings.train, settings.vec
        if self.steps is not None:
            train = dataclasses.replace(train, total_timesteps=self.steps)
        if self.num_envs is not None:
            vec = dataclasses.replace(vec, num_envs=self.num_envs)
        settings = dataclasses.replace(settings, env=env, env_arg=arguments, train=train, vec=vec)
        known = [f"{g}.{f.name}" for g, kind in _GROUPS.items() for f in dataclasses.fields(kind)]
        sections = {} if self.config is None else read_ini(self.config)
        return settings, read_space(sections, [*known, "env.*"])

    def _study(self, settings: Train, space: Space, seed: int) -> Study:
        about = dataclasses.asdict(settings)
        fixed = {name: about[name] for name in ("env", "env_arg", "rnn", "vec", "policy", "train")}
        return Study(
            self.data_dir / self.name,
            space,
            fixed,
            seed=seed,
            sampler=self.sampler,
            shared=_static(space) if _in_jax(settings) else (),
        )

    def _work(self, settings: Train, study: Study) -> None:
        """Run trials until there are as many as there are to be."""
        in_jax = _in_jax(settings)
        run = partial(self._at_once, settings, study, cache(self._population))
        while (left := self.trials - study.count()) > 0:
            count = min(self.batch, left) if in_jax else 1
            proposals = study.ask(count, _static(study.space))
            try:
                if in_jax:
                    run(proposals)
                else:
                    self._on_host(with_values(settings, proposals[0].values), study, *proposals)
            except BaseException as error:
                for proposal in proposals:
                    study.fail(proposal.trial)
                # Options that do not fit together, and numbers that are none, are a trial's fault.
                if not isinstance(error, ValueError | ArithmeticError):
                    raise
                print(f"trial {proposals[0].trial.number} failed: {error}", file=sys.stderr)
            best = study.done()[:1]
            scores = f"best {best[0].value:.4g} (trial {best[0].number})" if best else "no score"
            print(f"{study.count()} of {self.trials} trials, {scores}", flush=True)

    def _population(self, settings: Train, metric: str) -> Any:
        """The program for all trials with these options, and what makes their policies."""
        arguments = parse_arguments(settings.env_arg)
        env, single, count = make_envs(
            str(settings.env), settings.vec, arguments, settings.policy.action_mask
        )
        config = _config(settings, count, self.seed)

        def policy(rngs: nnx.Rngs) -> nnx.Module:
            return make_policy(single, settings.policy, settings.rnn, config.precision, rngs=rngs)

        return make_population(config, env, policy, metric), policy

    def _at_once(
        self, settings: Train, study: Study, population: Any, proposals: Sequence[Proposal]
    ) -> None:
        groups: dict[Train, list[Proposal]] = {}
        for proposal in proposals:
            static = {n: x for n, x in proposal.values.items() if n in _static(study.space)}
            groups.setdefault(with_values(settings, static), []).append(proposal)
        for options, group in groups.items():
            train, make = population(options, study.space.metric)
            hypers = [
                {n.partition(".")[2]: float(x) for n, x in p.values.items() if n in _TRACED}
                for p in group
            ]
            # One size, one compilation.
            hypers += hypers[-1:] * (self.batch - len(hypers))
            start = time.monotonic()
            found = train(hypers, self.seed + group[0].trial.number)
            seconds = (time.monotonic() - start) / len(group)
            for place, proposal in enumerate(group):
                study.tell(proposal.trial, float(found.scores[place]), seconds)
            best = study.done()[:1]
            places = [p.trial.number for p in group]
            if best and best[0].number in places:
                place = places.index(best[0].number)
                params = jax.tree.map(lambda x: x[place], found.params)  # noqa: B023
                graphdef, _ = split(make(nnx.Rngs(0)))
                save_weights(merge(graphdef, params), study.folder / "best.safetensors")

    def _on_host(self, settings: Train, study: Study, proposal: Proposal) -> None:
        from puffer_jax.run.loggers import NoLogger
        from puffer_jax.run.trainer import PuffeRL

        trial, start = proposal.trial, time.monotonic()
        envs, single, count = make_envs(
            str(settings.env),
            settings.vec,
            parse_arguments(settings.env_arg),
            settings.policy.action_mask,
        )
        try:
            config = _config(settings, count, self.seed + trial.number)
            config = dataclasses.replace(config, data_dir=str(study.folder))
            policy = make_policy(
                single, settings.policy, settings.rnn, config.precision, config.seed
            )
            trainer = PuffeRL(config, envs, policy, NoLogger(f"trial{trial.number}"))
        except BaseException:
            getattr(envs, "close", lambda: None)()
            raise
        trainer.log_seconds = 0.0
        curve: list[tuple[int, float]] = []
        logs: dict[str, Any] = {}
        with trainer:
            while not trainer.done:
                logs = trainer.run_epoch() or {}
                names = (study.space.metric, METRICS.get(study.space.metric))
                found = [x for n in names if (x := logs.get(f"environment/{n}")) is not None]
                if found:
                    curve.append((trainer.global_step, float(found[0])))
                    trial.report(curve[-1][1], trainer.global_step)
                    if trial.should_prune():
                        study.prune(trial, time.monotonic() - start)
                        return
        if not curve:
            raise ValueError(f"no {study.space.metric} in the logs; there are {', '.join(logs)}")
        last = [x for step, x in curve if step > 0.9 * config.total_timesteps] or [curve[-1][1]]
        study.tell(trial, float(np.mean(last)), time.monotonic() - start)

    def _command(self, settings: Train, values: Values) -> str:
        words = ["puffer-jax", "train"]
        words += ["--config", str(self.config)] if self.config else []
        words += ["--env", str(settings.env)]
        for pair in settings.env_arg:
            words += ["--env-arg", pair]
        steps = values.get("train.total_timesteps", settings.train.total_timesteps)
        words += ["--train.total-timesteps", str(round(steps))]
        words += [] if self.num_envs is None else ["--vec.num-envs", str(self.num_envs)]
        for name, value in values.items():
            group, _, key = name.partition(".")
            if group == "env":
                words += ["--env-arg", f"{key}={value!r}"]
            elif name != "train.total_timesteps":
                words += [
                    f"--{group}.{key.replace('_', '-')}",
                    str(value) if isinstance(value, int) else f"{value:.6g}",
                ]
        return shlex.join(words)


_TRACED = {f"train.{name}" for name in PuffeRLConfig().hypers()}


def _static(space: Space) -> tuple[str, ...]:
    """What a compiled program cannot take as an argument."""
    return tuple(p.name for p in space.parameters if p.name not in _TRACED)


def _in_jax(settings: Train) -> bool:
    return registry.find(str(settings.env))[0].in_jax


def with_values(settings: Train, values: Values) -> Train:
    """The options with a trial's values; a whole number where the option is one.

    Raises:
        ValueError: an option cannot have that value.
    """
    groups: dict[str, dict[str, Any]] = {name: {} for name in _GROUPS}
    arguments = list(settings.env_arg)
    for name, value in values.items():
        group, _, key = name.partition(".")
        if group == "env":
            arguments.append(f"{key}={value!r}")
            continue
        kinds = {field.name: field.type for field in dataclasses.fields(_GROUPS[group])}
        value = value if fits(value, kinds[key]) else round(value)
        if not fits(value, kinds[key]):
            raise ValueError(f"[sweep.{name}]: {name} cannot be {value!r}")
        groups[group][key] = value
    made = {g: dataclasses.replace(getattr(settings, g), **new) for g, new in groups.items()}
    return dataclasses.replace(settings, env_arg=tuple(arguments), **made)


def _config(settings: Train, num_envs: int | None, seed: int) -> PuffeRLConfig:
    known = {"env": settings.env, "num_envs": num_envs, "seed": seed}
    return PuffeRLConfig.from_dict(dataclasses.asdict(settings.train) | known)


def _work(sweep: Sweep, number: int) -> None:
    """One of several processes."""
    settings, space = sweep._start()
    sweep._work(settings, sweep._study(settings, space, sweep.seed + 1 + number))
