"""Whether a run and a scoring job on a GPU go through their engines, by the kernels that ran.

One training step of a default run (its own loader, `prepare`, `Trainer.step`) and one scoring batch
are watched by torch's profiler. Its kernel names must show nvJPEG, DALI's paste operator, the
preprocessing kernel and the fused loss, and no matrix product of the loss outside its kernels. One
JSON line a finding; exit code 1 and one sentence if something did not run.

`--rehearse` does the same step and batch on a CPU, the loss's kernels interpreted. Kernels have
names on a GPU only, and it says which checks wait for one; that the loss calls no matrix product of
torch's is checked on a CPU too.
"""

import argparse
import json
import logging
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

STEP = {
    "nvJPEG": r"nvjpeg(?!2k)|jpeg.*(huffman|idct|dct)",
    "DALI's paste operator": r"dali.*paste",
    "the preprocessing kernel (pipeline/_preprocess_triton.py)": r"^preprocess",
    "the fused loss, forward: log_sums": r"^(log|symmetric)_sums",
    "the fused loss, forward: finish_rows": r"^finish_rows",
    "the fused loss, backward: pair_gradient": r"^pair_gradient",
    "the fused loss, backward: finish_gradient": r"^finish_gradient",
    "the fused loss, backward: hub_gradient": r"^hub_gradient",
}
"""Engines of a training step whose keys are the student's, with what their kernels are called."""
SCORING = tuple(STEP)[:3]
"""Those of a scoring batch."""
_PRODUCT = re.compile(
    r"gemm|gemv|xmma|nvjet|splitkreduce|cutlass"
    r"|^aten::(mm|bmm|mv|dot|addmm|addbmm|baddbmm|matmul|linear|einsum|_scaled_mm)$",
    re.IGNORECASE,
)
_LOSS = re.compile(r"objective|lmcl::contrastive")
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "smoke.toml"
SPLIT = "70-10-20-seed123-00"
ON_GPU = ("runtime.precision=bf16", "runtime.require=['gpu-decode', 'fused-loss']")
ON_CPU = (
    "objective.backend=triton", "crops.random=2", "encoder.depth=1", "saliency.layers=1",
    "train.batch_size=4",
)  # fmt: skip


def missing_engines(kernel_names: Sequence[str], wanted: Iterable[str] = tuple(STEP)) -> list[str]:
    """The engines of `wanted` (names of `STEP`) of which no kernel is among those that ran.

    Args:
        kernel_names: As a profiler writes them, demangled or not.
        wanted: Which engines.
    """
    return [
        name
        for name in wanted
        if not any(re.search(STEP[name], kernel, re.IGNORECASE) for kernel in kernel_names)
    ]


def matrix_products(names: Iterable[str]) -> list[str]:
    """Those that are matrix products of a library: the loss has its own, so each is one too many.

    Args:
        names: Of kernels, and of torch's operations.
    """
    return sorted({name for name in names if _PRODUCT.search(name)})


def watch_step(root: Path, output: Path, *, on_gpu: bool) -> dict[str, Any]:
    """Take one training step of a run under the profiler; what ran."""
    import torch

    from lmcl.config import load_config
    from lmcl.training.setup import prepare

    place = (f"data.root={json.dumps(str(root))}", f"data.split={SPLIT}")
    config = load_config(CONFIG, (*place, *(ON_GPU if on_gpu else ON_CPU)))
    trainer = prepare(config, output, resume="", progress=False)
    compute_loss = trainer.compute_loss

    def marked(*arguments: Any) -> Any:
        with torch.profiler.record_function("objective"):
            return compute_loss(*arguments)

    trainer.compute_loss = marked  # type: ignore[method-assign]
    try:
        trainer.refresh_salient_boxes(0)
        trainer.student.train()
        batches = trainer.loader.epoch(0, saliency=trainer.progress.saliency)
        with _profile(on_gpu=on_gpu) as profile:
            # Decoding runs ahead: it is begun within.
            out = trainer.step(next(batches))
            _synchronize(on_gpu=on_gpu)
        batches.close()
        of_loss = list(_within_loss(profile.events()))
        return {
            "engines": trainer.engines,
            "images": out.stats.images,
            "kernels": kernels_of(profile.events()),
            "loss": [*(event.name for event in of_loss), *kernels_of(of_loss)],
        }
    finally:
        trainer.close()


