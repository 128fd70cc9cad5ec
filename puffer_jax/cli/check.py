"""`puffer-jax check`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tyro
from flax import nnx
from jaxtyping import PyTree

from puffer_jax.cli.checkpoint import CheckpointOptions
from puffer_jax.policies.protocol import is_recurrent
from puffer_jax.weights.state_dicts import state_dict


@dataclass(frozen=True, kw_only=True)
class Check(CheckpointOptions):
    """Compare a checkpoint's policy in JAX with the real PufferLib policy.

    Prints the report. Exit code 0 when they agree, 1 when they differ, 2 when they cannot be
    compared.
    """

    model: tyro.conf.Positional[Path]
    """The checkpoint: .pt, .safetensors or .bin."""
    json: Path | None = None
    """Write the report here as JSON."""
    plot: Path | None = None
    """Draw the error of each layer here (PNG, PDF, SVG)."""
    batch: int = 32
    """Number of observations, drawn from the observation space."""
    time: int = 8
    """Number of steps, for recurrent policies."""
    seed: int = 0
    """Seed of observations, states and the loss."""

    def run(self) -> int:
        """Compare, print, and return the exit code."""
        from puffer_jax.parity.comparison import compare
        from puffer_jax.parity.reference import reference_env, reference_policy

        if min(self.batch, self.time) < 1:
            raise ValueError(f"batch is {self.batch} and time {self.time}; both must be positive")
        env = self.make_env()
        policy = self.load(self.model, env)
        reference = reference_policy(policy)
        _load_reference(reference, self.model, policy)

        lead, state = (self.batch,), None
        if is_recurrent(policy):
            lead = (self.batch, self.time)
            # Not zero, so that a swap of its parts would be noticed.
            rng = np.random.default_rng(self.seed)
            state = {
                name: np.tanh(rng.standard_normal(part.shape)).astype(np.float32)
                for name, part in policy.initial_state(self.batch).items()
            }
        observations = _sample(
            reference_env(policy) if env is None else env, math.prod(lead), self.seed
        )
        observations = observations.reshape(*lead, *observations.shape[1:])
        report = compare(reference, policy, observations, state, seed=self.seed)
        print(report)
        if self.json is not None:
            report.to_json(self.json)
        if self.plot is not None:
            report.plot(self.plot)
        return 1 if report.failures else 0


def _load_reference(reference: Any, path: Path, policy: nnx.Module) -> None:
    """Load a `.pt` as PufferLib would, not through our policy."""
    import torch

    if path.suffix == ".pt":
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    else:
        tensors = {name: torch.from_numpy(array) for name, array in state_dict(policy).items()}
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    while all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    try:
        reference.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"PufferLib's policy does not accept {path}: {error}") from error


def _sample(env: SimpleNamespace, count: int, seed: int) -> np.ndarray:
    """Observations (count, *obs) from the space, packed where the environment packs them."""
    emulated = getattr(env, "emulated", None)
    space = env.env.observation_space if emulated else env.single_observation_space
    space.seed(seed)
    samples = [space.sample() for _ in range(count)]
    if emulated:
        packed = np.zeros(count, emulated["emulated_observation_dtype"])
        for i, sample in enumerate(samples):
            _pack(packed[i : i + 1], sample)
        return packed.view(emulated["observation_dtype"]).reshape(count, -1)
    observations = np.stack(samples)
    # Bounds like 1e38, which mean unbounded, would overflow float32 in the first matmul.
    return np.clip(observations, -1e6, 1e6) if observations.dtype.kind == "f" else observations


def _pack(struct: np.ndarray, sample: PyTree) -> None:
    if isinstance(sample, tuple):
        sample = {f"f{i}": value for i, value in enumerate(sample)}
    if isinstance(sample, Mapping):
        for name, value in sample.items():
            _pack(struct[name], value)
    else:
        struct[...] = sample
