"""Which runs a sweep consists of, where each lies, and how far it is."""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmcl.config import Config, binding_differences, find_config, load_config, load_run_config
from lmcl.errors import ConfigError, LmclError
from lmcl.training.run_dir import RunDir
from shards.read import open_set
from shards.text import printable

Over = Literal["splits", "seeds"]

BASE = "base.toml"
"""What the other files of a folder build upon; a folder's sweep leaves it out."""
_FINISHED = ("metrics.json", "protocol.json", "report.html")
_NUMBERED = re.compile(r"(.+)-\d+")
_SEEDS = 5
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
"""Names become folders, jobs and lines of batch scripts."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run of a sweep."""

    model: str
    """Name of its configuration file: what is compared."""
    label: str
    """Its split or seed: what repeats."""
    file: Path
    config: Config
    """The file with the overrides, as it was when the sweep was planned."""
    folder: Path

    @property
    def name(self) -> str:
        """How the run is called in messages and as a job."""
        return f"{self.model}/{self.label}"

    @property
    def is_finished(self) -> bool:
        """Whether the run wrote everything a run leaves; its report comes last."""
        return all((self.folder / name).is_file() for name in _FINISHED)

    def command(self, trainer: str, written: Path, *, progress: bool) -> list[str]:
        """The command line that starts the run, or takes it up where it stopped.

        Args:
            trainer: What trains, as a shell would read it; empty: `lmcl train` in this Python.
            written: Where the run's whole configuration was written.
            progress: Let it show bars.
        """
        first = shlex.split(trainer) or [sys.executable, "-m", "lmcl", "train"]
        place = ["--output", str(self.folder), "--resume", "auto"]
        quiet = [] if progress else ["--no-progress"]
        return [*first, "--config", str(written), *place, *quiet]


def plan_tasks(
    paths: Sequence[Path],
    over: Over,
    *,
    count: int | None,
    overrides: Sequence[str],
    output: Path,
) -> list[Task]:
    """All runs, those of one split or seed side by side, so that a stopped sweep is comparable.

    Args:
        paths: Configuration files, and folders of them.
        over: `splits`: every split of the same draw as `data.split`. `seeds`: `train.seed` and the
            numbers after it.
        count: How many splits (all) or seeds (5).
        overrides: `key=value` for every run.
        output: Folder of the sweep; runs lie in `<configuration>/<split or seed>` below it.

    Raises:
        ConfigError: If there is nothing to do, a configuration cannot be read, a name could not
            stand in a batch script, or a run's folder holds another configuration (exit code 5).
        LmclError: If there are fewer splits than asked for (exit code 4).
    """
    by_model: list[list[Task]] = []
    for file in config_files(paths):
        config = load_config(file, overrides)
        changes = _split_changes(config, count) if over == "splits" else _seeds(config, count)
        by_model.append(
            [
                Task(
                    model=file.stem,
                    label=label,
                    file=file,
                    config=load_config(file, (*overrides, change)),
                    folder=output / file.stem / label,
                )
                for label, change in changes
            ]
        )
    longest = max(len(tasks) for tasks in by_model)
    tasks = [tasks[i] for i in range(longest) for tasks in by_model if i < len(tasks)]
    for task in tasks:
        _check_folder(task)
    return tasks


def config_files(paths: Sequence[Path]) -> list[Path]:
    """Files as they were named, folders as their TOML files in order, without `base.toml`.

    Those that come with the project are known by name (`lmcl.config.find_config`).

    Raises:
        ConfigError: If there is none, two have the same name, or one is named by other signs than
            letters, digits, dot, dash and underscore.
    """
    files: list[Path] = []
    for path in (find_config(path, folders=True) for path in paths):
        inside = [file for file in sorted(path.glob("*.toml")) if file.name != BASE]
        if path.is_dir() and not inside:
            raise ConfigError(f"{path}: no TOML file in this folder (besides {BASE}); name another")
        files += inside if path.is_dir() else [path]
    for file in files:
        _check_name(file.stem, f"{printable(file)}: rename the file", what="configuration")
    stems = [file.stem for file in files]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice:
        raise ConfigError(
            f"two configurations are called {twice!r}, and their runs would share a folder; rename "
            "one of the files"
        )
    return files


def _split_changes(config: Config, count: int | None) -> list[tuple[str, str]]:
    """Label and override of every split drawn together with the configuration's own."""
    if config.data.is_joint:
        raise ConfigError(
            "data.sets has several sets, each with a split of its own; go over seeds (--over "
            "seeds), or write a configuration for each choice of splits"
        )
    root, split = config.data.root, config.data.split
    numbered = _NUMBERED.fullmatch(split)
    if numbered is None:
        raise ConfigError(
            f"data.split = {split!r} stands alone, there are no others of its kind; go over seeds "
            "(--over seeds), or set data.split to the first of several, e.g. 70-10-20-seed123-00"
        )
    shard_set = open_set(root, cache=Path(config.data.cache) if config.data.cache else None)
    _check_name(split, "draw one under another name with `lmcl-shard split`", what="split")
    found = sorted(Path(name).stem for name in shard_set.store.names("splits"))
    drawn = [name for name in found if re.fullmatch(re.escape(numbered[1]) + r"-[0-9]+", name)]
    if not drawn or (count is not None and count > len(drawn)):
        raise LmclError(
            f"{root}: {count or 'at least one'} splits like {split!r} were asked for, there are "
            f"{len(drawn)}; draw them with `lmcl-shard split {root}`",
            exit_code=4,
        )
    return [(name, f"data.split='{name}'") for name in drawn[:count]]


def _seeds(config: Config, count: int | None) -> list[tuple[str, str]]:
    first = config.train.seed
    seeds = range(first, first + (_SEEDS if count is None else count))
    return [(f"seed-{seed}", f"train.seed={seed}") for seed in seeds]


def _check_name(name: str, way_out: str, *, what: str) -> None:
    """Refuse what a shell, SLURM or a file system could take for something else.

    Raises:
        ConfigError: Names it.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"the {what}'s name {printable(name)!r} becomes a folder and a job of the sweep; it "
            "must begin with a letter of A-Z, a digit or an underscore and go on with these, dots "
            f"and dashes; {way_out}"
        )


def _check_folder(task: Task) -> None:
    folder = RunDir(task.folder)
    if not folder.has_begun or not folder.config.exists():
        return
    changed = binding_differences(task.config, load_run_config(folder.config))
    if changed:
        raise ConfigError(
            f"{task.folder}: holds a run of another configuration (asked / found there): "
            f"{'; '.join(changed[:5])}; choose another --output, or remove that folder",
            exit_code=5,
        )