def watch_scoring(files: Sequence[bytes], *, on_gpu: bool) -> dict[str, Any]:
    """Score one batch of files under the profiler; what ran."""
    from lmcl.bench.score import make_scorer
    from lmcl.utils.environment import engines_line

    scorer = make_scorer("conv-vit", "cuda" if on_gpu else "cpu", crops=4)
    with _profile(on_gpu=on_gpu) as profile:
        if scorer.files is None:
            prepared = [scorer.prepare(data) for data in files]
        else:
            found = scorer.prepare_files(files)
            prepared = [one for one in found if not isinstance(one, str)]
        scores = scorer.predict(prepared)
        _synchronize(on_gpu=on_gpu)
    return {
        "engines": engines_line(scorer.device, f"decode {scorer.recipe}"),
        "images": len(scores),
        "kernels": kernels_of(profile.events()),
    }


def kernels_of(events: Iterable[Any]) -> list[str]:
    """Names of the kernels on the GPU: the profiler's own events, or those of CPU events."""
    names: set[str] = set()
    for event in events:
        if event.device_type.name == "CPU":
            names |= {kernel.name for kernel in event.kernels}
        else:
            names.add(event.name)
    return sorted(names)


def _within_loss(events: Iterable[Any]) -> Iterator[Any]:
    """The loss's own range, its operations forward and backward, and all they call."""
    waiting = [e for e in events if e.device_type.name == "CPU" and _LOSS.search(e.name)]
    while waiting:
        event = waiting.pop()
        yield event
        waiting += event.cpu_children


def _profile(*, on_gpu: bool) -> Any:
    import torch

    kind = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[kind.CPU, *([kind.CUDA] if on_gpu else [])])


def _synchronize(*, on_gpu: bool) -> None:
    if on_gpu:
        import torch

        torch.cuda.synchronize()


def make_set(folder: Path) -> tuple[Path, list[bytes]]:
    """A packed demo set with a split, and the bytes of some of its JPEGs."""
    from shards.build.build import build
    from shards.datasets.demo import open_demo, write_demo
    from shards.read import open_set
    from shards.splits.draw import make_splits
    from shards.splits.split import write_split

    images = write_demo(folder / "images", contents=6).parent
    build(open_demo(images), folder / "shards", workers=1)
    for split in make_splits(open_set(folder / "shards"), repeats=1):
        write_split(folder / "shards", split)
    photos = sorted(images.rglob("*.jpg"))[:8]
    return folder / "shards", [path.read_bytes() for path in photos]


def _say(**finding: Any) -> None:
    print(json.dumps(finding), flush=True)


def judge(what: str, found: dict[str, Any], wanted: Sequence[str], *, on_gpu: bool) -> list[str]:
    """Print the finding of each engine; what is wrong, in words."""
    _say(check=what, engines=found["engines"], images=found["images"])
    missing = missing_engines(found["kernels"], wanted) if on_gpu else []
    for name in wanted:
        _say(check=what, engine=name, ran=name not in missing if on_gpu else "needs a GPU")
    if missing:
        _say(check=what, kernels=found["kernels"])
    return [f"{what}: {name} did not run" for name in missing]


def check(*, on_gpu: bool) -> list[str]:
    """The step and the batch; what is wrong, in words."""
    with tempfile.TemporaryDirectory() as place:
        root, files = make_set(Path(place))
        step = watch_step(root, Path(place) / "run", on_gpu=on_gpu)
        scoring = watch_scoring(files, on_gpu=on_gpu)
    wrong = judge("training step", step, tuple(STEP), on_gpu=on_gpu)
    wrong += judge("scoring batch", scoring, SCORING, on_gpu=on_gpu)
    # Without these the next finding would say nothing.
    names = ("objective", "lmcl::contrastive_forward", "lmcl::contrastive_backward")
    wrong += [f"training step: {name} did not run" for name in names if name not in step["loss"]]
    products = matrix_products(step["loss"])
    _say(check="training step", products_of_the_loss_outside_its_kernels=products)
    return wrong + [f"training step: the loss ran {name}" for name in products]


def main() -> None:
    """Check both; exit code 1 if an engine was not taken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="On a CPU, kernels interpreted.")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    wrong = check(on_gpu=not asked.rehearse)
    if wrong:
        sys.exit(f"engines: {'; '.join(wrong)}; no timing is worth taking before")


if __name__ == "__main__":
    main()
