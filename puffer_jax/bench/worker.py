"""A process for each side, of which one works at a time: both ends of its pipe."""

import gc
import importlib
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from puffer_jax.bench.rows import Arguments, Arrays, Case

Side = Literal["jax", "torch"]
# Seconds that a measurement lasts at least; shorter calls are repeated within it.
_SHORTEST = 0.02
# Torch's threads spin for a while after a call and would slow down whatever comes next.
_PAUSE = 0.01


class Failed(RuntimeError):
    """What a contestant raised, in one line."""


class Worker:
    """A fresh process of one side; calls of its methods run there.

    Args:
        side: "jax" or "torch".
        threads: how many threads it may use; for JAX, how many cores.
        device: "cpu" or "gpu".
        precision: precision of matrix products: "float32", or "tf32" on a GPU.
        more: other variables of its environment.
    """

    def __init__(
        self,
        side: Side,
        threads: int,
        device: str,
        precision: str,
        more: dict[str, str] | None = None,
    ):
        self.side = side
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": str(threads),
            "JAX_PLATFORMS": "cpu" if device == "cpu" else "cuda",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            **(more or {}),
        }
        code = "from puffer_jax.bench.worker import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        try:
            self.about: dict[str, object] = self.ask("start", side, threads, device, precision)
        except Failed:
            self.close()
            raise

    def ask(self, method: str, *arguments: object) -> Any:
        """Call a method of `_Server` there.

        Raises:
            Failed: it raised, or its process ended.
        """
        assert self._process.stdin and self._process.stdout
        try:
            pickle.dump((method, arguments), self._process.stdin)
            self._process.stdin.flush()
            good, answer = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            code = self._process.wait()
            raise Failed(f"its process ended with exit code {code}") from error
        if not good:
            raise Failed(answer)
        return answer

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            try:
                stream.close() if stream else None
            except OSError:
                pass


class _Server:
    """The child's end."""

    def __init__(self) -> None:
        self.cases: dict[str, tuple[Case, int]] = {}
        self.contestants: Any = None

    def start(self, side: Side, threads: int, device: str, precision: str) -> dict[str, object]:
        """Load a side's framework; returns the versions, and what runs where."""
        if device == "cpu" and hasattr(os, "sched_setaffinity"):
            # JAX takes as many threads as there are cores.
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        self.contestants = importlib.import_module(f"puffer_jax.bench.{side}_side")
        return self.contestants.start(threads, device, precision)

    def open(self, name: str, family: str, arguments: Arguments) -> tuple[float, Arrays | None]:
        """Build a case and call it once; returns the seconds the call took, and the outputs."""
        case = getattr(self.contestants, family)(**arguments)
        began = time.perf_counter()
        result = case.call()
        first = time.perf_counter() - began
        outputs = case.outputs(result) if case.outputs else None
        repeats = 1
        if not case.rate:
            del result
            began = time.perf_counter()
            case.call()
            repeats = max(1, round(_SHORTEST / max(time.perf_counter() - began, 1e-7)))
        self.cases[name] = case, repeats
        return first, outputs

    def sample(self, name: str) -> float:
        """Seconds per unit of a case's work, in a loop that does nothing else."""
        case, repeats = self.cases[name]
        time.sleep(_PAUSE)
        if case.rate:
            return 1 / case.call()
        # Once unmeasured: caches and recently freed memory still belong to another case.
        case.call()
        began = time.perf_counter()
        for _ in range(repeats):
            case.call()
        return (time.perf_counter() - began) / (repeats * case.units)

    def memory(self, name: str) -> int:
        """Peak memory in bytes of the whole process over a few calls."""
        case, _ = self.cases[name]
        on_device = self.contestants.device_memory()
        if on_device is None:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        for _ in range(3):
            case.call()
        if on_device is not None:
            return self.contestants.device_memory()
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])

    def close(self) -> None:
        """Forget all cases."""
        self.cases.clear()
        self.contestants.forget()
        gc.collect()


def serve() -> None:
    """Answer requests until the pipe closes."""
    requests = sys.stdin.buffer
    # Nothing that is printed may come between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    server = _Server()
    while True:
        try:
            method, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = True, getattr(server, method)(*arguments)
        except Exception as error:
            words = " ".join(str(error).split())
            answer = False, f"{type(error).__name__}: {words[:300]}"
        pickle.dump(answer, answers)
        answers.flush()


def difference(here: Arrays, there: Arrays) -> tuple[float, str]:
    """The largest error relative to the magnitude of its array, and that array's name.

    Only arrays that both have are compared; with none in common, the error is infinite.
    """
    worst = -1.0, ""
    for name in here.keys() & there.keys():
        a, b = here[name].astype(np.float64), there[name].astype(np.float64)
        if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
            return np.inf, name
        scale = max(np.abs(b).max(initial=0.0), 1e-30)
        worst = max(worst, (float(np.abs(a - b).max(initial=0.0) / scale), name))
    return worst if worst[0] >= 0 else (np.inf, "nothing in common")
