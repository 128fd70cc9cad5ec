"""JAX-native environments of other packages, several agents in one, and steps spent waiting.

pgx is tested itself; of the other packages, small objects with their interface stand in.
"""

import itertools
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct

import puffer_jax
from puffer_jax import environments, ppo, vector
from puffer_jax.base.spaces import Box, Dict, Discrete, MultiDiscrete
from puffer_jax.cli import eval
from puffer_jax.environments.jax_native import as_jax_env, autoreset
from puffer_jax.ppo.jax_rollout import JaxSource

pytestmark = pytest.mark.usefixtures("quick")


def key(seed=0):
    return jax.random.key(seed)


@pytest.fixture
def narrow():
    """Without 64 bits, which pgx does not bear."""
    with jax.enable_x64(False):
        yield


def play(env, actions):
    """The first observation, and `Step` stacked over time."""
    env = as_jax_env(env)
    obs, state = env.reset(key())

    def one(state, inputs):
        out = autoreset(env)(inputs[1], state, inputs[0])
        return out.state, out

    keys = jax.random.split(key(), len(actions))
    return jax.device_get((obs, jax.lax.scan(one, state, (jnp.asarray(actions), keys))[1]))


# --- steps spent waiting ---------------------------------------------------------------------


def test_a_step_spent_waiting_is_as_if_it_were_not_there():
    """Advantages are those of the agent's own steps, with the rewards until the next of them."""
    random, gamma, decay = np.random.default_rng(0), 0.9, 0.9 * 0.8
    waits = random.random((16, 12)) < 0.5
    waits[:, -1] = False
    values, rewards, ratio = random.standard_normal((3, 16, 12))
    ratio, terminals = np.minimum(np.abs(ratio), 1), (random.random((16, 12)) < 0.2).astype(float)
    rates = {"gamma": gamma, "gae_lambda": 0.8, "vtrace_rho_clip": 1.0, "vtrace_c_clip": 1.0}
    shown = jnp.where(waits, 99.0, values)
    found = ppo.puff_advantage(shown, rewards, terminals, ratio, **rates, mask=~waits, waits=waits)
    for row in range(16):
        own = np.flatnonzero(~waits[row])
        expected, after = np.zeros(12), 0.0
        for now, following in reversed([*itertools.pairwise(own)]):
            got, alive = 0.0, 1.0
            for t in range(now + 1, following + 1):
                got += alive * (1 if t == now + 1 else gamma) * rewards[row, t]
                alive *= 1 - terminals[row, t]
            delta = got + gamma * alive * values[row, following] - values[row, now]
            after = ratio[row, now] * (delta + decay * alive * after)
            expected[now] = after
        # At most 12 steps of float64 in another order: 12 * 12 * 2e-16; atol for sums near 0.
        np.testing.assert_allclose(found[row], expected, rtol=1e-12, atol=1e-14)


# --- several agents --------------------------------------------------------------------------


class Race:
    """Two agents in turns; each walks as far as it says, and whoever comes to 4 wins.

    The winner gets 1, the other -1. An agent sees its own place and the other's.
    """

    observation_space = Box(0.0, 9.0, (2,))
    action_space = Discrete(2)
    num_agents = 2

    def reset(self, key) -> Any:
        places = jnp.zeros(2, jnp.float32)
        return self.seen(places), (places, 0)

    def seen(self, places):
        return jnp.stack([places, places[::-1]])

    def step(self, key, state, action) -> Any:
        places, turn = state
        places = places.at[turn].add(1.0 + action[turn])
        won = places >= 4
        reward = jnp.where(won.any(), jnp.where(won, 1.0, -1.0), 0.0)
        end = jnp.full(2, won.any())
        return self.seen(places), (places, 1 - turn), reward, end, jnp.zeros(2, bool), {}

    def playing(self, state):
        return jnp.arange(2) == state[1]


