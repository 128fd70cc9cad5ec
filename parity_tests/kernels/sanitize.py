"""Every CPU kernel at odd shapes, where nothing can be read beyond the memory that is its own.

    python parity_tests/kernels/sanitize.py --shapes 300 --seed 0

For both precisions and vectors of 16, 32 and 64 bytes: the kernels are built with the address and
undefined behaviour sanitizers, and as they are for users. The latter run with a forbidden page
behind, then before each block of memory, and with each allocation failing once. sanitize.cc calls
the kernels; results are not looked at, but for calls that follow one without memory.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from puffer_jax.kernels.cpu import build, native

SANITIZE = (
    *("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "--param=asan-instrumentation-with-call-threshold=0",  # compiles in half the time
)
GUARDED = ("end", "begin", "starve")
LENGTHS = 16, 32, 64
HERE = Path(__file__).parent


def compile_with(*words):
    compiler = build.find_compiler().command
    command = [*compiler, "-std=c++20", "-pthread", "-isystem", jax.ffi.include_dir(), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)


def build_driver(folder, flags=()):
    driver = Path(folder) / f"driver{len(flags)}"
    if not driver.exists():
        compile_with("-O0", *flags, "-rdynamic", str(HERE / "sanitize.cc"), "-o", driver, "-ldl")
    return driver


def build_kernels(folder, dtype, *flags):
    library = Path(tempfile.mkdtemp(dir=folder)) / "kernels.so"
    source = str(Path(build.__file__).parents[1] / "cc" / "kernels.cc")
    number = f"-DNUMBER={build.TYPES[dtype]}"
    compile_with(*build._FLAGS, number, *flags, source, "-o", library)
    return library


def run(driver, library, dtype, mode, shapes, seed=0, kernels=native._NAMES):
    """Raise if a kernel leaves its memory, with the call in which it did."""
    command = [driver, library, build.TYPES[dtype], mode, str(shapes), str(seed), *kernels]
    # Leaks are looked for with ptrace, which containers may forbid.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or lines[-1:] != ["done"]:
        error = "\n".join((*lines[-2:], done.stderr[:4000]))
        raise AssertionError(f"{library} {dtype} {mode}: exit status {done.returncode}\n{error}")
    return len(lines) - 1


def check(folder, length, dtype, sanitized, shapes, seed):
    """Build the kernels one way, and run all of them; how many calls that were."""
    vectors = f"-DVECTOR_BYTES={length}"
    if sanitized:
        library = build_kernels(folder, dtype, vectors, "-O1", *SANITIZE)
        return run(build_driver(folder, SANITIZE), library, dtype, "plain", shapes, seed)
    library = build_kernels(folder, dtype, vectors)
    driver = build_driver(folder)
    # To fail each allocation in turn takes as many calls as there are allocations.
    few = -(-shapes // 10)
    return sum(
        run(driver, library, dtype, mode, few if mode == "starve" else shapes, seed)
        for mode in GUARDED
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=int, default=300, help="of each kernel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        build_driver(folder), build_driver(folder, SANITIZE)
        jobs = {}
        for length in args.lengths:
            for dtype in build.TYPES:
                for sanitized in (False, True):
                    given = length, dtype, sanitized
                    jobs[given] = pool.submit(check, folder, *given, args.shapes, args.seed)
        for (length, dtype, sanitized), job in jobs.items():
            how = "sanitizers" if sanitized else "forbidden pages, failing allocations"
            name = f"vectors of {length} bytes, {dtype}, {how}"
            try:
                print(f"{name}: {job.result()} calls, nothing found", flush=True)
            except (AssertionError, RuntimeError) as error:
                print(f"{name}: {error}", flush=True)
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
