"""The command line: what a user meets when something is wrong, and how long it takes to say so."""
import json
import resource

import pytest


def test_help_is_quick(hidreamer):
    "In seconds of processor time, which other work on the machine does not change."
    def spent(): u = resource.getrusage(resource.RUSAGE_CHILDREN); return u.ru_utime + u.ru_stime
    seconds = []
    for _ in range(3):
        began = spent(); hidreamer("--help", check=0); seconds.append(spent() - began)
    assert 0 < min(seconds) < .5


def test_info(hidreamer):
    info = json.loads(hidreamer("info", check=0).stdout)
    assert info["versions"]["torch"] and info["hardware"]["cores"] >= 1


@pytest.mark.parametrize("args, said", [
    (["trian"], "Nearest: train"),
    (["eval", "nowhere"], "no run here"),
    (["report"], "at least one run folder"),
    (["play", "nowhere", "--out", "film.txt"], "must end in .gif or .mp4"),
    (["play", "nowhere", "--fps", "0"], "fps=0: must be at least 1"),
    (["info", "--hlep"], "Unrecognized"),
])
def test_mistakes_are_explained(hidreamer, args, said):
    done = hidreamer(*args, check=2)
    assert said in " ".join(done.stderr.split()), done.stderr
