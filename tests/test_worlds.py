"""Every world goes through the same command: train, dream, report."""
import json
import shutil
import subprocess

import pytest
import torch
from conftest import COMMAND

from hidreamer.evaluate.imagined import Reader, main
from hidreamer.train import beside, preset, put_beside
from hidreamer.worlds.rssm import Dreamer


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "The finished run of a world: `home(world)`. Each is trained once; tests that change it work on a copy."
    folder = tmp_path_factory.mktemp("homes")
    def of(world):
        if not (folder / world).exists():
            command = [*COMMAND, "train", "--world", world, "--env", "Pong", "--preset", "debug", "--run", str(folder / world)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return folder / world
    return of


@pytest.mark.parametrize("world, log", [("dreamer", "kl"), ("hdreamer", "kl"), ("shi", "kept_changed"), ("original-shi", "nll_changed")])
def test_a_world_is_an_option(tmp_path, monkeypatch, home, hidreamer, world, log):
    folder = tmp_path / "run"
    shutil.copytree(home(world), folder)
    assert len(json.loads((folder / "scores.json").read_text())["returns"]) == 2
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any(f"world/{log}" in k for row in rows for k in row)
    assert json.loads((folder / "costs.json").read_text())["rollout"][world]["flops"] > 0
    hidreamer("train", "--run", folder, check=0)                       # resumes without being told which world it is
    hidreamer("dream", folder, "--horizon", 10, check=0)
    assert (folder / "dream.gif").stat().st_size > 1000
    assert world in (folder / "report" / "index.html").read_text()
    if world == "shi":
        monkeypatch.setattr(Reader, "updates", 300)
        where_things_are(folder, tmp_path / "state.json")


def where_things_are(folder, out):
    main([str(folder), "--out", str(out), "--steps", "2000", "--starts", "64"])
    told = json.loads(out.read_text())["runs"]["run"]
    assert {r["thing"] for r in told["rows"]} == {"ball_x", "ball_y", "player_y", "enemy_y"}
    assert all(r["true"]["r2"] > max(.5, r["dream"]["r2"]) for r in told["rows"] if r["thing"] in ("player_y", "enemy_y"))      # it has learned nothing yet


def test_a_scenery_that_is_known_is_restored():
    "After 32 batches the frames that it was measured on are gone. They are not missed."
    old, new = (Dreamer(preset("debug", "dreamer").model, 6) for _ in range(2))
    some = lambda: torch.randint(0, 255, (2, 8, 3, 64, 64), dtype=torch.uint8)
    for _ in range(33): old.scenery.learn(some())
    put_beside(new, beside(old)); new.load_state_dict(old.state_dict()); new.scenery.learn(some())
    assert torch.equal(new.scenery.median, old.scenery.median)


def test_a_world_cannot_change_on_resume(tmp_path, hidreamer):
    done = hidreamer("train", "--world", "dremer", "--run", tmp_path / "run", check=2)
    assert "Nearest: dreamer" in " ".join(done.stderr.split())


def test_two_worlds_are_compared(tmp_path, home, hidreamer):
    run = {w: home(w) for w in ("shi", "dreamer")}
    hidreamer("compare", run["shi"], "--against", run["dreamer"], "--out", tmp_path / "page", check=0)
    page = (tmp_path / "page" / "report.md").read_text()
    assert "undecided" in page and "1 pair" in page                     # one seed of one game decides nothing
    same = hidreamer("compare", run["shi"], "--against", run["shi"], "--out", tmp_path / "same", check=2)
    assert "both" in same.stderr and not (tmp_path / "same").exists()
