"""The trainer's configuration: the reference's `[train]` section, and options it lacks."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from puffer_jax.base.text import hint, near
from puffer_jax.ppo.fields import checked, option
from puffer_jax.ppo.presets import preset_path, presets, read_ini
from puffer_jax.ppo.sizes import Sizes, multiples
from puffer_jax.ppo.v4_ini import V4Ini, is_v4, load_ini

Auto = Literal["auto"]

# Lengths of segments to choose from, and the least number of epochs that must result.
_HORIZONS, _EPOCHS = (8, 16, 32, 64, 128), 100

# What PufferLib 4 calls them.
_IN_V4 = {
    "horizon": "bptt_horizon",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_eps",
    "replay_ratio": "update_epochs",
}

# What other libraries call them.
_ELSEWHERE = {
    "lr": "learning_rate",
    "num_steps": "bptt_horizon",
    "n_steps": "bptt_horizon",
    "n_epochs": "update_epochs",
    "n_envs": "num_envs",
    "clip_range": "clip_coef",
    "clip_eps": "clip_coef",
    "num_timesteps": "total_timesteps",
    "vf_loss_coef": "vf_coef",
    **_IN_V4,
}

# Found on the tasks of `examples/learning.py`.
_RECIPE: dict[str, Any] = {
    "bptt_horizon": "budget",
    "num_minibatches": 8,
    "update_epochs": 4,
    "optimizer": "adam",
    "learning_rate": 1e-3,
    "adam_beta1": 0.9,
    "adam_eps": 1e-5,
    "max_grad_norm": 0.5,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "vf_coef": 0.5,
    "vf_clip_coef": 10.0,
    "normalize_observations": "auto",
    "normalize_rewards": True,
}

# Switches for torch that mean nothing here: XLA always compiles, and JAX picks the device.
_TORCH_ONLY = frozenset(
    "device torch_deterministic cpu_offload compile compile_mode compile_fullgraph name project "
    "tag neptune wandb env_batch_size".split()
)


@dataclass(frozen=True)
class PuffeRLConfig:
    """What to train with. Names, meaning and defaults are those of PufferLib 3.0's `[train]`.

    The last group is ours. Its defaults are what the reference does; `recommended()` has the
    values we would use.

    Attributes:
        env: name of the environment, for logs.
        seed: seed of the environments and of every random key.
        total_timesteps: agent steps to train for.
        learning_rate: size of an optimizer step, in the first epoch.
        anneal_lr: whether the learning rate falls along a cosine to 0 at `total_timesteps`, epoch
            by epoch.
        optimizer: "muon", "adam", or "muon_v4", which is PufferLib 4's own Muon.
        adam_beta1: decay of the momentum, in every optimizer.
        adam_beta2: decay of Adam's second moment.
        adam_eps: Adam's epsilon.
        max_grad_norm: largest 2-norm of the gradients; larger ones are scaled down to it.
        batch_size: steps in an epoch; "auto": agents * `bptt_horizon`.
        bptt_horizon: steps in a segment; "auto": `batch_size` / agents; "budget": the same or, if
            `batch_size` is "auto", the largest of 8, 16, ... 128 that divides `total_timesteps`
            into at least a hundred epochs, or the least that a given `minibatch_size` fits into.
        minibatch_size: steps in an update; "auto": the batch, at most 8192; see `num_minibatches`.
        max_minibatch_size: most steps in a forward pass; a larger `minibatch_size` accumulates
            gradients.
        update_epochs: passes over the batch; may be a fraction.
        gamma: discount of future rewards.
        gae_lambda: decay of the sum of temporal differences that makes the advantage.
        vtrace_rho_clip: bound of the importance ratio in the temporal difference.
        vtrace_c_clip: bound of the importance ratio in the trace.
        clip_coef: PPO's clip of the ratio.
        vf_coef: weight of the value loss.
        vf_clip_coef: clip of the change of a value.
        ent_coef: weight of the entropy bonus.
        prio_alpha: segments are drawn in proportion to (sum of |advantage|) ** alpha.
        prio_beta0: initial exponent of the importance weights that correct for `prio_alpha`.
        precision: "float32" or "bfloat16"; must be what the policy was built for (`dtype`).
        use_rnn: whether the policy must have a recurrent state; None: it may have one.
        data_dir: folder of all runs.
        checkpoint_interval: epochs between checkpoints.
        num_envs: number of JAX-native environments; None: `batch_size` / `bptt_horizon`, or 64.
        reset_ratio: of n JAX-native environments, n / `reset_ratio` resets, rounded up, are
            computed in a step, and if more episodes end at once, some begin alike; None: n, of
            which those are thrown away that are not needed. For resets that cost more than steps.
        num_minibatches: with `minibatch_size` "auto", the number of minibatches of a pass over the
            batch, as far as it divides; None: as `minibatch_size` says.
        min_lr_ratio: where the cosine of `anneal_lr` ends, as a share of `learning_rate`.
        normalize_observations: whether observations are normalised by their running mean and
            deviation, which is then folded into the first layers of the policy that acts and is
            saved; "auto": where actions are continuous and the policy has such layers.
        normalize_rewards: whether rewards are divided by the running deviation of the discounted
            return, after `reward_scale` and `reward_clip`. Returns in logs are those of the
            environment.
        reward_scale: factor on the rewards, applied before the clamp; it should keep values near
            1, which `vf_clip_coef` is made for.
        reward_clip: rewards are clamped to [-reward_clip, reward_clip]; None (recommended) leaves
            them as they are. The clamp silently changes the task (field reports: PufferDrive#207).
        advantage: how advantages are estimated. "vtrace", as in the reference: anew for each
            minibatch, from the latest values and ratios. The loss multiplies by the ratio once
            more: what has become less likely is hardly learned again, and with several
            `update_epochs` the entropy collapses. "gae": once, as in the original PPO.
        sampling: how segments become minibatches. "prioritized", as in the reference: each
            minibatch is drawn by itself, by `prio_alpha`. "shuffled": each pass over the batch
            takes all segments once, in random order or, with "gae" and a policy without recurrent
            state, all steps; `prio_alpha` and `prio_beta0` have no effect.
            "replacement", as in PufferLib 4: drawn like "prioritized", but each segment by itself,
            so that one may come twice in a minibatch.
        recompute_advantage: with "vtrace", whether the policy's advantages are scaled with the
            ratio of the current policy. The reference computes that and then overwrites it
            (PufferLib#306, #341).
        bootstrap_truncation: whether a truncated episode, which counts as ended, is credited with
            the value of its last observation in place of the rewards it missed. The reference
            ignores truncation: value leaks in from the next episode. Environments that reset
            themselves without handing out the last observation (PufferLib's native ones) count as
            terminated instead.
        bootstrap_last: whether the last step of each segment learns too, from the reward and value
            that follow it. In the reference its advantage is always 0 (PufferLib#363).
        reset_on_done: whether the recurrent state is zeroed where an episode starts, in the rollout
            and in training. The reference never does (metta#2233).
        store_initial_state: whether each segment is trained from the recurrent state it was
            collected from, and the state is carried from one epoch to the next. The reference
            trains from zeros, which is a different policy wherever a segment does not start an
            epoch.
        mean_accumulate: whether accumulated gradients are averaged, so that the clip by norm does
            not depend on `max_minibatch_size`. The reference sums them.
        use_mask: whether steps that a PufferLib vecenv did not play are left out of the update:
            padded agents, and the step after an episode's end, whose action an emulated
            environment ignores. Such steps of gymnasium's environments always are.
        on_nonfinite: what to do about a minibatch with a NaN or infinite loss or gradient: "stop"
            ends training with a checkpoint and "skip" goes on, both without applying it; "ignore"
            applies it.
        checkpoint_keep: number of a run's checkpoints to keep.

    Example:
        >>> from puffer_jax import PuffeRLConfig
        >>> PuffeRLConfig(learning_rate=0.01).reward_clip  # as PufferLib
        1.0
        >>> PuffeRLConfig.recommended(learning_rate=0.01).reward_clip is None
        True
    """

    env: str = ""
    seed: int = 42
    total_timesteps: int = option(10_000_000, positive=True)
    learning_rate: float = option(0.015, traced=True, positive=True)
    anneal_lr: bool = True
    optimizer: Literal["muon", "adam", "muon_v4"] = "muon"
    adam_beta1: float = option(0.95, traced=True, within=(0, 1))
    adam_beta2: float = option(0.999, traced=True, within=(0, 1))
    adam_eps: float = option(1e-12, traced=True, within=(0, math.inf))
    max_grad_norm: float = option(1.5, traced=True, positive=True)
    batch_size: int | Auto = option("auto", positive=True)
    bptt_horizon: int | Auto | Literal["budget"] = option(64, positive=True)
    minibatch_size: int | Auto = option("auto", positive=True)
    max_minibatch_size: int = option(32768, positive=True)
    update_epochs: float = option(1.0, positive=True)
    gamma: float = option(0.995, traced=True, within=(0, 1))
    gae_lambda: float = option(0.90, traced=True, within=(0, 1))
    vtrace_rho_clip: float = option(1.0, traced=True, positive=True)
    vtrace_c_clip: float = option(1.0, traced=True, positive=True)
    clip_coef: float = option(0.2, traced=True, within=(0, math.inf))
    vf_coef: float = option(2.0, traced=True, within=(0, math.inf))
    vf_clip_coef: float = option(0.2, traced=True, within=(0, math.inf))
    ent_coef: float = option(0.001, traced=True)
    prio_alpha: float = option(0.8, traced=True, within=(0, math.inf))
    prio_beta0: float = option(0.2, traced=True, within=(0, math.inf))
    precision: Literal["float32", "bfloat16"] = "float32"
    use_rnn: bool | None = None
    data_dir: str = "experiments"
    checkpoint_interval: int = option(200, positive=True)
    num_envs: int | None = option(None, positive=True)

    reset_ratio: int | None = option(None, positive=True)
    num_minibatches: int | None = option(None, positive=True)
    min_lr_ratio: float = option(0.0, traced=True, within=(0, 1))
    normalize_observations: bool | Auto = False
    normalize_rewards: bool = False
    reward_scale: float = 1.0
    reward_clip: float | None = option(1.0, positive=True)
    advantage: Literal["vtrace", "gae"] = "vtrace"
    sampling: Literal["prioritized", "shuffled", "replacement"] = "prioritized"
    recompute_advantage: bool = False
    bootstrap_truncation: bool = False
    bootstrap_last: bool = False
    reset_on_done: bool = False
    store_initial_state: bool = False
    mean_accumulate: bool = False
    use_mask: bool = False
    on_nonfinite: Literal["stop", "skip", "ignore"] = "stop"
    checkpoint_keep: int = option(3, positive=True)

    @classmethod
    def recommended(cls, **changes: Any) -> "PuffeRLConfig":
        """A recipe that learns, with PufferLib's quirks switched off.

        The sizes follow from the number of environments and from `total_timesteps`.
        """
        better: dict[str, Any] = {
            **_RECIPE,
            "reward_clip": None,
            "advantage": "gae",
            "sampling": "shuffled",
            "bootstrap_truncation": True,
            "bootstrap_last": True,
            "reset_on_done": True,
            "store_initial_state": True,
            "mean_accumulate": True,
            "use_mask": True,
        }
        return cls.from_dict(better | changes)

    @classmethod
    def v4(cls, **changes: Any) -> "PuffeRLConfig":
        """PufferLib 4's training: its sizes, its drawing of segments, its Muon, and its names.

        Its fault is left out: there the state is reset one step late in training, here where an
        episode starts. Gradients are not accumulated, so `max_minibatch_size` is the minibatch.

        Args:
            changes: other values, by our names or by PufferLib 4's: `horizon`, `replay_ratio`,
                `beta1`, `beta2`, `eps`.

        Raises:
            ValueError: an option is given by both names; or as `from_dict`.

        Example:
            >>> from puffer_jax import PuffeRLConfig
            >>> PuffeRLConfig.v4(horizon=32, replay_ratio=2).bptt_horizon
            32
        """
        theirs: dict[str, Any] = {
            "learning_rate": 0.015,
            "bptt_horizon": 64,
            "minibatch_size": 8192,
            "update_epochs": 1.0,
            "num_envs": 4096,
            "optimizer": "muon_v4",
            "sampling": "replacement",
            "reset_on_done": True,
        }
        ours = _from_v4_names(changes)
        whole = (theirs | ours)["minibatch_size"]
        most = {} if whole == "auto" else {"max_minibatch_size": whole}
        return cls.from_dict(theirs | most | ours)

    @classmethod
    def preset(cls, env: str, **changes: Any) -> "PuffeRLConfig":
        """What is known to learn in an environment: `recommended()` and the changes it needs.

        Args:
            env: its name, as in `puffer-jax train --env`.
            changes: other values.

        Raises:
            ValueError: there is no preset for it; those that there are are named.

        Example:
            >>> from puffer_jax import PuffeRLConfig
            >>> PuffeRLConfig.preset("CartPole-v1").total_timesteps
            100000
        """
        path = preset_path(env)
        if path is None:
            known = [name for names in presets().values() for name in names]
            raise ValueError(
                f"no preset for {env!r}{hint(env, known)}; there are {', '.join(known)}"
            )
        return cls.recommended(**read_ini(path).get("train", {}) | changes)

    @classmethod
    def from_dict(cls, values: "Mapping[str, Any] | PuffeRLConfig") -> "PuffeRLConfig":
        """A configuration from a PufferLib `args["train"]` dict.

        torch's own switches (`device`, `compile`, ...) are accepted and have no effect.

        Raises:
            ValueError: an unknown name (the nearest known one is given) or a bad value.
        """
        if isinstance(values, PuffeRLConfig):
            return values
        fields = {field.name: field for field in dataclasses.fields(cls)}
        known = {name: value for name, value in values.items() if name not in _TORCH_ONLY}
        unknown = [name for name in known if name not in fields]
        if unknown:
            raise ValueError("no such training option: " + ", ".join(near_options(unknown)))
        return cls(**{name: checked(fields[name], value) for name, value in known.items()})

    @classmethod
    def from_ini(cls, path: str | Path) -> "PuffeRLConfig":
        """A configuration from the `[train]` section of a PufferLib `.ini` file.

        One of PufferLib 4 is told by its names, and is read on top of `v4()`.

        Raises:
            ValueError: as `from_dict`, or there is no such section.
            FileNotFoundError: there is no such file.
        """
        sections = read_ini(path)
        if is_v4(sections):
            return cls.of_v4(path, load_ini(path, sections))
        if "train" not in sections:
            found = ", ".join(sections) or "none"
            raise ValueError(f"{path} has no section [train]; its sections are: {found}")
        try:
            return cls.from_dict(sections["train"])
        except ValueError as error:
            raise ValueError(f"{path}: [train] {error}") from error

    @classmethod
    def of_v4(
        cls, path: str | Path, read: V4Ini, start: "PuffeRLConfig | None" = None
    ) -> "PuffeRLConfig":
        """A configuration from a PufferLib 4 file, on top of `start`; None: of `v4()`.

        Raises:
            ValueError: as `v4`.
        """
        try:
            if start is None:
                return cls.v4(**read.train)
            return cls.from_dict(dataclasses.asdict(start) | _from_v4_names(read.train))
        except ValueError as error:
            raise ValueError(f"{path}: [train] {error}") from error

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))
        if self.recompute_advantage and self.advantage != "vtrace":
            raise ValueError(
                f"recompute_advantage needs 'vtrace'; got advantage {self.advantage!r}"
            )

    def hypers(self) -> dict[str, float]:
        """The numbers of the update that may be traced: see `puffer_jax.make_train`."""
        traced = [f.name for f in dataclasses.fields(self) if f.metadata.get("traced")]
        return {name: float(getattr(self, name)) for name in traced}

    def sizes(
        self, agents: int | None, agents_per_batch: int | None = None, devices: int = 1
    ) -> Sizes:
        """Settle the sizes for `agents`, checking that they divide.

        Args:
            agents: number of agents over all environments; None for a JAX-native environment,
                which can be run in any number of copies.
            agents_per_batch: number of agents that act at once; None: all.
            devices: number of devices; each has its share of the agents and of every minibatch.

        Raises:
            ValueError: the sizes do not fit together; the message names the nearest that do.
        """
        batch, horizon = self.batch_size, self.bptt_horizon
        if agents is None:
            sized = not (isinstance(batch, str) or isinstance(horizon, str))
            agents = self.num_envs or (max(1, int(batch) // int(horizon)) if sized else 64)
        if batch == horizon == "auto":
            raise ValueError("give batch_size or bptt_horizon; both are 'auto'")
        if isinstance(batch, str) and isinstance(horizon, str):
            horizon, minibatch = _HORIZONS[0], self.minibatch_size
            for longer in _HORIZONS[1:]:
                fits = isinstance(minibatch, str) or agents * horizon >= minibatch
                if not fits or self.total_timesteps >= _EPOCHS * agents * longer:
                    horizon = longer
        if isinstance(batch, str):
            batch = agents * int(horizon)
        if isinstance(horizon, str):
            horizon = max(1, batch // agents)
        if batch % horizon:
            raise ValueError(
                f"batch_size {batch} is not a multiple of bptt_horizon {horizon}; nearest: "
                + multiples(batch, horizon)
            )
        segments = batch // horizon
        unit = agents if agents_per_batch in (None, agents) else agents_per_batch
        if segments < agents or segments % unit:
            raise ValueError(
                f"batch_size {batch} = {segments} segments of {horizon} steps, but there are "
                f"{agents} agents{'' if unit == agents else f' in batches of {unit}'}: segments "
                f"must be a multiple of {unit} and at least {agents}; nearest batch_size: "
                + multiples(max(batch, agents * horizon), unit * horizon)
            )
        if unit % devices:
            rule = f"{unit} agents that act together cannot be divided among {devices} devices"
            raise ValueError(f"{rule}; nearest: {multiples(unit, devices)}")
        minibatch, alone, row = self.minibatch_size, self.minibatch_size, horizon * devices
        if isinstance(minibatch, str):
            alone = self._auto_minibatch(batch, segments, horizon)
            minibatch = self._auto_minibatch(batch, segments // devices, row)
        if minibatch > batch:
            raise ValueError(f"minibatch_size {minibatch} is larger than batch_size {batch}")
        step = min(minibatch, self.max_minibatch_size)
        if minibatch % step:
            raise ValueError(
                f"minibatch_size {minibatch} is not a multiple of max_minibatch_size {step}; "
                f"nearest: {multiples(minibatch, step)}"
            )
        if step % row:
            on = f" on {devices} devices" if devices > 1 else ""
            rule = f"is not a multiple of bptt_horizon {horizon}{on}"
            raise ValueError(f"minibatch_size {step} {rule}; nearest: {multiples(step, row)}")
        minibatches, accumulate = int(self.update_epochs * batch / step), minibatch // step
        if minibatches == 0 or minibatches % accumulate:
            raise ValueError(
                f"update_epochs {self.update_epochs} of batch_size {batch} make {minibatches} "
                f"minibatches of {step}, and {accumulate} make one update: it must be a positive "
                f"multiple; nearest: {multiples(max(minibatches, 1), accumulate)}"
            )
        return Sizes(
            agents=agents,
            segments=segments,
            horizon=horizon,
            minibatch_segments=step // horizon,
            minibatches=minibatches,
            accumulate=accumulate,
            epochs=max(1, self.total_timesteps // batch),
            on_one=int(self.update_epochs * batch / min(int(alone), self.max_minibatch_size)),
        )

    def _auto_minibatch(self, batch: int, most: int, row: int) -> int:
        """A minibatch of whole `row`s that divides the batch into `most` or fewer."""
        minibatch = min(batch, 8192)
        if self.num_minibatches is not None:
            minibatch = batch // min(self.num_minibatches, most)
        minibatch = max(row, minibatch // row * row)
        while batch % minibatch:
            minibatch -= row
        return minibatch


def _from_v4_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values by our names.

    Raises:
        ValueError: one is given by both names.
    """
    if twice := [name for name in _IN_V4 if {name, _IN_V4[name]} <= values.keys()]:
        both = ", ".join(f"{name} and {_IN_V4[name]}" for name in twice)
        raise ValueError(f"one option by two names: {both}")
    return {_IN_V4.get(name, name): value for name, value in values.items()}


def near_options(names: Iterable[str], known: Iterable[str] | None = None) -> list[str]:
    """Each name with the nearest option in parentheses, by spelling or by another library's name.

    Args:
        names: what somebody wrote.
        known: the options there are; None: all of `PuffeRLConfig`.
    """
    if known is None:
        known = [field.name for field in dataclasses.fields(PuffeRLConfig)]
    known = list(known)
    return [
        f"{name} (did you mean {alias}?)"
        if (alias := _ELSEWHERE.get(name)) in known
        else near([name], known)[0]
        for name in names
    ]
