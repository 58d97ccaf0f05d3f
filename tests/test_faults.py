"""What a run survives, on real runs of seconds: signals, kills, a full disk, two owners, broken environments, NaN, and files that lie."""
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

import hidreamer.train as training
import hidreamer.worlds.hjepa as jepa
from hidreamer.core import HidreamerError
from hidreamer.data.envs import Frames, Games, make_envs
from hidreamer.run import Run
from hidreamer.studies.faults import FAULTS, KINDS, at_call, broken, corpus, disturbed, fuzz_one, learn, outcome, run_folders, short_run, spoil
from hidreamer.train import Trainer, load_agent, train

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = dict(seed=0)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def quiet(cfg):
    "The config of a run without its evaluation (see `studies.faults.live`)."
    return replace(cfg, episodes=7)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    "A run that nobody disturbed: its config and its outcome."
    cfg = quiet(short_run(tmp_path_factory.mktemp("truth") / "run"))
    learn(cfg)
    return cfg, outcome(cfg.folder)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    "The same of HJEPA, which learns from stored walks through two rooms."
    cfg = short_run(tmp_path_factory.mktemp("rooms") / "run", "hjepa")
    learn(cfg)
    return cfg, outcome(cfg.folder)


def finish(cfg):
    "Go on in peace; what the run came to."
    learn(cfg)
    return outcome(cfg.folder)


@pytest.mark.parametrize("world, learner", [k for k in KINDS if k[0] != "hjepa"])
def test_stopped_and_resumed_is_the_same(tmp_path, world, learner):
    "Stopped after any unit of work, with and without a save; every row and weight is that of the undisturbed run, for every world."
    rng = random.Random(world)
    whole, cfg = (quiet(short_run(tmp_path / name, world, learner)) for name in ("whole", "pieces"))
    learn(whole)
    for save in (True, False, True):
        t = Trainer(cfg)
        for _, _ in zip(range(rng.randint(1, 25)), t.work()): pass
        if save: t.save()
        t.close()
    assert finish(cfg) == outcome(whole.folder)


