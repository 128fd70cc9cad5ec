"""Measure the parity table and print it: `make table`; it belongs in parity_tests/README.md."""

import tempfile
import warnings
from pathlib import Path

import jax
import numpy as np
import pufferlib.models
import torch
from flax import nnx
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from support.bars import stub_env as env

import puffer_jax
from puffer_jax.parity.comparison import compare

BATCH, TIME = 32, 8
HEADER = "| policy | forward | gradient | eval step | init | export |"


VECTOR = Box(-1, 1, (17,))
ATARI = env(Box(0, 255, (4, 84, 84), np.uint8), Discrete(6))
PROCGEN = env(Box(0, 255, (64, 64, 3), np.uint8), Discrete(15))
NATURE = {"framestack": 4, "flat_size": 3136}


def default(library, action):
    return lambda **rngs: library.Default(env(VECTOR, action), **rngs)


def recurrent(library, action):
    def build(**rngs):
        policy = library.Default(env(VECTOR, action), **rngs)
        return library.LSTMWrapper(env(VECTOR, action), policy, **rngs)

    return build


def rows():
    """Name, the reference policy, ours, observations."""
    random = np.random.default_rng(0)
    theirs, ours = pufferlib.models, puffer_jax
    vectors = random.standard_normal((BATCH, TIME, 17)).astype(np.float32)
    actions = {
        "Discrete": Discrete(6),
        "MultiDiscrete": MultiDiscrete([3, 1, 4]),
        "Box": Box(-1, 1, (3,)),
    }
    for name, make, x in (("Default", default, vectors[:, 0]), ("LSTMWrapper", recurrent, vectors)):
        for kind, action in actions.items():
            yield f"{name}, {kind}", make(theirs, action), make(ours, action), x
    atari = random.integers(0, 256, (BATCH, 4, 84, 84), dtype=np.uint8)
    # Among more images of noise some ReLU or max-pool decides within float32 rounding, and then
    # a gradient jumps by 1e-4, in torch as often as here.
    procgen = random.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    yield (
        "Convolutional, Discrete",
        lambda: theirs.Convolutional(ATARI, **NATURE),
        lambda **rngs: ours.Convolutional(ATARI, **NATURE, **rngs),
        atari,
    )
    yield (
        "ProcgenResnet, Discrete",
        lambda: theirs.ProcgenResnet(PROCGEN),
        lambda **rngs: ours.ProcgenResnet(PROCGEN, **rngs),
        procgen,
    )


def initial_spread(reference, policy):
    """Largest relative difference in the root-mean-square of a weight, ours against torch's."""
    ours = puffer_jax.state_dict(policy)
    rms = {
        k: (float(v.square().mean().sqrt()), np.sqrt(np.mean(ours[k] ** 2)))
        for k, v in reference.state_dict().items()
        if v.ndim > 1
    }
    return max(abs(a - b) / a if a else b for a, b in rms.values())


def export(reference, policy):
    """Round trip through a .pt file and the reference, bit for bit."""
    before = puffer_jax.state_dict(policy)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        puffer_jax.save_weights(policy, path)
        reference.load_state_dict(torch.load(path, weights_only=True), strict=True)
        torch.save(reference.state_dict(), path)
        puffer_jax.load_weights(policy, path)
    after = puffer_jax.state_dict(policy)
    return "bit-exact" if all(np.array_equal(before[k], after[k]) for k in before) else "DIFFERS"


def main():
    print(HEADER)
    print("|---" * HEADER.count(" | ") + "|---|")
    for name, make_reference, make_ours, observations in rows():
        torch.manual_seed(0)
        reference, policy = make_reference(), make_ours(rngs=nnx.Rngs(0))
        spread = initial_spread(reference, policy)
        exported = export(reference, policy)
        report = compare(reference, policy, observations)
        report.assert_close()

        def worst(rows):
            if not rows:
                return "only ours has one"
            errors = [max(getattr(r, p).relative for r in rows) for p in ("float64", "float32")]
            return " / ".join(f"{error:.0e}" for error in errors)

        forward = [r for r in report.of("output") if not r.name.startswith("eval.")]
        evaluation = [r for r in report.of("output") if r.name.startswith("eval.")]
        cells = worst(forward), worst(report.of("gradient")), worst(evaluation)
        print(
            f"| {name} | {' | '.join(cells)} | rms within {spread:.1%} | {exported} |", flush=True
        )


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    jax.config.update("jax_platforms", "cpu")
    main()
