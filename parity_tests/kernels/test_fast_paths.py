"""What is faster than the plain formula is the same function: values and gradients in float64."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import gymnasium.spaces as gs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sanitize
import scipy.special
from flax import nnx
from support.bars import stub_env

import puffer_jax
from puffer_jax.kernels import convolution, lstm, perceptron, pooling, recurrence, use
from puffer_jax.kernels.cpu import build, native
from puffer_jax.kernels.windows import Windows
from puffer_jax.nn import linear, random
from puffer_jax.nn.images import Conv2d, ImageLayers

LAYOUT = ("NHWC", "HWIO", "NHWC")
THREEFRY = jax.random.key(0, impl="threefry2x32")  # `quick` makes another the default


@pytest.fixture(autouse=True)
def _double(quick):
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["cpu", "xla"])
def kernels(request):
    """With the CPU kernels and as on machines that cannot build them."""
    if request.param == "cpu":
        message = "the tests need a C++ compiler, as the reference does"
        assert native.is_available("float64"), message
    with use(request.param):
        yield request.param


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def agree(ours, plain, bar=1e-13):
    ours, plain = jax.device_get((ours, plain))  # NumPy compiles nothing
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        assert np.abs(other).max() > 0
        assert np.abs(mine - other).max() / np.abs(other).max() < bar


def both(function, *arrays, seed=9):
    """Results and gradients for all arrays of numbers."""
    given = [a for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]
    fixed = arrays[: len(arrays) - len(given)]

    @jax.jit  # one program compiles sooner than its operations one by one
    def run(*given):
        out, backward = jax.vjp(lambda *given: function(*fixed, *given), *given)
        return out, backward(draw(seed, *out.shape).astype(out.dtype))

    return run(*given)


@pytest.mark.parametrize(
    "image, window, channels, windows",
    [
        ((5, 20, 20), (8, 8), (4, 6), Windows((4, 4))),  # NatureCNN's first layer
        ((3, 9, 10), (4, 4), (3, 5), Windows((2, 2))),  # a row is left over
        ((2, 7, 8), (3, 3), (4, 4), Windows(pads=(1, 1))),
        ((2, 7, 8), (3, 3), (16, 33), Windows(pads=(1, 1), rectify=True)),  # the ResNet's
        ((2, 6, 5), (3, 2), (3, 70), Windows(pads=(4, 3))),  # borders wider than the window
        ((2, 8, 8), (3, 3), (2, 3), Windows((2, 1), (1, 0), rectify=True)),
        ((1, 4, 5), (2, 1), (2, 3), Windows((3, 4))),  # the stride passes over pixels
        ((2, 4, 6), (4, 6), (20, 2), Windows()),  # one window
    ],
)
def test_convolution(kernels, image, window, channels, windows):
    x, kernel, bias = (
        draw(0, *image, channels[0]),
        draw(1, *window, *channels),
        draw(2, channels[1]),
    )

    def convolve(x, kernel, bias):
        x = jax.nn.relu(x) if windows.rectify else x
        pads = [(pad, pad) for pad in windows.pads]
        out = jax.lax.conv_general_dilated(
            x, kernel, windows.strides, pads, dimension_numbers=LAYOUT
        )
        return out + bias

    @jax.jit
    def ours(*arrays):
        x, *weights = arrays
        first_in = windows._replace(channels_first=True)
        first_out = windows._replace(out_channels_first=True)
        return [
            both(partial(convolution.convolution, windows=windows), *arrays),
            both(partial(convolution.convolution, windows=first_out), *arrays),
            convolution.convolution(x.transpose(0, 3, 1, 2), *weights, first_in),
        ]

    @jax.jit
    def plain(*arrays):
        turned = both(lambda *a: convolve(*a).transpose(0, 3, 1, 2), *arrays)
        return [both(convolve, *arrays), turned, convolve(*arrays)]

    agree(ours(x, kernel, bias), plain(x, kernel, bias))


def test_windows_that_see_only_the_border(kernels):
    x, kernel, bias = draw(0, 2, 3, 2, 4), draw(1, 2, 1, 4, 3), draw(2, 3)
    out, gradients = both(
        partial(convolution.convolution, windows=Windows((20, 20), (5, 7))), x, kernel, bias
    )
    np.testing.assert_array_equal(out, jnp.broadcast_to(bias, (2, 1, 1, 3)))
    assert not gradients[0].any() and not gradients[1].any() and gradients[2].all()


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("channels, pad", [(1, 0), (2, 1), (3, 1), (4, 0)])
def test_convolution_of_bytes(kernels, channels, pad, channels_first):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 9, 8, channels), np.uint8))
    kernel, bias = draw(1, 3, 3, channels, 5), draw(2, 5)
    windows = Windows((2, 2), (pad, pad))
    given = x.transpose(0, 3, 1, 2) if channels_first else x
    ours = both(
        partial(convolution.convolution, windows=windows._replace(channels_first=channels_first)),
        given,
        kernel,
        bias,
    )
    numbers = x.astype(jnp.float64) / 255
    agree(ours, both(lambda *w: convolution.convolution(numbers, *w, windows), kernel, bias))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("channels, width", [(1, 256), (3, 90), (4, 84), (4, 30)])
def test_bytes_are_divided_exactly(channels, width, channels_first, dtype):
    count = 2 * channels * 3 * width
    x = np.random.default_rng(0).permutation(np.arange(count) % 256).astype(np.uint8)
    x = x.reshape(2, channels, 3, width)
    given = x if channels_first else x.transpose(0, 2, 3, 1)
    one = jnp.eye(channels, dtype=dtype)[None, None]
    windows = Windows(channels_first=channels_first, out_channels_first=True)
    ours = convolution.convolution(jnp.asarray(given), one, jnp.zeros(channels, dtype), windows)
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours, x / np.asarray(255, dtype))


def test_convolution_over_parameters_and_in_a_loop(kernels):
    x, kernels, bias = draw(0, 2, 6, 6, 2), draw(1, 3, 3, 3, 2, 4), draw(2, 4)

    def ours(kernel):
        return convolution.convolution(x, kernel, bias, Windows())

    def plain(kernel):
        out = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=LAYOUT)
        return out + bias

    def total(function):
        def descend(kernel, _):
            return kernel - 1e-3 * jax.grad(lambda k: jnp.sum(function(k) ** 2))(kernel), None

        return jax.vmap(lambda k: jax.lax.scan(descend, k, None, length=3)[0])(kernels)

    agree(jax.jit(lambda: total(ours))(), total(plain))


def test_half_precision_and_empty_batches(kernels):
    kernel, bias = draw(1, 3, 3, 2, 4), draw(2, 4)
    x = draw(0, 2, 6, 6, 2)
    half = [a.astype(jnp.bfloat16) for a in (x, kernel, bias)]
    out = convolution.convolution(*half, Windows())
    assert out.dtype == jnp.bfloat16
    exact = convolution.convolution(*(a.astype(jnp.float64) for a in half), Windows())
    assert float(jnp.abs(out - exact).max() / jnp.abs(exact).max()) < 1e-2
    assert convolution.convolution(x[:0], kernel, bias, Windows()).shape == (0, 4, 4, 4)
    # The window does not fit: no pixels, as XLA has it.
    assert convolution.convolution(x[:, :2], kernel, bias, Windows()).shape == (2, 0, 4, 4)


@pytest.mark.parametrize("height, width, channels", [(8, 8, 4), (7, 10, 16), (1, 3, 19), (2, 2, 8)])
def test_max_pool(kernels, height, width, channels):
    # Few different numbers: of equal ones in a window the first takes the gradient.
    x = jnp.round(2 * draw(0, 3, height, width, channels))
    plain = partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    # Up to four gradients are added, in another order.
    agree(both(pooling.max_pool, x), both(plain, x), bar=1e-15)


@pytest.mark.parametrize(
    "batch, inputs, hidden, outputs",
    [
        (3, 2, 5, [2, 1]),
        (201, 9, 33, []),
        (1, 70, 128, [1]),
        (60, 3, 150, [7, 1]),  # eight outputs are the last few
        (60, 3, 150, [8, 1]),
    ],
)
def test_perceptron(kernels, batch, inputs, hidden, outputs):
    def layer(seed, inputs, outputs):
        def normal(key, shape, dtype):  # of a size that keeps the activations near 1
            return draw(seed, *shape) / np.sqrt(inputs)

        options = {"param_dtype": jnp.float64, "kernel_init": normal, "rngs": nnx.Rngs(seed)}
        layer = nnx.Linear(inputs, outputs, **options)
        layer.bias[...] = draw(seed, outputs)
        return layer

    first = layer(1, inputs, hidden)
    heads = [layer(2 + i, hidden, size) for i, size in enumerate(outputs)]
    arrays = [a for layer in (first, *heads) for a in (layer.kernel[...], layer.bias[...])]

    def run(x, *arrays):
        for i, layer in enumerate((first, *heads)):
            layer = nnx.clone(layer)
            layer.kernel[...], layer.bias[...] = arrays[2 * i : 2 * i + 2]
            yield layer

    def ours(x, *arrays):
        first, *heads = run(x, *arrays)
        results = linear.perceptron(x, nnx.Sequential(first, perceptron.gelu), heads)
        assert [r.shape[1] for r in results] == (outputs or [hidden])
        return jnp.concatenate(results, axis=-1)

    def plain(x, *arrays):
        first, *heads = run(x, *arrays)
        activations = jax.nn.gelu(first(x), approximate=False)
        return jnp.concatenate([h(activations) for h in heads] or [activations], axis=-1)

    x = draw(0, batch, inputs)
    agree(both(ours, x, *arrays), both(plain, x, *arrays))


@pytest.mark.parametrize("outputs", [[1], [2, 1], [7, 1], [5, 3, 30]])
@pytest.mark.parametrize("batch, inputs", [(1, 3), (97, 40), (203, 1300)])
def test_linear(kernels, batch, inputs, outputs):
    options = {"param_dtype": jnp.float64, "kernel_init": nnx.initializers.zeros_init()}

    def layer(kernel, bias):
        layer = nnx.Linear(*kernel.shape, rngs=nnx.Rngs(0), **options)
        layer.kernel[...], layer.bias[...] = kernel, bias
        return layer

    def ours(x, *arrays):
        heads = [layer(*arrays[i : i + 2]) for i in range(0, len(arrays), 2)]
        return jnp.concatenate(linear.linear(x, heads), axis=-1)

    def plain(x, *arrays):
        parts = (x @ arrays[i] + arrays[i + 1] for i in range(0, len(arrays), 2))
        return jnp.concatenate(list(parts), axis=-1)

    arrays = [a for i, n in enumerate(outputs) for a in (draw(i, inputs, n), draw(i, n))]
    x = draw(9, batch, inputs)
    agree(both(ours, x, *arrays), both(plain, x, *arrays))
    xs = draw(8, 3, batch, inputs)
    agree(*(jax.jit(jax.vmap(lambda x, f=f: f(x, *arrays)))(xs) for f in (ours, plain)))


class Doubled(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Renamed(nnx.Linear):
    """Plain: it computes as Flax does."""


def layers_that_are_not_plain():
    options = {"rngs": nnx.Rngs(1)}
    yield "no bias", nnx.Linear(3, 2, use_bias=False, **options)
    yield "another dtype", nnx.Linear(3, 1, dtype=jnp.bfloat16, **options)
    yield "a subclass", Doubled(3, 2, **options)
    yield (
        "its own product",
        nnx.Linear(3, 2, dot_general=lambda *a, **k: 3 * jax.lax.dot_general(*a, **k), **options),
    )
    yield "another class", nnx.Sequential(nnx.Linear(3, 2, **options), jnp.tanh)


@pytest.mark.parametrize("name, layer", layers_that_are_not_plain())
def test_other_layers_are_called_as_they_are(kernels, name, layer):
    plain = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    x = draw(0, 4, 3).astype(jnp.float32)
    for layers in ([layer], [plain, layer]):
        for mine, one in zip(linear.linear(x, layers), layers, strict=True):
            assert mine.dtype == one(x).dtype
            np.testing.assert_allclose(mine, one(x), rtol=1e-6)
    first = nnx.Linear(3, 3, rngs=nnx.Rngs(2))
    encoder = nnx.Sequential(first, perceptron.gelu)
    _, second = linear.perceptron(x, encoder, [plain, layer])
    np.testing.assert_allclose(second, layer(encoder(x)), rtol=1e-5)
    (hidden,) = linear.perceptron(x, nnx.Sequential(layer, perceptron.gelu))
    np.testing.assert_allclose(hidden, perceptron.gelu(layer(x)), rtol=1e-6)
    (hidden,) = linear.perceptron(x, nnx.Sequential(first, jnp.tanh))
    np.testing.assert_allclose(hidden, jnp.tanh(first(x)), rtol=1e-6)


def test_which_layers_are_computed_in_one_pass():
    def kernels_of(*layers):
        text = str(jax.make_jaxpr(lambda x: linear.linear(x, layers))(jnp.ones((2, 3))))
        return text.count("puffer_jax_linear_float64")

    def layer(cls=nnx.Linear, **options):
        return cls(3, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)

    assert kernels_of(layer(), layer(Renamed), layer(dtype=jnp.float64)) == 1
    for other in (layer(Doubled), layer(precision="highest"), layer(use_bias=False)):
        assert kernels_of(layer(), other) == 0
    with use("xla"):
        assert kernels_of(layer()) == 0


def test_what_hooks_the_layers_sees_all_of_them():
    env = stub_env(gs.Box(-1, 1, (3,)), gs.Discrete(2))
    policy = puffer_jax.Default(env, 4, rngs=nnx.Rngs(0))
    capture = nnx.capture(policy.forward, nnx.Intermediate, method_outputs=nnx.Intermediate)
    (logits, values), seen = capture(jnp.ones((2, 3)))
    np.testing.assert_array_equal(seen["decoder"]["__call__"][0], logits)
    np.testing.assert_array_equal(seen["value"]["__call__"][0], values)
    assert seen["encoder"]["__call__"][0].shape == (2, 4)


def test_a_relu_before_a_convolution(kernels):
    class Halved(Conv2d):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs) / 2

    def conv(cls):
        options = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        layer = cls(2, 2, 3, padding=1, **options)
        layer.kernel[...], layer.bias[...] = draw(1, 3, 3, 2, 2), draw(2, 2)
        return layer

    x = draw(0, 2, 5, 4, 2)
    for activation in (jax.nn.relu, jnp.tanh):
        for second in (conv(Conv2d), conv(Halved), jnp.sin):
            layers = ImageLayers(conv(Conv2d), activation, second, jax.nn.relu)
            plain = jax.nn.relu(second(activation(layers.layers[0](x))))
            agree(layers(x), plain)
            agree(layers(x), nnx.Sequential.__call__(layers, x))


@pytest.mark.parametrize("rows, time", [(1, 1), (3, 7), (21, 5)])
def test_recurrence(kernels, rows, time):
    a, b = draw(0, rows, time), draw(1, rows, time)

    def plain(a, b):
        y = [jnp.zeros(rows)]
        for t in reversed(range(time)):
            y.insert(0, a[:, t] + b[:, t] * y[0])
        return jnp.stack(y[:-1], axis=1)

    ours, others = both(recurrence.recurrence, a, b), both(plain, a, b)
    if time == 1:  # nothing follows, so its factor has no gradient
        assert not ours[1][1].any() and not others[1][1].any()
        ours, others = (x[0] for x in (ours, others))
    agree(ours, others)


def test_float32_functions_are_accurate():
    """Against float64, over all arguments that matter; an LSTM of one unit, gelu of one layer."""
    with jax.enable_x64(False):
        z = jnp.linspace(-30, 30, 60001, dtype=jnp.float32)[:, None]
        one = jnp.ones((1, 1), jnp.float32)
        assert native.takes(z)
        (gelu,) = perceptron.perceptron(z, one, one[0] * 0)
        # Input, forget and output gate take z, the candidate 1; what remains is sigmoid^2-like.
        weight = jnp.asarray([[1], [0], [0], [0]], jnp.float32)
        bias = jnp.asarray([0, 0, 20, 20], jnp.float32)
        state = jnp.zeros((len(z), 1), jnp.float32)
        _, _, sigmoid = lstm.lstm_scan(weight, 0 * weight, bias, z[:, None], state, state)
        bias = jnp.asarray([20, 0, 0, 20], jnp.float32)
        weight = jnp.roll(weight, 2)
        _, _, tanh = lstm.lstm_scan(weight, 0 * weight, bias, z[:, None], state, state)
        z, gelu, sigmoid, tanh = (
            np.asarray(a, np.float64).ravel() for a in (z, gelu, sigmoid, tanh)
        )
        few = jnp.asarray(z[::50], jnp.float32)[:, None]
        weights = jnp.ones((1, 200), jnp.float32)
        # Vectors that are computed side by side, and those that are left over.
        (wide,) = perceptron.perceptron(few, weights, weights[0] * 0)
    exact = z * 0.5 * scipy.special.erfc(-z / np.sqrt(2))
    assert wide.shape == (len(z[::50]), 200)
    for found, right, at in ((gelu[:, None], exact, z), (wide, exact[::50], z[::50])):
        off = np.abs(np.float64(found) - right[:, None]).max(1)
        assert off.max() < 2e-6 and off[np.abs(at) < 4].max() < 5e-7
        assert (off / right)[at > 0].max() < 4e-7  # below, 1 + erf rounds where it is small
    close = partial(np.testing.assert_allclose, rtol=4e-7, atol=1e-37)
    close(sigmoid, scipy.special.expit(z))
    close(tanh, np.tanh(z))


def test_nan_and_infinity_pass(kernels):
    x = jnp.full((1, 4, 4, 1), 1.0).at[0, 1, 1, 0].set(jnp.nan)
    kernel, bias = jnp.ones((3, 3, 1, 1)), jnp.zeros(1)
    for windows in (Windows(pads=(1, 1)), Windows(pads=(1, 1), rectify=True)):
        out = convolution.convolution(x, kernel, bias, windows)
        assert np.isnan(out[0, :3, :3]).all() and np.isfinite(out[0, 3]).all()
    assert np.isnan(pooling.max_pool(x)).all()
    assert (pooling.max_pool(jnp.full((1, 4, 4, 1), -jnp.inf)) == -jnp.inf).all()
    weight, bias = jnp.ones((4, 1)), jnp.zeros(4)
    x = jnp.asarray([0.5, jnp.nan, jnp.inf, -jnp.inf])[:, None, None]
    outputs, _, _ = lstm.lstm_scan(weight, weight, bias, x, *jnp.zeros((2, 4, 1)))
    np.testing.assert_allclose(outputs[2:, 0, 0], [np.tanh(1), 0], atol=1e-15)
    assert list(np.isnan(outputs[:, 0, 0])) == [False, True, False, False]
    for dtype in (jnp.float32, jnp.float64):
        x = jnp.asarray([[0.0], [jnp.nan], [jnp.inf], [-jnp.inf]], dtype)
        first = nnx.Linear(1, 1, param_dtype=dtype, rngs=nnx.Rngs(0))
        first.kernel[...] = jnp.ones((1, 1), dtype)
        encoder = nnx.Sequential(first, perceptron.gelu)
        out = linear.perceptron(x, encoder)[0][:, 0]
        np.testing.assert_array_equal(out, [0, np.nan, np.inf, np.nan])  # as jax.nn.gelu has it
        np.testing.assert_array_equal(out, jax.nn.gelu(x, approximate=False)[:, 0])


def test_the_same_call_gives_the_same_bits():
    weight, bias, x = draw(0, 256, 64), draw(1, 256), draw(2, 100, 6, 64)
    state = draw(3, 2, 100, 64)

    @jax.jit
    def run():
        def loss(weight):
            outputs, h, c = lstm.lstm_scan(weight, weight, bias, x, *state)
            return (outputs**2).sum() + (h * c).sum()

        return jax.value_and_grad(loss)(weight)

    first = run()
    for _ in range(5):
        for a, b in zip(first, run(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_calls_from_many_threads_at_once():
    """Who helps whom with what does not show in the results."""
    arrays = [draw(0, 64, 24), draw(1, 64, 16), draw(2, 64)]
    arrays += [draw(3, 40, 9, 24), draw(4, 40, 16), draw(5, 40, 16)]
    done = jnp.asarray(np.random.default_rng(6).random((40, 9)) < 0.2)

    @jax.jit
    def gradients(scale):
        def loss(*arrays):
            outputs, h, c = lstm.lstm_scan(*arrays, done)
            return scale * (outputs**2).sum() + (h * c).sum()

        return jax.grad(loss, range(6))(*arrays)

    scales = [1.0 + i / 8 for i in range(8)]
    alone = [gradients(scale) for scale in scales]
    assert float(jnp.abs(alone[0][0] - alone[1][0]).max()) > 0.1
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            for mine, other in zip(pool.map(gradients, scales), alone, strict=True):
                jax.tree.map(np.testing.assert_array_equal, mine, other)


MEMORY = """
import resource
import jax, jax.numpy as jnp
from puffer_jax.kernels.convolution import convolution
from puffer_jax.kernels.windows import Windows


