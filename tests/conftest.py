import os

import pytest

# before torch is imported: threads that wait by spinning stall a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import stages  # noqa: E402


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The options of a small run of each stage, in a tiny world made once."""
    return stages.make_world(tmp_path_factory.mktemp("world"))
