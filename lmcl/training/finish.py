"""What a finished run leaves: predictions, figures, a model folder, pictures, the report."""

import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from lmcl.evaluation.calibrate import calibrate, predict_sample
from lmcl.evaluation.calibration import Calibration, write_calibration
from lmcl.evaluation.metrics import Evaluation
from lmcl.evaluation.predict import PartPredictions, SaliencyMaps, compute_saliency, predict
from lmcl.evaluation.results import (
    evaluate_predictions,
    make_prediction_table,
    metrics_tree,
    to_pretty_json,
    write_pictures,
)
from lmcl.evaluation.significance import Difference
from lmcl.evaluation.words import caution_words, figures_words
from lmcl.models.pretrained import ModelCard, save_model
from lmcl.models.quality_model import QualityModel
from lmcl.models.training_images import write_training_images
from lmcl.training.checkpoint import best_path, load_tensors
from lmcl.training.probe import Probed, difference_words, probe_at_end
from lmcl.training.trainer import Trainer
from lmcl.utils.files import write_atomic

logger = logging.getLogger(__name__)
_SYNTHETIC = "This set is synthetic: its images and scores follow written rules, nobody rated them."


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the person who started the run is told."""

    folder: Path
    part: str
    evaluation: Evaluation
    is_main: bool
    chosen: str = ""
    """Which epoch's weights were evaluated, and why these."""
    probe: Difference | None = None
    """How far it is ahead of a ridge on its encoder's frozen features, if one was made."""

    def summary(self) -> str:
        """The figures and where to look, for the terminal."""
        lines = [
            caution_words(self.evaluation),
            difference_words(self.probe) if self.probe else "",
            f"{self.part}: {figures_words(self.evaluation)}, {self.chosen}",
            f"report: {self.folder / 'report.html'}",
        ]
        return "\n".join(line for line in lines if line)


def write_outcome(trainer: Trainer) -> Outcome:
    """Judge the chosen weights on the evaluated part, and write everything a reader needs."""
    model, epoch = chosen_weights(trainer)
    part = trainer.config.evaluation.part
    parts = dict.fromkeys([part, *(["val"] if len(trainer.split.part("val")) else [])])
    judged = {name: _predict(trainer, model, name) for name in parts}
    calibration, neighbours = _calibrate(trainer, model, judged.get("val"))
    maps = _compute_saliency(trainer, model, part)
    probed = None
    evaluations = {
        name: evaluate_predictions(trainer.shard_set, found) for name, found in judged.items()
    }
    selection = _selection(trainer, evaluations.get("val"))
    if trainer.context.is_main:
        for name, found in judged.items():
            boxes = maps if name == part else None
            table = make_prediction_table(
                trainer.shard_set,
                found,
                name,
                boxes,
                crops=trainer.config.crops,
                calibration=calibration,
            )
            table.write_csv(trainer.run_dir.predictions / f"{name}.csv")
        _write_metrics(trainer, judged, evaluations)
        _write_protocol(trainer, epoch, selection)
        save_model(trainer.run_dir.model, model, _card(trainer, evaluations[part]))
        if trainer.training_images is not None:
            write_training_images(trainer.run_dir.model, trainer.training_images)
        write_calibration(trainer.run_dir.model, calibration, neighbours)
        write_pictures(trainer.run_dir.root, trainer.shard_set, judged[part], maps)
        probed = _probe(trainer)
        _write_report(trainer)
    trainer.accelerator.wait_for_everyone()
    return Outcome(
        folder=trainer.run_dir.root,
        part=part,
        evaluation=evaluations[part],
        is_main=trainer.context.is_main,
        chosen=f"weights of {selection}",
        probe=probed.difference if probed else None,
    )


def chosen_weights(trainer: Trainer) -> tuple[QualityModel, int]:
    """The model to be judged and the epoch it comes from (counted from 0)."""
    model = trainer.evaluated_model
    if trainer.config.evaluation.select == "last" or trainer.progress.best_epoch < 0:
        return model, trainer.progress.position.epoch - 1
    path = best_path(trainer.run_dir.checkpoints, trainer.progress.best_epoch)
    model.load_state_dict(load_tensors(path)["model"])
    return model, trainer.progress.best_epoch


def _predict(trainer: Trainer, model: QualityModel, part: str) -> PartPredictions:
    return predict(
        model,
        trainer.source,
        trainer.split.part(part),
        crops=trainer.config.crops,
        preprocessing=trainer.preprocessing,
        context=trainer.context,
        batch_size=trainer.config.evaluation.batch_size,
        title=f"evaluating the {part} part",
    )


