"""All environments in this process."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from puffer_jax.vector.envs import WRITTEN, AgentLayout, Creator, Env, Envs, Maker, Order, Told
from puffer_jax.vector.options import SerialOptions
from puffer_jax.vector.protocol import Actions, AgentBatch, VecEnv


class Serial(VecEnv):
    """All environments in this process, one after another. Made by `make`.

    What an environment raises comes through as it is, with a note that says which one it was.

    With several buffers (double-buffered sampling, Petrenko et al. 2020), the environments form as
    many groups, which take turns: a group steps when `recv` comes to it again, and until then the
    device has time to compute its actions, while other groups step.

    Args:
        env_creators: see `make`; one for each environment, like the next two.
        env_args: see `make`.
        env_kwargs: see `make`.
        num_envs: see `make`.
        seed: see `make`.
        options: see `Options`; `num_buffers` must divide `num_envs`, and a batch is one group.

    Attributes:
        pending: for each group, the actions that it has not played yet, or None.

    Raises:
        ValueError: `num_buffers` does not divide `num_envs`.
    """

    Options = SerialOptions

    def __init__(
        self,
        env_creators: Sequence[Creator],
        env_args: Sequence[Sequence[object]],
        env_kwargs: Sequence[dict[str, object]],
        num_envs: int,
        seed: int = 0,
        **options: Any,
    ):
        settings = SerialOptions(**options)
        num_buffers = settings.num_buffers
        if num_buffers not in range(1, num_envs + 1) or num_envs % num_buffers:
            raise ValueError(
                f"num_buffers must divide the number of environments, {num_envs}; got {num_buffers}"
            )
        makers = [*map(Maker, env_creators, env_args, env_kwargs)]
        driver = makers[0]()
        layout = AgentLayout.of(driver)
        driver.close()
        each = self._each = num_envs // num_buffers
        self._groups: list[Envs] = []
        try:
            for first in range(0, num_envs, each):
                part = makers[first : first + each]
                buffers = layout.buffers(layout.num_agents * each)
                group = Envs(part, layout, buffers, seed + first, first, settings.restart_failed)
                self._groups.append(group)
        except BaseException:
            self._close()
            raise
        super().__init__(self.envs[0], layout, num_envs, each)
        self.num_buffers = num_buffers
        self._turn = 0
        self.pending: list[Actions | None] = [None] * num_buffers
        self._told = [Told([], [])] * num_buffers
        self._written = [[group.buf[name] for name in WRITTEN] for group in self._groups]
        self._ids = np.split(self.agent_ids, num_buffers)

    @property
    def envs(self) -> list[Env]:
        """The environments."""
        return [env for group in self._groups for env in group.envs]

    def _reset(self, seed: int | None) -> None:
        self._turn = 0
        for i, group in enumerate(self._groups):
            self.pending[i] = None
            first = None if seed is None else seed + i * self._each
            self._told[i] = group.obey(Order.RESET, first)

    def _recv(self) -> AgentBatch:
        turn = self._turn
        if self.pending[turn] is not None:
            self._step(turn)
        obs, rewards, terminals, truncations, masks = self._written[turn]
        infos, self.info_sources = self._told[turn]
        return obs, rewards, terminals, truncations, infos, self._ids[turn], masks

    def _renew(self) -> AgentBatch:
        self._told[self._turn] = self._groups[self._turn].obey(Order.RENEW)
        return self._recv()

    def _apply(
        self, function: Callable[[Env], Any], numbers: Sequence[int]
    ) -> list[tuple[bool, Any]]:
        return [
            self._groups[number // self._each].apply(function, [number])[0] for number in numbers
        ]

    def _send(self, actions: Actions) -> None:
        turn, self._turn = self._turn, (self._turn + 1) % self.num_buffers
        self.pending[turn] = actions
        if self.num_buffers == 1:
            self._step(turn)

    def _step(self, turn: int) -> None:
        actions, self.pending[turn] = self.pending[turn], None
        self._groups[turn].buf["actions"][:] = actions
        self._told[turn] = self._groups[turn].obey(Order.STEP)

    def _notify(self) -> None:
        for group in self._groups:
            group.notify()

    def _close(self) -> None:
        with contextlib.ExitStack() as stack:
            for group in self._groups:
                stack.callback(group.close)
