"""Shared by the tests of what does not fit a notebook's cell: processes, signals, the command line, the wheel."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-c", "import sys; from hidreamer.cli import main; sys.exit(main())"]   # `hidreamer`, installed or not


@pytest.fixture
def hidreamer(tmp_path):
    "Call the command line in a process of its own, in an empty folder: `hidreamer('info').stdout`."
    def call(*args, timeout=300, check=None, **kw):
        done = subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, cwd=tmp_path, timeout=timeout, **kw)
        if check is not None: assert done.returncode == check, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done
    return call
