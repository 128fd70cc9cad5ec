"""The contestants on torch: the reference's policies and trainer, eager and compiled.

The only module here that imports torch and pufferlib; it runs in the bench's child process.
"""

from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pufferlib.models
import pufferlib.pytorch
import torch

from puffer_jax.bench import rows
from puffer_jax.bench.rows import Case

DEVICE = torch.device("cpu")


def start(threads: int, device: str, precision: str) -> dict[str, Any]:
    """Settle threads, device and precision; returns what runs here."""
    global DEVICE
    torch.set_num_threads(threads)
    DEVICE = torch.device("cpu" if device == "cpu" else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True  # as in the reference's trainer
    name = torch.cuda.get_device_name() if device == "gpu" else "cpu"
    return {"torch": torch.__version__, "device": name}


def forget() -> None:
    """Drop compiled programs."""
    torch._dynamo.reset()


def device_memory() -> int | None:
    """Bytes at the peak on the device; None: it has no memory of its own."""
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _arrays(tensors: dict[str, torch.Tensor]) -> rows.Arrays:
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


def matmul(size: int) -> Case:
    """A square float32 matrix product."""
    x, y = (torch.from_numpy(rows.observations((size, size), seed)).to(DEVICE) for seed in (0, 1))

    def call() -> None:
        x @ y
        _wait()

    return Case(call)


def _policy(net: str, shape: tuple[int, ...], hidden: int, actions: int) -> torch.nn.Module:
    """The reference's, with the weights that every side has."""
    kind = (0, 255, shape, np.uint8) if len(shape) == 3 else (-np.inf, np.inf, shape, np.float32)
    space, action = gymnasium.spaces.Box(*kind), gymnasium.spaces.Discrete(actions)
    env = SimpleNamespace(observation_space=space, action_space=action)
    env.single_observation_space, env.single_action_space = space, action
    models = pufferlib.models
    match net:
        case "default":
            policy = models.Default(env, hidden)
        case "lstm":
            policy = models.LSTMWrapper(env, models.Default(env, hidden), hidden, hidden)
        case "naturecnn":
            policy = models.Convolutional(env, framestack=4, flat_size=3136)
        case _:
            policy = models.ProcgenResnet(env)
    shapes = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    weights = rows.generic(shapes)
    policy.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
    return policy.to(DEVICE)


def evaluate(net: str, batch: int, compiled: bool = False) -> Case:
    """`forward_eval` and `sample_logits`, from a host array to a host action."""
    policy = _policy(net, (4,), 128, 2)
    obs = rows.observations((batch, 4))
    state: dict[str, Any] = {}
    if net == "lstm":
        zeros = torch.zeros(batch, 128, device=DEVICE)
        state = {"lstm_h": zeros, "lstm_c": zeros}

    def act(obs: torch.Tensor, state: dict[str, Any]) -> Any:
        logits, values = policy.forward_eval(obs, state)
        return *pufferlib.pytorch.sample_logits(logits), values

    if compiled:
        act = torch.compile(act)

    def call() -> Any:
        with torch.no_grad():
            action, _, entropy, values = act(torch.as_tensor(obs).to(DEVICE), state)
            return action.cpu().numpy(), entropy, values, dict(state)

    def outputs(result: Any) -> rows.Arrays:
        found = {"entropy": result[1].reshape(batch), "values": result[2]}
        return _arrays(found | {n: x for n, x in result[3].items() if n != "hidden"})

    return Case(call, outputs)


def train(
    net: str,
    lead: tuple[int, ...],
    shape: tuple[int, ...],
    hidden: int,
    backward: bool,
    compiled: bool = False,
) -> Case:
    """Logits and values; or a loss of them and its gradients."""
    policy = _policy(net, shape, hidden, 6 if len(shape) == 3 else 2)
    forward = torch.compile(policy) if compiled else policy
    obs = torch.from_numpy(rows.observations((*lead, *shape))).to(DEVICE)

    def run() -> dict[str, torch.Tensor]:
        state = {"lstm_h": None, "lstm_c": None} if net == "lstm" else None
        logits, values = forward(obs, state)
        return {"logits": logits, "values": values.reshape(lead)}

    def call() -> dict[str, torch.Tensor]:
        if not backward:
            with torch.no_grad():
                found = run()
        else:
            policy.zero_grad()
            loss = sum((x**2).mean() for x in run().values())
            loss.backward()
            grads = {f"d {name}": p.grad for name, p in policy.named_parameters()}
            found = {"loss": loss, **grads}
        _wait()
        return found

    return Case(call, _arrays)
