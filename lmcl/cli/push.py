"""`lmcl push`: put a run's model on a hub."""

import click


@click.command(
    epilog="EXAMPLES: lmcl push runs/livec hf://me/livec --dry-run · "
    "lmcl push runs/livec hf://me/livec --private · "
    "lmcl score photos --model hf://me/livec"
)
@click.argument("run", metavar="RUN")
@click.argument("target", metavar="hf://USER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made now.")
@click.option("--dry-run", is_flag=True, help="Say what would be uploaded; ask nobody.")
def command(run: str, target: str, private: bool, dry_run: bool) -> None:
    """Upload a run's model, or a model folder, to a hub: JSON, safetensors and the model card.

    Nothing else of the folder is uploaded. The token is huggingface_hub's own: `hf auth login`, or
    HF_TOKEN.
    """
    from lmcl.inference.push import plan_upload, push
    from lmcl.models.named import find_model
    from lmcl.utils.hub_names import parse_hub_name

    name = parse_hub_name(target)
    if name.revision:
        raise click.UsageError("a push makes a commit of the main branch; leave out @REVISION")
    upload = plan_upload(find_model(run))
    for line in upload.lines(name, private=private):
        click.echo(line)
    if dry_run:
        click.echo("nothing was uploaded: --dry-run")
        return
    done = push(upload, name, private=private)
    click.echo(f"pushed; use it: lmcl score PHOTOS --model {done}")
