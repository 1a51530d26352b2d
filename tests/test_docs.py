"""README and docs say what is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
ROOT_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES = [*(REPO / name for name in ROOT_PAGES), *sorted((REPO / "docs").rglob("*.md"))]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_wrapped_at_100_columns_but_for_tables_and_code(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    long = [
        line
        for line in text.splitlines()
        # Indented by four it is code; a word alone, such as an address, cannot be wrapped.
        if len(line) > 100
        and not line.startswith("    ")
        and not line.lstrip().startswith("|")
        and " " in line.strip("*- ")
    ]
    assert not long, f"{len(long)} lines of {page.name} are too long, e.g. {long[0][:60]}"


def test_every_row_of_security_names_a_test_that_is_there() -> None:
    lines = (REPO / "SECURITY.md").read_text().splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| ")]
    rows = [row for row in rows if row[-1].strip() != "test"]
    assert len(rows) >= 20
    for row in rows:
        named = re.findall(r"`(tests/[^`]+)`", row[-1])
        assert named, f"no test for {row[0]}"
        for name in named:
            assert "def test_" in (REPO / name).read_text(), name


def test_the_tree_in_the_readme_is_the_tree() -> None:
    tree = re.search(r"```\n(shards/.*?)```", (REPO / "README.md").read_text(), flags=re.DOTALL)
    assert tree is not None
    named, parent = set(), ""
    for line in tree[1].splitlines():
        name = line.split()[0]
        parent = parent if line.startswith(" ") else name
        named.add(parent + name if line.startswith(" ") else name)
    assert [name for name in named if not (REPO / name).exists()] == []
    folders = {f"lmcl/{path.name}/" for path in (REPO / "lmcl").iterdir() if path.is_dir()}
    assert folders - named <= {"lmcl/__pycache__/"}


def test_the_citation_is_valid_and_names_this_version() -> None:
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((REPO / "CITATION.cff").read_text())
    version = re.search(r'^version = "(.+)"$', (REPO / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert found["version"] == version[1]
    assert "2406.19247" in found["preferred-citation"]["url"]
    assert found["preferred-citation"]["authors"][0]["family-names"] == "Gao"


def test_the_hook_asks_no_host_for_anything_and_can_be_run() -> None:
    file = REPO / ".githooks" / "pre-commit"
    assert file.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", file]).returncode == 0
    assert "://" not in file.read_text()
