"""What the trainer's commands do: `puffer-jax train`, `puffer-jax eval` and `puffer-jax plot`."""

import argparse
import ast
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import numpy as np
import tyro

from puffer_jax import environments, vector
from puffer_jax.base import spaces
from puffer_jax.base.files import write_atomically
from puffer_jax.base.text import near
from puffer_jax.environments import host
from puffer_jax.ppo.config import Auto, PuffeRLConfig, read_ini
from puffer_jax.run import checkpoint
from puffer_jax.weights.files import load_weights, policy_from_checkpoint

_INSTALL_PUFFERLIB = "pip install psutil && pip install --no-deps pufferlib-core==3.0.23"

# What the rest of the command line says already.
_SETTLED = ("env", "use_rnn", "num_envs")

if TYPE_CHECKING:
    TrainOptions = PuffeRLConfig
else:
    # PuffeRLConfig checks its values when it is made, and tyro would wrap what it says.
    TrainOptions = dataclasses.make_dataclass(
        "TrainOptions",
        [
            (field.name, field.type, field.default)
            for field in dataclasses.fields(PuffeRLConfig)
            if field.name not in _SETTLED
        ],
        frozen=True,
        namespace={"__doc__": PuffeRLConfig.__doc__},
    )


def _train_options(config: PuffeRLConfig) -> Any:
    values = dataclasses.asdict(config)
    return TrainOptions(**{k: v for k, v in values.items() if k not in _SETTLED})


