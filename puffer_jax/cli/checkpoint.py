"""What the commands that read a checkpoint have in common."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from puffer_jax import environments
from puffer_jax.base.packages import require
from puffer_jax.base.spaces import Box, Space, kind_of, row_dtypes
from puffer_jax.cli.envs import naming_the_flag
from puffer_jax.environments import registry
from puffer_jax.environments.emulation.spaces import gymnasium_space
from puffer_jax.environments.families import Arguments
from puffer_jax.weights.files import policy_from_checkpoint


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """What the shapes in a checkpoint may not tell; needed only where they do not."""

    env: str | None = None
    """The environment the policy was trained on, as in `puffer-jax train`; gives both spaces."""
    nvec: tuple[int, ...] | None = None
    """How the discrete head splits: 5 for Discrete(5), 2 3 for MultiDiscrete([2, 3])."""
    image_shape: tuple[int, int, int] | None = None
    """Shape of an image observation as the environment gives it, such as 4 84 84."""
    channels_last: bool = False
    """A Convolutional policy's images are height, width, channels."""
    downsample: int = 1
    """A Convolutional policy sees every n-th pixel."""

    def load(self, path: Path, env: SimpleNamespace | None, padding: int | None = None) -> Any:
        """The policy in the checkpoint; `env` is `self.make_env()`."""
        options: dict[str, Any] = {**self.hints(env), "padding": padding}
        policy = policy_from_checkpoint(path, env, image_shape=self.image_shape, **options)
        shape = None if env is not None or self.image_shape else policy.example_shape()
        return policy_from_checkpoint(path, image_shape=shape, **options) if shape else policy

    def hints(self, env: SimpleNamespace | None) -> dict[str, Any]:
        """What the options say about a policy; see `policy_from_checkpoint`."""
        return {
            "nvec": self.nvec[0] if self.nvec and len(self.nvec) == 1 else self.nvec,
            "channels_last": self.channels_last,
            "downsample": self.downsample,
        }

    def make_env(
        self, name: str | None = None, arguments: Arguments | None = None
    ) -> SimpleNamespace | None:
        """An environment's spaces, as PufferLib hands them to a policy; None without a name.

        Args:
            name: the environment's; None: that of --env.
            arguments: of its constructor.
        """
        name = self.env if name is None else name
        if name is None:
            return None
        require("gymnasium", "--env")
        with naming_the_flag():
            space, action_space = _spaces(name, arguments or {})
        observation_space, emulated = space, None
        if kind_of(space) != "box":
            sample, structured = row_dtypes(space)
            shape = (structured.itemsize // sample.itemsize,)
            high = 1 if sample.kind == "b" else 100
            observation_space = gymnasium_space(Box(0, high, shape, sample))
            emulated = {"observation_dtype": sample, "emulated_observation_dtype": structured}
        return SimpleNamespace(
            single_observation_space=observation_space,
            single_action_space=action_space,
            emulated=emulated,
            env=SimpleNamespace(observation_space=space),
        )


def _spaces(name: str, arguments: Arguments) -> tuple[Space, Space]:
    """The spaces of an agent's observations, before any emulation, and of its actions."""
    family, _ = registry.find(name)
    env = environments.make(name, **arguments)
    if family.in_jax:
        return gymnasium_space(env.observation_space), gymnasium_space(env.action_space)
    env.close()
    if family.multi_agent:
        return env.env.observation_space(env.possible_agents[0]), env.single_action_space
    return env.env.observation_space, env.single_action_space
