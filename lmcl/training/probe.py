"""`lmcl probe`: a ridge on the frozen features of an encoder, the floor that training must beat.

Of a run it takes the encoder as it was before the first step, the run's evaluation crops, split and
part; of a set any encoder by name. `lmcl train` makes one in the end where it costs little
(docs/decisions/0013).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from timm.models import get_pretrained_cfg, is_model

from lmcl.config import Config, apply_override, load_run_config, locate_data, parse_config
from lmcl.distributed import RankContext, make_rank_context
from lmcl.errors import ConfigError, LmclError
from lmcl.evaluation.data import describe_splits, open_data
from lmcl.evaluation.metrics import Evaluation
from lmcl.evaluation.predictions import Predictions, read_predictions
from lmcl.evaluation.probe import (
    FEW_LABELS,
    PROBE,
    PROBE_PREDICTIONS,
    ProbeFacts,
    difference_from_probe,
    fit_probe,
    write_probe,
)
from lmcl.evaluation.results import evaluate_predictions, make_prediction_table, metrics_tree
from lmcl.evaluation.significance import Difference
from lmcl.evaluation.words import figures_words
from lmcl.features.pooled import PooledFeatures
from lmcl.models.encoder import SQUEEZENET, EncoderConfig
from lmcl.models.factory import make_encoder
from lmcl.models.normalization import find_normalization
from lmcl.models.packaged import PACKAGED
from lmcl.models.preprocess import Preprocessing
from lmcl.training.init_from import start_from_model
from lmcl.training.student import make_student
from lmcl.utils.environment import engines_line
from lmcl.utils.files import make_output_folder, require_run_folder
from pipeline.errors import PipelineError
from pipeline.loader import decode_choice
from shards.errors import ShardError
from shards.manifest import SPLITS
from shards.read import ShardSet, open_set
from shards.splits.split import Split
from shards.text import printable

logger = logging.getLogger(__name__)

DEFAULT_ENCODER = "tf_efficientnet_lite0"
"""Whose weights are an installed package: a probe needs no network."""
_STEM_SIDE, _CROPS = 384, 2
"""Of a probe of a set: pixels a side for encoders that take any size, and crops an image, which
cover pictures up to twice as wide as high; at one place they are seen once."""
_CHEAP = 4
"""`evaluation.probe = "auto"`: crops a run learns from for each one that the probe looks at."""


@dataclass(frozen=True, kw_only=True)
class Probed:
    """A finished probe."""

    facts: ProbeFacts
    evaluation: Evaluation
    folder: Path
    difference: Difference | None = None
    """How far the run's model is ahead in SRCC; None where there is no such model."""

    def summary(self) -> str:
        """The figures and where to look, for the terminal."""
        found, facts, ridge = self.evaluation, self.facts, self.facts.ridge
        shape = "ridge" if ridge.width is None else "kernel ridge"
        has_figures = "srcc" not in found.reasons
        lines = [
            f"{facts.part}: SRCC {_with_interval(found, 'srcc')}  "
            f"PLCC {_with_interval(found, 'plcc_raw')}  ({found.n} images)"
            if has_figures
            else f"{facts.part}: {figures_words(found)}",
            f"{shape} on {facts.features} features of {facts.encoder} (weights {facts.weights}), "
            f"{facts.train} training images, penalty {ridge.weight:.3g} of {ridge.folds} folds",
        ]
        if facts.train < FEW_LABELS:
            lines.append(
                f"caution: {facts.train} training images are few; another split would give other "
                "figures"
            )
        if self.difference is not None:
            lines.append(f"the run's model: {difference_words(self.difference)}")
        return "\n".join([*lines, f"predictions: {self.folder / PROBE_PREDICTIONS}"])


def difference_words(difference: Difference) -> str:
    """A paired difference of SRCC in words, or that there is none."""
    if not math.isfinite(difference.value):
        return "no SRCC, nor has the probe one, on the same images"
    interval = difference.interval
    ends = f" [{interval.low:+.4f}, {interval.high:+.4f}]" if interval else ""
    return f"SRCC {difference.value:+.4f}{ends} against the probe, on the same images"


def probe_run(run: Path, *, output: Path | None, progress: bool) -> Probed:
    """Probe the encoder of a run as it was before training, on the run's own split and part.

    Args:
        run: A run folder; a run that has not ended will do.
        output: Folder of the files; None: `probe` in the run folder, where its report looks.
        progress: Show bars on a terminal.

    Raises:
        LmclError: If the run, its set or its split is not there, or too little can be learned.
    """
    require_run_folder(run)
    config = locate_data(load_run_config(run / "config.toml"), run)
    done = _probe(config, output or run / PROBE, progress=progress)
    return _beside_model(done, run)