def test_turns():
    obs, out = play(Race(), [[1, 0]] * 9)  # 2 steps, 1, 2: won
    assert obs.tolist() == [[0, 0], [0, 0]]
    assert out.final_obs[:3, 0].tolist() == [[2, 0], [2, 1], [4, 1]]
    assert out.reward[:4].tolist() == [[0, 0], [0, 0], [1, -1], [0, 0]]
    assert out.start.tolist() == [False, False, True] * 3
    assert (out.terminated == out.start[:, None]).all() and not out.truncated.any()
    assert (out.playing[:, 0] == [False, True, True] * 3).all()
    assert (out.playing.sum(1) == 1).all()
    limited = as_jax_env(Race(), max_steps=2)
    _, out = play(limited, [[1, 0]] * 4)
    assert out.truncated.tolist() == [[False] * 2, [True] * 2] * 2
    assert (out.playing[:, 0] == [False, True] * 2).all()


class Leaving:
    """Agents leave after 1 + their number of steps; the first by truncation. A reward for all."""

    observation_space = Box(0.0, 9.0, (1,))
    action_space = Discrete(2)
    num_agents = 3

    def reset(self, key) -> Any:
        return jnp.zeros((3, 1), jnp.float32), 0

    def step(self, key, n, action) -> Any:
        n = n + 1
        over = n > jnp.arange(3)
        first = jnp.arange(3) == 0
        obs = jnp.full((3, 1), n, jnp.float32)
        return obs, n, jnp.ones(3), over & ~first, over & first, {}


def test_an_agent_ends_once_and_is_absent_until_all_have_ended():
    _, out = play(Leaving(), np.zeros((6, 3), int))
    yes = np.eye(3, dtype=bool)
    assert (out.terminated == np.tile(yes & (np.arange(3) > 0), (2, 1))).all()
    assert (out.truncated == np.tile(yes & (np.arange(3) == 0), (2, 1))).all()
    assert out.reward.tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]] * 2
    assert out.start.tolist() == [False, False, True] * 2
    there = [[False, True, True], [False, False, True], [True, True, True]]
    assert out.playing.tolist() == there * 2


def test_each_agent_is_a_row():
    """A rollout holds both agents' views, who played, and what each got for its last own step."""
    env = as_jax_env(Race())
    config = puffer_jax.PuffeRLConfig(num_envs=2, bptt_horizon=8, total_timesteps=64)
    policy = puffer_jax.Default(env, 4, rngs=nnx.Rngs(0))
    source = JaxSource(config, env, policy)
    assert source.sizes.agents == 4 and source.sizes.batch == 32
    stream = source.init(key())
    params = puffer_jax.split(policy)[1]
    stream, experience, outcome = jax.jit(source.collect)(params, stream, key(1))
    rows = jax.device_get(experience)
    assert rows.observations.shape == (4, 8, 2) and (rows.waits == ~rows.mask).all()
    steps, stats = source.summary(outcome)
    assert steps == rows.mask.sum() == 16
    for pair in (0, 2):
        places, turn, ended, last = [0, 0], 0, False, [0.0, 0.0]
        for t in range(8):
            for i in (0, 1):
                seen = [places[i], places[1 - i]]
                assert rows.observations[pair + i, t].tolist() == seen
                assert rows.mask[pair + i, t] == (turn == i)
                assert rows.terminals[pair + i, t] == ended
                assert rows.rewards[pair + i, t] == last[i]
            places[turn] += 1 + int(rows.actions[pair + turn, t])
            ended = places[turn] >= 4
            last = [(1.0 if i == turn else -1.0) if ended else 0.0 for i in (0, 1)]
            places, turn = ([0, 0], 0) if ended else (places, 1 - turn)
    assert sum(stats["episode_return"]) == 0 and len(stats["episode_return"]) % 2 == 0
    with pytest.raises(ValueError, match="JaxVecEnv is for one agent, and Race has several"):
        vector.JaxVecEnv(env, num_envs=2)


