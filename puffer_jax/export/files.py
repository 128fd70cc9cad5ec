"""`export_step` writes a policy's step, `load_step` reads it back."""

from collections.abc import Sequence
from pathlib import Path

from flax import nnx
from jaxtyping import PyTree

from puffer_jax.base import spaces
from puffer_jax.base.files import write_atomically
from puffer_jax.export import onnx, stablehlo
from puffer_jax.export.loaded import LoadedStep
from puffer_jax.export.step import step_of


def export_step(
    policy: nnx.Module,
    path: str | Path,
    *,
    format: str = "stablehlo",
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    batch: int | None = None,
    output: str = "logits",
    env: spaces.Env = None,
    observations: PyTree = None,
) -> None:
    """Write one step of a policy, (observations, state) -> (logits, values, state), as a file.

    The file holds the parameters and operations of XLA's or ONNX's, no kernel of ours, and its
    inputs and outputs are plain arrays, tuples and dicts: logits are an array, a tuple of them for
    MultiDiscrete actions, {"loc": ..., "scale": ...} for a `Normal`, or {"tanh": {"loc": ...,
    "scale": ...}} for a `TanhNormal`. Values are (batch, 1). The state is the core's,
    `policy.core.initial_state(batch)`, zeros where an episode starts; that of a policy without
    memory is None. A recurrent policy of your own has that of its `initial_state`.

    - "stablehlo" is what `jax.export.deserialize` reads, with jax alone.
    - "onnx" is written by jax2onnx (`pip install puffer_jax[onnx]`), and run by onnxruntime on
      random observations before the file is put in place. Inputs are called `observations` and
      `state.NAME`, outputs `logits` (or `action`), `values` and `new_state.NAME`; parts of an
      observation `observations.NAME`, components `logits.0`, `logits.loc`.

    Args:
        policy: any that acts: with `forward_eval`, or `encode_observations` and `decode_actions`.
        path: the file, replaced as a whole or not at all.
        format: see above.
        platforms: that "stablehlo" is compiled for when it is called: of cpu, cuda, rocm, tpu.
        batch: rows of observations; None: any number.
        output: "action" writes the most likely action in place of the logits: int32 (batch,) or
            (batch, components), or the mode, not yet clipped to a Box (see `playable`).
        env: gives shapes and dtypes of observations; by default the policy's `env_spec`, which
            does not tell the dtype: it is taken to be uint8 for images, float32 for others.
        observations: a batch of them, which gives shapes and dtypes in place of `env`.

    Raises:
        ValueError: an argument is none of these, the policy does not tell its observations, or
            it cannot be exported: the message names what stands in the way.
        TypeError: the policy holds other variables than `nnx.Param`.
        ImportError: "onnx" without jax2onnx or onnxruntime.

    Example:
        >>> import jax, puffer_jax
        >>> from flax import nnx
        >>> env = puffer_jax.environments.make("cartpole")
        >>> policy = puffer_jax.Default(env, hidden_size=16, rngs=nnx.Rngs(0))
        >>> puffer_jax.export.export_step(policy, "policy.stablehlo", output="action")
        >>> action, values, state = puffer_jax.export.load_step("policy.stablehlo")(
        ...     jax.numpy.ones((3, 4))
        ... )
        >>> action.shape, values.shape, state
        ((3,), (3, 1), None)
    """
    if format not in ("stablehlo", "onnx"):
        raise ValueError(f"format is {format!r}; expected 'stablehlo' or 'onnx'")
    if format == "onnx":
        onnx.packages()  # missing ones are found before the work
    else:
        stablehlo.check(platforms)
    step = step_of(policy, batch=batch, output=output, env=env, observations=observations)
    content = onnx.checked(step) if format == "onnx" else stablehlo.serialized(step, platforms)
    write_atomically(Path(path), lambda file: file.write(content))


def load_step(path: str | Path) -> LoadedStep:
    """The step in a StableHLO file, of `export_step` or of `jax.export` with the same arguments.

    With jax alone it is `jax.export.deserialize(bytearray(file.read())).call`. An ONNX file is run
    by `onnxruntime.InferenceSession(path)`.

    Raises:
        ValueError: it is another file, or a part of one.

    Example:
        >>> import jax, puffer_jax
        >>> from flax import nnx
        >>> env = puffer_jax.environments.make("cartpole")
        >>> policy = puffer_jax.Default(env, hidden_size=16, rngs=nnx.Rngs(0))
        >>> policy = puffer_jax.LSTMWrapper(env, policy, 16, 16, rngs=nnx.Rngs(1))
        >>> puffer_jax.export.export_step(policy, "policy.stablehlo")
        >>> step = puffer_jax.export.load_step("policy.stablehlo")
        >>> logits, values, state = step(jax.numpy.ones((3, 4)), step.initial_state(3))
        >>> logits.shape, sorted(state)
        ((3, 2), ['lstm_c', 'lstm_h'])
    """
    return LoadedStep(stablehlo.read(Path(path)))
