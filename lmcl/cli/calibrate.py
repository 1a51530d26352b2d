"""`lmcl calibrate`: what a finished run's scores mean, for models of earlier versions."""

from pathlib import Path

import click


@click.command(epilog="EXAMPLES: lmcl calibrate runs/livec")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--no-progress", is_flag=True, help="No progress bars.")
def command(run: Path, batch_size: int, no_progress: bool) -> None:
    """Calibrate a run's model: percentiles, intervals, `unusual`, adaptive crops.

    Training does it by itself; this is for runs of version 0.1, and needs the run's set.
    """
    from lmcl.evaluation.calibrate import calibrate_run
    from lmcl.evaluation.calibration import CALIBRATION
    from shards.text import printable

    found = calibrate_run(run, batch_size=batch_size, progress=not no_progress).calibration
    click.echo(f"{printable(run / 'model' / CALIBRATION)}: {found.summary}")
