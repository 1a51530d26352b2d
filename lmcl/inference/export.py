"""Export a model (safetensors, torch.export, ONNX); each file is checked against PyTorch.

The check scores the run's test part with both, unless other images are named: random pixels find a
wrong operator, but only real images say how far apart the scores people would see are.

What is exported takes crops as they are cut from an image, bytes `[n, size, size, 3]`, and gives
one quality per crop in [0, 1], higher = better, and its embedding. Decoding, cropping and the mean
over crops stay outside: a program of sixty lines beside an ONNX file does them (docs/scoring.md).
"""

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from lmcl.config import load_run_config, locate_data
from lmcl.errors import LmclError
from lmcl.evaluation.data import describe_splits, open_data
from lmcl.inference.inputs import list_items
from lmcl.inference.onnx_file import complete_onnx, write_program
from lmcl.inference.scorer import Scorer
from lmcl.models.folders import MODEL_FILES
from lmcl.models.named import is_cached
from lmcl.utils.files import write_atomic
from shards.errors import ShardError
from shards.files import atomic_folder, temporary_beside
from shards.progress import progress_bar
from shards.source_files import is_regular, read_regular, read_text
from shards.text import printable

logger = logging.getLogger(__name__)

Format = Literal["safetensors", "pt2", "onnx"]
TOLERANCE = 1e-4
"""Most an exported model may differ from PyTorch, in quality units."""
INT8_TOLERANCE = 0.05
"""The same for weights of eight bits; what they do to the order of images is measured apart."""
_BATCHES = (1, 2, 7)
_OPSET = 18


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity:
    """How far an exported file lies from the model it was made of."""

    format: str
    file: str
    images: int
    """Images compared; 0 if only random crops were."""
    images_of: str
    """Which images they are, or why there are none."""
    crops: int
    """Crops compared, in batches of several sizes."""
    max_crop_difference: float
    """Greatest absolute difference of a crop's quality, in [0, 1] units."""
    max_score_difference: float
    """The same for an image's mean; NaN if no images were given."""
    runtime: str
    """What the file was run with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """The images that scores are compared on."""

    images: Iterable[tuple[str, bytes]]
    """Name and bytes of each file; read one at a time."""
    count: int
    name: str
    """Which images they are, or why there are none."""


NO_IMAGES = Compared(images=(), count=0, name="none were asked for")


class CropQuality(nn.Module):
    """The exported function: bytes of crops in, quality, score and embedding of each out."""

    gain: Tensor
    shift: Tensor

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.model = scorer.model
        card = scorer.card
        mean, std = torch.tensor(card.mean), torch.tensor(card.std)
        self.register_buffer("gain", (1 / (255 * std.double())).float()[:, None, None])
        self.register_buffer("shift", (-mean.double() / std.double()).float()[:, None, None])
        low, high = (float(v) for v in scorer.scale.from_unit(np.array([0.0, 1.0])))
        self.zero, self.span = low, high - low

    def forward(self, crops: UInt8[Tensor, "n s s 3"]) -> tuple[Tensor, ...]:
        """What `output_names` says of each crop.

        Quality ` n` in [0, 1] units, higher = better; score ` n` in the set's scale; unit
        embedding `n d`; predicted deviation of the ratings ` n` in [0, 1] units, where the model
        gives one.
        """
        pixels = crops.permute(0, 3, 1, 2).float() * self.gain + self.shift
        out = self.model(pixels)
        found = (out.score, self.zero + self.span * out.score, out.embedding)
        return found if out.deviation is None else (*found, out.deviation)


def output_names(scorer: Scorer) -> list[str]:
    """What the exported function gives, in order."""
    more = ["deviation"] if scorer.engine.gives_deviation else []
    return ["quality", "score", "embedding", *more]


def export(
    scorer: Scorer,
    folder: Path,
    output: Path,
    *,
    format: Format,
    compared: Compared,
    precision: Literal["float32", "int8"] = "float32",
    progress: bool = False,
) -> Parity:
    """Write one format, compare it with PyTorch, and write the figures beside it.

    `<output>.parity.json` has the figures, `<output>.md` is the model card with them.

    Args:
        scorer: The model, on the CPU.
        folder: Its folder, for the format that is a copy and for the model card.
        output: File to write (a folder for `safetensors`).
        format: See the docs.
        compared: What scores are compared on; crops of random pixels are compared in any case.
        precision: Of the weights; `int8` is for `onnx`, and may differ by `INT8_TOLERANCE`.
        progress: Show a bar over the images.

    Raises:
        LmclError: If a package is missing (4), or the file differs by more than `TOLERANCE` (3);
            then it is not kept. If `output` is there and no export wrote it (2).
    """
    if format == "safetensors":
        return _copy(folder, output)
    figures = output.with_name(f"{output.name}.parity.json")
    if os.path.lexists(output) and not figures.is_file():
        raise _in_the_way(output)
    temporary = Path(f"{temporary_beside(output)}{output.suffix}")
    output.parent.mkdir(parents=True, exist_ok=True)
    write, open_runtime = _FORMATS[format]
    allowed = TOLERANCE if precision == "float32" else INT8_TOLERANCE
    try:
        write(scorer, temporary)
        if format == "onnx":
            complete_onnx(temporary, scorer, folder, precision=precision)
        run, runtime = open_runtime(temporary)
        parity = _compare(
            scorer,
            run,
            compared,
            format=format,
            file=output.name,
            runtime=runtime,
            progress=progress,
        )
        gaps = [parity.max_crop_difference]
        gaps += [parity.max_score_difference] if parity.images else []
        worst = float(np.max(gaps))  # np.max hands a NaN on, max() loses it
        if not worst <= allowed:
            raise LmclError(
                f"{output}: differs from PyTorch by {worst:.2e}, {allowed:.0e} is allowed; the "
                "file was not kept, use another format or another version of the exporter",
                exit_code=3,
            )
        report = json.dumps(_finite(dataclasses.asdict(parity)), indent=2) + "\n"
        # Before the file they are about: by them it is known as an export, which may be replaced.
        write_atomic(figures, report.encode())
        write_atomic(output.with_name(f"{output.name}.md"), _card(folder, parity, scorer).encode())
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    if format == "onnx":
        write_program(output, scorer.card.crops)
    return parity


def images_of_run(run: Path, *, most: int | None = None) -> Compared:
    """The test part of the set a run was trained on, or the reason why it is not at hand.

    Args:
        run: Run folder, with its configuration.
        most: Take no more images than these, evenly over the part.
    """
    file = run / "config.toml"
    if not file.is_file():
        return _without(f"{run} has no config.toml, so it is not known what it was trained on")
    config = locate_data(load_run_config(file), run)
    try:
        shard_set, split = open_data(config.data)
        ids = split.test
    except (ShardError, OSError) as error:
        # An OSError's text begins with its number; what people need is the file.
        why = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
        return _without(f"the run's set is not here ({why})")
    chosen = ids[_places(len(ids), most)].tolist()

    def read() -> Iterator[tuple[str, bytes]]:
        for id in chosen:
            yield str(shard_set.samples.path[id]), shard_set.read_bytes(id)

    named = f"the test part of {shard_set.name}, split {describe_splits(config.data)}"
    few = "" if len(chosen) == len(ids) else f" (every so many of {len(ids)})"
    return Compared(images=read(), count=len(chosen), name=named + few)


def images_named(images: Path, *, most: int | None = None) -> Compared:
    """The images of a folder, file or pattern, to compare scores on.

    Raises:
        LmclError: If there is none, or one that cannot be read; exit code 4.
    """
    items = list_items([str(images)])
    bad = [f"{i.path}: {i.problem}" for i in items if i.problem]
    if bad or not items:
        raise LmclError(f"--images {images}: {bad[0] if bad else 'no image'}", exit_code=4)
    chosen = [items[i] for i in _places(len(items), most)]

    def read() -> Iterator[tuple[str, bytes]]:
        for item in chosen:
            try:
                yield item.path, item.read()
            except LmclError as error:
                raise LmclError(
                    f"--images {images}: {item.path}: {error}; repair it or leave it out",
                    exit_code=error.exit_code,
                ) from error

    return Compared(images=read(), count=len(chosen), name=images.as_posix())


def _without(why: str) -> Compared:
    return Compared(images=(), count=0, name=f"none: {why}")


def _places(count: int, most: int | None) -> list[int]:
    """Places of at most `most` things out of `count`, evenly spaced."""
    if most is None or count <= most:
        return list(range(count))
    return [int(i) for i in np.linspace(0, count - 1, most).round()]


def _card(folder: Path, parity: Parity, scorer: Scorer) -> str:
    """The model folder's card, and what is known of this file."""
    file = folder / "README.md"
    card = read_text(file).rstrip() + "\n\n" if is_regular(file) else ""
    size = scorer.card.crops.size
    scores = (
        f"scores of {parity.images} images ({parity.images_of}) differ by at most "
        f"{parity.max_score_difference:.1e}"
        if parity.images
        else f"scores of images were not compared ({parity.images_of})"
    )
    return (
        f"{card}## {parity.file}\n\n"
        f"Takes crops as bytes `[n, {size}, {size}, 3]`, gives one quality a crop in [0, 1], its "
        "score and its embedding; an image's quality is the mean over its crops. Run by "
        f"{parity.runtime} and compared with PyTorch: {scores}, {parity.crops} crops by at most "
        f"{parity.max_crop_difference:.1e}, in [0, 1] units; {TOLERANCE:.0e} is allowed.\n"
    )