@dataclass(frozen=True, kw_only=True)
class VecOptions:
    """Copies of the environment. JAX-native ones need no mode: they are one compiled program."""

    num_envs: int | None = None
    """How many. None: 64, but 8 with the modes async, puffer_jax and puffer."""
    mode: Literal["auto", "sync", "async", "vector", "puffer_jax", "puffer"] = "auto"
    """sync: one after another; async: a process each; vector: the environment's own vector form.
    All of them gymnasium's. puffer_jax: `puffer_jax.vector`, puffer: PufferLib's, both with what
    follows. auto: for ids of gymnasium, vector or else sync; for all others, puffer_jax."""
    backend: Literal["Serial", "Multiprocessing"] = "Serial"
    """Of the modes puffer_jax and puffer."""
    num_workers: int | Auto | None = None
    """Processes of Multiprocessing; auto: one for each environment."""
    batch_size: int | Auto | None = None
    """Environments that Multiprocessing hands out at once; auto: half of them."""
    zero_copy: bool = True
    """Multiprocessing hands out only batches that lie in a row."""
    local_worker: bool = False
    """One of the workers of puffer_jax's Multiprocessing is the trainer's process."""
    num_buffers: int = 1
    """Groups in which the environments of puffer_jax's Serial take turns: while one steps, the
    policy acts for another. 2 is often faster."""


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """The policy; what is not given is its own default, or comes from the environment."""

    name: Literal["auto", "Default", "Convolutional", "ProcgenResnet"] = "auto"
    """auto: Convolutional for uint8 images of 84x84 with 1 or 4 channels, ProcgenResnet for
    those of (64, 64, 3), Default for all else."""
    hidden_size: int | None = None
    """Width of the encoding, and of the LSTM."""
    cnn_width: int | None = None
    """Of ProcgenResnet: channels of the first convolutions."""
    framestack: int | None = None
    """Of Convolutional: channels of the image."""
    flat_size: int | None = None
    """Of Convolutional: numbers that leave the convolutions."""
    channels_last: bool | None = None
    """Of Convolutional: images are height, width, channels."""
    downsample: int | None = None
    """Of Convolutional: every n-th pixel is seen."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a policy.

    Writes DATA_DIR/RUN/ with config.json, log.jsonl, model_*.pt and state_*, and goes on from
    there with --resume. Ctrl-C and SIGTERM end it after the running epoch, with a checkpoint.
    """

    env: str | None = None
    """A gymnasium, ALE or minigrid id, `gymnax:ID`, `pettingzoo:FOLDER/MODULE`, or one of the
    JAX-native ones of puffer_jax.environments (cartpole, memory, squared, ...)."""
    env_arg: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE for the constructor of the environment; may be given several times."""
    config: Path | None = None
    """A PufferLib .ini file; flags win over it."""
    recommended: bool = False
    """Start from PuffeRLConfig.recommended(), not from PufferLib's quirks; the file and flags
    win over it."""
    resume: Path | None = None
    """Go on with the run in this folder, with its options where flags give no others."""
    name: str | None = None
    """The run is called NAME_seed<seed>; without it, by the time."""
    log: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = ("jsonl",)
    """Where the logs go. `plot` needs jsonl."""
    project: str = "puffer_jax"
    """Of Weights & Biases."""
    rnn: bool = False
    """Put an LSTM between the policy's encoder and its heads."""
    vec: VecOptions = VecOptions()
    policy: PolicyOptions = PolicyOptions()
    train: TrainOptions = dataclasses.field(default_factory=TrainOptions)

    def run(self) -> int:
        """Train, and return the exit code."""
        from puffer_jax.run.loggers import NoLogger, new_run_id
        from puffer_jax.run.trainer import PuffeRL

        if self.env is None:
            raise ValueError("give --env, --config FILE or --resume RUN")
        run_id, data_dir = new_run_id(), self.train.data_dir
        if self.resume is not None:
            run = self.resume if self.resume.name not in ("", "..") else self.resume.resolve()
            run_id, data_dir = run.name, str(run.parent)
        elif self.name is not None:
            run_id = f"{self.name}_seed{self.train.seed}"
            if Path(run_id).name != run_id:
                raise ValueError(f"--name {self.name} cannot name a folder")
            if (Path(data_dir) / run_id).exists():
                raise ValueError(
                    f"there is a run {Path(data_dir) / run_id}; --resume it or give another --name"
                )
        # First of all, since processes of environments should not be forked from a running JAX.
        envs, single, count = _make_envs(self.env, self.vec, _arguments(self.env_arg))
        try:
            settled = {"env": self.env, "num_envs": count, "data_dir": data_dir}
            config = PuffeRLConfig.from_dict(dataclasses.asdict(self.train) | settled)
            policy = make_policy(single, self.policy, self.rnn, config.precision, config.seed)
            trainer = PuffeRL(config, envs, policy, NoLogger(run_id))
            if self.resume is not None:
                trainer.restore()
        except BaseException:
            getattr(envs, "close", lambda: None)()
            raise
        steps = f"of {config.total_timesteps} steps"
        if trainer.done:
            getattr(envs, "close", lambda: None)()
            print(f"{trainer.run_folder}: {trainer.global_step} {steps} are done already")
            return 0
        # Not before now, so that bad options leave nothing behind.
        _write_settings(self, trainer.run_folder)
        trainer.logger = _logger(self, trainer.run_folder)
        print(f"run {trainer.run_folder}", flush=True)
        logs = trainer.run()
        print(f"{trainer.global_step} {steps}, {trainer.epoch} epochs: {trainer.close()}")
        for name in ("episode_return", "episode_length"):
            if (value := logs.get(f"environment/{name}")) is not None:
                print(f"{name} {value:.2f}")
        if not trainer.done:
            print(f"go on with: puffer-jax train --resume {trainer.run_folder}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Play a checkpoint of PufferLib or of puffer_jax, whole episodes one after another."""

    model: tyro.conf.Positional[Path]
    """.pt, .safetensors or .bin; or the folder of a run, for its latest."""
    env: str | None = None
    """As in `puffer-jax train`; without it, that of the run."""
    env_arg: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE for the constructor of the environment; may be given several times."""
    episodes: int = 10
    """How many."""
    deterministic: bool = False
    """Take the most likely action instead of a sampled one."""
    seed: int = 0
    """Of the environment and of the actions."""
    render: Literal["ansi", "gif"] | None = None
    """ansi: print all as text. gif: write the first episode."""
    out: Path = Path("eval.gif")
    """The GIF."""
    fps: float | None = None
    """Frames per second; None: the environment's own, or 30."""
    channels_last: bool = False
    """A Convolutional policy's images are height, width, channels."""
    downsample: int = 1
    """A Convolutional policy sees every n-th pixel."""

    def run(self) -> int:
        """Play, print, and return the exit code."""
        if self.episodes < 1 or (self.fps is not None and self.fps <= 0):
            raise ValueError(f"episodes is {self.episodes}, fps {self.fps}; must be positive")
        path, settings = _find_model(self.model)
        env = self.env or (settings and settings.env)
        if env is None:
            raise ValueError(f"give --env; {path} has no {_SETTINGS} beside it")
        inherited = settings.env_arg if settings is not None and self.env is None else ()
        frames: list[Any] = []
        image = _pillow() if self.render == "gif" else None
        game = _make_game(env, _arguments((*inherited, *self.env_arg)), self.render, self.seed)
        try:
            policy = self._load(path, game, settings)
            fps = self.fps or game.fps

            def show(episode: int) -> None:
                if image is not None and episode == 0:
                    frame = image.fromarray(np.asarray(game.render(), np.uint8))
                    # In 256 colours a frame takes a third of the memory.
                    frames.append(frame.quantize(method=image.Quantize.FASTOCTREE))
                elif image is not None and episode == 1 and frames:
                    self._write_gif(frames, fps)
                elif self.render == "ansi":
                    _print_text(game.render(), fps)

            returns, lengths = play(
                policy, game, self.episodes, self.seed, self.deterministic, show
            )
        finally:
            game.close()
        if frames:
            self._write_gif(frames, fps)
        print(f"{env}, {path}, episodes: {self.episodes}")
        print(f"{'':8}{'mean':>12}{'std':>12}{'min':>12}{'max':>12}")
        for name, x in (("return", returns), ("length", lengths)):
            print(f"{name:8}{x.mean():12.2f}{x.std():12.2f}{x.min():12.2f}{x.max():12.2f}")
        return 0

    def _load(self, path: Path, game: Any, settings: Train | None) -> Any:
        if settings is None:
            options: dict[str, Any] = {"channels_last": self.channels_last}
            return policy_from_checkpoint(path, game, downsample=self.downsample, **options)
        policy = make_policy(game, settings.policy, settings.rnn, settings.train.precision)
        load_weights(policy, path)
        return policy

    def _write_gif(self, frames: list[Any], fps: float) -> None:
        first, *rest = frames
        options: dict[str, Any] = {"duration": round(1000 / fps), "loop": 0}
        write_atomically(
            self.out,
            lambda file: first.save(file, "GIF", save_all=True, append_images=rest, **options),
        )
        frames.clear()
        print(f"the first episode: {self.out}")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw the learning curves of runs, against steps and against seconds.

    Runs whose names differ only in _seed<k> make one line, with a band from lowest to highest.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Their folders."""
    out: Path
    """The picture to write (png, pdf, svg)."""
    metric: str = "environment/episode_return"
    """A name in the runs' log.jsonl."""

    def run(self) -> int:
        """Draw, and return the exit code."""
        from puffer_jax.run.plot import plot_runs

        print(plot_runs(self.runs, self.out, self.metric))
        return 0


_SETTINGS = "config.json"

_INI_SECTIONS = ("base", "env", "vec", "policy", "rnn", "train", "sweep")

_INI_BASE = ("env_name", "package", "policy_name", "rnn_name", "max_suggestion_cost")


def train_defaults(argv: Sequence[str]) -> Train:
    """The options of `puffer-jax train` before its flags, which stand in a file or a run.

    Args:
        argv: of the command line; only --config, --recommended and --resume are looked at.

    Raises:
        ValueError: the file or the run is not what it should be.
        FileNotFoundError: it is not there.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # tyro says what is wrong with the flags themselves.
    parser.add_argument("--config", nargs="?")
    parser.add_argument("--resume", nargs="?")
    parser.add_argument("--recommended", action=argparse.BooleanOptionalAction)
    found = parser.parse_known_args(argv)[0]
    if found.resume is not None:
        if found.config is not None or found.recommended is not None:
            raise ValueError("--config and --recommended start a run; they do not go with --resume")
        return _read_settings(Path(found.resume))
    config = PuffeRLConfig.recommended() if found.recommended else PuffeRLConfig()
    if found.config is not None:
        return _read_config(Path(found.config), config)
    return Train(train=_train_options(config))


def _read_config(path: Path, config: PuffeRLConfig) -> Train:
    """The options in a PufferLib .ini file."""
    sections = read_ini(path)
    groups = {name: values for name, values in sections.items() if not name.startswith("sweep.")}
    _check_names(path, "section", groups, _INI_SECTIONS)
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
    if len(set(widths)) > 1:
        raise ValueError(
            f"{path}: the widths in [policy] and [rnn] are {widths}; they must be the same"
        )
    if widths:
        policy["hidden_size"] = widths[0]
    kinds = {"None": "auto", "Policy": "auto"}
    policy_name = str(base.get("policy_name", "Policy"))
    known = {**kinds, **{n: n for n in ("Default", "Convolutional", "ProcgenResnet")}}
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
            "train": dataclasses.asdict(_train_options(config)),
        },
    )


def _write_settings(settings: Train, folder: Path) -> None:
    values = dataclasses.asdict(settings)
    for name in ("config", "recommended", "resume"):
        del values[name]
    text = json.dumps(values, indent=1).encode()
    write_atomically(folder / _SETTINGS, lambda file: file.write(text))


def _read_settings(folder: Path) -> Train:
    path = folder / _SETTINGS
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return _checked(path, values)


def _checked(where: Any, values: Mapping[str, Any]) -> Train:
    """`Train` of plain values, refusing what flags would not give."""
    kinds: dict[str, Any] = {"vec": VecOptions, "policy": PolicyOptions, "train": TrainOptions}
    _check_names(where, "option", values, _fields(Train))
    given: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    for group, kind in kinds.items():
        options = given.get(group, {})
        _check_names(where, f"key in [{group}]", options, _fields(kind))
        for field in dataclasses.fields(kind):
            if not _fits(options.get(field.name, field.default), field.type):
                raise ValueError(
                    f"{where}: [{group}] {field.name} cannot be {options[field.name]!r}"
                )
        given[group] = kind(**options)
    return Train(**given)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_args(kind):
        return any(_fits(value, part) for part in get_args(kind))
    return type(value) is kind


def _fields(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _check_names(where: Any, what: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"{where}: no such {what}: {', '.join(near(unknown, known))}")


def _arguments(pairs: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE as keyword arguments; values are Python literals where they are any."""
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


@contextmanager
def _naming_the_flag() -> Iterator[None]:
    """What is wrong with the name of an environment, or with its arguments, is so with --env."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"--env {error}") from error
    except ImportError as error:
        raise ImportError(f"--env {error}") from error


def _native(name: str, arguments: dict[str, Any]) -> Any:
    """A JAX-native environment, or None if the name is not of one."""
    from puffer_jax.environments.jax_native import as_jax_env

    if environments.family(name)[0] not in ("native", "gymnax"):
        return None
    with _naming_the_flag():
        return as_jax_env(environments.make(name, **arguments))


def _make_envs(
    name: str, vec: VecOptions, arguments: dict[str, Any]
) -> tuple[Any, Any, int | None]:
    """What the trainer takes, what a policy takes, and the `num_envs` of a JAX-native one."""
    if vec.num_envs is not None and vec.num_envs < 1:
        raise ValueError(f"--vec.num-envs is {vec.num_envs}; must be positive")
    env = _native(name, arguments)
    if env is not None:
        return env, env, vec.num_envs
    family, known = environments.family(name)
    mode = vec.mode
    if family != "gymnasium":
        if mode not in ("auto", "puffer_jax"):
            raise ValueError(f"--vec.mode {mode} is for gymnasium's, not for --env {name}")
        mode = "puffer_jax"
    if vec.num_buffers != 1 and (mode, vec.backend) != ("puffer_jax", "Serial"):
        raise ValueError(
            f"--vec.num-buffers {vec.num_buffers} is for --vec.mode puffer_jax with the backend "
            f"Serial; got {mode} with {vec.backend}"
        )
    if vec.local_worker and (mode, vec.backend) != ("puffer_jax", "Multiprocessing"):
        raise ValueError(
            f"--vec.local-worker is for --vec.mode puffer_jax with the backend Multiprocessing; "
            f"got {mode} with {vec.backend}"
        )
    count = vec.num_envs or (64 if mode in ("auto", "sync", "vector") else 8)
    if mode == "puffer_jax":
        create = environments.env_creator(name)
        options = _backend(vec, count)
        if vec.backend == "Serial":
            options["num_buffers"] = vec.num_buffers
        else:
            options["local_worker"] = vec.local_worker
        envs = vector.make(create, env_kwargs=arguments, **options)
        return envs, envs.driver_env, None
    with _naming_the_flag():
        host.check_gymnasium(name, known, arguments)
        import gymnasium

        with host.errors(name):
            if mode == "puffer":
                create = partial(gymnasium.make, known, **arguments)
                envs = _make_pufferlib(name, _backend(vec, count), create)
                return envs, envs.driver_env, None
            form = {"auto": None, "vector": "vector_entry_point"}.get(mode, mode)
            envs = gymnasium.make_vec(known, num_envs=count, vectorization_mode=form, **arguments)
            return envs, envs, None


def _backend(vec: VecOptions, count: int) -> dict[str, Any]:
    """The options of a vecenv, of PufferLib's names."""
    options: dict[str, Any] = {"backend": vec.backend, "num_envs": count}
    if vec.backend == "Multiprocessing":
        given = {"num_workers": vec.num_workers, "batch_size": vec.batch_size}
        options |= {n: v for n, v in given.items() if v is not None}
        options["zero_copy"] = vec.zero_copy
    return options


def _make_pufferlib(name: str, options: dict[str, Any], create: Callable[[], Any]) -> Any:
    try:
        import pufferlib.emulation
        import pufferlib.vector
    except ImportError as error:
        raise ImportError(
            f"{name}: --vec.mode puffer needs PufferLib: {_INSTALL_PUFFERLIB}"
        ) from error
    emulated = partial(pufferlib.emulation.GymnasiumPufferEnv, env_creator=create)
    make: Any = pufferlib.vector.make
    return make(emulated, **options)


def make_policy(
    env: Any, options: PolicyOptions, rnn: bool, precision: str = "float32", seed: int = 0
) -> Any:
    """A new policy for an environment.

    Args:
        env: gives the spaces, see `puffer_jax.spaces.env_spec`.
        options: what is not given comes from the observation space or is the policy's default.
        rnn: wrap it in `LSTMWrapper`.
        precision: "float32" or "bfloat16", of matmuls.
        seed: of the weights.

    Raises:
        ValueError: an option the policy does not have, or that does not fit the environment.
    """
    import jax.numpy as jnp
    from flax import nnx

    from puffer_jax.policies.recurrent import LSTMWrapper

    given = {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
    dtype = jnp.bfloat16 if precision == "bfloat16" else None
    rngs = nnx.Rngs(seed)
    policy = environments.Policy(env, **given, rngs=rngs, dtype=dtype)
    if not rnn:
        return policy
    size = policy.hidden_size
    return LSTMWrapper(env, policy, size, size, rngs=rngs, dtype=dtype)


def _logger(settings: Train, folder: Path) -> Any:
    from puffer_jax.run import loggers

    made: list[Any] = []
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


def _find_model(path: Path) -> tuple[Path, Train | None]:
    """The weights, and the options of the run they are of, if there is one."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        epoch = checkpoint.latest(path)
        found = [] if epoch is None else list(path.glob(f"model_{epoch:06d}.*"))
        if not found:
            raise FileNotFoundError(f"no complete checkpoint in the folder {path}")
        path = found[0]
    return path, _read_settings(folder) if (folder / _SETTINGS).exists() else None


def play(
    policy: Any,
    game: Any,
    episodes: int,
    seed: int = 0,
    deterministic: bool = False,
    show: Callable[[int], None] = lambda episode: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Play whole episodes, one after another, so that short ones count no more than long ones.

    Args:
        policy: recurrent ones start each episode from the zero state.
        game: `action_space`; `reset() -> obs`; `step(action) -> (obs, reward, done)`.
        episodes: how many.
        seed: of the actions.
        deterministic: take the most likely action.
        show: called with the number of the episode, at its start and after each step.

    Returns:
        Returns and lengths, (episodes,), float64 and int64.
    """
    import jax

    from puffer_jax.nn.params import merge, split
    from puffer_jax.nn.sampling import sample_logits
    from puffer_jax.ppo.objective import is_recurrent

    graphdef, params = split(policy)
    recurrent = is_recurrent(policy)

    @jax.jit
    def act(params: Any, obs: Any, state: Any, key: Any) -> tuple[Any, Any, Any]:
        key, sample_key = jax.random.split(key)
        outputs = merge(graphdef, params).forward_eval(obs, state)
        way: dict[str, Any] = {"deterministic": True} if deterministic else {"key": sample_key}
        action = sample_logits(outputs[0], **way)[0]
        return action[0], outputs[2] if recurrent else None, key

    key = jax.random.key(seed)
    space = game.action_space
    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    for episode in range(episodes):
        obs, done = game.reset(), False
        state = policy.initial_state(1) if recurrent else None
        show(episode)
        while not done:
            batch = jax.tree.map(lambda x: np.asarray(x)[None], obs)
            action, state, key = act(params, batch, state, key)
            action = np.asarray(action)
            if spaces.kind_of(space) == "box":
                action = np.clip(action, space.low, space.high).astype(space.dtype)
            obs, reward, done = game.step(action)
            returns[episode] += reward
            lengths[episode] += 1
            show(episode)
    return returns, lengths


class _NativeGame:
    """One environment that is played; it serves as `env` of a policy."""

    fps = 4.0

    def __init__(self, name: str, env: Any, render: str | None, seed: int):
        import jax

        self._draw = getattr(env.unwrapped, "render", None)
        if render == "gif" or (render and self._draw is None):
            raise ValueError(
                f"--env {name} cannot be drawn as {render}"
                + ("; --render ansi" if self._draw is not None else "")
            )
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self._key, self._state = jax.random.key(seed), None

        def reset(key: Any) -> Any:
            key, reset_key = jax.random.split(key)
            return key, *env.reset(reset_key)

        def step(key: Any, state: Any, action: Any) -> Any:
            key, step_key = jax.random.split(key)
            obs, state, reward, terminated, truncated, _ = env.step(step_key, state, action)
            return key, obs, state, reward, terminated | truncated

        self._reset, self._step = jax.jit(reset), jax.jit(step)

    def reset(self) -> Any:
        self._key, obs, self._state = self._reset(self._key)
        return obs

    def step(self, action: np.ndarray) -> tuple[Any, float, bool]:
        self._key, obs, self._state, reward, done = self._step(self._key, self._state, action)
        return obs, float(reward), bool(done)

    def render(self) -> Any:
        assert self._draw is not None
        return self._draw(self._state)

    def close(self) -> None:
        pass


class _HostGame:
    """The same on the host."""

    def __init__(self, name: str, arguments: dict[str, Any], render: str | None, seed: int):
        self._name, self._seed = name, seed
        mode = {"gif": "rgb_array"}.get(render or "", render)
        with _naming_the_flag():
            self._env = host.create(name, **arguments)
            modes = self._env.metadata.get("render_modes", ())
            if mode is not None and mode not in modes:
                raise ValueError(f"{name} cannot be drawn as {mode}; it has: {', '.join(modes)}")
            if mode is not None:
                self._env.close()
                self._env = host.create(name, render_mode=mode, **arguments)
        self.observation_space = self._env.observation_space
        self.action_space = self._env.action_space
        self.fps = float(self._env.metadata.get("render_fps") or 30)

    def reset(self) -> Any:
        with _naming_the_flag(), host.errors(self._name):
            obs, _ = self._env.reset(seed=self._seed)
        # Only the first episode is seeded; those after it go on from there.
        self._seed = None
        return obs

    def step(self, action: np.ndarray) -> tuple[Any, float, bool]:
        play = int(action) if action.ndim == 0 else action
        obs, reward, terminated, truncated, _ = self._env.step(play)
        return obs, float(reward), bool(terminated or truncated)

    def render(self) -> Any:
        with _naming_the_flag(), host.errors(self._name):
            return self._env.render()

    def close(self) -> None:
        self._env.close()


def _make_game(
    name: str, arguments: dict[str, Any], render: str | None, seed: int
) -> _NativeGame | _HostGame:
    env = _native(name, arguments)
    if env is not None:
        return _NativeGame(name, env, render, seed)
    if environments.family(name)[0] == "pettingzoo":
        raise ValueError(f"--env {name} has several agents; only games of one can be played")
    return _HostGame(name, arguments, render, seed)


def _print_text(text: Any, fps: float) -> None:
    if sys.stdout.isatty():
        print(f"\033[H\033[J{text}", flush=True)
        time.sleep(1 / fps)
    else:
        print(f"{text}\n")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("a GIF needs Pillow: pip install pillow") from error
    return Image
