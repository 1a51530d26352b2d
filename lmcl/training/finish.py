"""What a finished run leaves: predictions, figures, a model folder, pictures, the report."""

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lmcl.evaluation.metrics import Evaluation, LogisticMapping, evaluate
from lmcl.evaluation.predict import PartPredictions, SaliencyMaps, compute_saliency, predict
from lmcl.evaluation.predictions import Predictions, make_predictions
from lmcl.models.pretrained import ModelCard, ScoreScale, save_model
from lmcl.models.quality_model import QualityModel
from lmcl.training.checkpoint import load_tensors
from lmcl.training.trainer import Run, best_path, judged_model
from lmcl.utils.files import write_atomic
from pipeline.boxes import scaled_sizes
from pipeline.decode import decode_rgb
from shards.read import ShardSet

logger = logging.getLogger(__name__)

_THUMB_SIDE = 192
_MOST_PICTURES = 2000
_SYNTHETIC = "This set is synthetic: its images and scores follow written rules, nobody rated them."


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the person who started the run is told."""

    folder: Path
    part: str
    evaluation: Evaluation
    is_main: bool

    def summary(self) -> str:
        """The figures and where to look, for the terminal."""
        found = self.evaluation
        return (
            f"{self.part}: SRCC {found.srcc:.4f}  PLCC {found.plcc_raw:.4f}  "
            f"({found.n} images)\nreport: {self.folder / 'report.html'}"
        )


def write_outcome(run: Run) -> Outcome:
    """Judge the chosen weights on the evaluated part, and write everything a reader needs."""
    model, epoch = chosen_weights(run)
    part = run.config.evaluation.part
    parts = dict.fromkeys([part, *(["val"] if len(run.split.part("val")) else [])])
    judged = {name: _judge(run, model, name) for name in parts}
    looked = _look(run, model, part)
    evaluations = {
        name: evaluate_predictions(run.shard_set, found) for name, found in judged.items()
    }
    if run.context.is_main:
        for name, found in judged.items():
            boxes = looked if name == part else None
            table = predictions(
                run.shard_set, found, name, boxes, max_side=run.config.crops.max_side
            )
            table.write_csv(run.folder.predictions / f"{name}.csv")
        _write_metrics(run, judged, evaluations)
        _write_protocol(run, epoch)
        save_model(run.folder.model, model, _card(run, evaluations[part]))
        write_pictures(run.folder.root, run.shard_set, judged[part], looked)
        _write_report(run)
    run.accelerator.wait_for_everyone()
    return Outcome(
        folder=run.folder.root,
        part=part,
        evaluation=evaluations[part],
        is_main=run.context.is_main,
    )


def chosen_weights(run: Run) -> tuple[QualityModel, int]:
    """The model to be judged and the epoch it comes from (counted from 0)."""
    model = judged_model(run)
    if run.config.evaluation.select == "last" or run.best_epoch < 0:
        return model, run.config.train.epochs - 1
    model.load_state_dict(load_tensors(best_path(run.folder, run.best_epoch))["model"])
    return model, run.best_epoch


def predictions(
    shard_set: ShardSet,
    judged: PartPredictions,
    part: str,
    looked: SaliencyMaps | None,
    *,
    max_side: int | None,
) -> Predictions:
    """A part's predictions beside what the set knows of its images."""
    rows, samples, score = judged.ids, shard_set.samples, shard_set.score
    return make_predictions(
        id=rows,
        path=samples.path[rows],
        group=samples.group[rows],
        distortion=samples.distortion[rows],
        level=samples.level[rows],
        subset=samples.subset[rows],
        part=part,
        mos=samples.mos[rows],
        mos_std=samples.mos_std[rows],
        prediction=score.from_unit(judged.score) if score else judged.score,
        prediction_unit=judged.score,
        size=scaled_sizes(samples.height[rows], samples.width[rows], max_side),
        box=looked.boxes if looked else None,
    )


def write_pictures(
    folder: Path, shard_set: ShardSet, judged: PartPredictions, looked: SaliencyMaps
) -> None:
    """Thumbnails and attention maps for the report, and the embeddings it maps."""
    shown = judged.ids[:_MOST_PICTURES]
    for place, row in enumerate(shown):
        image = Image.fromarray(decode_rgb(shard_set.read_bytes(int(row))))
        image.thumbnail((_THUMB_SIDE, _THUMB_SIDE))
        write_atomic(folder / "thumbs" / f"{row}.jpg", _encoded(image, "JPEG"))
        if looked.attention.size:
            grey = Image.fromarray(_stretch(looked.attention[place]))
            write_atomic(folder / "attention" / f"{row}.png", _encoded(grey, "PNG"))
    buffer = io.BytesIO()
    np.savez(buffer, id=judged.ids, embedding=judged.embedding)
    write_atomic(folder / "embeddings.npz", buffer.getvalue())


