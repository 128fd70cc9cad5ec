"""Compilation for devices that are not here: `make accelerators`, one process for each platform.

The session around it is not this one's: 64-bit numbers are off, as they are for users.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import compilers

STARTED = {}


def pytest_addoption(parser):
    parser.addoption("--platform", choices=("cuda", "tpu"), default="cuda")
    parser.addoption("--every", action="store_true", help="every program in every precision")


def pytest_configure(config):
    # Before JAX is used, and before warnings are errors.
    STARTED["compiler"] = compilers.start(config.getoption("platform"))


@pytest.fixture(scope="session")
def compiler():
    return STARTED["compiler"]
