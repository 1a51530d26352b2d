"""What an exported ONNX file carries besides the network: metadata, eight bits, a program."""

import base64
import hashlib
import importlib
import json
import logging
from pathlib import Path
from typing import Any, Literal

from lmcl.errors import LmclError
from lmcl.evaluation.calibration import CALIBRATION, MOST_BYTES, read_meaning, read_neighbours
from lmcl.inference.onnx_engine import FORMAT_VERSION, GRID_RULE, ExportedCard
from lmcl.inference.scorer import Scorer
from lmcl.utils.files import write_atomic
from pipeline.boxes import CropConfig
from shards.source_files import read_regular

logger = logging.getLogger(__name__)

_PROGRAM = Path(__file__).with_name("onnx_program.txt")


def complete_onnx(
    file: Path, scorer: Scorer, folder: Path, *, precision: Literal["float32", "int8"]
) -> None:
    """Turn weights to eight bits if that was asked for, and write the metadata into the file.

    Raises:
        LmclError: If the package onnx is missing; exit code 4.
    """
    if precision == "int8":
        _quantize(file)
    onnx = _package("onnx", file)
    model = onnx.load(file)
    del model.metadata_props[:]
    for name, value in exported_card(scorer, folder, precision).metadata().items():
        model.metadata_props.add(key=name, value=value)
    onnx.save(model, file)


def write_program(file: Path, crops: CropConfig) -> Path | None:
    """The program that scores with an exported file by numpy and Pillow, beside it.

    None for crops that are scattered by a hash of the image: the program knows the grid only.
    """
    if crops.evaluation_layout != "grid":
        logger.warning(
            "%s: crops of the layout %r are cut by `lmcl score` only; no program was written "
            "beside it",
            *(file.name, crops.evaluation_layout),
        )
        return None
    program = file.with_suffix(".py")
    text = _PROGRAM.read_text(encoding="utf-8").replace("MODEL.onnx", file.name)
    write_atomic(program, text.encode())
    return program


def exported_card(
    scorer: Scorer, folder: Path, precision: Literal["float32", "int8"]
) -> ExportedCard:
    """What a file says about the model it is made of."""
    card, crops, scale = scorer.card, scorer.card.crops, scorer.scale
    # A damaged calibration stops the export as it stops scoring.
    data = (
        read_regular(folder / CALIBRATION, limit_bytes=MOST_BYTES) if read_meaning(folder) else b""
    )
    return ExportedCard(
        lmcl_format=FORMAT_VERSION,
        mean=card.mean,
        std=card.std,
        crop_size=crops.size,
        crop_count=crops.evaluation,
        crop_layout=crops.evaluation_layout,
        grid_rule=GRID_RULE,
        max_side=crops.max_side,
        short_side=crops.short_side,
        scale=scale.kind,
        scale_low=scale.low,
        scale_high=scale.high,
        higher_is_better=scale.higher_is_better,
        training_set=card.training_set,
        decoder=card.decode,
        precision=precision,
        calibration=json.loads(data) if data else None,
        calibration_sha256=hashlib.sha256(data).hexdigest() if data else "",
        neighbours=base64.b64encode(read_neighbours(folder)).decode() if data else "",
        sha256=scorer.fingerprint,
    )


def _quantize(file: Path) -> None:
    """Weights of matrix products in eight bits, a scale a column; activations while they run.

    Source: onnxruntime, "Quantize ONNX models", dynamic quantization.
    """
    quantization = _package("onnxruntime.quantization", file)
    whole = file.with_name(f"{file.name}.float32")
    file.replace(whole)
    level = logging.root.level
    try:
        # It advises to preprocess by the root logger; what counts is the comparison.
        logging.root.setLevel(logging.ERROR)
        quantization.quantize_dynamic(
            whole,
            file,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
        )
    finally:
        logging.root.setLevel(level)
        whole.unlink()


def _package(name: str, file: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LmclError(
            f"{file.name}: ONNX needs the package {name.partition('.')[0]}, which is not "
            'installed; `pip install "lmcl[onnx]"`',
            exit_code=4,
        ) from error