def test_what_does_not_fit_the_agents_is_named():
    class Shared(Race):
        def step(self, *arguments):
            obs, state, reward, *others = super().step(*arguments)
            return obs, state, reward.sum(), *others

    with pytest.raises(ValueError, match=r"reward must be one for each of the 2 agents; got shape"):
        as_jax_env(Shared())


# --- pgx -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*player_id")
@pytest.mark.usefixtures("narrow")
def test_pgx_plays_itself():
    """Three games of pgx's own, move by move, with the same keys; an illegal move loses one."""
    import pgx

    game = pgx.make("tic_tac_toe")
    env = as_jax_env(game)
    assert env.num_agents == 2 and env.action_space == Discrete(9)
    shapes = {name: space.shape for name, space in env.observation_space.spaces.items()}
    assert shapes == {"observation": (3, 3, 2), "action_mask": (9,)}
    step, theirs = jax.jit(autoreset(env)), jax.jit(game.step)
    obs, state = env.reset(key())
    direct, results, turns = game.init(key()), [], 0
    moves = [0, 4, 1, 5, 2, *[0, 1, 2, 4, 3, 5, 7, 6, 8], 4, 4]  # won, drawn, and 4 again
    for i, move in enumerate(moves):
        player = int(direct.current_player)
        mask = np.ones((2, 9), bool)
        mask[player] = direct.legal_action_mask
        np.testing.assert_array_equal(obs["action_mask"], mask)
        for who in (0, 1):
            np.testing.assert_array_equal(obs["observation"][who], game.observe(direct, who))
        assert env.playing(state).tolist() == [player == 0, player == 1]
        step_key, reset_key = jax.random.split(key(i))
        actions = np.full(2, 8 - move)
        actions[player] = move
        out = step(key(i), state, jnp.asarray(actions))
        direct = theirs(direct, move, step_key)
        np.testing.assert_array_equal(out.reward, direct.rewards)
        assert out.terminated.tolist() == [bool(direct.terminated)] * 2
        assert bool(out.start) == bool(direct.terminated) and not out.truncated.any()
        turns += 1
        if direct.terminated:
            results.append((turns, out.reward[player].item()))
            direct, turns = game.init(reset_key), 0
        obs, state = out.obs, out.state
    assert results == [(5, 1), (9, 0), (2, -1)]


@pytest.mark.usefixtures("narrow")
def test_pgx_against_random_players():
    """Between our moves there is one of theirs, or theirs begins; they never lose by the rules."""
    env = environments.make("pgx:tic_tac_toe", opponent="random")
    assert env.num_agents is None
    step, reset = jax.jit(jax.vmap(autoreset(env))), jax.jit(jax.vmap(env.reset))
    obs, state = reset(jax.random.split(key(), 64))
    stones = np.asarray(obs["observation"]).sum((1, 2))
    assert (stones[:, 0] == 0).all() and set(stones[:, 1].tolist()) == {0, 1}
    ends, seen = [], 0
    for i in range(12):
        legal = np.where(np.asarray(obs["action_mask"]), np.random.default_rng(i).random(9), -1)
        before = stones
        out = step(jax.random.split(key(i), 64), state, jnp.asarray(legal.argmax(1)))
        stones = np.asarray(out.obs["observation"]).sum((1, 2))
        going = ~np.asarray(out.start)
        assert (stones[going] == before[going] + 1).all()
        assert (np.asarray(out.reward)[going] == 0).all()
        seen += (np.asarray(out.obs["action_mask"]).sum(1) == 9 - stones.sum(1)).all()
        ends += np.asarray(out.reward)[~going].tolist()
        obs, state = out.obs, out.state
    assert seen == 12 and {-1.0, 0.0, 1.0} == set(ends)
    with pytest.raises(ValueError, match="opponent must be 'self' or 'random'; got 'me'"):
        environments.make("pgx:tic_tac_toe", opponent="me")


