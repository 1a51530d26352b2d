"""`lmcl threshold`: choose the quality below which images are sorted out, by what it costs."""

from pathlib import Path

import click

from shards.number_range import NumberRange


@click.command(
    epilog="EXAMPLES: lmcl threshold runs/livec --bad-below 0.4 --precision .95 · "
    "lmcl threshold runs/livec --bad-below 0.4 --recall .9 --name careful · "
    "lmcl score photos --model runs/livec --keep careful --move-to rejected --dry-run"
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--bad-below",
    type=NumberRange(0, 1, min_open=True),
    required=True,
    help="People's quality in 0..1, higher = better, below which an image is bad (on a scale from "
    "1 to 5, 0.4 is 2.6).",
)
@click.option(
    "--precision",
    type=NumberRange(0, 1, min_open=True),
    help="At least this share of the rejected images is bad; as many as possible are found.",
)
@click.option(
    "--recall",
    type=NumberRange(0, 1, min_open=True),
    help="At least this share of the bad images is rejected; as few as possible are.",
)
@click.option(
    "--reject-share",
    type=NumberRange(0, 1, min_open=True),
    help="At most this share of all images is rejected.",
)
@click.option("--name", help="Name of the rule, for --keep [from the options].")
def command(
    run: Path,
    bad_below: float,
    precision: float | None,
    recall: float | None,
    reject_share: float | None,
    name: str | None,
) -> None:
    """Choose a cut on the val part, judge it on the test part, keep it in the model folder."""
    from lmcl.evaluation.threshold import Target
    from lmcl.report.threshold import choose_threshold
    from shards.text import printable

    asked: dict[Target, float | None] = {
        "precision": precision,
        "recall": recall,
        "reject-share": reject_share,
    }
    given = [(target, value) for target, value in asked.items() if value is not None]
    if len(given) != 1:
        raise click.UsageError("give one of --precision, --recall and --reject-share")
    ((target, wanted),) = given
    rule, page = choose_threshold(run, target=target, wanted=wanted, bad_below=bad_below, name=name)
    click.echo(f"{rule.name}: reject what scores below {rule.cut:.4f} of quality")
    for part, found in (("val, where it was chosen", rule.val), ("test", rule.test)):
        if found is not None:
            click.echo(
                f"{part}: precision {found.precision.to_text()}, recall {found.recall.to_text()}, "
                f"rejected {found.rejected.to_text()}"
            )
    click.echo(f"page: {printable(page)}")
    click.echo(f"use it: lmcl score PHOTOS --model {printable(run)} --keep {rule.name}")
