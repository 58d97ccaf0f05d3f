"""Two rooms on the command line: mistakes, an interruption, and going on."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

SMALL = ["tworooms", "--transitions", "6000", "--epochs", "8", "--trials", "4", "--budget", "256"]


@pytest.mark.parametrize("args, said", [
    (["--step-skip", "1"], "must be at least 2"),
    (["--transitions", "0"], "is an empty data set"),
    (["--layout", "tworooms"], "Nearest: "),
    (["--mode", "l2"], "holds no level 1"),
])
def test_mistakes(hidreamer, tmp_path, args, said):
    done = hidreamer("tworooms", "--output", str(tmp_path / "x"), *args, check=2)
    assert said in " ".join(done.stderr.split()), done.stderr


def test_interrupted_and_resumed(tmp_path):
    "Ctrl-C in the middle of level 1 saves it."
    code = "import sys; from hidreamer.cli import main; sys.exit(main())"
    env = dict(os.environ, OMP_NUM_THREADS="1")
    out = tmp_path / "a"; args = [sys.executable, "-c", code, *SMALL, "--mode", "l1", "--output", str(out)]
    p = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    log = out / "level1" / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size): assert p.poll() is None, p.stderr.read(); time.sleep(.05)
    p.send_signal(signal.SIGINT); err = p.communicate(timeout=120)[1]
    assert p.returncode == 130 and "is saved at update" in " ".join(err.split()), err
    saved = max(json.loads(m.read_text())["step"] for m in (out / "level1" / "checkpoints").glob("*/manifest.json"))
    done = subprocess.run(args, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0 and "two levels" not in done.stdout and "flat" in done.stdout, done.stderr
    assert 50 <= saved < 153 and (out / "level1" / "checkpoints" / "step-000000153").is_dir()
    assert json.loads((out / "summary.json").read_text())["planners"]["flat"]["seconds_per_episode"] > 0