def test_evaluated_by_another_process(tmp_path, monkeypatch):
    "Stopped before, or during, its evaluation, a run is evaluated when it is resumed: the same scores, rollouts and weights. SHI has batch normalisation."
    few = training.held_out
    monkeypatch.setattr(training, "held_out", lambda agent, cfg, seed: few(agent, cfg, seed, envs=2, steps=60))
    for name in ("dream", "write_report"): monkeypatch.setattr(training, name, lambda *_, **__: None)
    whole, pieces = (short_run(tmp_path / name, "shi") for name in ("whole", "pieces"))
    train(whole)
    learn(pieces)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(training, "evaluate", training.evaluate); at_call(training, ("evaluate",), 1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"): train(pieces)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Frames, "step", Frames.step); at_call(Frames, ("step",), 70, broken)          # its environment breaks, too: evaluation begins anew
        train(pieces)
    assert outcome(pieces.folder)["returns"] is not None and outcome(pieces.folder) == outcome(whole.folder)


@pytest.mark.parametrize("kind", ["truth", "rooms"])
def test_killed_anywhere(tmp_path, kind, request):
    "SIGKILL at a random moment and at a random file operation, SIGTERM, Ctrl-C, in processes of their own; HJEPA's training, too."
    truth = request.getfixturevalue(kind)
    cfg = replace(truth[0], run=str(tmp_path / "run"))
    tried, end = disturbed(cfg, truth[1], ["SIGKILL inside a save", "SIGKILL", "SIGTERM", "SIGKILL inside a save", "Ctrl-C"], 5., random.Random(1))
    assert not any(end.values()), (tried, end)
    assert not any(t["unexplained"] or t["half"] or t["checkpoint_lost"] for t in tried)
    assert sum(t["status"] == -signal.SIGKILL for t in tried) >= 1


def test_rooms_stopped_anywhere(tmp_path, rooms, monkeypatch):
    "HJEPA: SIGTERM after any update is answered by a checkpoint of that very update, in either level; NaN ends it; the end is the same to the bit."
    cfg = replace(rooms[0], run=str(tmp_path / "run"))
    assert [len(Run(p).metrics()) > 3 for p in run_folders(rooms[0].folder)] == [True, True]
    first = Run(rooms[0].folder / "level1").latest().step              # all updates of level 1
    for k, level in ((70, "level1"), (400, "level1"), (first - 470 + 300, "level2")):
        with monkeypatch.context() as m:
            m.setattr(jepa.Stage, "update", jepa.Stage.update)
            def stop(f, args): signal.raise_signal(signal.SIGTERM); return f(*args)
            at_call(jepa.Stage, ("update",), k, stop)
            with pytest.raises(KeyboardInterrupt, match="SIGTERM"): learn(cfg)
        assert Run(cfg.folder / level).latest().damage() == ""
    with monkeypatch.context() as m:
        for name in ("level1_loss", "level2_loss"): m.setattr(jepa, name, getattr(jepa, name))
        at_call(jepa, ("level1_loss", "level2_loss"), 20, spoil)
        with pytest.raises(HidreamerError, match="not finite"): learn(cfg)
    assert finish(cfg) == rooms[1]


def test_rooms_damaged_and_owned(tmp_path, rooms):
    "HJEPA: a damaged checkpoint is named, never used; a second process is told who has the folder."
    cfg = replace(rooms[0], run=str(tmp_path / "run")); shutil.copytree(rooms[0].folder, cfg.folder)
    held = cfg.folder / "level2"
    code = f"import time; from hidreamer.run import Run; r = Run({str(held)!r}, {Run(held).config!r}); print('ready', flush=True); time.sleep(100)"
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert p.stdout.readline().startswith(b"ready")
        with pytest.raises(HidreamerError, match=f"process {p.pid} is training in this folder"): learn(cfg)
    finally: p.kill(); p.communicate()
    weights = Run(held).latest().path / "model.safetensors"
    data = bytearray(weights.read_bytes()); data[-1] ^= 1; weights.write_bytes(data)
    if len(Run(held).checkpoints()) == 1:
        with pytest.raises(HidreamerError, match="model.safetensors has changed"): learn(cfg)
        shutil.rmtree(held)
    assert finish(cfg) == rooms[1]


def test_signal_in_the_middle_of_a_step(tmp_path, truth, monkeypatch):
    "A step that would take a minute ends within seconds; the last checkpoint leads to the same end."
    cfg = replace(truth[0], run=str(tmp_path / "run"))
    def forever(f, args): os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)
    with monkeypatch.context() as m:
        m.setattr(training, "Stop", lambda: training_stop(grace=.5))
        m.setattr(training, "imagine", training.imagine); at_call(training, ("imagine",), 3, forever)
        began = time.time()
        with pytest.raises(KeyboardInterrupt, match="in the middle of a step"): learn(cfg)
        assert time.time() - began < 40
    assert finish(cfg) == truth[1]


training_stop = training.Stop


def test_full_disk(tmp_path, truth):
    "The disk is full at the k-th file operation: an error that says so, the checkpoint before it is intact, and with room again it goes on."
    cfg = replace(truth[0], run=str(tmp_path / "run"))
    for k in (3, 17, 31):
        with pytest.MonkeyPatch.context() as m:
            for name in ("fsync", "rename", "replace", "link"): m.setattr(os, name, getattr(os, name))
            def full(f, args): raise OSError(errno.ENOSPC, "No space left on device")
            at_call(os, ("fsync", "rename", "replace", "link"), k, full)
            t = None
            try: t = Trainer(cfg); t.learn()
            except HidreamerError as e: assert "full" in str(e) or "disk space" in str(e)
            finally:
                if t: t.close()
        if (last := Run(cfg.folder).checkpoints()): assert last[0].damage() == ""
        assert not list(cfg.folder.glob("checkpoints/.old-*"))
    assert finish(cfg) == truth[1]


def test_small_disk(tmp_path, truth):
    "A file system of 48 MB, where one may be mounted."
    small = tmp_path / "small"; small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "none", small]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode: pytest.skip("may not mount a file system")
    try:
        cfg = replace(truth[0], run=str(small / "run"))
        t = Trainer(cfg)
        for _, _ in zip(range(30), t.work()): pass
        t.save()
        with open(small / "ballast", "wb") as f:
            with pytest.raises(OSError):
                while True: f.write(bytes(1 << 16)); f.flush()
        with pytest.raises(HidreamerError, match="(?s)(full|disk space).*intact"): t.learn()
        t.close()
        (small / "ballast").unlink()
        assert finish(cfg) == truth[1]
    finally: subprocess.run(["umount", small], check=False)


