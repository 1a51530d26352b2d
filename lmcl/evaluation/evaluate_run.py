"""`lmcl eval`: a finished run's model on a part of its own set, or on another set."""

import dataclasses
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import msgspec
import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from lmcl.config import Config, load_run_config, locate_data
from lmcl.distributed import RankContext, make_rank_context
from lmcl.errors import LmclError
from lmcl.evaluation.calibration import Meaning, read_meaning
from lmcl.evaluation.data import open_data, open_source
from lmcl.evaluation.decoders import DecoderComparison, compare_decoders
from lmcl.evaluation.metrics import Evaluation, LogisticMapping, evaluate, fit_mapping
from lmcl.evaluation.predict import PartPredictions, PixelSource, predict
from lmcl.evaluation.predictions import Predictions, read_predictions
from lmcl.evaluation.results import (
    evaluate_predictions,
    make_prediction_table,
    metrics_tree,
    to_pretty_json,
)
from lmcl.evaluation.scope import (
    ON_THEMSELVES,
    ON_TRAIN,
    ON_VAL,
    WHOLE,
    Scope,
    SplitFigures,
)
from lmcl.evaluation.seen_images import SeenImages, find_seen_images
from lmcl.evaluation.sets import sets_tree, to_own_scales, to_set_scale
from lmcl.models.precision import PrecisionChoice, choose_precision, warn_of_emulation
from lmcl.models.preprocess import Preprocessing
from lmcl.models.pretrained import ModelCard, ReleasedModel, load_model
from lmcl.utils.environment import engines_line
from lmcl.utils.files import require_run_folder, write_atomic
from pipeline.backends.select import DecodeChoice
from pipeline.decode_config import same_pixels
from pipeline.loader import decode_choice
from shards import ScoreScale
from shards.errors import ShardError
from shards.joined import JoinedSet
from shards.manifest import MANIFEST
from shards.read import ShardSet, open_set
from shards.splits.draw import make_splits
from shards.splits.split import Protocol, Split, load_split

logger = logging.getLogger(__name__)

_PARTS = ("train", "val", "test")
FitPart = Literal["test", "val", "train"]
_OF_SPLITS: dict[FitPart, str] = {"test": ON_THEMSELVES, "val": ON_VAL, "train": ON_TRAIN}
PARTS = (*_PARTS, "all")
PROTOCOLS = (WHOLE, "70-10-20", "80-20", "official", "k-fold")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which images of which set, by which rule."""

    data: str | None = None
    """Another set: a folder, a URL, or the name of a folder beside the run's own set."""
    part: str = "test"
    """train, val or test of the run's split, `all`, or the name of a split of the set."""
    decode: Literal["auto", "cpu", "gpu", "both"] | None = None
    """Decoder; None: the run's own `runtime.decode`. `both`: the CPU's, whose figures are written
    down, and the GPU's beside it."""
    protocol: str = WHOLE
    """Across sets: `whole`, or a rule by which splits of the other set are drawn."""
    fit_on: FitPart | None = None
    """Part of the split the mapping is fitted on. None: the judged images themselves; with a
    protocol of splits, each one's train part."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chosen:
    """Which images are judged, and which split they are a part of."""

    ids: NDArray[np.int64]
    name: str
    """What the choice is called."""
    split: Split | None = None
    part: str = ""
    """Part of the split; empty without one."""

    @property
    def split_name(self) -> str:
        """Name of the split; empty without one."""
        return self.split.name if self.split else ""


@dataclass(frozen=True, kw_only=True)
class EvaluatedRun:
    """Figures of a run's model on one part of one set."""

    evaluation: Evaluation
    scope: Scope
    path: Path
    """The predictions file."""
    decoders: DecoderComparison | None = None
    """What the GPU's decoder changes, if both were asked for."""


