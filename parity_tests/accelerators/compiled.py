"""A compiled program, read from its text: what it launches, in which loops, and what it calls."""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# What is one kernel or one library call on a GPU. A TPU has no launches: what is counted there is
# what its core does one after another.
LAUNCHES = (
    *("convolution", "copy", "custom-call", "dot", "fusion", "gather", "reduce", "reduce-window"),
    *("rng-bit-generator", "scatter", "select-and-scatter", "sort", "topk"),
)
# Custom calls that only name memory.
_NO_LAUNCH = ("AllocateBuffer", "Sharding", "MoveToDevice")
# What devices exchange; where it is asynchronous, its beginning counts.
COLLECTIVES = re.compile(
    r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)"
    r"(-start)?"
)
_HOST = ("infeed", "outfeed", "send", "recv", "send-done", "recv-done")
_HOST_CALL = re.compile(r"callback|MoveToHost|PinToHost|SendToHost|RecvFromHost")
_CALLEE = r"{}=%?([\w.\-]+)"
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_TYPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](?:\{([\d,]*))?")
# What a transposition moves at least for it to matter, in elements.
_LARGE = 2**14


class Array(NamedTuple):
    """An array's type in a program: dtype, shape, and axes from the fastest to the slowest."""

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]

    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str

    def arrays(self) -> list[Array]:
        return [
            Array(dtype, _numbers(shape), _numbers(order))
            for dtype, shape, order in _TYPE.findall(self.type)
        ]

    def callee(self, kind: str) -> str | None:
        found = re.search(_CALLEE.format(kind), self.rest)
        return found[1] if found else None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(",") if x)


@dataclass
class Loop:
    """The body of a loop: its launches, the loops in it, and how often it runs (0: unknown).

    Of a collective the bytes of its result count: of an all-reduce what each device gives.
    """

    trips: int = 1
    launches: list[str] = field(default_factory=list)
    collectives: list[tuple[str, int]] = field(default_factory=list)
    loops: list["Loop"] = field(default_factory=list)

    def __str__(self) -> str:
        inside = f" [{', '.join(map(str, self.loops))}]" if self.loops else ""
        return f"{len(self.launches)} x {self.trips or '?'}{inside}"


class Program:
    """A compiled program.

    Args:
        compiled: what `jax.jit(f).lower(...).compile()` returns.

    Attributes:
        text: the optimised program.
        entry: what is launched, as one loop of one trip.
        temporaries: bytes of temporary memory.
    """

    def __init__(self, compiled: Any):
        self.text: str = compiled.as_text()
        memory = compiled.memory_analysis()
        self.temporaries = int(getattr(memory, "temp_size_in_bytes", 0))
        self._bodies, entry = _bodies(self.text)
        self.entry = self._loop(entry, 1)

    def __str__(self) -> str:
        entry, loops = self.entry, ", ".join(map(str, self.entry.loops))
        size = self.temporaries / 2**20
        return f"launches {len(entry.launches)}, loops [{loops}], temporaries {size:.1f} MiB"

    def loops(self) -> list[Loop]:
        """All loops, those within others after these."""
        found, left = [], list(self.entry.loops)
        while left:
            found.append(left.pop(0))
            left += found[-1].loops
        return found

    def calls(self) -> Counter[str]:
        """The custom calls by name."""
        return Counter(re.findall(r'custom_call_target="([^"]+)"', self.text))

    def wide(self) -> set[str]:
        """Which types of 64 bits there are: floats anywhere, integers in arrays in memory.

        JAX's threefry counts with integers of 64 bits in registers, XLA with scalars.
        """
        everywhere = {array.dtype for i in self._instructions() for array in i.arrays()}
        launched = {i.name: i for i in self._instructions()}
        written = {
            array.dtype
            for loop in (self.entry, *self.loops())
            for name in loop.launches
            for array in launched[name].arrays()
            if array.shape
        }
        return everywhere & {"f64", "c128"} | written & {"s64", "u64"}

    def host(self) -> list[str]:
        """Instructions that exchange data with the host, or call it."""
        names = [i.opcode for i in self._instructions() if i.opcode in _HOST]
        return names + [name for name in self.calls() if _HOST_CALL.search(name)]

    def transpositions(self) -> list[str]:
        """Launches that only bring a large array, of any dtype, into another order of its axes."""
        named = {i.name: i for i in self._instructions()}
        found = []
        for i in named.values():
            if not any(math.prod(array.shape) >= _LARGE for array in i.arrays()):
                continue
            source = named.get(next(iter(re.findall(r"%([\w.\-]+)", i.rest)), ""))
            if i.opcode == "copy" and source and source.arrays()[:1] != i.arrays()[:1]:
                found.append(i.name)
            elif i.opcode == "fusion" and "transpose" in i.name:
                found.append(i.name)
        return found

    def _instructions(self) -> list[Instruction]:
        return [i for body in self._bodies.values() for i in body]

    def _loop(self, name: str, trips: int) -> Loop:
        loop = Loop(trips)
        for i in self._bodies.get(name, []):
            if i.opcode == "while":
                count = re.search(r'known_trip_count"?[:=]\s*\{"?n"?[:=]"?(\d+)', i.rest)
                body = i.callee("body") or ""
                loop.loops.append(self._loop(body, int(count[1]) if count else 0))
            elif i.opcode in ("call", "async-start", "conditional"):
                # Of a condition's branches the longest.
                inner = max((self._loop(x, 1) for x in _callees(i)), key=_cost, default=Loop())
                loop.launches += inner.launches
                loop.collectives += inner.collectives
                loop.loops += inner.loops
            elif found := COLLECTIVES.fullmatch(i.opcode):
                sizes = [array.bytes() for array in i.arrays()]
                # A beginning has what is given beside the result, but for an all-reduce's.
                both = found[2] and found[1] != "all-reduce"
                loop.collectives.append((found[1], max(sizes) if both else sum(sizes)))
            elif i.opcode in LAUNCHES and not any(f'"{x}"' in i.rest for x in _NO_LAUNCH):
                loop.launches.append(i.name)
        return loop


def _cost(loop: Loop) -> int:
    return len(loop.launches) + sum((x.trips or 1) * _cost(x) for x in loop.loops)


def _callees(i: Instruction) -> list[str]:
    branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
    if branches:
        return re.findall(r"%?([\w.\-]+)", branches[1])
    kinds = ("to_apply", "calls", "true_computation", "false_computation")
    return [name for kind in kinds if (name := i.callee(kind))]


def _bodies(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations by name, and the name of the first."""
    bodies: dict[str, list[Instruction]] = {}
    name = entry = ""
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name and (found := _INSTRUCTION.match(line)):
            bodies[name].append(Instruction(*found.groups()))
    return bodies, entry
