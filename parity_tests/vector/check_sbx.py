"""SBX trains on our vecenvs: `make sbx`, since it brings a nightly build that may break any day."""

import pytest
from test_examples import run as run

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_example(run):
    out = run("sb3.py", "--trainers", "sbx", *"--steps 64 --num-envs 4 --horizon 8".split())
    assert out.splitlines()[1].startswith("sbx")
