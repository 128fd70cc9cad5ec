"""Environments for the tests of vecenvs, cheap and random by their seeds. Imports no JAX."""

import copy
import ctypes
import os
import signal
import sys
import time

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Tuple


class Walk(gymnasium.Env):
    """A random walk that ends at random, structured in all it says and takes."""

    observation_space = Dict(
        {"place": Box(-np.inf, np.inf, (2,)), "seen": Tuple((Discrete(5), Box(0, 255, (3,), "u1")))}
    )
    action_space = Dict({"go": Discrete(3), "how": Tuple((Discrete(2), Discrete(4)))})

    def _observation(self):
        random = self.np_random
        seen = int(random.integers(5)), random.integers(256, size=3, dtype=np.uint8)
        return {"place": self.place, "seen": seen}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2).astype(np.float32)
        return self._observation(), {}

    def step(self, action):
        self.place = self.place + np.float32(action["go"] - 1 + 0.1 * sum(action["how"]))
        terminated, truncated = self.np_random.random(2) < 0.03
        info = {"where": float(self.place[0])} if terminated else {}
        return self._observation(), float(self.place[1]), bool(terminated), bool(truncated), info


class Pair:
    """Three agents of PettingZoo's parallel kind, of which one leaves early."""

    metadata = {"name": "pair"}  # noqa: RUF012
    possible_agents = ["a", "b", "c"]  # noqa: RUF012
    render_mode = None

    def observation_space(self, agent):
        return Box(-np.inf, np.inf, (2,))

    def action_space(self, agent):
        return Discrete(4)

    def _observations(self):
        return {a: self.random.normal(size=2).astype(np.float32) for a in self.agents}

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.agents, self.steps = list(self.possible_agents), 0
        return self._observations(), {a: {} for a in self.agents}

    def step(self, actions):
        assert sorted(actions) == sorted(self.agents)
        self.steps += 1
        observations = self._observations()
        rewards = {a: float(actions[a] + observations[a][0]) for a in self.agents}
        over = self.random.random() < 0.05
        terminations = {a: bool(over or (a == "c" and self.steps == 3)) for a in self.agents}
        truncations = {a: False for a in self.agents}
        infos = {a: {"last": rewards[a]} if terminations[a] else {} for a in self.agents}
        self.agents = [a for a in self.agents if not terminations[a]]
        return observations, rewards, terminations, truncations, infos

    def close(self):
        pass


class Guess(gymnasium.Env):
    """One-step episodes: say what was shown, among other things."""

    observation_space = Dict({"noise": Box(-1, 1, (2,)), "shown": Box(0, 1, (3,), np.int8)})
    action_space = Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.shown = int(self.np_random.integers(3))
        noise = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return {"noise": noise, "shown": np.eye(3, dtype=np.int8)[self.shown]}, {}

    def step(self, action):
        right = float(action == self.shown)
        return self.reset()[0], right, True, False, {}


class Together:
    """Two agents of PettingZoo's, one-step episodes: both say what the other was shown.

    Args:
        rivals: one is paid what the other loses, too: for being right, of 1.5 in all.
    """

    metadata = {"name": "together"}  # noqa: RUF012
    possible_agents = ["a", "b"]  # noqa: RUF012
    render_mode = None

    def __init__(self, rivals=False):
        self.rivals = rivals

    def observation_space(self, agent):
        return Box(0, 1, (2, 3))

    def action_space(self, agent):
        return Discrete(3)

    def _observations(self):
        self.shown = self.random.integers(3, size=2)
        own = np.eye(3, dtype=np.float32)[self.shown]
        return {"a": own, "b": own[::-1].copy()}

    def reset(self, seed=None, options=None):
        if seed is not None or not hasattr(self, "random"):
            self.random = np.random.default_rng(seed)
        self.agents = list(self.possible_agents)
        return self._observations(), {a: {} for a in self.agents}

    def step(self, actions):
        right = {
            a: float(actions[a] == self.shown[1 - i]) for i, a in enumerate(self.possible_agents)
        }
        if self.rivals:
            rewards = {"a": right["a"] - right["b"] / 4, "b": right["b"] - right["a"] / 4}
        else:
            rewards = dict.fromkeys(right, right["a"] * right["b"])
        ended, no = dict.fromkeys(right, True), dict.fromkeys(right, False)
        self.agents = []
        return self._observations(), rewards, ended, no, {a: {} for a in right}

    def close(self):
        pass