def evaluate_run(run: Path, asked: Asked, *, batch_size: int, progress: bool) -> EvaluatedRun:
    """Predictions and figures of a run's model on one part of one set.

    Across sets the whole of the other set is judged (`part` = test or all), as the field does,
    less those images the model was trained on byte for byte; predictions are brought to the set's
    own scale and direction by both ranges.

    Returns:
        The figures over all evaluated images, what they are about, and the predictions file.

    Raises:
        LmclError: If the run, its model, the set or the part is not there, if splits are asked
            for on the set the model was trained on, or if no mapping can be fitted as asked.
    """
    require_run_folder(run)
    config = locate_data(load_run_config(run / "config.toml"), run)
    released = load_model(run / "model")
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    decode = config.runtime.decoding
    if asked.decode:
        decode = replace(decode, decode="cpu" if asked.decode == "both" else asked.decode)
    context = make_rank_context(accelerator, decode=decode, progress=progress)
    shard_set, whole = _open(asked.data, config)
    seen = find_seen_images(run / "model", config)
    member = None if whole else _member(shard_set, config)
    if member is not None:
        # One of several sets it learned from: its own split, its own scale.
        config = _config_of(config, member)
    other = not (whole or member is not None or _is_own(shard_set, config, released.card, seen))
    chosen = _chosen(shard_set, asked, config, other=other)
    ids, name = chosen.ids, chosen.name
    scope = _scope(shard_set, released.card, asked, name, across=other)
    fit_ids = _fit_ids(shard_set, asked, chosen)
    if other:
        fit_ids, _ = _without_training_images(shard_set, fit_ids, scope, seen)
        ids, scope = _without_training_images(shard_set, ids, scope, seen)
    if not len(ids):
        raise LmclError(
            f"{shard_set.root}: part {asked.part!r} holds no image to "
            f"evaluate ({scope.left_out} are in the run's train and val parts); choose another",
            exit_code=3,
        )
    choice = decode_choice(shard_set, decode, context.device)
    gpu = replace(context, decode=replace(decode, decode="gpu"))
    if asked.decode == "both":
        # Refused now, not after the first pass.
        decode_choice(shard_set, gpu.decode, context.device)
    precision = choose_precision(config.runtime.precision, context.device)
    _tell_engines(choice, precision, released, context)
    evaluation_pass = _Pass(released, shard_set, precision.dtype, batch_size, member)
    wanted = np.union1d(ids, fit_ids)
    predicted = evaluation_pass.run(wanted, context, title=f"evaluating {shard_set.name} {name}")
    decoders = None
    if asked.decode == "both":
        again = evaluation_pass.run(wanted, gpu, title=f"{shard_set.name} {name} by the GPU")
        decoders = compare_decoders(_some(predicted, ids), _some(again, ids))
    judged = _some(predicted, ids)
    mapping = _mapping(shard_set, _some(predicted, fit_ids), asked, chosen)
    found = evaluate_predictions(shard_set, judged, mapping=mapping)
    scope = replace(scope, images=len(ids), splits=_over_splits(shard_set, judged, asked))
    if mapping is not None:
        words = f"fitted on {mapping.n} images of the {mapping.fit_on} part of {chosen.split_name}"
        scope = replace(scope, fitted=mapping, mapping=words)
    stem = f"{shard_set.name}-{name}" if other or member is not None else name
    path = run / "predictions" / f"{stem}.csv"
    done = EvaluatedRun(evaluation=found, scope=scope, path=path, decoders=decoders)
    if context.is_main:
        # Intervals hold for images like those of the val part, so for no other set.
        has_own = not other and not released.card.sets
        meaning = read_meaning(run / "model") if has_own else None
        _write_files(done, shard_set, judged, name, released.card, meaning=meaning)
    accelerator.wait_for_everyone()
    return done


def _write_files(
    done: EvaluatedRun,
    shard_set: ShardSet,
    judged: PartPredictions,
    name: str,
    card: ModelCard,
    *,
    meaning: Meaning | None,
) -> None:
    """The predictions, and the figures beside them."""
    calibration = meaning.calibration if meaning else None
    table = make_prediction_table(
        shard_set, judged, name, None, crops=card.crops, calibration=calibration
    )
    _with_boxes(table, done.path).write_csv(done.path)
    figures, mapping = {name: done.evaluation}, done.scope.fitted
    tree = metrics_tree(shard_set, {name: judged}, figures, name, mapping=mapping)
    if isinstance(shard_set, JoinedSet):
        tree |= sets_tree(shard_set, judged)
    tree["trained_on"] = card.training_set
    tree["decode"] = judged.decode
    tree["scope"] = msgspec.to_builtins(done.scope)
    if done.decoders is not None:
        tree["decoders"] = msgspec.to_builtins(done.decoders)
    write_atomic(done.path.with_suffix(".metrics.json"), to_pretty_json(tree))


