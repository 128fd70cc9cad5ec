"""Emulated observations as named, shaped, typed arrays."""

from puffer_jax.base.spaces import emulated_dtypes as emulated_dtypes
from puffer_jax.base.spaces import structured_dtype as structured_dtype
from puffer_jax.policies.nativize import NativeDtype as NativeDtype
from puffer_jax.policies.nativize import flatten_observations as flatten_observations
from puffer_jax.policies.nativize import flattened_tensor_size as flattened_tensor_size
from puffer_jax.policies.nativize import nativize_dtype as nativize_dtype
from puffer_jax.policies.nativize import nativize_tensor as nativize_tensor
from puffer_jax.policies.nativize import numpy_to_jax_dtype_dict as numpy_to_jax_dtype_dict
from puffer_jax.policies.nativize import unflatten_observations as unflatten_observations
