"""Tests use this checkout, and never the runs that the book made."""

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
settings.register_profile("same each time", derandomize=True, database=None, deadline=None)
settings.load_profile("same each time")
sys.path.insert(0, str(ROOT))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without it


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory):
    os.environ["DIFFCOURSE_HOME"] = str(tmp_path_factory.mktemp("home"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
