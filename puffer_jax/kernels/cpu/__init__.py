"""CPU kernels for LSTM, MinGRU, convolutions, pooling, perceptrons, random numbers: custom calls.

They are built once, where they run and for the processor they run on: the library is kept in the
user's cache. Without a C++ compiler, or with PUFFER_JAX_NATIVE=0 in the environment, everything
runs on XLA's own operations and nothing but speed is lost.

They compute in float32 and float64, with gradients written out (`jax.custom_vjp`): no
forward-mode derivatives. Gradients of gradients are those of XLA's operations. Under `jax.vmap`
most calls run one after the other.
"""

from puffer_jax.kernels.cpu.adam import adam as adam
from puffer_jax.kernels.cpu.derivatives import differentiable as differentiable
from puffer_jax.kernels.cpu.images import convolution as convolution
from puffer_jax.kernels.cpu.images import convolution_gradient as convolution_gradient
from puffer_jax.kernels.cpu.images import max_pool as max_pool
from puffer_jax.kernels.cpu.images import max_pool_gradient as max_pool_gradient
from puffer_jax.kernels.cpu.linear import linear as linear
from puffer_jax.kernels.cpu.linear import linear_gradient as linear_gradient
from puffer_jax.kernels.cpu.linear import perceptron as perceptron
from puffer_jax.kernels.cpu.linear import perceptron_gradient as perceptron_gradient
from puffer_jax.kernels.cpu.lstm import lstm as lstm
from puffer_jax.kernels.cpu.lstm import lstm_gradient as lstm_gradient
from puffer_jax.kernels.cpu.lstm import lstm_step as lstm_step
from puffer_jax.kernels.cpu.mingru import mingru as mingru
from puffer_jax.kernels.cpu.mingru import mingru_gradient as mingru_gradient
from puffer_jax.kernels.cpu.random import categorical as categorical
from puffer_jax.kernels.cpu.random import sample as sample
from puffer_jax.kernels.cpu.random import threefry as threefry
from puffer_jax.kernels.cpu.recurrence import recurrence as recurrence
