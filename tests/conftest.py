import os
import random
import signal
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import settings

# Wrong in the last digits is wrong every time: the same examples on every run, and none left behind on the disk.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.load_profile("fixed")
torch.set_num_threads(2)
# A shell starts what runs in its background deaf to Ctrl-C, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What a test draws is the same in every run and order; another seed shows which tests only pass by luck.
SEED = int(os.environ.get("TEST_SEED", "0"))


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tests of values, precision and queues make their tensors")
    parser.addoption("--one-in", type=int, default=1, help="run one of so many tests, always the same")


def pytest_configure(config):
    if config.getoption("--device") != "cpu":
        import grid

        grid.DEVICE = torch.device(config.getoption("--device"))


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if crc32(item.nodeid.encode()) % config.getoption("--one-in")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        without = set(left_out)
        items[:] = [item for item in items if item not in without]


# The markers of whole files and folders; `make quick` runs what has none.
MARKERS = {
    "distributed": (
        "test_distributed.py",
        "test_learned_parameters.py",
        "test_training.py",
        "experiment/test_processes.py",
    ),
    "host": ("frameworks/", "test_third_party.py", "test_export_upstream.py", "test_methods_table.py", "test_peers.py"),
    "slow": (
        "experiment/",
        "test_compatibility.py",
        "test_compile.py",
        "test_docs.py",
        "test_errors.py",
        "test_identities.py",
        "test_import.py",
        "test_learning.py",
        "test_reproduce.py",
        "test_testing.py",
        "test_waiting.py",
    ),
}
QUICK = ("experiment/test_settings.py", "experiment/test_spec.py", "experiment/test_style.py")


def pytest_itemcollected(item):
    place = item.nodeid.removeprefix("tests/")
    for marker, places in MARKERS.items():
        if place.startswith(places) and not place.startswith(QUICK):
            item.add_marker(marker)


def seed():
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    seed()  # fixtures of a module or session draw in the first test that asks for them


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    seed()
