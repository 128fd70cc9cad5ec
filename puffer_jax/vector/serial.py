"""All environments in this process."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from puffer_jax.vector.envs import GIVEN, Envs, Info, Layout, Maker
from puffer_jax.vector.protocol import Received, VecEnv


class Serial(VecEnv):
    """All environments in this process, one after the other. Made by `make`.

    What an environment raises comes through as it is, with a note that says which it was.

    With several buffers (double-buffered sampling, Petrenko et al. 2020), they are as many groups,
    which act by turns: a group steps when `recv` comes to it again, and until then the device has
    time to compute its actions, while other groups step.

    Args:
        env_creators: see `make`; one for each environment, as what follows.
        env_args: see `make`.
        env_kwargs: see `make`.
        num_envs: see `make`.
        seed: see `make`.
        num_buffers: a divisor of `num_envs`; a batch is that part of them.
        restart_failed: see `make`.

    Raises:
        ValueError: `num_buffers` is not possible.
    """

    def __init__(
        self,
        env_creators: Sequence[Callable[..., Any] | str],
        env_args: Sequence[Sequence[Any]],
        env_kwargs: Sequence[dict[str, Any]],
        num_envs: int,
        seed: int = 0,
        num_buffers: int = 1,
        restart_failed: bool = False,
        **_: Any,  # those of the other backends
    ):
        if num_buffers not in range(1, num_envs + 1) or num_envs % num_buffers:
            raise ValueError(
                f"num_buffers must divide the number of environments, {num_envs}; got {num_buffers}"
            )
        makers = [*map(Maker, env_creators, env_args, env_kwargs)]
        driver = makers[0]()
        layout = Layout.of(driver)
        driver.close()
        each = self._each = num_envs // num_buffers
        self._groups: list[Envs] = []
        try:
            for first in range(0, num_envs, each):
                part = makers[first : first + each]
                buffers = layout.buffers(layout.num_agents * each)
                group = Envs(part, layout, buffers, seed + first, first, restart_failed)
                self._groups.append(group)
        except BaseException:
            self._close()
            raise
        super().__init__(self.envs[0], layout, num_envs, each)
        self.num_buffers = num_buffers
        self._turn = 0
        self._actions: list[Any] = [None] * num_buffers  # that a group has not played yet
        self._infos: list[list[Info]] = [[]] * num_buffers
        self._given = [[group.buf[name] for name in GIVEN] for group in self._groups]
        self._ids = np.split(self.agent_ids, num_buffers)

    @property
    def envs(self) -> list[Any]:
        """The environments."""
        return [env for group in self._groups for env in group.envs]

    def _reset(self, seed: int | None) -> None:
        self._turn = 0
        for i, group in enumerate(self._groups):
            self._actions[i] = None
            self._infos[i] = group.reset(None if seed is None else seed + i * self._each)

    def _recv(self) -> Received:
        turn = self._turn
        if self._actions[turn] is not None:
            self._step(turn)
        obs, rewards, terminals, truncations, masks = self._given[turn]
        return obs, rewards, terminals, truncations, self._infos[turn], self._ids[turn], masks

    def _send(self, actions: Any) -> None:
        turn, self._turn = self._turn, (self._turn + 1) % self.num_buffers
        self._actions[turn] = actions
        if self.num_buffers == 1:
            self._step(turn)

    def _step(self, turn: int) -> None:
        actions, self._actions[turn] = self._actions[turn], None
        self._groups[turn].buf["actions"][:] = actions
        self._infos[turn] = self._groups[turn].step()

    def _notify(self) -> None:
        for group in self._groups:
            group.notify()

    def _close(self) -> None:
        with contextlib.ExitStack() as stack:
            for group in self._groups:
                stack.callback(group.close)