def _example(scorer: Scorer, n: int, *, seed: int) -> UInt8[Tensor, "n s s 3"]:
    size = scorer.card.crops.size
    pixels = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return torch.from_numpy(pixels)


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
    with warnings.catch_warnings(), _quiet("onnxscript", "onnx_ir"):
        # torch and onnxscript announce their own future changes; the parity check is what counts.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            CropQuality(scorer).eval(),
            (_example(scorer, 2, seed=0),),
            dynamo=True,
            input_names=["crops"],
            output_names=output_names(scorer),
            dynamic_shapes=({0: torch.export.Dim("n", min=1, max=65536)},),
            opset_version=_OPSET,
            verbose=False,
        )
        assert program is not None
        # One file: weights beside the model get lost when it is copied.
        program.save(file, external_data=False)


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Loggers of libraries that tell of every node they rewrite show errors only."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.ERROR)
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _program(scorer: Scorer) -> "torch.export.ExportedProgram":
    batch = torch.export.Dim("n", min=1, max=65536)
    # A no_grad block inside the model is a region of its own in the graph, which cannot be saved
    # when it is empty (torch 2.15); inside another no_grad there is none.
    with torch.no_grad():
        return torch.export.export(
            CropQuality(scorer).eval(),
            # Two crops: with one, the batch would be taken for a constant.
            (_example(scorer, 2, seed=0),),
            dynamic_shapes=({0: batch},),
        )