def run(pad):  # in copies of the images with their borders, one for each thread
    windows = Windows((pad, pad), (pad, pad))
    x, kernel = jnp.ones((8, 3, 2, 4)), jnp.ones((3, 3, 4, 5))
    return convolution(x, kernel, jnp.ones(5), windows).block_until_ready()


before = run(9)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, -1))
for _ in range(2):
    try:
        run(30000)
    except jax.errors.JaxRuntimeError as error:
        print("RESOURCE_EXHAUSTED" in str(error))
print((run(9) == before).all())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux has it")
def test_no_memory_is_an_error():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True"] * 3, done.stderr


# --- building the kernels -------------------------------------------------------------------

SCRIPT = """
import logging, sys
logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
import jax.numpy as jnp
from puffer_jax.kernels.convolution import convolution
from puffer_jax.kernels.cpu import native
from puffer_jax.kernels.windows import Windows
x = jnp.ones((1, 3, 3, 2))
out = convolution(x, jnp.ones((3, 3, 2, 1)), jnp.ones(1), Windows())
print(native.takes(x), out.item())
"""


def run_script(tmp_path, **environment):
    environment = (
        os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"} | environment
    )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


# Takes what this session's compiler made, which is what takes long, to where it is to be.
COMPILER = """#!/bin/sh
for last; do :; done
case " $* " in *" -dM "*) exit 0;; esac
echo "$*" >> {folder}/calls
cp {library} "$last"
"""