def _calibrate(
    trainer: Trainer, model: QualityModel, val: PartPredictions | None
) -> tuple[Calibration, NDArray[np.float32]]:
    config = trainer.config
    sample = predict_sample(
        model,
        trainer.source,
        trainer.split,
        crops=config.crops,
        preprocessing=trainer.preprocessing,
        context=trainer.context,
        batch_size=config.evaluation.batch_size,
    )
    return calibrate(trainer.shard_set, trainer.split, val=val, sample=sample, crops=config.crops)


def _compute_saliency(trainer: Trainer, model: QualityModel, part: str) -> SaliencyMaps:
    return compute_saliency(
        model.encoder.cls_attention,
        trainer.source,
        trainer.split.part(part),
        saliency=trainer.config.saliency,
        crops=trainer.config.crops,
        preprocessing=trainer.preprocessing,
        context=trainer.context,
        keep_attention=True,
        title=f"saliency maps of the {part} part",
    )


def _write_metrics(
    trainer: Trainer, judged: dict[str, PartPredictions], evaluations: dict[str, Evaluation]
) -> None:
    tree = metrics_tree(trainer.shard_set, judged, evaluations, trainer.config.evaluation.part)
    write_atomic(trainer.run_dir.metrics, to_pretty_json(tree))


def _selection(trainer: Trainer, val: Evaluation | None) -> str:
    """Which epoch was evaluated, and by what rule."""
    epochs, last = trainer.config.train.epochs, trainer.progress.position.epoch
    if trainer.config.evaluation.select == "last":
        return f"epoch {last} of {epochs}, the last one, no selection"
    if trainer.progress.best_epoch >= 0:
        best = trainer.progress.best_epoch + 1
        return f"epoch {best} of {epochs}, the highest SRCC on the val part"
    why = val.reasons.get("srcc", "") if val else ""
    return f"epoch {last} of {epochs}, the last one: no epoch has an SRCC on the val part" + (
        f" ({why})" if why else ""
    )


def _write_protocol(trainer: Trainer, epoch: int, selection: str) -> None:
    score, split, crops = trainer.shard_set.score, trainer.split, trainer.config.crops
    tree = {
        "set": trainer.shard_set.name,
        "set_version": trainer.shard_set.manifest.version,
        "set_sha256": trainer.shard_set.manifest.samples_sha256,
        "images_sha256": trainer.images_sha256,
        "split": trainer.config.data.split,
        "split_hash": split.hash,
        "protocol": split.protocol,
        "selection": selection,
        "epoch": epoch + 1,
        "model": trainer.config.evaluation.model,
        "part": trainer.config.evaluation.part,
        "counts": {name: len(split.part(name)) for name in ("train", "val", "test")},
        "crops": f"{crops.evaluation} x {crops.size} px, {crops.evaluation_layout}, deterministic",
        "decode": trainer.loader.recipe,
        "score": msgspec.to_builtins(score),
        "synthetic": trainer.shard_set.name == "demo",
        "note": _SYNTHETIC if trainer.shard_set.name == "demo" else "",
        "train_seconds": round(trainer.progress.seconds, 1),
    }
    write_atomic(trainer.run_dir.root / "protocol.json", to_pretty_json(tree))


def _card(trainer: Trainer, evaluation: Evaluation) -> ModelCard:
    config, score = trainer.config, trainer.shard_set.score
    if score is None:
        raise TypeError("a trained run has a scale")
    return ModelCard(
        encoder=config.encoder,
        decoder=config.decoder,
        crops=config.crops,
        saliency=config.saliency,
        score=score,
        training_set=trainer.shard_set.name,
        split=config.data.split,
        split_hash=trainer.split.hash,
        decode=trainer.loader.recipe,
        mean=trainer.preprocessing.mean,
        std=trainer.preprocessing.std,
        test_srcc=evaluation.srcc,
        test_plcc=evaluation.plcc_raw,
        note=_SYNTHETIC if trainer.shard_set.name == "demo" else "",
    )


def _probe(trainer: Trainer) -> Probed | None:
    return probe_at_end(
        trainer.config,
        trainer.shard_set,
        trainer.split,
        context=trainer.context,
        run=trainer.run_dir.root,
    )


def _write_report(trainer: Trainer) -> None:
    from lmcl.report import write_report  # jinja and the page's assets, needed only here

    write_report([trainer.run_dir.root], trainer.run_dir.root)