def test_pgx_by_name(tmp_path, capsys):
    from puffer_jax.cli.command import main

    with pytest.raises(ValueError, match="no environment 'pgx:ches'; did you mean 'pgx:chess'"):
        environments.make("pgx:ches")
    with pytest.raises(TypeError, match="no such argument: opponen"):
        environments.make("pgx:chess", opponen="random")
    with pytest.raises(ValueError, match="pgx:kuhn_poker has several agents"):
        eval.make_game("pgx:kuhn_poker", {}, None, 0)
    small = "--vec.num-envs 2 --train.bptt-horizon 8 --train.num-minibatches 1 --name a".split()
    small += ["--train.update-epochs", "1", "--policy.hidden-size", "4", "--log", "jsonl"]
    flags = ["--train.data-dir", str(tmp_path), "--train.total-timesteps", "48"]
    assert main(["train", "--env", "pgx:kuhn_poker", *small, *flags]) == 0
    assert "48 of 48 steps, 3 epochs" in capsys.readouterr().out  # of 32 rows' steps each


# --- stand-ins -------------------------------------------------------------------------------


class Spec:
    """A spec of jumanji's: of an array with or without bounds, or of parts."""

    def __init__(self, shape=(), dtype: Any = np.int32, minimum=None, maximum=None, **parts):
        self._specs, self.shape, self.dtype = parts, shape, np.dtype(dtype)
        if maximum is not None:
            self.minimum, self.maximum = minimum, maximum


class Position(NamedTuple):
    row: Any
    column: Any


@struct.dataclass
class TimeStep:
    observation: Any
    reward: Any
    discount: Any
    step: Any
    extras: dict = struct.field(default_factory=dict)

    def last(self):
        return (self.step == 3) | (self.discount.max() == 0)


@struct.dataclass
class Seen:
    position: Position
    action_mask: Any


class Jumanji:
    """Two agents push one stone along two axes; it falls off at 3, and after 3 steps it is late."""

    observation_spec = Spec(
        position=Spec(row=Spec((), np.int32, 0, 9), column=Spec()),
        action_mask=Spec((2, 2), bool, False, True),
    )
    action_spec = Spec((2,), np.int32, np.zeros(2), np.array([1, 2]))
    discount_spec = Spec((2,), np.float32)

    def seen(self, place):
        return Seen(Position(place[0], place[1]), jnp.ones((2, 2), bool))

    def reset(self, key):
        place = jnp.zeros(2, jnp.int32)
        one = jnp.ones(2, jnp.float32)
        return (place, 0), TimeStep(self.seen(place), 0 * one, one, 0)

    def step(self, state, action):
        place, n = state[0] + action, state[1] + 1
        discount = jnp.where(place.max() >= 3, 0.0, jnp.array([0.0, 1.0]))
        reward = place.astype(jnp.float32)
        return (place, n), TimeStep(self.seen(place), reward, discount, n, {"n": n})


def test_jumanjis_are_dicts_by_name_with_one_policy_for_all():
    env = as_jax_env(Jumanji())
    assert env.action_space == MultiDiscrete((2, 3))
    parts = env.observation_space.spaces
    assert list(parts) == ["position", "action_mask"] and parts["action_mask"].dtype == bool
    assert parts["position"].spaces["row"].high == 9 and parts["action_mask"].shape == (2, 2)
    _, out = play(env, [[0, 1], [0, 1], [0, 0], [0, 2], [1, 1], [0, 0]])
    assert out.final_obs["position"]["column"].tolist() == [1, 2, 2, 2, 3, 0]
    assert out.obs["position"]["column"].tolist() == [1, 2, 0, 2, 0, 0]
    assert out.reward.tolist() == [1, 2, 2, 2, 4, 0]
    assert out.truncated.tolist() == [False, False, True, False, False, False]
    assert out.terminated.tolist() == [False] * 4 + [True, False]
    assert out.info["n"].tolist() == [1, 2, 3, 1, 2, 1]

    class AutoResetWrapper(Jumanji):
        pass

    class Outer(Jumanji):
        _env = None

    wrapped = Outer()
    wrapped._env = AutoResetWrapper()
    with pytest.raises(ValueError, match="Outer resets by itself"):
        as_jax_env(wrapped)
    thrown = Jumanji()
    thrown.action_spec = Spec((2, 2), np.float32, -1.0, 1.0)
    assert as_jax_env_actions(thrown) == (4,)
    thrown.action_spec = Spec((2,), np.int32, np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="its actions must begin at 0"):
        as_jax_env(thrown)


