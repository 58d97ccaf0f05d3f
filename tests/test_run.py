"""The run folder under kill -9, signals, full disks and read-only folders."""
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hidreamer.core import HidreamerError
from hidreamer.run import Run, Stop

CONFIG = dict(seed=0, ppo=dict(horizon=15))

# A training loop reduced to its traces: one row a step, a checkpoint every fifth.
LOOP = """
import sys, time, torch
from hidreamer.run import Run, Stop
run = Run(sys.argv[1], dict(seed=0, ppo=dict(horizon=15)), tensorboard=False)
last = run.latest(); step = last.step if last else 0
if last: assert last.model()["w"].eq(step).all() and last.training()["step"] == step
class Pile:
    def save(self, path): path.mkdir(); (path/"frames.bin").write_bytes(bytes(200_000))
print("ready", step, flush=True)
with Stop() as stop:
    while step < int(sys.argv[2]):
        step += 1
        run.log(step, dict(value=step))
        if step % 5 == 0: run.save(step, dict(w=torch.full((50_000,), float(step))), dict(step=step), Pile())
        time.sleep(.002)
        if stop: run.save(step, dict(w=torch.full((50_000,), float(step))), dict(step=step), Pile()); sys.exit(130)
"""


def start(folder, steps=10**6):
    "The loop in a process of its own, once it has logged eight steps more and saved."
    p = subprocess.Popen([sys.executable, "-c", LOOP, str(folder), str(steps)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert (line := p.stdout.readline()).startswith("ready"), p.stderr.read()
    log = folder / "metrics.jsonl"
    while not log.exists() or len(log.read_bytes().splitlines()) < int(line[6:]) + 8:
        assert p.poll() is None, p.stderr.read()
        time.sleep(.01)
    return p


def test_kill_at_any_moment(tmp_path):
    rng, reached = random.Random(0), 0
    for _ in range(4):
        p = start(tmp_path / "run")
        time.sleep(rng.random() * .3)
        p.kill(); p.communicate()
        with Run(tmp_path / "run", CONFIG) as run:
            last = run.latest()
            assert last.step > reached and last.model()["w"].eq(last.step).all()
            assert [r["step"] for r in run.metrics()] == list(range(1, last.step + 1))
            assert len(run.checkpoints()) <= 2 and not list((tmp_path / "run" / "checkpoints").glob(".*"))
            reached = last.step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_after_a_whole_step(tmp_path, number):
    p = start(tmp_path / "run")
    p.send_signal(number)
    p.communicate(timeout=60)
    assert p.returncode == 130
    run = Run(tmp_path / "run")
    assert run.latest().step == run.metrics()[-1]["step"]


def test_second_signal_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt):
        with Stop() as stop:
            signal.raise_signal(signal.SIGINT); assert stop
            signal.raise_signal(signal.SIGINT)


def test_one_process_at_a_time(tmp_path):
    p = start(tmp_path / "run")
    try:
        with pytest.raises(HidreamerError, match=f"process {p.pid} is training in this folder"): Run(tmp_path / "run", CONFIG)
        Run(tmp_path / "run")   # reading is allowed
    finally: p.kill(); p.communicate()
    Run(tmp_path / "run", CONFIG).close()


def test_full_disk_keeps_what_was_saved(tmp_path):
    "A limit on the size of files makes the same errors as a full disk, and needs no special file system."
    run = Run(tmp_path / "run", CONFIG, tensorboard=False)
    run.log(1, dict(value=1)); run.save(1, dict(w=torch.zeros(10)), dict(step=1))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        with pytest.raises(HidreamerError, match="full.*step 1 is intact"): run.save(2, dict(w=torch.zeros(50_000)), dict(step=2))
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "run" / "metrics.jsonl").stat().st_size + 10, old[1]))
        with pytest.raises(HidreamerError, match="full.*step 1 is intact"): run.log(2, dict(value=2))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert [c.step for c in run.checkpoints()] == [1] and run.latest().model()["w"].shape == (10,)
    assert [r["step"] for r in run.metrics()] == [1]
    run.log(2, dict(value=2)); run.save(2, dict(w=torch.ones(10)), dict(step=2))   # and it goes on once there is room
    assert [r["step"] for r in run.metrics()] == [1, 2] and run.latest().step == 2
    run.close()


def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    home = tmp_path if os.geteuid() else Path("/sys")   # root may write everywhere but there
    if not home.exists(): pytest.skip("root, and no /sys")
    try:
        with pytest.raises(HidreamerError, match="may not be written to.*--run DIR"): Run(home / "run", CONFIG)
    finally: tmp_path.chmod(0o700)


def test_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HidreamerError, match="Cannot write"): Run(tmp_path / "file" / "run", CONFIG)
