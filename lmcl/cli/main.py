"""`lmcl`: commands parse and print; the work is a function that can be called without click."""

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from lmcl.errors import LmclError
from lmcl.utils.malloc import keep_freed_memory

_ELSEWHERE = {
    "eval": ("lmcl.evaluation.evaluate_run", "Judge a run's model on a part or on another set."),
    "export": (
        "lmcl.inference.export",
        "Write a model as torch.export program or ONNX, with parity.",
    ),
    "gmad": ("lmcl.report.gmad", "Pairs of images on which two models contradict each other."),
    "score": ("lmcl.cli.score", "Score images, folders, tables and shards; a quality gate."),
    "report": ("lmcl.cli.report", "Write or compare reports of finished runs."),
    "saliency": ("lmcl.inference.saliency_overlay", "Draw where a model looks in photographs."),
    "sweep": ("lmcl.cli.sweep", "The 10-split protocol, seeds, ladders of configurations."),
}
_BENCHES = {
    "build": ("lmcl.bench.build", "Packing shards against reading, hashing and decoding alone."),
    "contrastive": ("lmcl.bench.contrastive", "The loss against eager, compiled and chunked."),
    "loader": ("lmcl.bench.loader", "Images per second against what people use today."),
    "manifest": ("lmcl.bench.manifest", "Opening and splitting a set of ten million samples."),
    "score": ("lmcl.bench.score", "Scoring a folder against the bare model."),
    "step": ("lmcl.bench.step", "One optimiser step, part by part, beside the usual loop."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called: `lmcl --help` stays quick."""

    def __init__(
        self, *args: Any, elsewhere: dict[str, tuple[str, str]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.elsewhere = elsewhere or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, sorted."""
        return sorted({*super().list_commands(ctx), *self.elsewhere})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now if it lives elsewhere."""
        if cmd_name in self.elsewhere:
            module, _ = self.elsewhere[cmd_name]
            found: click.Command = importlib.import_module(module).command
            return found
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in `--help`, without importing what it lists."""
        rows = []
        for name in self.list_commands(ctx):
            if name in self.elsewhere:
                rows.append((name, self.elsewhere[name][1]))
            elif (command := super().get_command(ctx, name)) is not None:
                rows.append((name, command.get_short_help_str(limit=80)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def config_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options by which a run is named: a file and changes to it."""
    file = click.option(
        "--config",
        "config_file",
        required=True,
        type=click.Path(path_type=Path),
        help="TOML file of the run (see configs/).",
    )
    change = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change one field; repeatable.",
    )
    return file(change(function))


@click.group(
    cls=LazyGroup,
    elsewhere=_ELSEWHERE,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="EXAMPLES: lmcl demo · lmcl train --config configs/demo.toml · lmcl report runs/demo",
)
@click.version_option(package_name="lmcl")
def cli() -> None:
    """Learn to judge the quality of images without a reference."""


@cli.command()
@config_options
@click.option("--output", type=click.Path(path_type=Path), help="Run folder [runs/<config name>].")
@click.option("--resume", default="", metavar="auto|PATH", help="Go on from a checkpoint.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--no-progress", is_flag=True, help="No progress bars.")
def train(
    config_file: Path,
    overrides: tuple[str, ...],
    output: Path | None,
    resume: str,
    dry_run: bool,
    no_progress: bool,
) -> None:
    """Train a student and its teacher, evaluate, and write the report.

    Several processes: accelerate launch --num_processes 2 train.py --config FILE
    """
    from lmcl.config import load_config
    from lmcl.training.setup import fit, plan

    config = load_config(config_file, overrides)
    folder = output or Path("runs") / config_file.stem
    if dry_run:
        click.echo(plan(config, folder))
        return
    outcome = fit(config, folder, resume=resume, progress=not no_progress)
    if outcome.is_main:
        click.echo(outcome.summary())


@cli.command("show-config")
@click.argument("config_file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one field.")
def show_config(config_file: Path, overrides: tuple[str, ...]) -> None:
    """Print the whole effective configuration of a file, defaults included."""
    from lmcl.config import dump_config, load_config

    click.echo(dump_config(load_config(config_file, overrides)), nl=False)


@cli.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Run folder.",
)
@click.option("--again", is_flag=True, help="Throw away what the folder holds and start over.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one field.")
@click.option("--no-progress", is_flag=True, help="No progress bars.")
def demo(output: Path, again: bool, overrides: tuple[str, ...], no_progress: bool) -> None:
    """Make a synthetic set, train the full method on it, and leave a report: some minutes."""
    from lmcl.demo import run_demo

    click.echo(run_demo(output, again=again, overrides=overrides, progress=not no_progress))


@cli.group(cls=LazyGroup, elsewhere=_BENCHES)
def bench() -> None:
    """Measure this machine; every figure stands beside its baseline from the same run."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors become one sentence on stderr and an exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # A run opens a loader for every pass; which decoder it took is said once, by the session.
    for noisy in ("accelerate", "httpx", "pipeline.loader", "timm", "torch", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # The usual loaders are measured as their users run them: Pillow's gain a fifth by it.
    if (sys.argv[1:] if arguments is None else arguments)[:2] != ["bench", "loader"]:
        keep_freed_memory()
    with report_errors():
        cli.main(arguments, standalone_mode=False)


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn the exceptions of ours, the system and click, and an interrupt, into a sentence."""
    try:
        yield
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        click.echo(f"error: {_sentence(error)}", err=True)
        sys.exit(code)


def _exit_code(error: Exception) -> int | None:
    """The exit code of what is wrong with the world; None for a bug, which keeps its traceback."""
    from pipeline.errors import PipelineError
    from shards.errors import ShardError

    ours = (LmclError, PipelineError, ShardError)
    if isinstance(error, ours):
        return error.exit_code
    return 1 if isinstance(error, OSError) else None


def _sentence(error: Exception) -> str:
    # A folder that may not be written, a full disk: the system's words, without its number.
    if isinstance(error, OSError) and error.filename:
        return (
            f"{error.filename}: {error.strerror}; check its rights and space, or name another place"
        )
    return str(error)


if __name__ == "__main__":
    main()