class Ends(gymnasium.Env):
    """Random observations of any space; ends and is cut off at random, at times both."""

    action_space = Discrete(3)
    render_mode = "rgb_array"

    def __init__(self, space):
        self.observation_space = copy.deepcopy(space)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.last = 0
        return self.observation_space.sample(), {"began": seed is not None}

    def step(self, action):
        self.last = action
        terminated, truncated = (self.np_random.random(2) < 0.1).tolist()
        info = {"is_success": truncated} if terminated or truncated else {}
        reward = self.np_random.integers(9) / 8 - action  # whose sums are exact
        return self.observation_space.sample(), reward, terminated, truncated, info

    def action_masks(self):
        return np.arange(3) != self.last

    def render(self):
        return np.full((2, 2, 3), self.last, np.uint8)


class Native:
    """Two agents as PufferLib's own environments: buffers handed in, resets within the step."""

    single_observation_space = Box(-np.inf, np.inf, (3,))
    single_action_space = Box(-1.0, 1.0, (2,))
    num_agents = 2
    emulated = False
    done = False

    def __init__(self, fault=None, buf=None, seed=0):
        self.random, self.fault, self.steps = np.random.default_rng(seed), fault, 0
        buf = buf or {
            "observations": np.zeros((2, 3), np.float32),
            **{name: np.zeros(2, np.float32) for name in ("rewards", "terminals", "truncations")},
        }
        self.observations, self.rewards = buf["observations"], buf["rewards"]
        self.terminals, self.truncations = buf["terminals"], buf["truncations"]

    def reset(self, seed=None):
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.observations[:] = self.random.normal(size=(2, 3))
        self.rewards[:], self.terminals[:], self.truncations[:] = 0, False, False
        return self.observations, []

    def step(self, actions):
        self.steps += 1
        if self.fault is not None:
            misbehave(*self.fault, self.steps)
        self.observations[:] = self.random.normal(size=(2, 3))
        self.rewards[:] = actions.sum(1) + self.observations[:, 0]
        self.terminals[:] = self.random.random() < 0.05
        infos = [{"ended": 1.0}] if self.terminals[0] else []
        return self.observations, self.rewards, self.terminals, self.truncations, infos

    def notify(self):
        self.random = np.random.default_rng(0)

    def close(self):
        pass


class Tick(gymnasium.Env):
    """Counts its steps, and misbehaves in the one it is told to.

    Args:
        fault: what `misbehave` is to do, and when: "make", "reset" or the number of a step.
        pause: seconds of each step.
        length: steps of an episode.
        once: a file; the fault only comes while it is not there.
        info: what each step says besides.
    """

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)
    action_space = Discrete(2)

    def __init__(self, fault=None, pause=0.0, length=None, once=None, info=dict):
        self.info = info
        self.fault, self.pause, self.length, self.once = fault, pause, length, once
        self.made = 0.0
        self._misbehave("make")

    def _misbehave(self, when):
        if self.fault is None or when != self.fault[1]:
            return
        if self.once is not None:
            if os.path.exists(self.once):
                return
            open(self.once, "w").close()
        misbehave(*self.fault, when)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.first = float(self.np_random.integers(1000))
        self.steps = 0
        self._misbehave("reset")
        return np.array([self.first, 0.0]), {}

    def step(self, action):
        self.steps += 1
        self._misbehave(self.steps)
        time.sleep(self.pause)
        over = self.steps == self.length
        return np.array([self.first, float(self.steps)]), 1.0, over, False, self.info()


def fork(child, told=False):
    """Fork as a library in C does, so that Python is not told, or as `os.fork`; run `child`."""
    if not (os.fork() if told else ctypes.PyDLL(None).fork()):
        child()
        os._exit(0)


def misbehave(how, at, when):
    """Do `how` if it is time."""
    if at != when:
        return
    match how:
        case "raise":
            raise ValueError(f"boom at {when}")
        case "exit":
            sys.exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "fork-kill":
            fork(lambda: time.sleep(60))
            os.kill(os.getpid(), signal.SIGKILL)
        case "fork-hang":
            fork(lambda: time.sleep(60))
            while True:
                pass
        case "input":
            input()
        case "hang":
            while True:
                pass
        case _:
            raise AssertionError(how)


class Modules(gymnasium.Env):
    """Tells which modules its process has loaded, and how it stands there."""

    observation_space = Box(-1, 1, (1,))
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        info = {
            "pid": os.getpid(),
            "modules": sorted(sys.modules),
            "main": getattr(sys.modules["__main__"], "__file__", None),
            "platforms": os.environ.get("JAX_PLATFORMS"),
        }
        return np.zeros(1, np.float32), 0.0, False, False, info