def probe_set(
    root: str,
    *,
    split: str | None,
    encoder: str,
    weights: str | None,
    part: str,
    overrides: Sequence[str],
    output: Path | None,
    progress: bool,
) -> Probed:
    """Probe an encoder on a set.

    Args:
        root: Folder or URL of the set.
        split: Of its splits; None if it has but one.
        encoder: Any the project takes: a vision transformer or a stem of timm, `squeezenet1_1`, a
            package of weights.
        weights: As `encoder.weights`; None: the encoder's package where there is one, else timm's.
        part: Which one is predicted.
        overrides: `key=value` of further fields of a configuration.
        output: Folder of the files; None: `runs/probe-<set>`.
        progress: Show bars on a terminal.

    Raises:
        LmclError: If the set, the split or the weights are not there, the encoder is unknown, or
            too little can be learned.
    """
    name = Path(root.rstrip("/")).name
    tree: dict[str, Any] = {
        "data": {"root": root, "split": split or _only_split(root)},
        "encoder": _encoder_tree(encoder, weights),
        "evaluation": {"part": part},
    }
    for override in overrides:
        apply_override(tree, override)
    crops = tree.setdefault("crops", {})
    if isinstance(crops, dict):
        crops.setdefault("size", _side_of(encoder))
        crops.setdefault("evaluation", _CROPS)
        if not {"max_side", "short_side"} & crops.keys():
            crops["short_side"] = crops["size"]
        tree.setdefault("saliency", {}).setdefault("view", crops["size"])
    config = parse_config(tree, where="lmcl probe")
    return _probe(config, output or Path("runs") / f"probe-{name}", progress=progress)


def probe_at_end(
    config: Config, shard_set: ShardSet, split: Split, *, context: RankContext, run: Path
) -> Probed | None:
    """The probe that a run makes in the end, by `evaluation.probe`; None if there is none.

    What stands in its way is said; the run's own results do not depend on it.
    """
    rule = config.evaluation.probe
    if rule == "never":
        return None
    if rule == "auto" and not is_cheap(config, split):
        logger.info(
            "no probe was made: it would look at more than a quarter as many crops as the run "
            "learned from; `lmcl probe %s` makes one",
            printable(run),
        )
        return None
    try:
        alone = replace(context, rank=0, world_size=1)
        done = make_probe(config, shard_set, split, context=alone, output=run / PROBE)
        return _beside_model(done, run)
    except (LmclError, PipelineError, ShardError) as error:
        logger.warning("no probe was made: %s", error)
        return None


def is_cheap(config: Config, split: Split) -> bool:
    """Whether a probe looks at a quarter of the crops that the run learns from, or fewer.

    A count, not a clock: the same run makes the same files everywhere.
    """
    views = config.crops.random + config.crops.salient
    learned = config.train.epochs * len(split.part("train")) * views
    seen = len(_all_ids(split)) * config.crops.evaluation
    return _CHEAP * seen <= learned


def make_probe(
    config: Config, shard_set: ShardSet, split: Split, *, context: RankContext, output: Path
) -> Probed:
    """Features, ridge, figures and files of one configuration, on one process.

    Raises:
        LmclError: As `probe_run`.
    """
    part = config.evaluation.part
    ids = _all_ids(split)
    features = _features(config, shard_set, split, context, output).make(ids)
    judged, ridge = fit_probe(shard_set, split, ids, features, part)
    choice = decode_choice(shard_set, context.decode, context.device)
    judged = replace(judged, decode=choice.recipe)
    figures = evaluate_predictions(shard_set, judged)
    facts = ProbeFacts(
        set=shard_set.name,
        set_sha256=shard_set.manifest.samples_sha256,
        split=describe_splits(config.data),
        split_hash=split.hash,
        part=part,
        encoder=_name_of(config.encoder),
        weights=config.train.start_from or config.encoder.weights or "random",
        crops=f"{config.crops.evaluation} x {config.crops.size} px",
        decode=choice.recipe,
        features=features.shape[1],
        train=len(split.part("train")),
        ridge=ridge,
    )
    table = make_prediction_table(shard_set, judged, part, None, crops=config.crops)
    tree = metrics_tree(shard_set, {part: judged}, {part: figures}, part)
    write_probe(output, facts, table, tree)
    return Probed(facts=facts, evaluation=figures, folder=output)


