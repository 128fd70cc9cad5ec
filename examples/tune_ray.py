"""Hyper-parameters of `PuffeRL` searched by Ray Tune: `python examples/tune_ray.py --trials 8`.

Every trial is a training in a process of its own, which tells Tune its return in the course of it;
ASHA ends the worse half of them early. `puffer-jax sweep` does without Ray.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import tyro
from flax import nnx
from ray import tune
from ray.tune.schedulers import ASHAScheduler

import puffer_jax

SPACE = {
    "learning_rate": tune.loguniform(3e-4, 3e-2),
    "ent_coef": tune.loguniform(1e-3, 1e-1),
    "gae_lambda": tune.uniform(0.8, 0.99),
    "update_epochs": tune.choice([1, 2, 4]),
}


@dataclass(frozen=True)
class Args:
    trials: int = 8
    at_once: int = 2
    """Of the trials; each has one core of the cluster."""
    steps: int = 60_000
    num_envs: int = 32
    seed: int = 0
    address: str = "local"
    """Of a Ray cluster; "auto": the one that runs on this machine."""
    data_dir: Path = Path("runs/tune")


def train(values: dict, args: Args) -> None:
    """A trial: trains with the values, and reports the mean return of the last episodes."""
    env = puffer_jax.environments.make("cartpole")
    config = puffer_jax.PuffeRLConfig.recommended(
        num_envs=args.num_envs,
        bptt_horizon=32,
        total_timesteps=args.steps,
        seed=args.seed,
        data_dir=tune.get_context().get_trial_dir(),
        **values,
    )
    policy = puffer_jax.Default(env, 64, rngs=nnx.Rngs(args.seed))
    trainer = puffer_jax.PuffeRL(config, env, policy)
    returns: list[float] = []
    while not trainer.done:
        returns = (returns + list(trainer.evaluate()["episode_return"]))[-100:]
        trainer.train()
        if returns:
            tune.report({"score": float(np.mean(returns)), "steps": trainer.global_step})
    trainer.close()


def main(args: Args) -> None:
    if not ray.is_initialized():
        ray.init(args.address, log_to_driver=False)
    trial = tune.with_resources(tune.with_parameters(train, args=args), {"cpu": 1})
    asha = ASHAScheduler(time_attr="steps", max_t=args.steps, grace_period=args.steps // 4)
    tuner = tune.Tuner(
        trial,
        param_space=SPACE,
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=args.trials,
            scheduler=asha,
            search_alg=tune.search.BasicVariantGenerator(
                max_concurrent=args.at_once, random_state=args.seed
            ),
        ),
        run_config=tune.RunConfig(storage_path=str(args.data_dir.absolute()), verbose=0),
    )
    found = tuner.fit()
    for error in found.errors:
        raise error
    for result in sorted(found, key=lambda result: -result.metrics["score"]):
        values = "  ".join(f"{name} {value:.3g}" for name, value in result.config.items())
        score, steps = result.metrics["score"], result.metrics["steps"]
        print(f"return {score:6.1f} after {steps:6d} steps  {values}")
    best = found.get_best_result()
    print(f"best of {len(found)}: return {best.metrics['score']:.1f}, model in {best.path}")


if __name__ == "__main__":
    main(tyro.cli(Args))