def test_kernels_are_built_once(tmp_path):
    compiler = tmp_path / "compiler"
    made = build.compiled(build.find_compiler(), "float32")
    compiler.write_text(COMPILER.format(folder=tmp_path, library=made))
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "PUFFER_JAX_CXXFLAGS": "-O0"}
    found = []
    for _ in range(2):
        out, log = run_script(tmp_path, **environment)
        assert (out, log) == ("True 19.0", "")
        lock, library = sorted((tmp_path / "puffer_jax").iterdir())
        assert lock.name == ".float32.lock"  # and nothing unfinished beside them
        found.append(library.stat().st_ino)
    assert found[0] == found[1]
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert " -O0 " in call and "kernels.cc" in call


def test_every_source_tells_libraries_apart(tmp_path):
    sources = {"adam.cc": "void adam() {}", "kernels.cc": '#include "adam.cc"', "vectors.h": ""}
    for name, text in reversed(sources.items()):
        (tmp_path / name).write_text(text)
    key = build.key(tmp_path, b"flags")
    assert key == build.key(tmp_path, b"flags") != build.key(tmp_path, b"other flags")
    for name, text in sources.items():
        (tmp_path / name).write_text(text + "// changed")
        assert build.key(tmp_path, b"flags") != key
        (tmp_path / name).write_text(text)
    assert build.key(tmp_path, b"flags") == key
    (tmp_path / "vectors.h").rename(tmp_path / "lanes.h")
    assert build.key(tmp_path, b"flags") != key