def as_jax_env_actions(env):
    """The shape of the actions; the stand-in itself cannot add them."""
    from puffer_jax.environments.adapters import jumanji

    return jumanji.adapt(env).action_space.shape


@struct.dataclass
class Moment:
    t: Any
    observation: Any
    reward: Any
    step_type: Any

    def is_termination(self):
        return self.step_type == 2

    def is_truncation(self):
        return self.step_type == 1


class Navix:
    """Counts the actions; terminates at 3, truncates after 4 steps; `step` resets when over."""

    termination_fn = transitions_fn = None
    max_steps = 4
    observation_space = SimpleNamespace(n=9, shape=(1,), minimum=jnp.asarray(0), maximum=8)
    action_space = SimpleNamespace(n=jnp.asarray(2), shape=())

    def reset(self, key):
        return Moment(0, jnp.zeros(1, jnp.uint8), 0.0, 0)

    def step(self, timestep, action):
        raise AssertionError("it would reset by itself")

    def _step(self, timestep, action):
        count, t = timestep.observation + action.astype(jnp.uint8), timestep.t + 1
        ends = jnp.where(count[0] >= 3, 2, jnp.where(t >= self.max_steps, 1, 0))
        return Moment(t, count, action * 1.0, ends)


def test_navixs_are_never_left_to_reset_themselves():
    env = as_jax_env(Navix())
    assert env.observation_space == Box(0, 8, (1,), np.dtype("uint8"))
    assert env.action_space == Discrete(2)
    _, out = play(env, [1, 1, 1, 1, 0, 0, 0, 1])
    assert out.terminated.tolist() == [False, False, True] + [False] * 5
    assert out.truncated.tolist() == [False] * 6 + [True, False]
    assert out.final_obs[:, 0].tolist() == [1, 2, 3, 1, 1, 1, 1, 1]


@struct.dataclass
class CraftaxParams:
    max_timesteps: int = 3


class Craftax:
    """Dies of the action 1; the clock is in `is_terminal`, as in Craftax."""

    default_params = CraftaxParams()

    def observation_space(self, params):
        return Box(0.0, 9.0, (1,))

    def action_space(self, params):
        return Discrete(2)

    def reset(self, key, params):
        return jnp.zeros(1, jnp.float32), {"timestep": 0, "dead": jnp.array(False)}

    def is_terminal(self, state, params):
        return (state["timestep"] >= params.max_timesteps) | state["dead"]

    def step_env(self, key, state, action, params):
        state = {"timestep": state["timestep"] + 1, "dead": action == 1}
        obs = jnp.full(1, state["timestep"], jnp.float32)
        return obs, state, 1.0, self.is_terminal(state, params), {}


def test_craftaxs_clock_truncates_and_death_at_that_moment_terminates():
    _, out = play(Craftax(), [0, 0, 0, 0, 1, 0, 0, 1, 0])
    assert out.truncated.tolist() == [False, False, True] + [False] * 6
    assert out.terminated.tolist() == [False] * 4 + [True, False, False, True, False]
    _, out = play((Craftax(), CraftaxParams(2)), [0, 0])
    assert out.truncated.tolist() == [False, True]


@struct.dataclass
class Team:
    step: Any
    alive: Any


