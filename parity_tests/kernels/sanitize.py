"""Every CPU kernel at odd shapes, where nothing can be read beyond the memory that is its own.

    python parity_tests/kernels/sanitize.py --shapes 300 --seed 0
    python parity_tests/kernels/sanitize.py --compiler aarch64-linux-gnu-g++ \\
        --runner "qemu-aarch64 -L /usr/aarch64-linux-gnu" --shapes 30

For both precisions and vectors of 16, 32 and 64 bytes: the kernels are built with the address and
undefined behaviour sanitizers, and as they are for users. The latter run with a forbidden page
behind, then before each block of memory, and with each allocation failing once. sanitize.cc calls
the kernels; results are not looked at, but for calls that follow one without memory.

With another processor's compiler, and what runs its programs here, the results are looked at: they
are held to those of this machine's own build with vectors of the same length.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from puffer_jax.kernels.cpu import build, native

SANITIZE = (
    *("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "--param=asan-instrumentation-with-call-threshold=0",  # compiles in half the time
)
GUARDED = ("end", "begin", "starve")
LENGTHS = 16, 32, 64
HERE = Path(__file__).parent


# XLA's numbers of the types that results have.
TYPES = {1: np.bool_, 2: np.int8, 4: np.int32, 8: np.uint32, 11: np.float32, 12: np.float64}
# Largest error relative to the largest magnitude, as of gradients in the parity tests.
CLOSE = {np.float32: 2e-5, np.float64: 1e-13}


def compile_with(*words, compiler=None):
    command = [
        *(compiler or build.find_compiler()).command,
        "-std=c++20",
        "-pthread",
        "-isystem",
        jax.ffi.include_dir(),
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)


def build_driver(folder, flags=(), compiler=None):
    driver = Path(folder) / f"driver{len(flags)}"
    if not driver.exists():
        words = "-O0", *flags, "-rdynamic", str(HERE / "sanitize.cc"), "-o", driver, "-ldl"
        compile_with(*words, compiler=compiler)
    return driver


def build_kernels(folder, dtype, *flags, compiler=None):
    library = Path(tempfile.mkdtemp(dir=folder)) / "kernels.so"
    source = str(Path(build.__file__).parents[1] / "cc" / "kernels.cc")
    number = f"-DNUMBER={build.TYPES[dtype]}"
    tuned, _ = build.tuning(compiler or build.find_compiler())
    words = *build._FLAGS, *tuned, number, *flags, source, "-o", library
    compile_with(*words, compiler=compiler)
    return library


def run(driver, library, dtype, mode, shapes, seed=0, kernels=native._NAMES, runner=()):
    """Raise if a kernel leaves its memory, with the call in which it did."""
    command = [*runner, driver, library, build.TYPES[dtype], mode, str(shapes), str(seed), *kernels]
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


def results(file):
    """The arrays that a driver wrote."""
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):
        kind, count = np.frombuffer(data, np.int64, 2, at)
        found.append(np.frombuffer(data, TYPES[int(kind)], count, at + 16))
        at += 16 + found[-1].nbytes
    return found


def compare(folder, dtype, compiler, runner, shapes, seed):
    """Hold another processor's results to this one's; how many arrays, and the largest error."""
    files = []
    for name, who, how in (("here", None, ()), ("there", compiler, runner)):
        place = Path(folder) / f"{name}-{dtype}"
        place.mkdir()
        library = build_kernels(place, dtype, "-DVECTOR_BYTES=16", compiler=who)
        driver = build_driver(place, compiler=who)
        files.append(place / "results")
        run(driver, library, dtype, f"write={files[-1]}", shapes, seed, runner=how)
    here, there = map(results, files)
    assert [(x.dtype, x.size) for x in here] == [(x.dtype, x.size) for x in there]
    largest = 0.0
    for i, (ours, theirs) in enumerate(zip(here, there, strict=True)):
        if ours.dtype.type not in CLOSE:
            # Draws, and which pixel was the largest: rounding may tip one in many.
            assert (ours != theirs).mean() < 0.01 if ours.size > 100 else True, (i, ours, theirs)
        elif ours.size:
            finite = np.isfinite(ours)
            assert (finite == np.isfinite(theirs)).all(), i
            ours, theirs = ours[finite], theirs[finite]
            error = np.abs(ours - theirs).max(initial=0) / np.abs(ours).max(initial=1e-30)
            assert error <= CLOSE[ours.dtype.type], (i, error)
            largest = max(largest, float(error))
    return len(here), largest


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=int, default=300, help="of each kernel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--compiler", help="another processor's")
    parser.add_argument("--runner", type=shlex.split, default=(), help="what runs its programs")
    args = parser.parse_args()
    if args.compiler:
        compiler = build.Compiler((args.compiler,), ())
        with tempfile.TemporaryDirectory() as folder:
            for dtype in build.TYPES:
                given = compiler, args.runner, args.shapes, args.seed
                count, largest = compare(folder, dtype, *given)
                print(f"{dtype}: {count} results, largest error {largest:.1e}", flush=True)
        return 0
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
