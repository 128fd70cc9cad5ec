"""`puffer-jax export`."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import tyro

from puffer_jax.cli.checkpoint import CheckpointOptions
from puffer_jax.cli.envs import make_policy
from puffer_jax.cli.model import find_model
from puffer_jax.cli.train import parse_arguments
from puffer_jax.export import export_step
from puffer_jax.policies.masks import AUTO, mask_of
from puffer_jax.weights.files import load_weights


@dataclass(frozen=True, kw_only=True)
class Export(CheckpointOptions):
    """Write a policy's step for elsewhere: StableHLO, which JAX alone runs, or ONNX.

    The file takes (observations, state) and gives (logits or action, values, state). Exit code 0,
    or 2 when something is wrong; nothing is written then.
    """

    model: tyro.conf.Positional[Path]
    """.pt, .safetensors or .bin; or the folder of a run, for its latest checkpoint, whose
    environment and options are then known."""
    format: Literal["stablehlo", "onnx"] = "stablehlo"
    """onnx needs jax2onnx and onnxruntime."""
    out: Path | None = None
    """The file to write. None: the model's name with the format as its suffix."""
    batch: int | None = None
    """Rows of observations. None: any number."""
    output: Literal["logits", "action"] = "logits"
    """action: the most likely one, in place of the logits."""
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")
    """What StableHLO can be compiled for: of cpu, cuda, rocm, tpu."""
    action_mask: str | None = None
    """As in `puffer-jax train --policy.action-mask`; by default, the run's."""

    def run(self) -> int:
        """Export, say what the file takes and gives, and return the exit code."""
        path, settings = find_model(self.model)
        inherits = settings is not None and self.env is None
        name = settings.env if settings is not None and inherits else self.env
        arguments = parse_arguments(settings.env_arg) if settings is not None and inherits else {}
        env = self.make_env(name, arguments)
        if settings is not None and env is not None:
            policy = make_policy(env, settings.policy, settings.rnn, settings.train.precision)
            load_weights(policy, path)
        else:
            policy = self.load(path, env)
        out = self.out or path.with_suffix(f".{self.format}")
        spaces = None
        if env is not None:  # as the environment gives them, not as emulation packs them
            whole = env.env.observation_space
            spaces = SimpleNamespace(observation_space=whole, action_space=env.single_action_space)
        options: dict[str, Any] = {"format": self.format, "output": self.output}
        export_step(policy, out, batch=self.batch, platforms=self.platforms, env=spaces, **options)
        print(f"{type(policy).__name__}: {out}")
        return 0

    def hints(self, env: SimpleNamespace | None) -> dict[str, Any]:
        """Also the key of the mask, where an environment says which parts observations have."""
        if env is None:
            return super().hints(env)
        mask = mask_of(env, self.action_mask or AUTO)
        return {**super().hints(env), "action_mask": mask}