LENGTHS = """
import jax, jax.numpy as jnp, numpy as np
from puffer_jax import layers, random, sample_logits
from puffer_jax.kernels import use
from puffer_jax.kernels.mingru import mingru_layer
from puffer_jax.kernels.perceptron import linear, perceptron
from puffer_jax.kernels.windows import Windows
jax.config.update("jax_enable_x64", True)
def draw(*shape):  # numbers that float32 has
    numbers = np.random.default_rng(len(shape)).standard_normal(shape)
    return numbers.astype(np.float32).astype(np.float64)


x, w1, b1, w2, b2 = draw(23, 5), draw(5, 137), draw(137), draw(137, 18), draw(18)
images, kernel = draw(2, 9, 8, 3), draw(3, 4, 3, 18)
windows = Windows((2, 2), (1, 1))
key = jax.random.key(0)
lstm = draw(148, 5), draw(148, 37), draw(148), draw(13, 3, 5), draw(13, 37), draw(13, 37)
pixels = np.arange(2 * 4 * 5 * 70, dtype=np.uint8).reshape(2, 4, 5, 70)
planes = windows._replace(channels_first=True, out_channels_first=True)
step = draw(148, 5), draw(148, 37), draw(148), draw(148), draw(13, 5), draw(13, 37), draw(13, 37)
mingru = draw(3, 13, 37), draw(3, 13, 111), draw(13, 37)
starts = draw(3, 13) > 1
calls = [
    (lambda *a: layers.convolution(*a, windows), (images, kernel, b2)),
    (lambda *a: layers.convolution(pixels, *a, planes), (draw(3, 4, 4, 18), b2)),
    (lambda *a: jnp.concatenate(layers.lstm_scan(*a)[1:]), lstm),
    (lambda *a: jnp.concatenate(layers.lstm_step(*a)), step),
    (lambda *a: jnp.vstack([y.reshape(-1, 37) for y in mingru_layer(*a, starts)]), mingru),
]
for heads in ((), (w2[:, :3], b2[:3]), (w2[:, :2], b2[:2], w2, b2)):
    calls.append((lambda *a: jnp.concatenate(perceptron(*a), 1), (x, w1, b1, *heads)))
calls.append((lambda *a: jnp.concatenate(linear(*a), 1), (draw(23, 137), *heads)))
functions, operands = zip(*calls)
logits = draw(3, 2), draw(3, 700)


# Cotangents made of the results, say their cosines, would carry the rounding of the results into
# the gradients, and a sum that nearly cancels would show nothing else.
def gradients(operands):
    found = []
    for function, arrays in zip(functions, operands, strict=True):
        out, back = jax.vjp(function, *arrays)
        found += [out, *back(jnp.asarray(draw(*out.shape), out.dtype))]
    return found


def drawn(logits):
    found = []
    for rows in logits:
        found += [random.categorical(key, rows), sample_logits(rows, key=key)[0]]
    return [*found, jax.random.uniform(random.fast(key), (70,))]


def scores(logits, actions):
    found = []
    for rows, action in zip(logits, actions, strict=True):
        given = {"key": key} if rows.dtype == "float32" else {"action": action}
        found += sample_logits(rows, **given)[1:]
    return found


def check(ours, exact, bar):
    for a, b in zip(ours, exact, strict=True):
        if a.size:
            error = np.abs(a.astype(b.dtype) - b).max() / np.abs(b).max()
            assert error <= bar, (a.shape, a.dtype, error)


# One program compiles sooner than its operations one by one.
def run(function, dtype, arrays, *others):
    arrays = jax.tree.map(lambda array: array.astype(dtype), arrays)
    return jax.device_get(jax.jit(function)(arrays, *others))


def everything():
    found = {d: (run(gradients, d, operands), run(drawn, d, logits)) for d in DTYPES}
    actions = found["float32"][1][1:4:2]
    return found, actions, run(scores, "float32", logits, actions)


DTYPES = "float64", "float32"
ours, actions, our_scores = everything()
with use("xla"):
    plain, plain_actions, _ = everything()
exact = plain["float64"][0]
check(ours["float64"][0], exact, 1e-13)
check(ours["float32"][0], exact, 5e-6)
check(our_scores, run(scores, "float64", logits, actions), 2e-6)
for dtype in DTYPES:
    for a, b in zip(ours[dtype][1], plain[dtype][1], strict=True):
        np.testing.assert_array_equal(a, b)
print("equal")
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return sanitize.build_driver(tmp_path_factory.mktemp("driver"))


def own_length(compiler):
    """Bytes of a vector in what is built for this machine."""
    _, macros = build.tuning(compiler)
    return 64 if "__AVX512F__" in macros else 32 if "__AVX__" in macros else 16


@pytest.mark.parametrize("length", [16, 32, 64])
def test_vectors_of_any_length(tmp_path, length, driver):
    """Processors have vectors of 16, 32 or 64 bytes; compilers have all of them everywhere."""
    compiler = build.find_compiler()
    environment = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    if length == own_length(compiler):
        libraries = {dtype: build.compiled(compiler, dtype) for dtype in build.TYPES}
    else:
        flags = f"-DVECTOR_BYTES={length} -Og"  # compiles in a third of the time
        environment |= {"XDG_CACHE_HOME": str(tmp_path), "PUFFER_JAX_CXXFLAGS": flags}
        libraries = {}
    command = [sys.executable, "-c", LENGTHS]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr
    # What was built for that never leaves its memory, and does without.
    for dtype in build.TYPES:
        library = libraries.get(dtype)
        if library is None:
            (library,) = (tmp_path / "puffer_jax").glob(f"{dtype}-*.so")
        for mode in sanitize.GUARDED:
            sanitize.run(driver, library, dtype, mode, shapes=1 if mode == "starve" else 8)


def test_without_a_compiler(tmp_path):
    out, log = run_script(tmp_path, CXX="no-such-compiler")
    assert out == "False 19.0"
    assert "WARNING puffer_jax.kernels.cpu.native no C++ compiler no-such-compiler" in log
    out, log = run_script(tmp_path, PUFFER_JAX_NATIVE="0")
    assert out == "False 19.0" and "puffer_jax" not in log


def test_with_a_compiler_that_fails(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\necho broken on purpose >&2\n[ "$2" = -dM ]\n')
    compiler.chmod(0o755)
    out, log = run_script(tmp_path, CXX=str(compiler))
    assert out == "False 19.0"
    assert log.count("could not be built") == 1 and "broken on purpose" in log
    assert {path.suffix for path in (tmp_path / "puffer_jax").iterdir()} <= {".lock"}


DONE = jnp.asarray([[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]], bool)
BYTES = jnp.arange(180, dtype=jnp.uint8).reshape(2, 6, 5, 3)
TWICE = {
    "linear": (lambda *a: perceptron.linear(*a)[0], [(5, 3), (3, 4), (4,)]),
    "perceptron": (lambda *a: perceptron.perceptron(*a)[0], [(5, 3), (3, 4), (4,), (4, 2), (2,)]),
    "recurrence": (recurrence.recurrence, [(3, 4), (3, 4)]),
    "max_pool": (pooling.max_pool, [(2, 5, 6, 3)]),
    "convolution": (
        partial(convolution.convolution, windows=Windows((2, 1), (1, 0), rectify=True)),
        [(2, 6, 5, 3), (3, 3, 3, 4), (4,)],
    ),
    "convolution of bytes": (
        partial(convolution.convolution, BYTES, windows=Windows()),
        [(3, 3, 3, 4), (4,)],
    ),
    "lstm_scan": (lstm.lstm_scan, [(8, 3), (8, 2), (8,), (3, 4, 3), (3, 2), (3, 2)]),
    "lstm_scan, done": (
        lambda *arrays: lstm.lstm_scan(*arrays, DONE),
        [(8, 3), (8, 2), (8,), (3, 4, 3), (3, 2), (3, 2)],
    ),
    "lstm_step": (lstm.lstm_step, [(8, 3), (8, 2), (8,), (8,), (3, 3), (3, 2), (3, 2)]),
}


@pytest.mark.parametrize("name", TWICE)
def test_gradients_of_gradients(name):
    function, shapes = TWICE[name]
    arrays = [draw(seed, *shape) for seed, shape in enumerate(shapes)]

    def loss(arrays):
        parts = enumerate(jax.tree.leaves(function(*arrays)))
        return sum((jnp.sin(part) * draw(9 + i, *part.shape)).sum() for i, part in parts)

    def of_gradients(arrays):
        return sum(jnp.sin(3 * d).sum() for d in jax.grad(loss)(arrays))

    run = jax.jit(jax.grad(of_gradients))
    ours = run(arrays)
    with use("xla"):
        agree(ours, run(arrays))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("typed", [True, False])
def test_random_numbers_are_those_of_jax(kernels, typed, impl):
    with jax.default_prng_impl(impl):
        key = jax.random.key(3) if typed else jax.random.PRNGKey(3)
    if typed:
        keys = jax.random.split(key, 3)
    else:
        with jax.default_prng_impl(impl):
            keys = jax.random.split(key, 3)

    def data(keys):
        return (
            jax.random.key_data(keys) if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) else keys
        )

    with jax.default_prng_impl(impl):
        for num in (2, (3, 5), 5000):
            ours, theirs = random.split(key, num), jax.random.split(key, num)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(data(ours), data(theirs))
        if impl == "threefry2x32":  # under vmap rbg keys draw something else with every program
            ours, theirs = jax.vmap(random.split)(keys), jax.vmap(jax.random.split)(keys)
            np.testing.assert_array_equal(data(ours), data(theirs))
        for dtype in (jnp.uint8, jnp.uint16, jnp.uint32, jnp.uint64):
            for shape in ((), (7,), (3, 0), (2, 4099)):
                ours = jax.random.bits(random.fast(key), shape, dtype)
                np.testing.assert_array_equal(ours, jax.random.bits(key, shape, dtype))
        draws = [
            lambda key: jax.random.uniform(key, (4, 5), jnp.float32, -1, 2),
            lambda key: jax.random.normal(key, (4, 5), jnp.float64),
            lambda key: jax.random.randint(key, (9,), 0, 7),
            lambda key: jax.random.permutation(key, 20),
            lambda key: jax.random.normal(jax.random.fold_in(key, 8), (3,)),
        ]
        for function in draws:
            np.testing.assert_array_equal(function(random.fast(key)), function(key))


def test_threefry_over_many_keys_and_in_a_loop(kernels):
    keys = jax.random.split(THREEFRY, (300, 2))

    def draw(key):
        def step(key, _):
            key, own = random.split(key)
            return key, jax.random.uniform(random.fast(own), (3,))

        return jax.lax.scan(step, key, None, length=4)[1]

    def plain(key):
        def step(key, _):
            key, own = jax.random.split(key)
            return key, jax.random.uniform(own, (3,))

        return jax.lax.scan(step, key, None, length=4)[1]

    ours, theirs = (jax.jit(jax.vmap(jax.vmap(f)))(keys) for f in (draw, plain))
    np.testing.assert_array_equal(ours, theirs)


def test_other_counters_are_left_to_jax(kernels):
    usual = jax.random.bits(random.fast(THREEFRY), (4,), jnp.uint32)
    with jax.threefry_partitionable(False):
        ours, theirs = (
            jax.random.bits(k, (4,), jnp.uint32) for k in (random.fast(THREEFRY), THREEFRY)
        )
    np.testing.assert_array_equal(ours, theirs)
    assert (usual != ours).any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows, n", [(1, 2), (1, 1), (5000, 2), (700, 5), (3, 3000)])
def test_categorical(kernels, rows, n, dtype):
    logits = 2 * np.asarray(draw(0, rows, n), dtype)
    logits[:, :: n + 1] = 0
    logits[: rows // 2, n // 2] = -np.inf
    if n == 1:
        logits = np.zeros_like(logits)
    keys = jax.random.split(THREEFRY, 3)
    many = np.stack([logits, np.zeros_like(logits), logits / 2])

    @partial(jax.jit, static_argnums=0)
    def draws(categorical, logits, many):
        return [
            categorical(THREEFRY, logits),
            jax.vmap(categorical)(keys, many),
            jax.vmap(categorical, (0, None))(keys, logits),
            jax.vmap(categorical, (None, 0))(THREEFRY, many),
        ]

    @jax.jit
    def of_zeros(zeros):
        total = jax.value_and_grad(lambda x: random.categorical(THREEFRY, x) @ x.sum(1))
        return *total(zeros), random.categorical(THREEFRY, zeros)

    plain = partial(jax.random.categorical, mode="high")
    pairs = zip(draws(random.categorical, logits, many), draws(plain, logits, many), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == jnp.int32
        np.testing.assert_array_equal(ours, theirs)
    ours, gradient, drawn = jax.device_get(of_zeros(many[1]))
    assert ours == 0
    np.testing.assert_array_equal(gradient, np.broadcast_to(drawn[:, None], gradient.shape))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows, n", [(1, 2), (5, 1), (9, 3), (3000, 2), (40, 300)])
def test_sampling(rows, n, dtype):
    """`sample_logits` by its kernel and by JAX's operations: all of it, bad rows and masks, too."""
    logits = (4 * draw(0, rows, n)).astype(dtype)
    if rows > 8:
        masked = logits.at[6, 0].set(-jnp.inf).at[7, 1:].set(-jnp.inf).at[5].add(300)
        logits = masked.at[0, 0].set(jnp.nan).at[1].set(-jnp.inf).at[2, 1].set(jnp.inf)
        logits = logits.at[3].set(0).at[4, 0].set(80).at[8, 0].set(-2e4)
    keys, many = jax.random.split(THREEFRY, 3), jnp.stack([logits, logits[::-1], -2 * logits])
    cotangent = draw(1, rows).astype(jnp.float32)  # both precisions are given the same numbers
    tangent = draw(2, rows, n).astype(jnp.float32)

    def results(logits, many, taken=None):
        """Draws and their scores, or the scores of what was taken."""

        def of(key, logits, action):
            way = {"key": key} if action is None else {"action": action}
            return puffer_jax.sample_logits(logits, **way)

        def scores(logits, action):  # of two components, with keys of their own
            action, *rest = of(THREEFRY, (logits, logits[:, ::-1]), action)
            return jnp.where(jnp.isnan(rest[0] + rest[1]), 0, 2 * rest[0] + rest[1]), action

        taken = taken or [None] * 4
        axis = None if taken[0] is None else 0
        found = [
            of(THREEFRY, logits, taken[0]),
            jax.vmap(of, (0, 0, axis))(keys, many, taken[1]),
            jax.vmap(of, (None, 0, axis))(THREEFRY, many, taken[2]),
        ]
        out, backward, action = jax.vjp(lambda x: scores(x, taken[3]), logits, has_aux=True)
        (gradient,) = backward(cotangent.astype(out.dtype))
        _, slope = jax.jvp(
            lambda x: scores(x, taken[3])[0], (logits,), (tangent.astype(logits.dtype),)
        )
        actions = [*(action for action, *_ in found), action]
        return actions, [x for _, *rest in found for x in rest], [out, gradient, slope]

    run = jax.jit(results)
    ours = run(logits, many)
    with use("xla"):
        others = run(logits, many)
    jax.tree.map(np.testing.assert_array_equal, ours[0], others[0])
    double = logits.astype(jnp.float64), many.astype(jnp.float64)
    with use("xla"):
        exact = run(*double, ours[0])

    # What float32 loses of a row is the rounding of its logsumexp.
    def lost(logits):
        size = np.abs(np.nan_to_num(scipy.special.logsumexp(np.float64(logits), axis=-1)))
        return np.spacing(size.clip(1e-3, 1e6).astype(dtype))

    single, of_many = lost(logits), lost(many)
    losses = [single] * 2 + [of_many] * 4, [single, single[:, None], single]
    bars = {"float32": (2e-6, 2e-5), "float64": (1e-13, 1e-12)}[dtype]
    for side in (ours, others):
        for kind, bar in enumerate(bars):
            # Gradients have the greater bar, and of the two scores each loses.
            mine, judge = side[kind + 1], exact[kind + 1]
            for found, right, loss in zip(mine, judge, losses[kind], strict=True):
                assert (found.shape, found.dtype, right.dtype) == (right.shape, dtype, np.float64)
                np.testing.assert_array_equal(np.isfinite(found), np.isfinite(right))
                finite = np.isfinite(right)
                difference = np.abs(np.where(finite, found, 0) - np.where(finite, right, 0))
                allowed = bar * np.abs(np.where(finite, right, 0)).clip(1) + (1 + 3 * kind) * loss
                assert (difference <= allowed).all()
    if dtype == "float64":
        close = partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-13)
        jax.tree.map(close, ours[1:], others[1:])


