import pytest
import stages


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The options of a small run of each stage, in a tiny world made once."""
    return stages.make_world(tmp_path_factory.mktemp("world"))
