"""`lmcl probe`: a ridge on the frozen features of an encoder."""

from pathlib import Path

import click


@click.command(
    epilog="EXAMPLES: lmcl probe runs/mine · lmcl probe data/mine --split 70-10-20-seed123-00 · "
    "lmcl probe data/mine --split official --encoder vit_small_patch14_dinov2 --weights w.pth"
)
@click.argument("target", metavar="RUN|SET")
@click.option("--split", metavar="NAME", help="Of a set: which of its splits [its only one].")
@click.option(
    "--encoder",
    metavar="NAME",
    help="Of a set: any encoder of lmcl train: a vision transformer or a stem of timm, "
    "squeezenet1_1, a package of weights.  [default: tf_efficientnet_lite0]",
)
@click.option(
    "--weights",
    metavar="FILE|timm|PACKAGE",
    help="Of a set: the encoder's weights [its installed package, else timm's from the hub].",
)
@click.option(
    "--part",
    type=click.Choice(["test", "val", "train"]),
    help="Of a set: the part that is predicted.  [default: test]",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Of a set: change one field of the configuration, e.g. crops.size=448; repeatable.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the files [RUN/probe; runs/probe-<set>].",
)
@click.option("--no-progress", is_flag=True, help="No progress bars.")
def command(
    target: str,
    split: str | None,
    encoder: str | None,
    weights: str | None,
    part: str | None,
    overrides: tuple[str, ...],
    output: Path | None,
    no_progress: bool,
) -> None:
    """The honest floor of a run or a set: a ridge on frozen features, in closed form.

    Of a RUN: its own encoder as it was before training, on its own crops, split and part; its
    report then shows both. Of a SET: any encoder on one of its splits. Penalty and kernel are
    chosen by cross-validation inside the train part.
    """
    from lmcl.training.probe import DEFAULT_ENCODER, probe_run, probe_set

    if (Path(target) / "config.toml").is_file():
        given = {"--split": split, "--encoder": encoder, "--weights": weights, "--part": part}
        wrong = [name for name, value in given.items() if value is not None]
        wrong += ["--set"] if overrides else []
        if wrong:
            raise click.UsageError(
                f"{wrong[0]} is for a set; {target} is a run, which has its own: probe its set in "
                "its place (`data.root` of its config.toml)"
            )
        done = probe_run(Path(target), output=output, progress=not no_progress)
    else:
        done = probe_set(
            target,
            split=split,
            encoder=encoder or DEFAULT_ENCODER,
            weights=weights,
            part=part or "test",
            overrides=overrides,
            output=output,
            progress=not no_progress,
        )
    click.echo(done.summary())
