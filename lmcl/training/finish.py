"""What a finished run leaves: predictions, figures, a model folder, pictures, the report."""

import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lmcl.evaluation.metrics import Evaluation
from lmcl.evaluation.predict import PartPredictions, SaliencyMaps, compute_saliency, predict
from lmcl.evaluation.results import (
    evaluate_predictions,
    make_prediction_table,
    metrics_tree,
    to_pretty_json,
    write_pictures,
)
from lmcl.models.pretrained import ModelCard, save_model
from lmcl.models.quality_model import QualityModel
from lmcl.training.checkpoint import load_tensors
from lmcl.training.trainer import Run, best_path, judged_model
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
            table = make_prediction_table(
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


def _write_metrics(
    run: Run, judged: dict[str, PartPredictions], evaluations: dict[str, Evaluation]
) -> None:
    tree = metrics_tree(run.shard_set, judged, evaluations, run.config.evaluation.part)
    write_atomic(run.folder.metrics, to_pretty_json(tree))


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
    write_atomic(run.folder.root / "protocol.json", to_pretty_json(tree))


def _card(run: Run, evaluation: Evaluation) -> ModelCard:
    config, score = run.config, run.shard_set.score
    if score is None:
        raise TypeError("a trained run has a scale")
    return ModelCard(
        encoder=config.encoder,
        decoder=config.decoder,
        crops=config.crops,
        saliency=config.saliency,
        score=score,
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
