"""What is said about a compiled program: of small programs, with a fault each."""

import jax
import jax.numpy as jnp
import pytest
from limits import Limit, faults

import puffer_jax.kernels
from puffer_jax.kernels import cpu
from puffer_jax.kernels.recurrence import recurrence

LARGE = jax.ShapeDtypeStruct((128, 64, 32), jnp.float32)
FEW = jax.ShapeDtypeStruct((256, 256), jnp.float32)
ROOM = Limit(99, (99,), 99)


def test_launches_are_counted_outside_and_inside_loops(compiler):
    def function(x):
        def step(x, _):
            return jnp.tanh(x @ x), None

        return jax.lax.scan(step, x, length=7)[0] @ x

    program = compiler(function, FEW)
    # A TPU's program does not say how often a loop runs.
    assert [loop.trips for loop in program.loops()] == [7 if compiler.platform == "cuda" else 0]
    # At least the product in the loop, and the one after it.
    assert len(program.loops()[0].launches) >= 1
    assert len(program.entry.launches) >= 1
    assert faults(program, ROOM) == []
    assert any("in loops" in fault for fault in faults(program, ROOM._replace(loops=())))
    assert any("outside" in fault for fault in faults(program, ROOM._replace(outside=0)))
    assert any("temporaries" in fault for fault in faults(program, ROOM._replace(mebibytes=-1)))


def test_loops_in_loops_and_branches(compiler):
    def function(x, flag):
        def inner(x, _):
            return jnp.tanh(x @ x), None

        def outer(x, _):
            return jax.lax.scan(inner, x, length=3)[0] + x.T @ x, None

        looped = jax.lax.scan(outer, x, length=5)[0]
        return jax.lax.cond(flag, lambda: looped @ x, lambda: looped)

    program = compiler(function, FEW, jax.ShapeDtypeStruct((), jnp.bool_))
    (outer,) = program.entry.loops
    (inner,) = outer.loops
    assert compiler.platform == "tpu" or (outer.trips, inner.trips) == (5, 3)
    assert len(program.entry.launches) >= 1, "the longer branch counts"


def test_transpositions_of_large_arrays_are_seen(compiler):
    def function(x, w):
        return jnp.tanh(x.transpose(2, 0, 1)), x * 2

    assert any("transpositions" in x for x in faults(compiler(function, LARGE, LARGE), ROOM))
    assert faults(compiler(lambda x: x * 2, LARGE), ROOM) == []


def test_a_forced_kernel_of_cpus_is_seen(compiler):
    platform = "gpu" if compiler.platform == "cuda" else "xla"
    with puffer_jax.kernels.replace("recurrence", platform, cpu.recurrence):
        found = faults(lambda: compiler(recurrence, FEW, FEW), ROOM)
    assert any("puffer_jax_recur" in fault for fault in found), found


def test_doubles_are_seen(compiler):
    with jax.enable_x64(True):
        wide = jax.ShapeDtypeStruct((256, 256), jnp.float64)
        assert any("f64" in x for x in faults(compiler(lambda x: x * 2, wide), ROOM))


def test_calls_of_the_host_are_seen(compiler):
    def function(x):
        return jax.pure_callback(lambda x: x, x, x * 2)

    found = faults(lambda: compiler(function, FEW), ROOM)
    # For a GPU that is not there JAX does not even compile it.
    assert any("host" in fault or "does not compile" in fault for fault in found), found


@pytest.mark.parametrize("count, spills", [(2, False), (16, True)])
def test_spilled_registers_are_seen(compiler, count, spills):
    if compiler.platform == "tpu":
        return  # it has none
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    def kernel(x, y):
        # Of each row a thread holds 32 numbers, and there are 255 registers.
        rows = [x[i, :] for i in range(count)]
        for i in range(count):
            y[i, :] = sum(row * (1 + (i * j) % 7) for j, row in enumerate(rows))

    shape = jax.ShapeDtypeStruct((count, 1024), jnp.float32)
    parameters = triton.CompilerParams(num_warps=1)
    call = pl.pallas_call(kernel, out_shape=shape, compiler_params=parameters)
    assert any("spill" in x for x in faults(lambda: compiler(call, shape), ROOM)) == spills
