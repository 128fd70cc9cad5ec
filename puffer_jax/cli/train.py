"""`puffer-jax train`, and where its options come from: defaults, a file or a run, flags."""

import argparse
import ast
import dataclasses
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tyro

from puffer_jax.base import locks
from puffer_jax.base.files import write_atomically
from puffer_jax.base.text import from_json, near
from puffer_jax.cli.envs import V4, make_envs, make_policy, settled
from puffer_jax.cli.options import PolicyOptions, TrainOptions, VecOptions
from puffer_jax.environments.families import Arguments
from puffer_jax.policies.choice import AUTO_0_1
from puffer_jax.policies.masks import AUTO
from puffer_jax.policies.registry import FEED_FORWARD
from puffer_jax.ppo.config import PuffeRLConfig, near_options
from puffer_jax.ppo.presets import preset_path, read_ini
from puffer_jax.ppo.v4_ini import Sections, is_v4, load_ini
from puffer_jax.run.loggers import Logger


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a policy.

    Writes DATA_DIR/RUN/ with config.json, log.jsonl, model_*.pt and state_*, and resumes from
    there with --resume. Ctrl-C and SIGTERM end it after the current epoch, with a checkpoint.
    """

    env: str | None = None
    """A gymnasium, ALE or minigrid id, `pettingzoo:FOLDER/MODULE`, an id in JAX after brax:,
    craftax:, gymnax:, jaxmarl:, jumanji:, navix:, pgx: or playground:, or a JAX-native one of
    puffer_jax.environments (cartpole, memory, squared, ...)."""
    env_arg: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE for the environment's constructor; may be given several times."""
    config: Path | None = None
    """A PufferLib .ini file; flags override it."""
    preset: bool = True
    """Start from the environment's preset, if puffer_jax has one; see puffer_jax/presets."""
    recommended: bool = True
    """Start from PuffeRLConfig.recommended(), not from PufferLib's numbers and quirks; presets, the
    file and flags override it. With --config the default is no."""
    resume: Path | None = None
    """Resume the run in this folder, with its options unless flags override them."""
    name: str | None = None
    """The run is called NAME_seed<seed>; without NAME, after the time."""
    log: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = ("jsonl",)
    """Where the logs go. `plot` needs jsonl."""
    project: str = "puffer_jax"
    """Project of Weights & Biases."""
    rnn: bool = False
    """Put an LSTM between the policy's encoder and its heads."""
    eval_every: int | None = None
    """Agent steps between evaluations in an environment of their own; the best model is kept as
    best.pt. None: no evaluations."""
    eval_episodes: int = 10
    """Episodes of an evaluation."""
    eval_deterministic: bool = False
    """Evaluate with the most likely actions instead of sampled ones."""
    profile: bool = False
    """With a JAX-native environment, run the rollout and the update as two programs, so that the
    dashboard and the logs have the time of each."""
    devices: Literal["all"] | int = 1
    """How many devices to train on: each has its share of the agents and of every minibatch. With
    --distributed it is all of them."""
    distributed: bool = False
    """Train together with the other processes that a launcher has started (SLURM, Open MPI, a TPU
    pod, Kubernetes), on all devices of all of them, in one --train.data-dir that all of them see.
    Environments on the host are per process."""
    coordinator_address: str | None = None
    """HOST:PORT of process 0; with the next two options --distributed needs no launcher."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which one this is, from 0."""
    vec: VecOptions = dataclasses.field(default_factory=VecOptions)
    policy: PolicyOptions = dataclasses.field(default_factory=PolicyOptions)
    train: TrainOptions = dataclasses.field(default_factory=TrainOptions)

    def run(self) -> int:
        """Train, and return the exit code."""
        from puffer_jax.run import processes

        if self.env is None:
            raise ValueError("give --env, --config FILE or --resume RUN")
        address = self.coordinator_address, self.num_processes, self.process_id
        if self.distributed or address != (None, None, None):
            if self.vec.mode == "async":
                raise ValueError(
                    "--vec.mode async forks, which processes that train together cannot; use "
                    "--vec.mode puffer_jax --vec.backend Multiprocessing"
                )
            processes.initialize(*address)
        quiet = nullcontext() if processes.index() == 0 else redirect_stdout(io.StringIO())
        with processes.together(), quiet:
            return self._train()

    def _train(self) -> int:
        """What each process does; of several the first one alone prints and writes."""
        from puffer_jax.run import processes
        from puffer_jax.run.loggers import NoLogger, new_run_id
        from puffer_jax.run.trainer import PuffeRL

        assert self.env is not None  # `run` checks that
        first = processes.index() == 0
        run_id, data_dir = new_run_id(), self.train.data_dir
        if self.resume is not None:
            run = self.resume if self.resume.name not in ("", "..") else self.resume.resolve()
            run_id, data_dir = run.name, str(run.parent)
        elif self.name is not None:
            run_id = f"{self.name}_seed{self.train.seed}"
            if Path(run_id).name != run_id:
                raise ValueError(f"--name {self.name} cannot name a folder")
            if first and (Path(data_dir) / run_id).exists():
                raise ValueError(
                    f"there is a run {Path(data_dir) / run_id}; --resume it or give another --name"
                )
        # First, since the environments' processes should not be forked from a running JAX.
        envs, single, count = make_envs(
            self.env, self.vec, parse_arguments(self.env_arg), self.policy.action_mask
        )
        try:
            known = {"env": self.env, "num_envs": count, "data_dir": data_dir}
            config = PuffeRLConfig.from_dict(dataclasses.asdict(self.train) | known)
            policy = make_policy(single, self.policy, self.rnn, config.precision, config.seed)
            trainer = PuffeRL(config, envs, policy, NoLogger(run_id), self._mesh())
            if self.resume is not None:
                trainer.restore()
            evaluation = self._evaluation() if first else None
            if first:
                locks.claim(trainer.run_folder)
        except BaseException:
            getattr(envs, "close", lambda: None)()
            raise
        steps = f"of {config.total_timesteps} steps"
        if trainer.done:
            getattr(envs, "close", lambda: None)()
            print(f"{trainer.run_folder}: {trainer.global_step} {steps} are done already")
            return 0
        # Only now, so that bad options leave no files behind.
        made = dataclasses.replace(self, policy=settled(self.policy, policy))
        if first:
            write_settings(made, trainer.run_folder)
            trainer.logger = make_logger(self, trainer.run_folder)
        else:
            trainer.logger = NoLogger(trainer.run_folder.name)
        trainer.log_seconds = 0.0
        if self.resume is not None:
            print(trainer.message)
        print(_masked_by(policy), end="")
        print(f"run {trainer.run_folder}\n{self._start()}\n{trainer.sizes.plan}", flush=True)
        try:
            logs = trainer.run(evaluation, apart=self.profile)
        finally:
            if evaluation is not None:
                evaluation.close()
        print(f"{trainer.global_step} {steps}, {trainer.epoch} epochs: {trainer.close()}")
        for name in ("episode_return", "episode_length"):
            if (value := logs.get(f"environment/{name}")) is not None:
                print(f"{name} {value:.2f}")
        if not trainer.done:
            print(f"go on with: puffer-jax train --resume {trainer.run_folder}")
        return 0

    def _mesh(self) -> Any:
        """The devices that --devices asks for; None: JAX's default one. Of processes, all."""
        from puffer_jax.ppo.devices import mesh
        from puffer_jax.run import processes

        if processes.count() > 1:
            return mesh()
        if self.devices == 1:
            return None
        return mesh(None if self.devices == "all" else self.devices)

    def _start(self) -> str:
        """Where the options come from that no flag gave."""
        assert self.env is not None  # `run` checks that
        path = preset_path(self.env)
        if self.resume is not None:
            return f"options of {self.resume}"
        if self.config is not None:
            return f"options of {self.config}"
        if not self.recommended:
            return "PufferLib's default options"
        return f"preset {path.name}" if self.preset and path else "recommended options"

    def _evaluation(self) -> Any:
        """The evaluations that --eval-every asks for."""
        from puffer_jax.cli.games import make_game
        from puffer_jax.run.evaluation import Evaluation

        if self.eval_every is None:
            return None
        if self.eval_every < 1 or self.eval_episodes < 1:
            raise ValueError(
                f"--eval-every is {self.eval_every}, --eval-episodes {self.eval_episodes}; must be "
                "positive"
            )
        assert self.env is not None
        arguments, mask = parse_arguments(self.env_arg), self.policy.action_mask
        game = make_game(self.env, arguments, None, self.train.seed + 1, mask)
        return Evaluation(game, self.eval_every, self.eval_episodes, self.eval_deterministic)


