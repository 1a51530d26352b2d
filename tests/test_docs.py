"""README and docs say what is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_begins_with_the_two_commands() -> None:
    lines = [line.split("#")[0].strip() for line in (REPO / "README.md").read_text().splitlines()]
    commands = [line for line in lines if line.startswith(("make ", "lmcl", "accelerate"))]
    assert commands[:2] == ["make demo", "make test"]


def test_every_command_and_option_of_the_readme_exists() -> None:
    text = (REPO / "README.md").read_text()
    for line in re.findall(r"^    ((?:lmcl|lmcl-shard) .*)$", text, flags=re.MULTILINE):
        words = line.split("#")[0].split()
        module = {"lmcl": "lmcl.cli.main", "lmcl-shard": "shards.cli"}[words[0]]
        call = [sys.executable, "-c", f"from {module} import main; main()", words[1], "--help"]
        done = subprocess.run(call, cwd=REPO, capture_output=True, text=True)
        assert done.returncode == 0, line
        for option in (word for word in words if word.startswith("--")):
            assert option in done.stdout, f"{line}: no {option}"
