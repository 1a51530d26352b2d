"""`lmcl`: commands parse and print; the work is a function that can be called without click."""

import logging
import os
import sys

import click

from lmcl.cli.lazy_group import LazyGroup
from lmcl.utils.malloc import keep_freed_memory
from shards.exit_codes import report_errors

_ELSEWHERE = {
    "calibrate": ("lmcl.cli.calibrate", "What a run's scores mean: intervals, percentiles."),
    "demo": ("lmcl.cli.demo", "The whole method on a synthetic set, and its report."),
    "eval": ("lmcl.cli.eval", "Evaluate a run's model on a part or on another set."),
    "export": (
        "lmcl.cli.export",
        "Write a model as torch.export program or ONNX, with parity.",
    ),
    "gmad": ("lmcl.cli.gmad", "Pairs of images on which two models contradict each other."),
    "probe": ("lmcl.cli.probe", "A ridge on frozen features: the floor training must beat."),
    "push": ("lmcl.cli.push", "Put a model on a hub, for `--model hf://USER/NAME`."),
    "score": ("lmcl.cli.score", "Score images, folders, tables and shards; filter by quality."),
    "report": ("lmcl.cli.report", "Write or compare reports of finished runs."),
    "saliency": ("lmcl.cli.saliency", "Draw where a model looks in photographs."),
    "show-config": ("lmcl.cli.show_config", "The whole effective configuration of a file."),
    "sweep": ("lmcl.cli.sweep", "The 10-split protocol, seeds, ladders of configurations."),
    "threshold": ("lmcl.cli.threshold", "Choose what is sorted out by what it costs."),
    "train": ("lmcl.cli.train", "Train a student and its teacher, evaluate, report."),
}
_BENCHES = {
    "build": (
        "lmcl.cli.bench:build",
        "Packing shards against reading, hashing and decoding alone.",
    ),
    "contrastive": ("lmcl.cli.bench:contrastive", "The loss against eager, compiled and chunked."),
    "loader": ("lmcl.cli.bench:loader", "Images per second against what people use today."),
    "loss-precision": ("lmcl.cli.bench:loss_precision", "The loss in bf16 against float64."),
    "manifest": ("lmcl.cli.bench:manifest", "Opening and splitting a set of ten million samples."),
    "score": ("lmcl.cli.bench:score", "Scoring a folder against the bare model."),
    "step": ("lmcl.cli.bench:step", "One optimiser step, part by part, beside the usual loop."),
}


@click.group(
    cls=LazyGroup,
    elsewhere=_ELSEWHERE,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="EXAMPLES: lmcl demo · lmcl train --config demo · lmcl report runs/demo",
)
@click.version_option(package_name="lmcl")
def cli() -> None:
    """Learn to judge the quality of images without a reference."""


@cli.group(cls=LazyGroup, elsewhere=_BENCHES)
def bench() -> None:
    """Measure this machine; every figure stands beside its baseline from the same run."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors become one sentence on stderr and an exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # A run opens a loader for every pass; which decoder it took is said once, by the session.
    for noisy in ("accelerate", "httpx", "httpx2", "pipeline.loader", "timm", "torch", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # The usual loaders are measured as their users run them: Pillow's gain a fifth by it.
    if (sys.argv[1:] if arguments is None else arguments)[:2] != ["bench", "loader"]:
        keep_freed_memory()
    with report_errors():
        # `accelerate launch $(which lmcl) train`, or `-m lmcl`: train.py has joined by itself.
        if arguments is None and "ACCELERATE_MIXED_PRECISION" in os.environ:
            from lmcl.training.launcher import join_launcher

            join_launcher(["--module", "lmcl"], sys.argv[1:])
        cli.main(arguments, standalone_mode=False)


if __name__ == "__main__":
    main()