def _masked_by(policy: Any) -> str:
    """A line about the action mask, if there is one."""
    key = getattr(getattr(policy, "policy", policy), "action_mask", None)
    return "" if key is None else f"only legal actions, by {key}\n"


SETTINGS = "config.json"

# Where the processes are is not the run's.
_ADDRESS = ("distributed", "coordinator_address", "num_processes", "process_id")

_INI_SECTIONS = ("base", "env", "vec", "policy", "rnn", "train")

# PufferLib's, which have no meaning here.
_INI_UNUSED = ("sweep",)

_INI_BASE = ("env_name", "package", "policy_name", "rnn_name", "max_suggestion_cost")


def train_defaults(argv: Sequence[str]) -> Train:
    """The options of `puffer-jax train` before its flags: the defaults, or those of a file or run.

    Args:
        argv: the command line; only --config, --env, --preset, --recommended and --resume matter.

    Raises:
        ValueError: the file or the run cannot be read, or has options that do not exist.
        FileNotFoundError: there is no such file or run.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # tyro says what is wrong with the flags themselves.
    parser.add_argument("--config", nargs="?")
    parser.add_argument("--resume", nargs="?")
    parser.add_argument("--env", nargs="?")
    parser.add_argument("--recommended", action=argparse.BooleanOptionalAction)
    parser.add_argument("--preset", action=argparse.BooleanOptionalAction)
    flags = [word[len("--train.") :].partition("=")[0] for word in argv if word[:8] == "--train."]
    options = {name.removeprefix("no-").replace("-", "_") for name in flags}
    if unknown := sorted(options - {*_fields(TrainOptions)}):
        raise ValueError(f"no such --train option: {', '.join(near_options(unknown))}")
    found = parser.parse_known_args(argv)[0]
    if found.resume is not None:
        if {found.config, found.recommended, found.preset} != {None}:
            raise ValueError(
                "--config, --preset and --recommended start a run; they do not go with --resume"
            )
        return read_settings(Path(found.resume))
    if found.config is not None:
        config = PuffeRLConfig.recommended() if found.recommended else PuffeRLConfig()
        read = _read_config(Path(found.config), config)
        # PufferLib's policies observe a mask like anything else.
        policy = read.policy if found.recommended else _unmasked(read.policy)
        return dataclasses.replace(read, recommended=bool(found.recommended), policy=policy)
    if found.recommended is False:
        train = TrainOptions(**dataclasses.asdict(PuffeRLConfig()))
        return Train(train=train, policy=PolicyOptions(action_mask=None))
    config = PuffeRLConfig.recommended()
    path = None if found.env is None or found.preset is False else preset_path(found.env)
    if path is not None:
        return _read_config(path, config)
    return Train(train=TrainOptions(**dataclasses.asdict(config)))


def _unmasked(policy: PolicyOptions) -> PolicyOptions:
    return dataclasses.replace(policy, action_mask=None) if policy.action_mask == AUTO else policy


def _read_config(path: Path, config: PuffeRLConfig) -> Train:
    """The options in a PufferLib .ini file."""
    sections = read_ini(path)
    if is_v4(sections):
        return _read_v4(path, sections, config)
    unused = [name for name in sections if name.split(".")[0] in _INI_UNUSED]
    groups = {name: values for name, values in sections.items() if name not in unused}
    _check_names(path, "section", groups, _INI_SECTIONS)
    for name in dict.fromkeys(name.split(".")[0] for name in unused):
        print(f"{path}: [{name}] is for puffer-jax sweep", file=sys.stderr)
    base, vec, policy, rnn = (dict(groups.get(n, {})) for n in ("base", "vec", "policy", "rnn"))
    _check_names(path, "key in [base]", base, _INI_BASE)
    try:
        config = PuffeRLConfig.from_dict(dataclasses.asdict(config) | groups.get("train", {}))
    except ValueError as error:
        raise ValueError(f"{path}: [train] {error}") from error

    names = str(base.get("env_name")).split()
    env = names[0] if len(names) == 1 and names != ["None"] else None
    if env is not None and base.get("package") == "gymnax":
        env = f"gymnax:{env}"

    vec.pop("seed", None)  # [train] has the one that counts
    _check_names(path, "key in [vec]", vec, _fields(VecOptions))
    if "backend" in vec:
        vec = {"mode": "puffer"} | vec
    if config.num_envs is not None:
        vec["num_envs"] = config.num_envs

    # One width under several names: they must be equal in all our policies.
    widths = [policy.pop(n) for n in ("mlp_width", "output_size") if n in policy]
    _check_names(path, "key in [policy]", policy, [*_fields(PolicyOptions), "input_size"])
    policy.pop("input_size", None)
    _check_names(path, "key in [rnn]", rnn, ("input_size", "hidden_size"))
    widths += [policy["hidden_size"]] if "hidden_size" in policy else []
    widths += rnn.values()
    if any(width != widths[0] for width in widths):
        raise ValueError(
            f"{path}: the widths in [policy] and [rnn] are {widths}; they must be the same"
        )
    if widths:
        policy["hidden_size"] = widths[0]
    kinds = {"None": "auto", "Policy": "auto"}
    policy_name = str(base.get("policy_name", "Policy"))
    known = {**kinds, **{name: name for name in FEED_FORWARD}}
    _check_names(path, "policy_name", [policy_name], known)
    recurrent = {"None": False, "Recurrent": True, "LSTMWrapper": True}
    rnn_name = str(base.get("rnn_name"))
    _check_names(path, "rnn_name", [rnn_name], recurrent)
    return _checked(
        path,
        {
            "env": env,
            "env_arg": [f"{name}={value!r}" for name, value in groups.get("env", {}).items()],
            "rnn": recurrent[rnn_name] or bool(config.use_rnn),
            "vec": vec,
            "policy": policy | {"name": known[policy_name]},
            "train": dataclasses.asdict(config),
        },
    )


def _read_v4(path: Path, sections: Sections, start: PuffeRLConfig) -> Train:
    """The options in a PufferLib 4 .ini file."""
    read = load_ini(path, sections)
    if read.unused is not None:
        print(read.unused, file=sys.stderr)
    config = PuffeRLConfig.of_v4(path, read, None if start == PuffeRLConfig() else start)
    return _checked(
        path,
        {
            "env": read.env_name,
            "env_arg": [f"{name}={value!r}" for name, value in read.env.items()],
            "vec": {"num_envs": config.num_envs},
            "policy": read.policy | {"name": V4},
            "train": dataclasses.asdict(config),
        },
    )


def write_settings(settings: Train, folder: Path) -> None:
    """Write the options of a run to its folder."""
    values = dataclasses.asdict(settings)
    for name in ("config", "preset", "recommended", "resume", *_ADDRESS):
        del values[name]
    text = json.dumps(values, indent=1).encode()
    write_atomically(folder / SETTINGS, lambda file: file.write(text))


def read_settings(folder: Path) -> Train:
    """The options of the run in a folder.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: its options cannot be read.
    """
    path = folder / SETTINGS
    try:
        values = from_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not the options of a run")
    settings = _checked(path, values)
    if "action_mask" not in values.get("policy", {}):  # before there were masks
        settings = dataclasses.replace(settings, policy=_unmasked(settings.policy))
    if "eval_every" not in values and settings.policy.name == "auto":
        # Version 0.1 wrote it, and chose less often among the policies.
        policy = dataclasses.replace(settings.policy, name=AUTO_0_1)
        settings = dataclasses.replace(settings, policy=policy)
    return settings


def _checked(where: Path, values: Mapping[str, Any]) -> Train:
    """`Train` from plain values, refusing what flags would not allow."""
    kinds: dict[str, type] = {"vec": VecOptions, "policy": PolicyOptions, "train": TrainOptions}
    groups: dict[str, Any] = {}
    for group, kind in kinds.items():
        given = values.get(group, {})
        if not isinstance(given, Mapping):
            raise ValueError(f"{where}: [{group}] cannot be {given!r}")
        groups[group] = kind(**_options(where, f"key in [{group}]", f"[{group}] ", given, kind))
    try:
        PuffeRLConfig.from_dict(dataclasses.asdict(groups["train"]))
    except ValueError as error:
        raise ValueError(f"{where}: [train] {error}") from error
    plain = {name: value for name, value in values.items() if name not in kinds}
    return Train(**_options(where, "option", "", plain, Train), **groups)


def _options(
    where: Path, what: str, prefix: str, given: Mapping[str, Any], kind: type
) -> dict[str, Any]:
    """Values for some fields of a dataclass, checked."""
    options = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    _check_names(where, what, options, fields)
    for name, value in options.items():
        if not fits(value, fields[name]):
            raise ValueError(f"{where}: {prefix}{name} cannot be {value!r}")
    return options


def fits(value: object, kind: object) -> bool:
    """Whether an option of that type can have the value."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(v, get_args(kind)[0]) for v in value)
    if get_args(kind):
        return any(fits(value, part) for part in get_args(kind))
    return type(value) is kind or (kind is float and type(value) is int)


def _fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _check_names(where: Path, what: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{where}: no such {what}: {', '.join(near(unknown, known))}")


def parse_arguments(pairs: Iterable[str]) -> Arguments:
    """NAME=VALUE as keyword arguments; a value that is a Python literal is evaluated."""
    arguments = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not (equals and name.isidentifier()):
            raise ValueError(f"--env-arg {pair}: expected NAME=VALUE")
        try:
            arguments[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            arguments[name] = text
    return arguments


def make_logger(settings: Train, folder: Path) -> Logger:
    """The loggers that `--log` names, as one."""
    from puffer_jax.run import loggers

    made: list[Logger] = []
    for kind in settings.log:
        match kind:
            case "jsonl":
                made.append(loggers.JSONLLogger(folder / "log.jsonl"))
            case "tensorboard":
                made.append(loggers.TensorBoardLogger(folder))
            case "wandb":
                options = {"dir": str(folder), "config": dataclasses.asdict(settings.train)}
                name = folder.name
                made.append(loggers.WandbLogger(settings.project, id=name, name=name, **options))
    return loggers.MultiLogger(made) if made else loggers.NoLogger(folder.name)