def test_environment_that_dies(tmp_path, truth, monkeypatch):
    "An environment that raises is started anew, its games are put back, and the run is the same; it is counted."
    cfg = replace(truth[0], run=str(tmp_path / "run"))
    def broken(*_): raise BrokenPipeError("the console is gone")
    monkeypatch.setattr(Frames, "step", Frames.step); at_call(Frames, ("step",), 21, broken)
    assert finish(cfg) == truth[1]
    assert Run(cfg.folder).metrics()[-1]["env/restarts"] == 1


def test_killed_process_behind_an_environment(tmp_path):
    "The environment talks to a process; the process is killed between two steps."
    class Remote(Frames):
        def __init__(self, *a):
            super().__init__(*a)
            self.child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        def step(self, actions):
            self.child.stdin.write(b"x\n"); self.child.stdin.flush()
            if not self.child.stdout.readline(): raise EOFError("the process is gone")
            return super().step(actions)
        def close(self, **kw): self.child.kill(); self.child.communicate(); super().close()
    def make():
        plain = make_envs("Pong", 2)
        return Remote(plain.env, plain.cfg, "Pong", plain.actions, 0)
    def play(kill):
        games, rng = Games(make, seed=3), np.random.default_rng(0); games.reset()
        seen = []
        for i in range(20):
            if i == 11 and kill: games.env.child.kill(); games.env.child.wait()
            seen.append(games.step(rng.integers(3, size=2))[0].copy())
        games.close()
        return np.stack(seen), games.restarts
    (a, none), (b, one) = play(False), play(True)
    assert (none, one) == (0, 1) and (a == b).all()


@pytest.mark.parametrize("what", ["world", "policy"])
def test_nan(tmp_path, truth, monkeypatch, what):
    "A NaN stops the run and names its term; nothing of it is saved."
    cfg = replace(truth[0], run=str(tmp_path / "run"))
    with monkeypatch.context() as m:
        if what == "world":
            kind = training.WORLDS["hidreamer"][1]
            m.setattr(kind, "loss", kind.loss); at_call(kind, ("loss",), 3, spoil)
        else:
            kind = training.LEARNERS["ppo"][1]
            def bad(f, args): return f(*args) | dict(critic=float("nan"))
            m.setattr(kind, "learn", kind.learn); at_call(kind, ("learn",), 3, bad)
        with pytest.raises(HidreamerError, match="reward=nan" if what == "world" else "policy/critic=nan"): learn(cfg)
    last = Run(cfg.folder).latest()
    assert last is None or all(torch.isfinite(v).all() for v in last.model().values() if v.is_floating_point())
    assert finish(cfg) == truth[1]


def test_out_of_memory(tmp_path, truth, monkeypatch):
    cfg = replace(truth[0], run=str(tmp_path / "run"))
    def none_left(*_): raise torch.OutOfMemoryError("CUDA out of memory")
    with monkeypatch.context() as m:
        m.setattr(training, "imagine", training.imagine); at_call(training, ("imagine",), 3, none_left)
        with pytest.raises(HidreamerError, match="smaller --dream-batch or --horizon"): learn(cfg)
    assert finish(cfg) == truth[1]


def test_time_is_kept_for_saving(tmp_path, truth, monkeypatch):
    "`max_minutes` ends the work so early that a slow save still fits."
    cfg = replace(truth[0], run=str(tmp_path / "run"), steps=10**5, max_minutes=20 / 60)
    save = Run.save
    monkeypatch.setattr(Run, "save", lambda self, *a: (time.sleep(2), save(self, *a)))
    t = Trainer(cfg); t.learn(); t.close()
    assert time.time() - t.began < 21 and Run(cfg.folder).latest() is not None
    again = Trainer(cfg); again.learn(); again.close()
    assert again.clock["updates"] == t.clock["updates"]              # over is over


def test_two_processes(tmp_path):
    "The second is told who has the folder, since when; the lock of a dead one is no hindrance."
    code = f"import time; from hidreamer.run import Run; r = Run({str(tmp_path / 'run')!r}, {CONFIG}); print('ready', flush=True); time.sleep(100)"
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert p.stdout.readline().startswith(b"ready")
        with pytest.raises(HidreamerError, match=rf"process {p.pid} is training in this folder \(on \S+, since \d+-"): Run(tmp_path / "run", CONFIG)
    finally: p.kill(); p.communicate()
    assert (tmp_path / "run" / ".lock").read_text()
    Run(tmp_path / "run", CONFIG).close()
    assert not (tmp_path / "run" / ".lock").read_text()


