"""The package as others get it: the wheel, its requirements, README and sidebar."""
import ast
import configparser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata

import pytest
from conftest import ROOT

settings = configparser.ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

OPTIONAL = {"beartype", "imageio_ffmpeg", "minari", "stable_baselines3", "vector_quantize_pytorch"}   # imported where wanted, with a plain message or a skip


def names(requirements: str) -> set[str]:
    "The project names in a line of requirements, as pip compares them."
    return {re.split(r"[<>=!~\[;]", r)[0].lower().replace("_", "-") for r in requirements.split()}


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("pages", ROOT / ".ci" / "pages.py")
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    return module


def test_readme_is_in_step(pages):
    assert (ROOT / "README.md").read_text(encoding="utf-8") == pages.readme(), "run: python .ci/pages.py"


def test_sidebar_is_in_step(pages):
    text = (ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8")
    assert text == pages.sidebar(), "run: python .ci/pages.py"
    for nb in (ROOT / "nbs").rglob("*.ipynb"):
        if not any(part.startswith((".", "_")) for part in nb.relative_to(ROOT).parts): assert f"- {nb.relative_to(ROOT / 'nbs')}\n" in text


def test_readme_has_the_two_commands(pages):
    for command in ("pip install -e . && hidreamer train", "pip install -e '.[dev]' && nbdev_test && pytest -q"):
        assert f"\n{command}\n" in pages.readme()


def test_every_import_is_required():
    "What the package imports from outside stands in settings.ini, so that it runs in a fresh environment."
    known = names(settings["requirements"])
    owners = metadata.packages_distributions()
    for path in sorted((ROOT / "hidreamer").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))):
            if isinstance(node, ast.Import): roots = [a.name.split(".")[0] for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0: roots = [node.module.split(".")[0]]
            else: continue
            for root in set(roots) - set(sys.stdlib_module_names) - {"hidreamer", *OPTIONAL}:
                given = {d.lower().replace("_", "-") for d in owners.get(root, [root])}
                assert given & known, f"{path.relative_to(ROOT)} imports {root}, of {given}, which settings.ini does not require"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from the repository, unpacked."
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"; source.mkdir()   # a copy, because building leaves its traces in the source
    shutil.copytree(ROOT / "hidreamer", source / "hidreamer", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"): shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(folder), str(source)], check=True)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as z: z.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_wheel_says_what_settings_say(wheel):
    (info,) = wheel.glob("*.dist-info")
    about = metadata.PathDistribution(info)
    assert about.metadata["Name"] == settings["lib_name"] and about.version == settings["version"]
    plain = [r for r in about.requires if "extra ==" not in r]
    assert {re.split(r"[<>=!~\[; ]", r)[0].lower().replace("_", "-") for r in plain} == names(settings["requirements"])
    assert not any("nbdev" in r for r in plain)
    assert [e.value for e in about.entry_points if e.group == "console_scripts"] == [settings["console_scripts"].split("=")[1]]
    assert (info / "licenses" / "LICENSE").exists() or (info / "LICENSE").exists()
    assert about.metadata["Requires-Python"] == f">={settings['min_python']}"
    built = {p.relative_to(wheel).as_posix() for p in wheel.glob("hidreamer/**/*.py")}
    assert built == {p.relative_to(ROOT).as_posix() for p in (ROOT / "hidreamer").rglob("*.py")}


def test_wheel_runs_without_nbdev(wheel, tmp_path):
    "Every module of the wheel imports, from the wheel and not from the checkout, with nbdev and Jupyter out of reach."
    modules = sorted(".".join(p.relative_to(wheel).with_suffix("").parts) for p in wheel.glob("hidreamer/**/*.py") if p.stem[0] != "_")
    code = f"""
import importlib, sys
for name in ("nbdev", "execnb", "IPython", "ipykernel", "pytest"): sys.modules[name] = None   # importing these now fails
for name in {modules!r}:
    module = importlib.import_module(name)
    assert module.__file__.startswith({str(wheel)!r}), module.__file__
from hidreamer.cli import main
sys.exit(main(["info"]))
"""
    env = {**os.environ, "PYTHONPATH": str(wheel)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["commit"] is None   # an installed copy belongs to no checkout


@pytest.mark.parametrize("game, lost", [("Pong", 2.)])
def test_published_agents_play(game, lost, tmp_path):
    "Points lost, less those won, in 300 steps of a game, the mean of eight: at random 7."
    import torch

    from hidreamer.data.envs import make_envs
    from hidreamer.train import folder_of, load_agent
    kept = ROOT / "weights" / f"{game}.safetensors"
    assert kept.stat().st_size <= 16e6
    path = shutil.copy(kept, tmp_path)
    agent, config = load_agent(path, "cpu"), json.loads((folder_of(path) / "config.json").read_text())
    step, = (int(p.name[5:]) for p in (folder_of(path) / "checkpoints").glob("step-*"))
    assert config["env"] == game and step >= config["steps"]           # trained to the end
    envs = make_envs(game, 8, seed=5)
    (frames, _), first, total = envs.reset(), torch.ones(8, dtype=torch.bool), 0.
    agent.reset(); agent.seed(0)
    for _ in range(300):
        frames, rewards, terminated, truncated, _ = envs.step(agent.act(torch.from_numpy(frames), first).numpy())
        first, total = torch.from_numpy(terminated | truncated), total + rewards.sum()
    envs.close()
    assert -total / 8 < lost
