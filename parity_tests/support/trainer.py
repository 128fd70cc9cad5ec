"""The reference's trainer on a given buffer, in either precision, beside ours."""

import signal
import warnings
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pufferlib
import pufferlib.models
import torch

from support.bars import stub_env
from support.reference import torch_precision

handlers = {number: signal.getsignal(number) for number in (signal.SIGINT,)}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pufferlib.pufferl  # takes SIGINT and the excepthook, and filters warnings
for number, handler in handlers.items():
    signal.signal(number, handler)

# The reference's `[train]` defaults of PufferLib 3.0, sized for tests.
CONFIG: dict[str, Any] = {
    "torch_deterministic": True,
    "seed": 0,
    "device": "cpu",
    "cpu_offload": False,
    "compile": False,
    "compile_mode": "default",
    "compile_fullgraph": False,
    "optimizer": "adam",
    "precision": "float32",
    "learning_rate": 0.015,
    "anneal_lr": True,
    "adam_beta1": 0.95,
    "adam_beta2": 0.999,
    "adam_eps": 1e-12,
    "max_grad_norm": 1.5,
    "gamma": 0.995,
    "gae_lambda": 0.9,
    "update_epochs": 1,
    "clip_coef": 0.2,
    "vf_coef": 2.0,
    "vf_clip_coef": 0.2,
    "ent_coef": 0.001,
    "vtrace_rho_clip": 1.0,
    "vtrace_c_clip": 1.0,
    "prio_alpha": 0.8,
    "prio_beta0": 0.2,
    "bptt_horizon": 8,
    "batch_size": 128,
    "minibatch_size": 32,
    "max_minibatch_size": 32768,
    "total_timesteps": 128 * 120,
    "checkpoint_interval": 10**9,
    "data_dir": "experiments",
    "env": "stub",
}


def numpy_advantage(values, rewards, terminals, ratio, gamma, gae_lambda, rho_clip, c_clip):
    """The formula of `compute_puff_advantage`, step by step, in the precision of its arguments."""
    advantages = np.zeros_like(values)
    running = np.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 2, -1, -1):
        alive = 1.0 - terminals[:, t + 1]
        target = rewards[:, t + 1] + gamma * values[:, t + 1] * alive
        delta = np.minimum(ratio[:, t], rho_clip) * (target - values[:, t])
        running = delta + gamma * gae_lambda * np.minimum(ratio[:, t], c_clip) * running * alive
        advantages[:, t] = running
    return advantages


def torch_advantage(advantage):
    """A NumPy advantage in the place of `pufferlib.pufferl.compute_puff_advantage`."""

    def compute(values, rewards, terminals, ratio, advantages, *numbers):
        arrays = (x.detach().numpy() for x in (values, rewards, terminals, ratio))
        return torch.from_numpy(advantage(*arrays, *numbers))

    return compute


class _Quiet:
    def stop(self) -> None:
        pass


@contextmanager
def patched(**names: Any):
    """Module attributes of the reference's trainer replaced for a while."""
    old = {name: getattr(pufferlib.pufferl, name) for name in names}
    for name, value in names.items():
        setattr(pufferlib.pufferl, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(pufferlib.pufferl, name, value)


class Reference:
    """The real `PuffeRL`; without a vecenv, its buffer is filled and its `train()` run."""

    def __init__(
        self,
        policy: torch.nn.Module,
        spaces: Any,
        dtype: str,
        vecenv: Any = None,
        **config: Any,
    ):
        self.dtype = dtype
        self.config = CONFIG | {"use_rnn": hasattr(policy, "lstm")} | config
        segments = self.config["batch_size"] // self.config["bptt_horizon"]
        if vecenv is None:
            vecenv = SimpleNamespace(
                async_reset=lambda seed: None, num_agents=segments, agents_per_batch=segments
            )
            vars(vecenv).update(vars(stub_env(*spaces)))
        with self.running():
            self.trainer = pufferlib.pufferl.PuffeRL(
                self.config, vecenv, policy.to(getattr(torch, dtype))
            )
        self.trainer.print_dashboard = lambda *args, **kwargs: None

    @contextmanager
    def running(self):
        names = {
            "compute_puff_advantage": torch_advantage(numpy_advantage),
            "_C_AVAILABLE": True,
            "Utilization": _Quiet,
        }
        dashboard = pufferlib.pufferl.PuffeRL.print_dashboard
        pufferlib.pufferl.PuffeRL.print_dashboard = lambda *args, **kwargs: None
        try:
            with torch_precision(self.dtype), patched(**names), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # autocast to float32 is announced as disabled
                yield
        finally:
            pufferlib.pufferl.PuffeRL.print_dashboard = dashboard

    def train(self, buffer: dict[str, np.ndarray], indices: np.ndarray) -> dict[str, Any]:
        """One `train()` on this buffer and these minibatches."""
        trainer, queue = self.trainer, list(indices)
        for name, array in buffer.items():
            getattr(trainer, name)[:] = torch.from_numpy(array)
        priorities = []

        def multinomial(probs, count):
            priorities.append(probs.numpy().copy())
            return torch.from_numpy(queue.pop(0).astype(np.int64))

        real = torch.multinomial
        torch.multinomial = multinomial
        try:
            with self.running():
                trainer.train()
        finally:
            torch.multinomial = real
        assert not queue
        return {
            "losses": {name: float(value) for name, value in trainer.losses.items()},
            "ratio": trainer.ratio.numpy().copy(),
            "values": trainer.values.numpy().copy(),
            "priorities": priorities[-1],
            "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        }