def metrics_tree(
    shard_set: ShardSet,
    judged: dict[str, PartPredictions],
    evaluations: dict[str, Evaluation],
    part: str,
    *,
    mapping: LogisticMapping | None = None,
) -> dict[str, Any]:
    """metrics.json: the headline part's figures on top, then each part's, then each portion's."""
    found = judged[part]
    portions = {
        name: _by_portion(shard_set, found, values[found.ids], mapping)
        for name, values in (
            ("subsets", shard_set.samples.subset),
            ("distortions", shard_set.samples.distortion),
        )
    }
    return {
        "schema": 1,
        "set": shard_set.name,
        "part": part,
        **evaluations[part].to_json(),
        "parts": {name: value.to_json() for name, value in evaluations.items()},
        **portions,
    }


def _judge(run: Run, model: QualityModel, part: str) -> PartPredictions:
    return predict(
        model,
        run.shard_set,
        run.split.part(part),
        crops=run.config.crops,
        preprocessing=run.preprocessing,
        context=run.context,
        batch_size=run.config.evaluation.batch_size,
        title=f"judging the {part} part",
        bank=run.banks.judged if run.banks else None,
    )


def _look(run: Run, model: QualityModel, part: str) -> SaliencyMaps:
    return compute_saliency(
        model.encoder.cls_attention,
        run.shard_set,
        run.split.part(part),
        saliency=run.config.saliency,
        crops=run.config.crops,
        preprocessing=run.preprocessing,
        context=run.context,
        keep_attention=True,
        title=f"where the model looks in the {part} part",
        bank=run.banks.views if run.banks else None,
    )


def evaluate_predictions(
    shard_set: ShardSet, judged: PartPredictions, *, mapping: LogisticMapping | None = None
) -> Evaluation:
    """Figures of predictions in the scale of the set they were made on.

    Args:
        shard_set: The set.
        judged: Predictions on some of its images.
        mapping: Fitted on others of them; else on these themselves.
    """
    samples, score = shard_set.samples, shard_set.score
    return evaluate(
        score.from_unit(judged.score) if score else judged.score,
        samples.mos[judged.ids],
        mos_std=samples.mos_std[judged.ids],
        group=samples.group[judged.ids],
        mapping=mapping,
    )


def _by_portion(
    shard_set: ShardSet,
    judged: PartPredictions,
    names: NDArray[Any],
    mapping: LogisticMapping | None,
) -> dict[str, dict[str, Any]]:
    found = {}
    for name in sorted({str(name) for name in names} - {""}):
        keep = names == name
        portion = PartPredictions(
            ids=judged.ids[keep], score=judged.score[keep], embedding=judged.embedding[keep]
        )
        found[name] = evaluate_predictions(shard_set, portion, mapping=mapping).to_json()
    return found


def _write_metrics(
    run: Run, judged: dict[str, PartPredictions], evaluations: dict[str, Evaluation]
) -> None:
    tree = metrics_tree(run.shard_set, judged, evaluations, run.config.evaluation.part)
    write_atomic(run.folder.metrics, _pretty(tree))


def _write_protocol(run: Run, epoch: int) -> None:
    score, split, crops = run.shard_set.score, run.split, run.config.crops
    selection = (
        f"epoch {epoch + 1}, the highest SRCC on the val part"
        if run.config.evaluation.select == "best"
        else "last epoch, no selection"
    )
    tree = {
        "set": run.shard_set.name,
        "split": run.config.data.split,
        "split_hash": split.hash,
        "protocol": split.protocol,
        "selection": selection,
        "epoch": epoch + 1,
        "model": run.config.evaluation.model,
        "part": run.config.evaluation.part,
        "counts": {name: len(split.part(name)) for name in ("train", "val", "test")},
        "crops": f"{crops.evaluation} x {crops.size} px, {crops.evaluation_layout}, deterministic",
        "decode": run.loader.recipe,
        "score": msgspec.to_builtins(score),
        "synthetic": run.shard_set.name == "demo",
        "note": _SYNTHETIC if run.shard_set.name == "demo" else "",
        "train_seconds": round(run.seconds, 1),
    }
    write_atomic(run.folder.root / "protocol.json", _pretty(tree))


def _card(run: Run, evaluation: Evaluation) -> ModelCard:
    config, score = run.config, run.shard_set.score
    if score is None:
        raise TypeError("a trained run has a scale")
    return ModelCard(
        encoder=config.encoder,
        decoder=config.decoder,
        crops=config.crops,
        saliency=config.saliency,
        score=ScoreScale(
            kind=score.kind,
            low=score.low,
            high=score.high,
            higher_is_better=score.higher_is_better,
        ),
        training_set=run.shard_set.name,
        split=config.data.split,
        split_hash=run.split.hash,
        decode=run.loader.recipe,
        test_srcc=evaluation.srcc,
        test_plcc=evaluation.plcc_raw,
        note=_SYNTHETIC if run.shard_set.name == "demo" else "",
    )


def _write_report(run: Run) -> None:
    from lmcl.report import write_report  # jinja and the page's assets, needed only here

    write_report([run.folder.root], run.folder.root)


def _stretch(attention: NDArray[np.float32]) -> NDArray[np.uint8]:
    spread = float(np.ptp(attention)) or 1.0
    grey: NDArray[np.uint8] = np.round((attention - attention.min()) / spread * 255).astype(
        np.uint8
    )
    return grey


def _encoded(image: Image.Image, codec: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, codec, quality=80)
    return buffer.getvalue()


def _pretty(tree: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(tree), indent=2) + b"\n"