@dataclass(frozen=True)
class _Pass:
    """A released model over images of a set, by the decoder of a context."""

    released: ReleasedModel
    shard_set: ShardSet
    precision: torch.dtype
    batch_size: int
    member: int | None
    """Which of several sets the model learned from this is; None: another, or all of them."""

    def run(self, ids: NDArray[np.int64], context: RankContext, *, title: str) -> PartPredictions:
        """Predictions of `ids`."""
        card = self.released.card
        found = predict(
            self.released.model.to(context.device),
            PixelSource(shard_set=self.shard_set, context=context),
            ids,
            crops=card.crops,
            preprocessing=Preprocessing(mean=card.mean, std=card.std, precision=self.precision),
            context=context,
            batch_size=self.batch_size,
            title=title,
        )
        scales = self.released.model.scales
        if scales is not None and isinstance(self.shard_set, JoinedSet):
            return to_own_scales(self.shard_set, scales, found)
        if scales is not None and self.member is not None:
            return to_set_scale(scales, self.member, found)
        return found


def _tell_engines(
    choice: DecodeChoice, precision: PrecisionChoice, released: ReleasedModel, context: RankContext
) -> None:
    """Say on what and by what images are evaluated, and whether the model learned otherwise."""
    if not context.is_main:
        return
    card = released.card
    logger.info("%s", engines_line(context.device, choice.line, precision.line))
    warn_of_emulation(
        released.model.to(context.device),
        precision.dtype,
        context.device,
        size=card.crops.size,
        crops=card.crops.evaluation,
        learns=False,
    )
    if card.decode and not same_pixels(card.decode, choice.recipe):
        logger.warning(
            "the model was trained on images decoded by %s, these are decoded by %s, whose pixels "
            "differ; --decode both shows what that changes",
            card.decode,
            choice.recipe,
        )


def _open(data: str | None, config: Config) -> tuple[ShardSet, bool]:
    """The set to be judged, and whether it is all that the run learned from."""
    if data is None:
        return open_data(config.data)[0], True
    for source in config.data.sources:
        if data == source.name:
            return open_source(config.data, source), False
        beside = Path(source.root).parent / data
        # A bare name, as in `--set koniq10k`, means the folder beside the run's own set.
        if "://" not in data and not (Path(data) / MANIFEST).is_file() and beside.is_dir():
            return open_set(beside), False
    return open_set(data), False


def _member(shard_set: ShardSet, config: Config) -> int | None:
    """Which of several sets the run learned from this one is, however its path is spelled."""
    if not config.data.is_joint:
        return None
    for number, source in enumerate(config.data.sources):
        try:
            own = open_source(config.data, source)
        except (ShardError, OSError):
            continue
        if own.manifest.ids_sha256 == shard_set.manifest.ids_sha256:
            return number
    return None


def _config_of(config: Config, member: int) -> Config:
    """The configuration of a joint run with one of its sets alone."""
    data = replace(config.data, sets=(config.data.sets[member],), share_exponent=1.0)
    return replace(config, data=data, objective=replace(config.objective, across_sets=False))


def _is_own(shard_set: ShardSet, config: Config, card: ModelCard, seen: SeenImages) -> bool:
    """Whether a set holds the images the run was trained on, however its path is spelled.

    Two sets may well have the same names (`0001.jpg`, ...), so some of their images must be equal
    too: in bytes, or, of a copy in another format, in size and score.
    """
    if config.data.is_joint:
        return False
    (source,) = config.data.sources
    try:
        own = open_source(config.data, source)
    except (ShardError, OSError):
        # Moved away: the hash of the run's split tells whether this is the place it went to.
        try:
            split = load_split(shard_set, source.split)
        except ShardError:
            return False
        is_same = split.hash == card.split_hash
        known = seen.listed
        return is_same and (
            known is None or bool(known.seen(shard_set.samples.sha256[split.train]).any())
        )
    if own.manifest.ids_sha256 != shard_set.manifest.ids_sha256:
        return False
    ours, theirs = own.samples, shard_set.samples
    is_equal = (ours.sha256 == theirs.sha256).all(axis=1) & ours.ok
    facts = ("width", "height", "mos")
    return bool(is_equal.any()) or all(
        np.array_equal(getattr(ours, name), getattr(theirs, name), equal_nan=True) for name in facts
    )