class JaxMARL:
    """The action 1 kills its agent; over after 4 steps, or when all are dead. They share rewards.

    `wide` says what the second one's observation is longer by; `masks`, whether it says what is
    available.
    """

    agents = ("left", "right")
    num_agents, max_steps = 2, 4

    def __init__(self, wide=0, masks=False, actions=(2, 2)):
        self.wide, self.masks = wide, masks
        self.actions = dict(zip(self.agents, actions, strict=True))

    def action_space(self, agent):
        return SimpleNamespace(n=self.actions[agent], shape=())

    def get_avail_actions(self, state):
        if not self.masks:
            raise NotImplementedError
        return {"left": jnp.array([1, 0]), "right": jnp.array([1, 1])}

    def seen(self, state):
        x = state.alive.astype(jnp.float32)
        longer = jnp.concatenate([x[1:], jnp.full(self.wide, 7, jnp.float32)])
        return {"left": x[:1], "right": longer, "world_state": x}

    def reset(self, key):
        state = Team(0, jnp.ones(2, bool))
        return self.seen(state), state

    def step_env(self, key, state, actions):
        dead = jnp.stack([actions["left"], actions["right"]]) == 1
        state = Team(state.step + 1, state.alive & ~dead)
        over = (state.step >= 4) | ~state.alive.any()
        done = {"left": ~state.alive[0], "right": ~state.alive[1], "__all__": over}
        reward = {"left": 1.0, "right": 2.0}
        return self.seen(state), state, reward, done, {"n": state.step}


def test_jaxmarls_agents_are_rows():
    env = as_jax_env(JaxMARL())
    assert env.num_agents == 2 and env.action_space == Discrete(2)
    assert env.observation_space.shape == (1,)
    _, out = play(env, [[0, 1], [0, 0], [1, 1], [0, 0], [0, 0], [0, 0], [0, 0]])
    assert out.final_obs[:3, :, 0].tolist() == [[1, 0], [1, 0], [0, 0]]
    assert (
        out.terminated.tolist() == [[False, True], [False] * 2, [True, False]] + [[False] * 2] * 4
    )
    assert out.truncated.tolist() == [[False] * 2] * 6 + [[True] * 2]
    assert out.reward.tolist() == [[1, 2], [1, 0], [1, 0]] + [[1, 2]] * 4
    assert out.playing.tolist() == [[True, False]] * 2 + [[True] * 2] * 5
    padded = as_jax_env(JaxMARL(wide=2, masks=True))
    obs, _ = padded.reset(key())
    assert obs["observation"].tolist() == [[1, 0, 0], [1, 7, 7]]
    assert obs["action_mask"].tolist() == [[True, False], [True, True]]
    assert isinstance(padded.observation_space, Dict)
    with pytest.raises(ValueError, match=r"same actions; got left: Discrete\(n=2\), right: .*n=3"):
        as_jax_env(JaxMARL(actions=(2, 3)))

    class Logs:
        def __init__(self, env):
            self._env = env

        def __getattr__(self, name):
            return getattr(self._env, name)

    with pytest.raises(ValueError, match="Logs is a wrapper of JaxMARL's"):
        as_jax_env(Logs(JaxMARL()))


# --- by name ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name", "line"),
    [
        ("brax", "brax:ant", "brax:ant needs brax: pip install brax"),
        ("mujoco_playground", "playground:CartpoleBalance", "pip install playground"),
        ("craftax", "craftax:Craftax-Symbolic-v1", "needs craftax: pip install craftax"),
        ("navix", "navix:Navix-Empty-5x5-v0", "needs navix: pip install navix"),
        ("jumanji", "jumanji:Snake-v1", "needs jumanji: pip install jumanji"),
        ("pgx", "pgx:chess", "needs pgx: pip install"),
        ("jaxmarl", "jaxmarl:SMAX", "needs jaxmarl: pip install jaxmarl"),
    ],
)
def test_what_is_not_installed(module, name, line, monkeypatch):
    assert environments.family(name)[0] == name.partition(":")[0]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=line):
        environments.make(name)