def test_gelu():
    x = jnp.concatenate([jnp.linspace(-9.0, 9.0, 1001), draw(0, 100)])

    def plain(x):
        return jax.nn.gelu(x, approximate=False)

    @partial(jax.jit, static_argnums=0)
    def everything(f, x):
        kinds = (f, jax.grad(f), jax.grad(jax.grad(f)))
        return [*(jax.vmap(kind)(x) for kind in kinds), jax.jvp(f, (x,), (jnp.cos(x),))[1]]

    for ours, theirs in zip(everything(perceptron.gelu, x), everything(plain, x), strict=True):
        # Ours takes the difference 1 + erf, which rounds where it is small; torch's, too.
        assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() < 2e-15


@pytest.mark.parametrize(
    "batch, time, inputs, hidden, with_done",
    [
        (3, 5, 4, 4, False),
        (3, 5, 4, 4, True),
        (3, 5, 3, 4, True),
        (131, 3, 20, 33, True),
        (7, 2, 5, 150, True),
        (20, 23, 18, 5, True),
        (131, 23, 18, 18, True),  # as wide as its inputs: results lie where those were
    ],
)
def test_lstm_gradient(kernels, batch, time, inputs, hidden, with_done):
    weight_ih, weight_hh = draw(0, 4 * hidden, inputs), draw(6, 4 * hidden, hidden)
    weights = weight_ih, weight_hh, draw(1, 4 * hidden)
    x, h, c = draw(2, batch, time, inputs), draw(3, batch, hidden), draw(4, batch, hidden)
    done = np.random.default_rng(5).random((batch, time)) < 0.4 if with_done else None

    def plain(weight_ih, weight_hh, bias, x, h, c):
        weight = jnp.concatenate([weight_ih, weight_hh], axis=1)

        def step(state, now):
            h, c = (jnp.where(now[1][:, None], 0, part) for part in state)
            h, c = lstm.lstm_cell(weight, bias, now[0], h, c)
            return (h, c), h

        ended = jnp.zeros((batch, time), bool) if done is None else done
        (h, c), outputs = jax.lax.scan(step, (h, c), (x.swapaxes(0, 1), ended.T))
        return outputs.swapaxes(0, 1), h, c

    def ours(*arguments):
        return lstm.lstm_scan(*arguments, done)

    @partial(jax.jit, static_argnums=0)
    def everything(function, *arguments):
        out, backward = jax.vjp(function, *arguments)
        gradients = backward(tuple(draw(7 + i, *part.shape) for i, part in enumerate(out)))
        return out, gradients, function(*arguments)

    agree(everything(ours, *weights, x, h, c), everything(plain, *weights, x, h, c))
    if done is not None:
        assert done.any() and not done.all()


