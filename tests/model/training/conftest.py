from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.model.training.tiny import make_dataset


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Models of these tests are too small for two, and threads that wait for each other on busy cores take minutes.

    The number of threads decides the order of sums, so the processes that the tests start have it as well.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("tiny"))
