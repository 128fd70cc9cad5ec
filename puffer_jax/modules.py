"""Parameters as a plain dict, and as torch names them."""

from puffer_jax.nn.params import GraphDef as GraphDef
from puffer_jax.nn.params import merge as merge
from puffer_jax.nn.params import mismatches as mismatches
from puffer_jax.nn.params import split as split
from puffer_jax.nn.torch_layout import TorchParameter as TorchParameter
from puffer_jax.nn.torch_layout import torch_aliases as torch_aliases
from puffer_jax.nn.torch_layout import torch_layout as torch_layout
from puffer_jax.nn.torch_layout import torch_modules as torch_modules
from puffer_jax.nn.torch_layout import torch_parameters as torch_parameters
