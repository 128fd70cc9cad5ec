"""The most that each compiled program may launch and take: one table, what was reached."""

from collections.abc import Callable
from typing import NamedTuple

from compiled import Program


class Limit(NamedTuple):
    """What a program may do at most.

    Attributes:
        outside: launches outside loops.
        loops: launches in the body of each loop, the most first.
        mebibytes: of temporary memory.
        transpositions: launches that only transpose a large array.
    """

    outside: int
    loops: tuple[int, ...]
    mebibytes: float
    transpositions: int = 0


# Each kind of program and each precision once or twice; `--every` compiles all with all. Transposed
# are filters, observations as they are scaled, and the last features, whose order is torch's; in an
# epoch also what a rollout has stored step by step, and on TPUs the gates, by the compiler.
LIMITS: dict[tuple[str, str], dict[str, Limit]] = {
    ("act-default", "float32"): {"cuda": Limit(8, (), 3), "tpu": Limit(15, (), 1)},
    ("act-lstm", "tf32"): {"tpu": Limit(20, (), 1)},
    ("act-lstm", "float32"): {"cuda": Limit(13, (), 17)},
    ("act-nature", "bfloat16"): {"cuda": Limit(19, (), 21, 4)},
    ("gradient-default", "float32"): {"cuda": Limit(23, (), 98)},
    ("policy-lstm", "float32"): {"cuda": Limit(24, (), 23), "tpu": Limit(20, (), 1, 6)},
    ("gradient-lstm", "float32"): {"cuda": Limit(38, (), 323)},
    ("gradient-lstm", "bfloat16"): {"tpu": Limit(47, (), 231, 14)},
    ("act-mingru", "float32"): {"cuda": Limit(21, (), 13)},
    ("gradient-mingru", "tf32"): {"cuda": Limit(56, (), 834, 4)},
    ("gradient-nature", "tf32"): {"cuda": Limit(44, (), 74, 9)},
    ("population-default", "tf32"): {"cuda": Limit(38, (70, 52, 16), 111, 3)},
    ("epoch-default", "tf32"): {"cuda": Limit(93, (56, 20), 111, 5)},
    ("epoch-lstm", "tf32"): {"cuda": Limit(121, (73, 25), 337, 5)},
}


def faults(program: Program | Callable[[], Program], limit: Limit) -> list[str]:
    """What is wrong with a program, or with compiling it, in words."""
    if not isinstance(program, Program):
        try:
            program = program()
        except Exception as error:
            return [f"it does not compile: {type(error).__name__}: {str(error)[:2000]}"]
    found = []
    outside = len(program.entry.launches)
    loops = sorted((len(loop.launches) for loop in program.loops()), reverse=True)
    if outside > limit.outside:
        found.append(f"{outside} launches outside loops, more than {limit.outside}")
    if len(loops) > len(limit.loops) or any(
        count > most for count, most in zip(loops, limit.loops, strict=False)
    ):
        found.append(f"{loops} launches in loops, more than {list(limit.loops)}")
    if (size := program.temporaries / 2**20) > limit.mebibytes:
        found.append(f"{size:.1f} MiB of temporaries, more than {limit.mebibytes}")
    if calls := [name for name in program.calls() if name.startswith("puffer_jax_")]:
        found.append(f"kernels of CPUs are called: {', '.join(calls)}")
    if host := program.host():
        found.append(f"it talks to the host: {', '.join(sorted(set(host)))}")
    if wide := program.wide():
        found.append(f"numbers of 64 bits: {', '.join(sorted(wide))}")
    if len(moved := program.transpositions()) > limit.transpositions:
        found.append(f"{len(moved)} transpositions, more than {limit.transpositions}: {moved}")
    return found
