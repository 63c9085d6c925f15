"""Shared fixtures: where the real images are, and an offline, deterministic environment."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Many tests compare bits, which a card does not repeat.
if os.environ.get("SOPHON_TEST_CUDA") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

ROOT = Path(__file__).resolve().parent.parent


# Taken now: tests of recipes set the variable for a while.
DATA = Path(os.environ.get("SOPHON_DATA", ROOT.parent / "shared" / "data"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a file to one worker, but each handed case, minutes in all, to whichever is free."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    scheduler = LoadFileScheduling(config, log)
    usual = scheduler._split_scope
    scheduler._split_scope = lambda at: at if "test_cases.py::" in at else usual(at)
    return scheduler


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real image sets, from SOPHON_DATA or `../shared/data`, or skip."""
    folder = DATA
    if not (folder / "cifar10.npz").is_file():
        pytest.skip(f"the real image sets are not at {folder}: set SOPHON_DATA")
    return folder


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let a command be interrupted though this process ignores it: a shell's job in the background
    does, and what it starts inherits that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread: sums of several do not come in one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