def _own_split(shard_set: ShardSet, config: Config) -> Split:
    """The run's own split of the set it learned from."""
    if config.data.is_joint:
        return open_data(config.data)[1]
    (source,) = config.data.sources
    return load_split(shard_set, source.split)


def _chosen(shard_set: ShardSet, asked: Asked, config: Config, *, other: bool) -> _Chosen:
    if asked.protocol != WHOLE:
        if not other:
            raise LmclError(
                f"--protocol {asked.protocol} on {shard_set.name}, the set this run was trained "
                "on: test images of other splits are its training images; train one run per "
                "split and compare them by `lmcl report RUN...`",
                exit_code=2,
            )
        return _Chosen(ids=shard_set.ids(), name=asked.protocol)
    if asked.part == "all" or (other and asked.part == "test"):
        if not other:
            _warn_of_seen(_own_split(shard_set, config), shard_set)
        return _Chosen(ids=shard_set.ids(), name="all")
    own = asked.part in _PARTS and not other
    split = _own_split(shard_set, config) if own else load_split(shard_set, asked.part)
    part = asked.part if own else "test"
    if not (own or other):
        _check_unseen(split, _own_split(shard_set, config), shard_set)
    return _Chosen(ids=split.part(part), name=asked.part, split=split, part=part)


def _warn_of_seen(trained: Split, shard_set: ShardSet) -> None:
    train, val = len(trained.part("train")), len(trained.part("val"))
    logger.warning(
        "--part all of %s: of its %d images this run has learned from %d (train part) and was "
        "chosen by %d (val part), so these figures are no test; evaluate --part test for one",
        *(shard_set.name, len(shard_set.ids()), train, val),
    )


def _check_unseen(asked: Split, trained: Split, shard_set: ShardSet) -> None:
    """Refuse the test part of another split of the run's own set if the run has learned from it."""
    judged = asked.part("test")
    train, val = (int(np.isin(judged, trained.part(part)).sum()) for part in ("train", "val"))
    if train + val:
        raise LmclError(
            f"--split {asked.name} of {shard_set.name}: of the {len(judged)} images of its test "
            f"part this run learned from {train} and was chosen by {val}: they are in the train "
            f"and val parts of its own split {trained.name}; train a run on {asked.name}, or "
            "evaluate --part test",
            exit_code=2,
        )


def _fit_ids(shard_set: ShardSet, asked: Asked, chosen: _Chosen) -> NDArray[np.int64]:
    """The other images that the mapping is fitted on; none if the judged ones are used."""
    nothing = np.zeros(0, dtype=np.int64)
    if asked.fit_on is None or asked.protocol != WHOLE or asked.fit_on == chosen.part:
        return nothing
    if chosen.split is None:
        if asked.fit_on == "test":
            return nothing  # all images are judged: they are the test part
        raise LmclError(
            f"--fit-on {asked.fit_on}: all images of {shard_set.name} are evaluated, so it has no "
            f"{asked.fit_on} part; evaluate one split by `--split NAME`, or draw splits of another "
            "set by `--protocol 70-10-20`",
            exit_code=2,
        )
    ids = chosen.split.part(asked.fit_on)
    if not len(ids):
        raise LmclError(
            f"--fit-on {asked.fit_on}: the split {chosen.split_name} of {shard_set.name} has no "
            f"image in its {asked.fit_on} part; fit on another part",
            exit_code=2,
        )
    return ids