def _probe(config: Config, output: Path, *, progress: bool) -> Probed:
    if config.data.is_joint:
        raise ConfigError(
            "a probe is one ridge on one scale, and this run learned from several sets "
            f"({', '.join(source.root for source in config.data.sources)}); probe each of them: "
            "`lmcl probe SET`"
        )
    shard_set, split = open_data(config.data)
    make_output_folder(output)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    context = make_rank_context(accelerator, decode=config.runtime.decoding, progress=progress)
    choice = decode_choice(shard_set, context.decode, context.device)
    logger.info("%s", engines_line(context.device, choice.line))
    return make_probe(config, shard_set, split, context=context, output=output)


def _features(
    config: Config, shard_set: ShardSet, split: Split, context: RankContext, output: Path
) -> PooledFeatures:
    with torch.random.fork_rng():
        # In float32 whatever the run computes in: seconds, and the same figures everywhere.
        exact = replace(config, runtime=replace(config.runtime, precision="no"))
        student = make_student(exact, context.device)
        start_from_model(student, config, shard_set=shard_set, split=split)
    mean, std = find_normalization(config.encoder)
    return PooledFeatures(
        folder=Path(config.runtime.cells) if config.runtime.cells else output / "features",
        shard_set=shard_set,
        encoder=student.encoder.eval(),
        has_trained_blocks=bool(config.train.start_from) or not config.encoder.has_stem,
        crops=config.crops,
        preprocessing=Preprocessing(mean=mean, std=std, precision=torch.float32),
        context=context,
    )


def _all_ids(split: Split) -> NDArray[np.int64]:
    """Those of all parts: every split of a set by one protocol then has the same features file."""
    return np.unique(np.concatenate([split.part(name) for name in ("train", "val", "test")]))


def _beside_model(done: Probed, run: Path) -> Probed:
    """The probe, and how far the run's own predictions of that part are ahead of it."""
    path = run / "predictions" / f"{done.facts.part}.csv"
    if not path.is_file():
        return done
    probe = read_predictions(done.folder / PROBE_PREDICTIONS)
    return replace(done, difference=_difference(read_predictions(path), probe))


def _difference(model: Predictions, probe: Predictions) -> Difference | None:
    try:
        return difference_from_probe(model, probe)
    except ValueError:
        return None  # another set or version: the report says so


def _encoder_tree(name: str, weights: str | None) -> dict[str, Any]:
    """The `[encoder]` table of an encoder by one name.

    Raises:
        ConfigError: If no encoder is called so.
    """
    package = PACKAGED.get(name)
    name = package.timm_name if package else name
    packages = [one.package for one in PACKAGED.values() if one.timm_name == name]
    if name in (SQUEEZENET, "squeezenet-vit"):
        tree: dict[str, Any] = {"name": "hybrid", "stem": SQUEEZENET}
    elif name == "conv-vit" or _is_plain_vit(name):
        tree = {"name": name}
    else:
        tree = {"name": "hybrid", "stem": name}
    default = "" if tree["name"] == "conv-vit" or tree.get("stem") == SQUEEZENET else "timm"
    return tree | {"weights": weights if weights is not None else next(iter(packages), default)}


def _is_plain_vit(name: str) -> bool:
    """Whether a timm model is one whose blocks can be read; what timm does not know is refused."""
    if not is_model(name):
        make_encoder(EncoderConfig(name=name), sizes=(224,))
    side = _side_of(name)
    try:
        with torch.device("meta"):
            make_encoder(EncoderConfig(name=name), sizes=(side,))
    except ConfigError:
        return False
    return True


def _side_of(name: str) -> int:
    """Pixels a side that an encoder is shown: its own where it has but one size."""
    package = PACKAGED.get(name)
    found = get_pretrained_cfg(package.timm_name if package else name, allow_unregistered=True)
    has_own = found is not None and (found.fixed_input_size or "vit" in name)
    return int(found.input_size[-1]) if found is not None and has_own else _STEM_SIDE


def _only_split(root: str) -> str:
    shard_set = open_set(root)
    names = sorted(Path(file).stem for file in shard_set.store.names(SPLITS))
    if len(names) == 1:
        return names[0]
    known = f"it has {', '.join(names)}" if names else f"`lmcl-shard split {root}` draws some"
    raise LmclError(
        f"{shard_set.root}: name one of its splits by --split; {known}",
        exit_code=2 if names else 4,
    )


def _name_of(encoder: EncoderConfig) -> str:
    return f"{encoder.name} on {encoder.stem}" if encoder.stem else encoder.name


def _with_interval(found: Evaluation, name: str) -> str:
    interval = found.intervals.get(name)
    ends = f" [{interval.low:.4f}, {interval.high:.4f}]" if interval else ""
    return f"{found.figure(name):.4f}{ends}"
