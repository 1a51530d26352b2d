"""`lmcl export`: the model for other runtimes, each file checked against PyTorch before it is kept.

What is exported takes normalised crops `[n, 3, size, size]` and gives one quality per crop in
[0, 1], higher = better. Decoding, cropping and the mean over crops stay outside (docs/scoring.md).
"""

import dataclasses
import importlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import click
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmcl.errors import LmclError
from lmcl.files import write_atomic
from lmcl.scoring.inputs import list_items
from lmcl.scoring.scorer import Scorer, open_scorer
from pipeline.normalize import normalize

logger = logging.getLogger(__name__)

Format = Literal["safetensors", "pt2", "onnx"]
TOLERANCE = 1e-4
"""Most an exported model may differ from PyTorch, in quality units."""
_BATCHES = (1, 2, 7)
_OPSET = 18


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity:
    """How far an exported file lies from the model it was made of."""

    format: str
    file: str
    images: int
    """Images compared; 0 if only random crops were."""
    crops: int
    """Crops compared, in batches of several sizes."""
    max_crop_difference: float
    """Greatest absolute difference of a crop's quality, in [0, 1] units."""
    max_score_difference: float
    """The same for an image's mean; NaN if no images were given."""
    runtime: str
    """What the file was run with."""


class CropQuality(nn.Module):
    """The exported function: one quality per crop, nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, crops: Float[Tensor, "n 3 s s"]) -> Float[Tensor, " n"]:
        """Quality in [0, 1] units, higher = better."""
        quality: Tensor = self.model(crops).score
        return quality


def export(
    scorer: Scorer, folder: Path, output: Path, *, format: Format, images: list[Path]
) -> Parity:
    """Write one format and compare it with PyTorch.

    Args:
        scorer: The model, on the CPU.
        folder: Its folder, for the format that is a copy.
        output: File to write (a folder for `safetensors`).
        format: See the docs.
        images: What scores are compared on; crops of random pixels are compared in any case.

    Raises:
        LmclError: If a package is missing (4), or the file differs by more than `TOLERANCE` (3);
            then it is not kept.
    """
    if format == "safetensors":
        return _copy(folder, output)
    temporary = output.with_name(f".{output.name}.tmp{output.suffix}")
    output.parent.mkdir(parents=True, exist_ok=True)
    write, open_runtime = _FORMATS[format]
    try:
        write(scorer, temporary)
        run, runtime = open_runtime(temporary)
        parity = _compare(scorer, run, images, format=format, file=output.name, runtime=runtime)
        worst = max(parity.max_crop_difference, np.nan_to_num(parity.max_score_difference))
        if not worst <= TOLERANCE:
            raise LmclError(
                f"{output}: differs from PyTorch by {worst:.2e}, {TOLERANCE:.0e} is allowed; the "
                "file was not kept, use another format or another version of the exporter",
                exit_code=3,
            )
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    report = json.dumps(_finite(dataclasses.asdict(parity)), indent=2) + "\n"
    write_atomic(output.with_name(f"{output.name}.parity.json"), report.encode())
    return parity


def _example(scorer: Scorer, n: int, *, seed: int) -> Float[Tensor, "n 3 s s"]:
    size = scorer.card.crops.size
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 1, size, size, 3), dtype=np.uint8)
    return _normalized(scorer, pixels)


def _normalized(scorer: Scorer, crops: np.ndarray) -> Float[Tensor, "n 3 s s"]:
    card = scorer.card
    flat = normalize(torch.from_numpy(crops), mean=card.mean, std=card.std, dtype=torch.float32)
    return flat.contiguous()


def _write_pt2(scorer: Scorer, file: Path) -> None:
    torch.export.save(_program(scorer), file)


def _write_onnx(scorer: Scorer, file: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise LmclError(
                f"{file.name}: ONNX needs the package {package}, which is not installed; "
                '`pip install "lmcl[onnx]"`',
                exit_code=4,
            ) from error
    with warnings.catch_warnings():
        # torch and onnxscript announce their own future changes; the parity check is what counts.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            CropQuality(scorer.model).eval(),
            (_example(scorer, 2, seed=0),),
            dynamo=True,
            input_names=["crops"],
            output_names=["quality"],
            dynamic_shapes=({0: torch.export.Dim("n", min=1, max=65536)},),
            opset_version=_OPSET,
            verbose=False,
        )
        assert program is not None
        # One file: weights beside the model get lost when it is copied.
        program.save(file, external_data=False)


def _program(scorer: Scorer) -> "torch.export.ExportedProgram":
    batch = torch.export.Dim("n", min=1, max=65536)
    # A no_grad block inside the model is a region of its own in the graph, which cannot be saved
    # when it is empty (torch 2.15); inside another no_grad there is none.
    with torch.no_grad():
        return torch.export.export(
            CropQuality(scorer.model).eval(),
            # Two crops: with one, the batch would be taken for a constant.
            (_example(scorer, 2, seed=0),),
            dynamic_shapes=({0: batch},),
        )


def _open_pt2(file: Path) -> tuple[Callable[[Tensor], np.ndarray], str]:
    module = torch.export.load(file).module()

    def run(crops: Tensor) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(module(crops).double().numpy())

    return run, f"torch {torch.__version__}"


def _open_onnx(file: Path) -> tuple[Callable[[Tensor], np.ndarray], str]:
    onnxruntime = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(crops: Tensor) -> np.ndarray:
        (quality,) = session.run(["quality"], {"crops": crops.numpy()})
        return np.asarray(quality, dtype=np.float64)

    return run, f"onnxruntime {onnxruntime.__version__}"


_FORMATS: dict[
    str,
    tuple[
        Callable[[Scorer, Path], None],
        Callable[[Path], tuple[Callable[[Tensor], np.ndarray], str]],
    ],
] = {"pt2": (_write_pt2, _open_pt2), "onnx": (_write_onnx, _open_onnx)}


def _compare(
    scorer: Scorer,
    run: Callable[[Tensor], np.ndarray],
    images: list[Path],
    *,
    format: str,
    file: str,
    runtime: str,
) -> Parity:
    model = CropQuality(scorer.model).eval()
    crop_gap, count = 0.0, 0
    for n in _BATCHES:
        crops = _example(scorer, n, seed=n)
        with torch.inference_mode():
            expected = model(crops).double().numpy()
        crop_gap = max(crop_gap, float(np.max(np.abs(run(crops) - expected))))
        count += n
    gaps = []
    for image in images:
        prepared = scorer.prepare(image)
        found = run(_normalized(scorer, prepared.crops[:, None]))
        gaps.append(abs(float(np.mean(found)) - scorer.judge([prepared])[0].quality))
        count += len(found)
    return Parity(
        format=format,
        file=file,
        images=len(images),
        crops=count,
        max_crop_difference=crop_gap,
        max_score_difference=max(gaps, default=float("nan")),
        runtime=runtime,
    )


def _copy(folder: Path, output: Path) -> Parity:
    if output.exists():
        raise LmclError(f"{output}: exists; choose another --output", exit_code=2)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(folder, temporary)
    temporary.rename(output)
    return Parity(
        format="safetensors",
        file=output.name,
        images=0,
        crops=0,
        max_crop_difference=0.0,
        max_score_difference=float("nan"),
        runtime="a copy",
    )


def _finite(values: dict[str, object]) -> dict[str, object]:
    return {k: None if isinstance(v, float) and v != v else v for k, v in values.items()}


@click.command(
    epilog="EXAMPLES: lmcl export runs/demo --format onnx --images photos · "
    "lmcl export runs/demo --format pt2 --output model.pt2"
)
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["safetensors", "pt2", "onnx"]),
    required=True,
    help="safetensors: the model folder itself; pt2: torch.export; onnx: opset 18.",
)
@click.option("--output", type=click.Path(path_type=Path), help="File [RUN/export/model.<format>].")
@click.option(
    "--images", type=click.Path(path_type=Path), help="Compare scores on the images of this folder."
)
def command(run: Path, format_name: Format, output: Path | None, images: Path | None) -> None:
    """Export a run's model and check the file against PyTorch."""
    inner = run / "model"
    folder = inner if not (run / "config.json").is_file() and inner.is_dir() else run
    suffix = "" if format_name == "safetensors" else f".{format_name}"
    target = output or run / "export" / f"model{suffix}"
    scorer = open_scorer(folder, device="cpu")
    files = [Path(i.file) for i in list_items([str(images)]) if i.is_file] if images else []
    parity = export(scorer, folder, target, format=format_name, images=files)
    click.echo(
        f"{target}: {parity.crops} crops of {parity.images} images and random pixels compared "
        f"with PyTorch by {parity.runtime}; greatest difference in [0, 1] units "
        f"{parity.max_crop_difference:.1e} a crop, {parity.max_score_difference:.1e} an image"
    )
