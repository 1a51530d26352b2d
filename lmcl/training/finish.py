"""What a finished run leaves: predictions, figures, a model folder, pictures, the report."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from lmcl.evaluation.calibrate import calibrate, predict_sample
from lmcl.evaluation.calibration import Calibration, write_calibration
from lmcl.evaluation.data import describe_splits, epoch_shares
from lmcl.evaluation.metrics import Evaluation
from lmcl.evaluation.predict import PartPredictions, SaliencyMaps, compute_saliency, predict
from lmcl.evaluation.results import (
    evaluate_predictions,
    make_prediction_table,
    metrics_tree,
    to_pretty_json,
    write_pictures,
)
from lmcl.evaluation.sets import set_figures, sets_tree, shared_truth, to_own_scales
from lmcl.evaluation.significance import Difference
from lmcl.evaluation.words import caution_words, figures_words, sets_words
from lmcl.models.pretrained import ModelCard, NamedScale, save_model
from lmcl.models.quality_model import QualityModel
from lmcl.models.training_images import write_training_images
from lmcl.training.checkpoint import best_path, load_tensors
from lmcl.training.lora import merge_lora
from lmcl.training.probe import Probed, difference_words, probe_at_end
from lmcl.training.trainer import Trainer
from lmcl.utils.files import write_atomic
from shards.joined import JoinedSet
from shards.read import ShardSet

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
    by_set: dict[str, Evaluation] = field(default_factory=dict)
    """Figures of each set in its own scale, if there are several."""

    def summary(self) -> str:
        """The figures and where to look, for the terminal."""
        together = "all sets together: " if self.by_set else ""
        lines = [
            caution_words(self.evaluation),
            difference_words(self.probe) if self.probe else "",
            *sets_words(self.by_set),
            f"{self.part}: {together}{figures_words(self.evaluation)}, {self.chosen}",
            f"report: {self.folder / 'report.html'}",
        ]
        return "\n".join(line for line in lines if line)


def write_outcome(trainer: Trainer) -> Outcome:
    """Judge the chosen weights on the evaluated part, and write everything a reader needs."""
    model, epoch = chosen_weights(trainer)
    model = merge_lora(model)
    part = trainer.config.evaluation.part
    parts = dict.fromkeys([part, *(["val"] if len(trainer.split.part("val")) else [])])
    judged = {name: _predict(trainer, model, name) for name in parts}
    calibration, neighbours = _calibrate(trainer, model, judged.get("val"))
    shard_set, scales = trainer.shard_set, model.scales
    intervals: Calibration | None = calibration
    if isinstance(shard_set, JoinedSet) and scales is not None:
        # Predictions stand beside people's scores, on each set's own scale; the model folder's
        # intervals are of the shared one.
        judged = {name: to_own_scales(shard_set, scales, one) for name, one in judged.items()}
        intervals = None
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
                calibration=intervals,
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
    by_set = set_figures(shard_set, judged[part]) if isinstance(shard_set, JoinedSet) else {}
    return Outcome(
        folder=trainer.run_dir.root,
        part=part,
        evaluation=evaluations[part],
        is_main=trainer.context.is_main,
        chosen=f"weights of {selection}",
        probe=probed.difference if probed else None,
        by_set=by_set,
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
    shard_set, truth = trainer.shard_set, None
    if isinstance(shard_set, JoinedSet) and model.scales is not None:
        truth = shared_truth(shard_set, model.scales)
    return calibrate(
        shard_set, trainer.split, val=val, sample=sample, crops=config.crops, truth=truth
    )


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
    part, shard_set = trainer.config.evaluation.part, trainer.shard_set
    tree = metrics_tree(shard_set, judged, evaluations, part)
    if isinstance(shard_set, JoinedSet):
        tree |= sets_tree(shard_set, judged[part])
    write_atomic(trainer.run_dir.metrics, to_pretty_json(tree))


def _selection(trainer: Trainer, val: Evaluation | None) -> str:
    """Which epoch was evaluated, and by what rule."""
    epochs, last = trainer.config.train.epochs, trainer.progress.position.epoch
    if trainer.config.evaluation.select == "last":
        return f"epoch {last} of {epochs}, the last one, no selection"
    if trainer.progress.best_epoch >= 0:
        best = trainer.progress.best_epoch + 1
        mean = "mean over the sets of the " if trainer.config.data.is_joint else ""
        return f"epoch {best} of {epochs}, the highest {mean}SRCC on the val part"
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
        "split": describe_splits(trainer.config.data),
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
        **_sets_of(trainer),
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
        split=describe_splits(config.data),
        split_hash=trainer.split.hash,
        decode=trainer.loader.recipe,
        mean=trainer.preprocessing.mean,
        std=trainer.preprocessing.std,
        test_srcc=evaluation.srcc,
        test_plcc=evaluation.plcc_raw,
        note=_SYNTHETIC if trainer.shard_set.name == "demo" else "",
        sets=_named_scales(trainer.shard_set),
    )


def _named_scales(shard_set: ShardSet) -> tuple[NamedScale, ...]:
    """Names and scales of several sets; nothing of a single one."""
    if not isinstance(shard_set, JoinedSet):
        return ()
    return tuple(
        NamedScale(name=name, score=shard_set.scale_of(number))
        for number, name in enumerate(shard_set.names)
    )


def _sets_of(trainer: Trainer) -> dict[str, object]:
    """What protocol.json says of several sets."""
    shard_set, config = trainer.shard_set, trainer.config
    if not isinstance(shard_set, JoinedSet):
        return {}
    shares = epoch_shares(config.data, shard_set, trainer.split)
    sets = [
        {
            "name": one.name,
            "score": msgspec.to_builtins(one.score),
            "split": source.split,
            "images_an_epoch": share,
        }
        for one, source, share in zip(
            _named_scales(shard_set), config.data.sources, shares, strict=True
        )
    ]
    return {"sets": sets, "across_sets": config.objective.across_sets}


def _probe(trainer: Trainer) -> Probed | None:
    if trainer.config.data.is_joint:
        return None
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