def test_lock_without_locks(tmp_path, monkeypatch):
    "On a file system without locks the number of the process decides."
    import fcntl
    def none(*_): raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", none)
    Run(tmp_path / "run", CONFIG).close()
    import socket
    lock = tmp_path / "run" / ".lock"
    lock.write_text(json.dumps(dict(pid=os.getppid(), host=socket.gethostname(), since="today")))
    with pytest.raises(HidreamerError, match=f"process {os.getppid()}"): Run(tmp_path / "run", CONFIG)
    dead = subprocess.Popen(["true"]); dead.wait()
    lock.write_text(json.dumps(dict(pid=dead.pid, host=socket.gethostname(), since="today")))
    Run(tmp_path / "run", CONFIG).close()


def test_the_best_is_kept(tmp_path):
    with Run(tmp_path / "run", CONFIG, tensorboard=False) as run:
        for step, score in ((1, 5.), (2, 9.), (3, None), (4, 1.), (5, float("nan"))): run.save(step, dict(w=torch.zeros(1)), {}, score=score)
        assert [c.step for c in run.checkpoints()] == [5, 4, 2] and run.best().step == 2


def test_rows_after_the_checkpoint_are_cut(tmp_path):
    "Rows of the same step as the checkpoint, but written after it, are written again by the resumed run: they must go."
    with Run(tmp_path / "run", CONFIG, tensorboard=False) as run:
        run.log(1, dict(a=1)); run.save(1, dict(w=torch.zeros(1)), {}); run.log(1, dict(a=2))
    with Run(tmp_path / "run", CONFIG) as run: assert [r["a"] for r in run.metrics()] == [1]


def test_bombs(tmp_path, truth):
    "A run folder from a stranger: a pickle in place of the training state, a config that wants a planet."
    class Bomb:
        def __reduce__(self): return os.system, (f"touch {tmp_path / 'boom'}",)
    folder = tmp_path / "run"; shutil.copytree(truth[0].folder, folder)
    last = Run(folder).latest()
    torch.save(dict(clock=Bomb()), last.path / "training.pt")
    with pytest.raises(HidreamerError, match="could run any program"): last.training()
    config = json.loads((folder / "config.json").read_text())
    config["model"]["transformer"].update(width=2**20, layers=10**6, experts=[1])
    (folder / "config.json").write_text(json.dumps(config))
    for c in Run(folder).checkpoints()[:1]: shutil.rmtree(c.path)          # the older one is intact
    before = psutil.Process().memory_info().rss
    with pytest.raises(HidreamerError): load_agent(folder, "cpu")
    assert psutil.Process().memory_info().rss < before + 2**28 and not (tmp_path / "boom").exists()


LOADERS = ["weights", "training state", "manifest", "replay.json", "replay rows", "config.json", "metrics.jsonl", "dreamerv3 weights", "dreamerv3 YAML",
           "TwoRooms data"]


@pytest.fixture(scope="module")
def garbage(tmp_path_factory):
    home = tmp_path_factory.mktemp("garbage"); corpus(home)
    return home


@pytest.mark.parametrize("name", LOADERS)
def test_files_that_lie(garbage, name):
    "Some hundred changed files for each loader: read, or refused in words. (Ten thousand: python -m hidreamer.studies.faults fuzz)"
    (garbage / "ends.txt").unlink(missing_ok=True)
    r = fuzz_one(name, garbage, 120, seed=99, limit=30.)
    assert r["read"] + r["refused"] == 120 and not r["other"] and not r["died"] and not r["hung"] and not r["executed"], r["ends"]
    assert r["refused"] > 5 or name == "metrics.jsonl"      # of that one, lines that cannot be read are left out


def test_training_states_that_lie(garbage):
    "Intact files with strange things in them, given to a trainer: hardly one gets past it, and none crashes it, hangs or runs code."
    (garbage / "ends.txt").unlink(missing_ok=True)
    r = fuzz_one("training state in use", garbage, 60, seed=7, limit=30.)
    assert r["read"] + r["refused"] + r["other"] == 60 and not r["died"] and not r["hung"] and not r["executed"], r["ends"]
    assert r["refused"] > 20 and r["other"] <= 3, r["ends"]


def test_every_fault_is_listed():
    "The table in the docs has what was injected here."
    assert {"SIGKILL", "SIGKILL inside a save", "disk full", "environment raises", "NaN in the loss", "out of memory"} <= set(FAULTS)
