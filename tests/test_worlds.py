"""Every world goes through the same command: train, dream, report."""
import json

import pytest


@pytest.mark.parametrize("world", ["dreamer", "hdreamer"])
def test_a_world_is_an_option(tmp_path, hidreamer, world):
    folder = tmp_path / "run"
    hidreamer("train", "--world", world, "--env", "Pong", "--preset", "debug", "--run", folder, check=0)
    assert len(json.loads((folder / "scores.json").read_text())["returns"]) == 2
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("world/kl" in k for row in rows for k in row)
    hidreamer("train", "--run", folder, check=0)                       # resumes without being told which world it is
    hidreamer("dream", folder, "--horizon", 10, check=0)
    assert (folder / "dream.gif").stat().st_size > 1000
    assert world in (folder / "report" / "index.html").read_text()


def test_a_world_cannot_change_on_resume(tmp_path, hidreamer):
    done = hidreamer("train", "--world", "dremer", "--run", tmp_path / "run", check=2)
    assert "Nearest: dreamer" in " ".join(done.stderr.split())
