"""Does a policy keep the rules that the trainer, `LSTMWrapper` and the weight exchange rely on?

    print(check_policy(policy, env))

A rule is a function, marked with `_rule`, that raises `_Broken` with what is wrong.
"""

import textwrap
from dataclasses import dataclass
from typing import Any, NamedTuple

from puffer_jax.base.spaces import Env
from puffer_jax.policies.check.rules import _RULES
from puffer_jax.policies.check.run import _describe, _Run


class Check(NamedTuple):
    """One rule: its name, "ok", "FAILED", "warning" or "not run", and why."""

    name: str
    result: str
    reason: str


@dataclass(frozen=True)
class PolicyReport:
    """What `check_policy` found; `str(report)` is for reading.

    Attributes:
        title: the policy and its action space.
        checks: every rule that applies to this kind of policy.

    Example:
        >>> import puffer_jax
        >>> from flax import nnx
        >>> env = puffer_jax.environments.make("cartpole")
        >>> report = puffer_jax.check_policy(puffer_jax.Default(env, rngs=nnx.Rngs(0)), env)
        >>> [check.name for check in report.checks if check.result == "FAILED"]
        []
    """

    title: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed; warnings do not count."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(check.name for check in self.checks if check.result == "FAILED")

    def __str__(self) -> str:
        verdict = f"{len(self.failures)} FAILED" if self.failures else "ok"
        width = max(len(check.name) for check in self.checks)
        lines = [
            textwrap.fill(
                check.reason,
                100,
                initial_indent=f"  {check.name:{width}}  {check.result:8} ",
                subsequent_indent=" " * (width + 13),
            )
            for check in self.checks
        ]
        return "\n".join([f"{self.title}: {verdict}", *lines])


def check_policy(
    policy: Any,
    env: Env,
    *,
    raise_on_failure: bool = False,
    batch_size: int = 8,
    seed: int = 0,
) -> PolicyReport:
    """Run a policy on zero, extreme and random observations and report which rules it keeps.

    A policy is recurrent if it has `initial_state`. An exception inside the policy fails the
    check it happened in; a check that needs one that failed is not run. The policy is run, not
    changed, unless its own methods change it.

    Args:
        policy: an `nnx.Module`.
        env: gives the spaces, with their bounds, see `puffer_jax.spaces.env_spec`; bounds beyond
            1e6 count as none. An emulated Dict does not tell its bounds: integers of 32 and 64
            bits, the usual Discrete, are then 0 or 1, others take the range of their dtype.
        raise_on_failure: whether a failure is an error, for tests.
        batch_size: observations in a batch, at least 2; several batches are run.
        seed: of the random observations.

    Returns:
        The report.

    Raises:
        ValueError: a check failed and `raise_on_failure` is set, with the report as its text; a
            `batch_size` below 2; an action space no policy supports.
        TypeError: an attribute of `env` is not a space.
        AttributeError: `env` has no spaces.

    Example:
        >>> import puffer_jax
        >>> from flax import nnx
        >>> env = puffer_jax.environments.make("cartpole")
        >>> report = puffer_jax.check_policy(puffer_jax.Default(env, rngs=nnx.Rngs(0)), env)
        >>> report.ok
        True
    """
    if batch_size < 2:
        raise ValueError(f"batch_size is {batch_size}; checking a batch takes at least 2 rows")
    run = _Run(policy, env, batch_size, seed)
    results: dict[str, Check] = {}
    for rule in _RULES:
        if rule.only not in ("", "recurrent" if run.recurrent else "feed-forward"):
            continue
        broken = [
            name
            for name in rule.needs
            if name in results and results[name].result in ("FAILED", "not run")
        ]
        if broken:
            results[rule.name] = Check(rule.name, "not run", f"it needs: {', '.join(broken)}")
            continue
        try:
            rule.function(run)
            problem = ""
        except Exception as error:
            problem = _describe(error)
        bad = "warning" if rule.name == "weights" else "FAILED"
        results[rule.name] = Check(rule.name, bad if problem else "ok", problem or rule.ok)
    title = f"{type(policy).__name__} acting in {run.action}"
    report = PolicyReport(title, tuple(results.values()))
    if raise_on_failure and not report.ok:
        raise ValueError(str(report))
    return report
