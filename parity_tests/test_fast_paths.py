"""What is faster than the plain formula is the same function: values and gradients in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from puffer_jax import layers

LAYOUT = ("NHWC", "HWIO", "NHWC")


@pytest.fixture(autouse=True)
def _double(quick):
    with jax.enable_x64(True):
        yield


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def agree(ours, plain, bar=1e-13):
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        assert float(jnp.abs(other).max()) > 0
        assert float(jnp.abs(mine - other).max() / jnp.abs(other).max()) < bar


@pytest.mark.parametrize(
    "image, window, channels, stride, padding",
    [
        ((5, 20, 20), 8, (4, 6), 4, "VALID"),  # NatureCNN's first layer
        ((3, 9, 10), 4, (3, 5), 2, "VALID"),  # a row is left over
        ((2, 7, 8), 3, (4, 4), 1, ((1, 1), (1, 1))),  # the ResNet's
        ((2, 6, 5), 3, (3, 2), 1, ((4, 0), (1, 3))),  # borders wider than the window
        ((2, 8, 8), 3, (2, 3), 2, "SAME"),  # the window is no whole number of strides
        ((1, 4, 4), 2, (2, 3), 3, "VALID"),  # the stride passes over pixels
    ],
)
def test_convolution(image, window, channels, stride, padding):
    x = draw(0, *image, channels[0])
    kernel = draw(1, window, window, *channels)
    options = {"dimension_numbers": LAYOUT, "precision": jax.lax.Precision.HIGHEST}

    def both(function):
        out, backward = jax.vjp(
            lambda x, k: function(x, k, (stride, stride), padding, **options), x, kernel
        )
        return out, backward(jnp.cos(out))

    ours, plain = both(layers.convolution), both(jax.lax.conv_general_dilated)
    agree(ours, plain)


def test_convolution_over_parameters_and_in_a_loop():
    x, kernels = draw(0, 2, 6, 6, 2), draw(1, 3, 3, 3, 2, 4)

    def total(function):
        def loss(kernel):
            out = function(x, kernel, (1, 1), "VALID", dimension_numbers=LAYOUT)
            return jnp.sum(out * out)

        def descend(kernel, _):
            return kernel - 1e-3 * jax.grad(loss)(kernel), None

        return jax.vmap(lambda k: jax.lax.scan(descend, k, None, length=3)[0])(kernels)

    agree(jax.jit(lambda: total(layers.convolution))(), total(jax.lax.conv_general_dilated))


@pytest.mark.parametrize(
    "inputs, options",
    [
        (4, {"rhs_dilation": (2, 2)}),
        (2, {"feature_group_count": 2}),
        (4, {"batch_group_count": 2}),
        (4, {"preferred_element_type": jnp.float64}),
        (4, {"padding": ((-1, 0), (0, 0))}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_options_are_left_to_xla(inputs, options):
    x, kernel = (a.astype(jnp.float32) for a in (draw(0, 2, 9, 9, 4), draw(1, 3, 3, inputs, 4)))
    options = {"padding": "VALID", "dimension_numbers": LAYOUT} | options
    ours, plain = (
        function(x, kernel, (1, 1), **options)
        for function in (layers.convolution, jax.lax.conv_general_dilated)
    )
    assert ours.dtype == plain.dtype and np.abs(plain).max() > 0
    np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize("height, width", [(8, 8), (7, 10), (1, 3)])
def test_max_pool(height, width):
    # Few different numbers: of equal ones in a window the first takes the gradient.
    x = jnp.round(2 * draw(0, 3, height, width, 4))

    def both(function):
        out, backward = jax.vjp(function, x)
        return out, backward(draw(1, *out.shape))

    plain = partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    # Up to four gradients are added, in another order.
    agree(both(layers.max_pool), both(plain), bar=1e-15)


def test_gelu():
    x = jnp.concatenate([jnp.linspace(-9.0, 9.0, 1001), draw(0, 100)])

    def plain(x):
        return jax.nn.gelu(x, approximate=False)

    for function in (lambda f: f, jax.grad, lambda f: jax.grad(jax.grad(f))):
        ours, theirs = (jax.vmap(function(f))(x) for f in (layers.gelu, plain))
        # Ours takes the difference 1 + erf, which rounds where it is small; torch's, too.
        assert float(jnp.abs(ours - theirs).max()) < 2e-15
    ours, theirs = (jax.jvp(f, (x,), (jnp.cos(x),))[1] for f in (layers.gelu, plain))
    assert float(jnp.abs(ours - theirs).max()) < 2e-15


@pytest.mark.parametrize("inputs, with_done", [(4, False), (4, True), (3, True)])
def test_lstm_gradient(inputs, with_done):
    batch, time, hidden = 3, 5, 4
    weight, bias = draw(0, 4 * hidden, inputs + hidden), draw(1, 4 * hidden)
    x, h, c = draw(2, batch, time, inputs), draw(3, batch, hidden), draw(4, batch, hidden)
    done = np.random.default_rng(5).random((batch, time)) < 0.4 if with_done else None

    def plain(weight, bias, x, h, c):
        outputs = []
        for t in range(time):
            if done is not None:
                h, c = (jnp.where(done[:, t, None], 0, part) for part in (h, c))
            h, c = layers.lstm_cell(weight, bias, x[:, t], h, c)
            outputs.append(h)
        return jnp.stack(outputs, axis=1), h, c

    def ours(*arguments):
        return layers.lstm_scan(*arguments, done)

    def both(function):
        out, backward = jax.vjp(function, weight, bias, x, h, c)
        return out, backward(jax.tree.map(jnp.cos, out))

    agree(both(ours), both(plain))
    agree(ours(weight, bias, x, h, c), plain(weight, bias, x, h, c))
    if done is not None:
        assert done.any() and not done.all()


def test_lstm_gradient_keeps_its_dtypes():
    weight, bias = draw(0, 8, 5), draw(1, 8)
    x, h = draw(2, 2, 3, 3).astype(jnp.bfloat16), draw(3, 2, 2)

    def loss(weight, bias, x, h, c):
        outputs, *state = layers.lstm_scan(weight, bias, x, h, c, dtype=jnp.bfloat16)
        return sum(jnp.sum(part) for part in (outputs, *state))

    gradients = jax.grad(loss, argnums=(0, 1, 2, 3, 4))(weight, bias, x, h, h)
    assert [g.dtype for g in gradients] == [a.dtype for a in (weight, bias, x, h, h)]
    doubled = jax.grad(
        lambda *a: sum(jnp.sum(p) for p in layers.lstm_scan(*a)), argnums=(0, 1, 2, 3, 4)
    )(weight, bias, x.astype(jnp.float64), h, h)
    for rounded, exact in zip(gradients, doubled, strict=True):
        assert float(jnp.abs(rounded - exact).max() / jnp.abs(exact).max()) < 2e-2
