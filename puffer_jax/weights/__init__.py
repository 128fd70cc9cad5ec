"""Weights in and out: torch state_dicts, and files in three formats.

| suffix | what it is | needs torch |
|---|---|---|
| `.pt` | the state_dict PufferLib's trainer writes and reads | yes (>= 2.10) |
| `.safetensors` | torch's names and layouts, with the policy's class and sizes as metadata | no |
| `.bin` | the flat float32 file of PufferLib's C inference, with a JSON sidecar | no |

Nothing is ever unpickled beyond tensors, a file is replaced as a whole or not at all, and a
load that fails leaves the policy as it was.

`rule` says how torch names and lays out the parameters of a layer of your own.
"""

from puffer_jax.base.files import write_atomically as write_atomically
from puffer_jax.nn.torch_rules import Constant as Constant
from puffer_jax.nn.torch_rules import Layout as Layout
from puffer_jax.nn.torch_rules import rule as rule
from puffer_jax.weights.files import load_weights as load_weights
from puffer_jax.weights.files import policy_from_checkpoint as policy_from_checkpoint
from puffer_jax.weights.files import save_weights as save_weights
from puffer_jax.weights.state_dicts import LoadResult as LoadResult
from puffer_jax.weights.state_dicts import load_state_dict as load_state_dict
from puffer_jax.weights.state_dicts import state_dict as state_dict