def _open_pt2(file: Path) -> tuple[Callable[[Tensor], np.ndarray], str]:
    module = torch.export.load(file).module()

    def run(crops: Tensor) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(module(crops)[0].double().numpy())

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
    compared: Compared,
    *,
    format: str,
    file: str,
    runtime: str,
    progress: bool,
) -> Parity:
    crop_gaps, gaps, count = [], [], 0
    for n in _BATCHES:
        crops = _example(scorer, n, seed=n)
        expected = scorer.engine.forward([crops.numpy()], batch_images=1).quality[0]
        crop_gaps.append(np.max(np.abs(run(crops) - expected)))
        count += n
    bar = progress_bar(
        compared.images,
        total=compared.count,
        desc="comparing",
        unit="img",
        off=not progress,
    )
    for name, image in bar:
        try:
            prepared = scorer.prepare(image)
        except LmclError as error:
            raise LmclError(
                f"{name}: {error}; scores cannot be compared on it, name other --images",
                exit_code=error.exit_code,
            ) from error
        found = run(torch.from_numpy(np.asarray(prepared.crops)))
        gaps.append(abs(float(np.mean(found)) - scorer.predict([prepared])[0].quality))
        count += len(found)
    return Parity(
        format=format,
        file=file,
        images=len(gaps),
        images_of=compared.name,
        crops=count,
        max_crop_difference=float(np.max(crop_gaps)),
        max_score_difference=float(np.max(gaps)) if gaps else float("nan"),
        runtime=runtime,
    )


def _in_the_way(output: Path) -> LmclError:
    return LmclError(f"{printable(output)}: exists; choose another --output", exit_code=2)


def _copy(folder: Path, output: Path) -> Parity:
    if os.path.lexists(output):
        raise _in_the_way(output)
    with atomic_folder(output) as new:
        # Of a folder from elsewhere, its own files and nothing that a link leads to.
        for name, most in MODEL_FILES.items():
            if os.path.lexists(folder / name):
                file = _own_file(folder, name)
                (new / name).write_bytes(read_regular(file, limit_bytes=most, follow_links=False))
    return Parity(
        format="safetensors",
        file=output.name,
        images=0,
        images_of="a copy needs none",
        crops=0,
        max_crop_difference=0.0,
        max_score_difference=float("nan"),
        runtime="a copy",
    )


def _own_file(folder: Path, name: str) -> Path:
    """A file of a model folder; of a hub's cache, which is made of links, what it links to."""
    file = folder / name
    if not is_cached(folder):
        return file
    real = file.resolve()
    return real if real.is_relative_to(folder.parent.parent.resolve()) else file


def _finite(values: dict[str, object]) -> dict[str, object]:
    return {k: None if isinstance(v, float) and v != v else v for k, v in values.items()}