def _mapping(
    shard_set: ShardSet, judged: PartPredictions, asked: Asked, chosen: _Chosen
) -> LogisticMapping | None:
    """The mapping made of the fit part; None if the judged images are to be used."""
    score = shard_set.score
    if asked.fit_on is None or not len(judged.ids) or score is None:
        return None
    mos = shard_set.samples.mos[judged.ids]
    found = fit_mapping(score.from_unit(judged.score), mos, fit_on=asked.fit_on)
    if found.fit4.status == "none" or found.fit5.status == "none":
        raise LmclError(
            f"--fit-on {asked.fit_on}: no mapping can be fitted on the {found.n} scored images of "
            f"the {asked.fit_on} part of {chosen.split_name}: {found.fit4.reason}; fit on another "
            "part",
            exit_code=3,
        )
    return found


def _some(judged: PartPredictions, ids: NDArray[np.int64]) -> PartPredictions:
    return judged.take(np.isin(judged.ids, ids))


def _with_boxes(table: Predictions, path: Path) -> Predictions:
    """The salient boxes of an earlier file over the same predictions: training looked for them."""
    try:
        before = read_predictions(path)
    except (LmclError, OSError):
        return table
    same = np.array_equal(before.id, table.id) and np.allclose(
        before.prediction_unit, table.prediction_unit, atol=1e-5, equal_nan=True
    )
    if not same:
        return table
    return dataclasses.replace(table, y=before.y, x=before.x, h=before.h, w=before.w)


def _scope(shard_set: ShardSet, card: ModelCard, asked: Asked, name: str, *, across: bool) -> Scope:
    score, own = shard_set.score, card.score
    return Scope(
        tested_on=shard_set.name,
        part=name,
        trained_on=card.training_set,
        # Without labels predictions stay in [0, 1], higher = better.
        scale=score or ScoreScale(kind="", low=0.0, high=1.0, higher_is_better=True),
        trained_scale=own,
        images=0,
        across=across,
        protocol=asked.protocol,
        mapping=ON_THEMSELVES if asked.protocol == WHOLE else _OF_SPLITS[asked.fit_on or "train"],
    )


def _without_training_images(
    shard_set: ShardSet, ids: NDArray[np.int64], scope: Scope, seen: SeenImages
) -> tuple[NDArray[np.int64], Scope]:
    """Leave out what the model learned from or was chosen on: sets share images."""
    fresh = ~seen.holds(shard_set.samples.sha256[ids])
    return ids[fresh], replace(scope, left_out=int(np.sum(~fresh)), left_out_known=seen.is_known)


def _over_splits(
    shard_set: ShardSet, judged: PartPredictions, asked: Asked
) -> tuple[SplitFigures, ...]:
    """Figures per split of the tested set; nothing for the whole set."""
    if asked.protocol == WHOLE:
        return ()
    return tuple(
        _of_split(shard_set, judged, split, asked.fit_on or "train")
        for split in make_splits(shard_set, protocol=cast(Protocol, asked.protocol))
    )


def _of_split(
    shard_set: ShardSet, judged: PartPredictions, split: Split, fit_on: FitPart
) -> SplitFigures:
    fit_part = split.part(fit_on)
    if not len(fit_part):
        raise LmclError(
            f"--fit-on {fit_on}: the split {split.name} has no image in its {fit_on} part; fit on "
            "another part, or use --protocol 70-10-20",
            exit_code=2,
        )
    samples, score = shard_set.samples, shard_set.score
    assert score is not None  # drawing splits asks for labels
    raw, mos = score.from_unit(judged.score), samples.mos[judged.ids]
    test = np.isin(judged.ids, split.test)
    fit = np.isin(judged.ids, fit_part)
    mapping = fit_mapping(raw[fit], mos[fit], fit_on=fit_on)
    found = evaluate(raw[test], mos[test], mapping=mapping, resamples=0)
    figures = {
        name: None if np.isnan(found.figure(name)) else found.figure(name)
        for name in ("srcc", "krcc", "plcc_raw", "plcc_fit4", "rmse_fit4")
    }
    return SplitFigures(
        name=split.name, hash=split.hash, n=found.n, n_fit=int(np.sum(fit)), **figures
    )
