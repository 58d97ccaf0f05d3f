"""A whole run through the command line, on the smallest preset: train, stop, resume, break, look."""
import json
import shutil
import signal
import subprocess
import time

import pytest
from conftest import COMMAND


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A finished run of the `debug` preset. Tests that change it work on a copy."
    folder = tmp_path_factory.mktemp("home") / "run"
    done = subprocess.run([*COMMAND, "train", "--preset", "debug", "--run", str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def rows(folder) -> list[dict]:
    "The rows of metrics.jsonl; a line that is being written right now does not count."
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_run_folder(home):
    config = json.loads((home / "config.json").read_text())
    assert config["preset"] == "debug" and config["seed"] == 0
    assert list(home.glob("events.out.tfevents.*"))
    steps = [r["step"] for r in rows(home)]
    assert steps == sorted(steps) and steps[-1] > 0
    newest = max(home.glob("checkpoints/step-*"))
    assert {"model.safetensors", "training.pt", "manifest.json"} <= {p.name for p in newest.iterdir()}


def test_running_again_changes_nothing(home, hidreamer):
    before = rows(home)
    hidreamer("train", "--run", home, check=0)
    assert rows(home)[:len(before)] == before and rows(home)[-1]["step"] == before[-1]["step"]


def test_looking(home, hidreamer):
    hidreamer("eval", home, "--episodes", 2, check=0)
    scores = json.loads((home / "scores.json").read_text())
    assert len(scores["returns"]) == 2 and scores["versions"]["torch"] and scores["hardware"]["cores"]
    assert "fewer than the 2" in " ".join(hidreamer("eval", home, "--episodes", 1, check=2).stderr.split())
    hidreamer("dream", home, "--horizon", 10, check=0)
    assert " in 50 steps" in hidreamer("play", home, "--max-steps", 50, check=0).stdout
    hidreamer("report", home, check=0)
    for name in ("dream.gif", "play.gif", "report/index.html"): assert (home / name).stat().st_size > 1000, name


def test_ctrl_c_saves_and_the_same_command_resumes(tmp_path, hidreamer):
    folder = tmp_path / "run"
    command = ["train", "--preset", "debug", "--run", str(folder)]
    p = subprocess.Popen([*COMMAND, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.time() + 120
    while not ((folder / "metrics.jsonl").exists() and any(r["step"] > 0 for r in rows(folder))):
        assert p.poll() is None and time.time() < end, p.communicate()
        time.sleep(.01)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 130 and "Traceback" not in err, err
    stopped, saved = rows(folder), int(max(folder.glob("checkpoints/step-*")).name[5:])
    assert 0 < stopped[-1]["step"] <= saved < 384 and f"at step {saved}" in " ".join(err.split())
    hidreamer(*command, check=0)
    assert rows(folder)[:len(stopped)] == stopped and rows(folder)[-1]["step"] > stopped[-1]["step"]


def test_damaged_checkpoints(home, tmp_path, hidreamer):
    folder = tmp_path / "run"
    shutil.copytree(home, folder)
    saved = sorted(folder.glob("checkpoints/step-*"))
    (saved[-1] / "model.safetensors").write_bytes(b"half")
    if len(saved) > 1:
        done = hidreamer("eval", folder, "--episodes", 2, check=0)
        assert f"{saved[-1].name} is damaged" in done.stderr
    for path in saved: (path / "training.pt").unlink()
    for command in (["eval", folder], ["train", "--run", folder]):
        done = hidreamer(*command, check=2)
        assert "training.pt is missing" in " ".join(done.stderr.split()) or "No intact one is left" in " ".join(done.stderr.split())


@pytest.mark.parametrize("options, said", [
    (["--env", "Pnog"], "Nearest: Pong"),
    (["--preset", "qick"], "quick"),
    (["--seed", "x"], "seed"),
    (["--ppo.clip", "-1"], "clip"),
    (["--no-such-field", "1"], "no-such-field"),
    (["--world", "nowhere"], "hidreamer"),
    (["--replay.capacity", "20"], "Raise --replay.capacity"),
    (["--ppo.real", "1", "--ppo.minibatches", "9"], "real states"),
])
def test_mistakes_before_anything_starts(tmp_path, hidreamer, options, said):
    preset = [] if "--preset" in options else ["--preset", "debug"]
    done = hidreamer("train", *preset, "--run", tmp_path / "run", *options, check=2)
    assert said in done.stderr and not (tmp_path / "run").exists()


def test_config_of_another_run(home, hidreamer):
    before = (home / "config.json").read_text()
    done = hidreamer("train", "--preset", "debug", "--seed", 7, "--run", home, check=2)
    assert "seed was 0, now 7" in " ".join(done.stderr.split()) and (home / "config.json").read_text() == before


def test_nothing_saved_yet(home, tmp_path, hidreamer):
    (tmp_path / "run").mkdir(); shutil.copy(home / "config.json", tmp_path / "run")
    assert "nothing has been saved" in " ".join(hidreamer("eval", tmp_path / "run", check=2).stderr.split())
