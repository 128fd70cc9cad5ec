"""Does a policy keep the rules that the rest relies on?"""

from puffer_jax.policies.check import Check as Check
from puffer_jax.policies.check import PolicyReport as PolicyReport
from puffer_jax.policies.check import check_policy as check_policy
