"""What the README promises is what the repository holds."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from huggingface_hub.utils import filter_repo_objects

from vilex import config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def front_matter() -> dict:
    return yaml.safe_load(README.split("---")[1])


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [line.split("#")[0].strip() for line in lines]
    return dict(line.split("==") for line in found if line and not line.startswith("-r"))


def test_ci_calls_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "```sh\nmake test\n```" in README
    assert script.splitlines()[-1] == "make test"


def test_the_space_runs_the_pinned_gradio():
    assert front_matter()["sdk_version"] == pins("requirements.txt")["gradio"]
    assert (ROOT / front_matter()["app_file"]).is_file()
    assert len(front_matter()["short_description"]) <= 60  # the hub refuses longer ones


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_is_pinned(name):
    assert pins(name)
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins(name).values())


def test_every_file_the_readme_names_is_there():
    named = re.findall(r"`((?:vilex|train|app|assets|benchmarks)/[\w./-]+)`", README)
    assert len(named) >= 10
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_the_default_weights_are_the_ones_the_readme_describes():
    assert f"assets/weights/{config.DEFAULT_MODEL}/README.md" in README
    folder = ROOT / "assets" / "weights" / config.DEFAULT_MODEL
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    assert sum(sizes) <= 100e6
    assert max(sizes) <= 50e6


def test_a_space_gets_all_that_the_app_needs_and_no_more():
    recipe = subprocess.run(
        ["make", "-n", "publish", "SPACE=a/b"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    patterns = {flag: re.findall(rf'--{flag} "([^"]+)"', recipe.stdout) for flag in ("include", "exclude")}
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files += ["vilex/__pycache__/cli.pyc", ".venv/lib/site-packages/vilex/README.md"]
    sent = list(filter_repo_objects(files, allow_patterns=patterns["include"], ignore_patterns=patterns["exclude"]))
    needed = {"app.py", "requirements.txt", "README.md", "LICENSE_WEIGHTS"}
    needed |= {file for file in files[:-2] if file.startswith(("app/", "vilex/", "assets/"))}
    assert needed <= set(sent)
    assert not [file for file in sent if file.startswith(("tests/", "train/", ".venv/")) or "__pycache__" in file]
