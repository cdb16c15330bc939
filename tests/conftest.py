"""Fixtures for all tests: one thread (so that results repeat) and the folder of real videos, where there is one."""

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch starts its threads

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _threads():
    torch.set_num_threads(int(os.environ.get("LVDM_TEST_THREADS", "2")))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real test videos named by LVDM_TEST_DATA; the test is skipped without it."""
    folder = os.environ.get("LVDM_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LVDM_TEST_DATA does not name a folder of real videos")
    return Path(folder)
