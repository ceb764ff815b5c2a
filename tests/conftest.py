import os

import pytest

# before torch is imported: threads that wait by spinning stall a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import stages  # noqa: E402
import torch  # noqa: E402

GPU = torch.cuda.is_available, os.environ.get("CUDA_VISIBLE_DEVICES")


def pytest_collection_finish():
    """From here on `auto` is the CPU, in the processes that tests start, too: what is compared with
    the CPU's numbers, or bit for bit, is computed there on a machine with a GPU as well.
    """
    torch.cuda.is_available = lambda: False
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def gpu_where_needed(request, monkeypatch):
    """The GPU is there for those that are skipped without one."""
    if any(m.kwargs.get("reason") == "needs a GPU" for m in request.node.iter_markers("skipif")):
        there, visible = GPU
        monkeypatch.setattr(torch.cuda, "is_available", there)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The options of a small run of each stage, in a tiny world made once."""
    return stages.make_world(tmp_path_factory.mktemp("world"))