def test_lstm_results_take_the_place_of_its_inputs(kernels):
    batch, hidden = 40, 16
    weights = draw(0, 4 * hidden, hidden), draw(6, 4 * hidden, hidden), draw(1, 4 * hidden)
    x, start = draw(2, batch, 12, hidden), (draw(3, batch, hidden), draw(4, batch, hidden))
    kept = np.array(x)

    def run(weights, x, start):
        return lstm.lstm_scan(*weights, x, *start)[0]

    def only_there(weights, x, start):
        return run(weights, jnp.sin(x), start).sum()

    plain = run(weights, x, start)
    # Where they are needed on they stay what they are.
    after, between = jax.jit(lambda *a: (run(*a), a[1] + 1))(weights, x, start)
    agree(after, plain)
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(between, kept + 1)
    mapped = jax.vmap(run, (None, 0, None))(weights, jnp.stack([x, -x]), start)
    agree(mapped, jnp.stack([plain, run(weights, -x, start)]))
    program = jax.jit(only_there).lower(weights, x, start).compile()
    agree(program(weights, x, start), only_there(weights, x, start))
    if kernels == "cpu":
        assert program.memory_analysis().temp_size_in_bytes < 1.8 * x.nbytes


@pytest.mark.parametrize(
    "batch, inputs, hidden", [(1, 3, 2), (5, 20, 33), (70, 16, 16), (1025, 3, 7)]
)
def test_lstm_step(kernels, batch, inputs, hidden):
    arrays = [draw(0, 4 * hidden, inputs), draw(1, 4 * hidden, hidden), draw(2, 4 * hidden)]
    arrays += [draw(6, 4 * hidden)]
    arrays += [draw(3, batch, inputs), draw(4, batch, hidden), draw(5, batch, hidden)]

    def plain(weight_ih, weight_hh, bias_ih, bias_hh, x, h, c):
        gates = x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh
        i, f, g, o = jnp.split(gates, 4, axis=1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jnp.stack([jax.nn.sigmoid(o) * jnp.tanh(c), c])

    def ours(*arrays):
        return jnp.stack(lstm.lstm_step(*arrays))

    agree(both(ours, *arrays), both(plain, *arrays))


def test_lstm_gradient_keeps_its_dtypes(kernels):
    weights = draw(0, 8, 3), draw(4, 8, 2), draw(1, 8)
    x, h = draw(2, 2, 3, 3).astype(jnp.bfloat16), draw(3, 2, 2)
    everything = tuple(range(6))

    def loss(*arrays):
        return sum(jnp.sum(part) for part in lstm.lstm_scan(*arrays, dtype=jnp.bfloat16))

    gradients = jax.jit(jax.grad(loss, argnums=everything))(*weights, x, h, h)
    assert [g.dtype for g in gradients] == [a.dtype for a in (*weights, x, h, h)]
    in_double = jax.grad(lambda *a: sum(map(jnp.sum, lstm.lstm_scan(*a))), argnums=everything)
    doubled = jax.jit(in_double)(*weights, x.astype(jnp.float64), h, h)
    for rounded, exact in zip(*jax.device_get((gradients, doubled)), strict=True):
        assert np.abs(rounded - exact).max() / np.abs(exact).max() < 2e-2
