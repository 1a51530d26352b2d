"""One run = one TOML file (+ `--set key=value`): read, checked, frozen, written back whole.

The configuration is composed of its owners' dataclasses, so a field is described, defaulted and
checked in one place. It never changes after loading.
"""

import dataclasses
import difflib
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import tomli_w

from lmcl.errors import ConfigError
from lmcl.method.lr_schedule import ScheduleConfig
from lmcl.method.objective import ObjectiveConfig
from lmcl.method.teacher import TeacherConfig
from lmcl.models.encoder import EncoderConfig, encoder_as_written
from lmcl.models.normalization import IMAGENET, find_normalization
from lmcl.models.quality_model import DecoderConfig, check_heads
from lmcl.models.saliency import SaliencyConfig
from lmcl.models.set_scales import MOST_SETS
from lmcl.utils.trackers import TRACKERS
from lmcl.utils.validators import check_bounds
from pipeline.boxes import CropConfig
from pipeline.decode_config import DecodeConfig
from shards.errors import ShardError
from shards.source_files import read_text
from shards.text import looked_at, printable, redact_url

_MOST_BYTES, _MOST_TEXT, _MOST_DEPTH, _MOST_BASES = 1 << 20, 4096, 8, 16
"""Of a configuration file, of one text in it, of its tables, and of the files it stands on."""
_PACKAGE = Path(__file__).resolve().parent
CONFIGS = next(
    (f for f in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if f.is_dir()),
    _PACKAGE / "configs",
)
"""The configurations that come with the project: inside an installed package, beside a clone's."""
_PATHS = (
    *("data.root", "data.split", "data.cache", "encoder.weights", "train.start_from"),
    "runtime.cells",
)
"""Fields that hold a path, or may: `~` in them is the user's folder."""
_ROOT_OF_SET = re.compile(r"data\.sets\.\d+\.root:")
_NO_CHOICE = re.compile(r"Invalid enum value .* - at `\$\.([a-z_.]+)`")
"""How msgspec says that a word is none of a field's words."""
_MOST_SEED = 2**63 - 1
_LOOSE_NUMBER = re.compile(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?")
"""Numbers that TOML does not take for numbers: without a digit before or behind the point."""
"""TOML's integers and torch's seeds go so far."""


@dataclass(frozen=True, kw_only=True)
class SetConfig:
    """One of the sets of a joint run."""

    root: str
    """Folder or fsspec URL, as `data.root`."""
    split: str
    """Its own split, as `data.split`."""
    name: str = ""
    """What the run calls it; empty: its own name."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which shards, which split of them."""

    root: str = ""
    """Folder or fsspec URL of a set built by `lmcl-shard build`."""
    split: str = ""
    """Name of a split in the set's `splits` folder, or the path of a split file."""
    cache: str = ""
    """Folder for shards fetched from a URL; empty: the user's cache folder."""
    sets: tuple[SetConfig, ...] = ()
    """In place of `root` and `split`: several sets that one model learns from, each with a line
    from the shared score to its own scale (decision 0017). The first one's scale is shared."""
    share_exponent: float = 1.0
    """Of several sets: an epoch's images come from each in proportion to (images of its train
    part)^this, in [0, 1]. 1: every image once. Below, larger sets lend a part of theirs, another
    one each epoch; 0: as many from each as the smallest has."""

    def __post_init__(self) -> None:
        check_bounds("data", self, least={"share_exponent": 0}, most={"share_exponent": 1})
        if not self.sets:
            _check_one_set(self)
            return
        if self.root or self.split:
            raise ValueError(
                f"data.sets and data.root = {self.root!r}, data.split = {self.split!r} both say "
                "what the run learns from; leave one out (--set data.root='' --set data.split='')"
            )
        if len(self.sets) > MOST_SETS:
            raise ValueError(
                f"data.sets are {len(self.sets)} sets; at most {MOST_SETS} are taken, merge some "
                "with `lmcl-shard reshard`"
            )
        if self.share_exponent != 1 and len(self.sets) == 1:
            raise ValueError("data.share_exponent shares an epoch between sets; data.sets has one")

    @property
    def is_joint(self) -> bool:
        """Whether the run learns from several sets."""
        return len(self.sets) > 1

    @property
    def sources(self) -> tuple[SetConfig, ...]:
        """The sets, be they one or several."""
        return self.sets or (SetConfig(root=self.root, split=self.split),)


def _check_one_set(data: DataConfig) -> None:
    if not data.root:
        raise ValueError(
            "data.root is missing: name a packed set (--set data.root=FOLDER), or several in "
            "data.sets"
        )
    if data.share_exponent != 1:
        raise ValueError(
            f"data.share_exponent = {data.share_exponent} shares an epoch between several sets, "
            "and there is one; name them in data.sets"
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how many at once, how the optimiser behaves."""

    epochs: int = 9
    """Length of the run [paper: 9]."""
    batch_size: int = 16
    """Images of one optimiser step over all ranks; an image's crops never part."""
    patience: int = 0
    """End the run after so many epochs without a higher SRCC on the val part; 0 = never. May be
    changed when a run goes on."""
    optimizer: str = "adamw"
    """`adamw` [family], or another of timm's optimisers by name (`sgd`, `lamb`, `lion`, ...)."""
    weight_decay: float = 0.05
    """Of the optimiser; biases, norms, CLS and queries are spared [family]."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Moving averages of AdamW [family], and of optimisers that have two."""
    clip: float = 5.0
    """Gradient norm beyond which gradients are scaled down [family]; 0 = never."""
    start_from: str = ""
    """A model folder (`<run>/model`), or `starter`, whose weights the student starts from; empty:
    those of `encoder.weights`. On the set it was trained on, the split must be its own (decision
    0010)."""
    stem_lr_scale: float = 1.0
    """Learning rate of a convolutional stem relative to the rest; below 1 for pretrained stems."""
    backbone_lr_scale: float = 1.0
    """Learning rate of the pretrained network (a ViT by name, a stem's layers) relative to what is
    above it; 0 = it keeps its weights."""
    layer_decay: float = 1.0
    """Of a ViT by name: learning rate of each layer relative to the layer above it, .65 to .9 where
    few images are to change the first layers little; 1 = all layers alike."""
    lora_rank: int = 0
    """Of a ViT by name: its weights stay, and matrices of this rank beside its layers learn (LoRA,
    package peft); the model folder has them added to the weights. 0 = the weights learn."""
    lora_alpha: float = 16.0
    """What the matrices add is multiplied by it over the rank."""
    lora_layers: Literal["attention", "all"] = "attention"
    """Beside which layers: those of the attention, or these and the feed-forward ones."""
    seed: int = 0
    """Everything random in a run follows from it."""
    balance: int = 0
    """Draw images evenly over so many equal ranges of the train part's scores, rare ones several
    times an epoch and crowded ones not in every epoch; 0 = each image once an epoch."""
    flip: bool = False
    """Mirror half of the random crops from left to right; quality does not change under it."""

    def __post_init__(self) -> None:
        least = {
            "patience": 0,
            "epochs": 1,
            "batch_size": 1,
            "clip": 0,
            "weight_decay": 0,
            "stem_lr_scale": 0,
        }
        most = {"epochs": 10**6, "batch_size": 10**6, "clip": 10**9, "weight_decay": 10**3}
        least |= {"seed": 0, "backbone_lr_scale": 0, "balance": 0, "lora_rank": 0}
        most |= {"lora_rank": 1024, "lora_alpha": 10**6}
        most |= {"balance": 1000, "layer_decay": 1, "backbone_lr_scale": 10**3}
        check_bounds(
            "train", self, least=least, most=most, above={"layer_decay": 0, "lora_alpha": 0}
        )
        if self.lora_rank and not self.backbone_lr_scale:
            raise ValueError(
                "train.backbone_lr_scale = 0 keeps the pretrained network as it is, and "
                f"train.lora_rank = {self.lora_rank} is how it learns; set one of them: a scale "
                "above 0 is then the rate of the LoRA matrices"
            )
        if self.layer_decay != 1 and not self.backbone_lr_scale:
            raise ValueError(
                "train.backbone_lr_scale = 0 keeps the pretrained network as it is, so "
                f"train.layer_decay = {self.layer_decay} has nothing to change; set it to 1, or "
                "the scale above 0"
            )
        if self.balance == 1:
            raise ValueError("train.balance = 1 is one range with all images; set 0, or 2 or more")
        if self.seed > _MOST_SEED:
            raise ValueError(f"train.seed must be at most {_MOST_SEED}, got {self.seed}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas must lie in [0, 1), got {list(self.betas)}")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Which weights are judged, on what."""

    part: Literal["test", "val", "train"] = "test"
    """The part whose figures are the headline."""
    model: Literal["student", "teacher"] = "student"
    """Whose weights predict [paper: student]."""
    select: Literal["best", "last"] = "best"
    """`best`: the epoch with the highest SRCC on the val part; `last`: no selection. Never the
    test part (method.md, trap 1)."""
    batch_size: int = 32
    """Images per rank and forward pass."""
    probe: Literal["auto", "always", "never"] = "auto"
    """Whether the run ends with a ridge on its encoder's frozen features, which the report shows
    beside the trained figure (`lmcl probe`). `auto`: if the crops it looks at are at most a quarter
    of those the run learns from; `lmcl probe RUN` makes one at any time."""

    def __post_init__(self) -> None:
        check_bounds("evaluation", self, least={"batch_size": 1}, most={"batch_size": 10**5})


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How the machine is used; only `on_error` changes what is learned, beyond rounding."""

    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Autocast of the networks; loss and head stay in float32. `auto`: bf16 where the device
    multiplies in it (CUDA from sm_80 on, a CPU with avx512_bf16 or AMX), else `no`; it is decided
    at the run's start, written into its config.toml, and kept when the run is resumed anywhere
    (decision 0012)."""
    backend: Literal["auto", "dali", "torch"] = "auto"
    """Who decodes and cuts; `auto` says in the log what it took and why."""
    decode: Literal["auto", "cpu", "gpu"] = "auto"
    """Where JPEGs are decoded: `auto`: on the GPU where the run's device is one and DALI is there;
    its pixels differ from the CPU's in single levels, so it is another recipe, which is written
    into everything the run leaves. Holds for training, saliency, validation and evaluation."""
    hw_decoder_load: float = 0.0
    """Share of the JPEGs that the GPU's JPEG engine takes, 0 to 1 (decision 0308); 0 gives the same
    pixels on every chip."""
    require: tuple[Literal["gpu-decode", "fused-loss"], ...] = ()
    """What the run may not do without: a fall-back of `auto` is then an error before the first
    step."""
    threads: int = 0
    """Decoder threads per rank; 0 = the cores of the machine over the ranks on it."""
    on_error: Literal["fail", "skip"] = "fail"
    """What training does about damaged images: `fail` stops at the first one and names it; `skip`
    reads the train part once, compares all checksums, and learns from the sound ones alone. Images
    that are judged are never left out: figures over fewer of them would not be of their part."""
    checkpoint_steps: int = 0
    """Write a checkpoint every so many steps; 0 = at the end of each epoch only."""
    keep_last: int = 2
    """How many checkpoints are kept, and how many weights of best epochs; at least 1. With 2 a
    damaged newest one costs the steps since the one before."""
    micro_batch: int = 0
    """Images per rank and forward pass; 0 = all of a rank's share at once. Smaller saves memory at
    the price of a second forward pass; the gradient is that of the undivided batch."""
    gradient_checkpointing: bool = False
    """Keep only the input of each transformer block for the backward pass and compute the rest
    again: less memory, about a third more time, the same gradient."""
    cells: str = ""
    """Folder that keeps what a frozen stem makes of every crop, so that further epochs and runs
    need no pixels (`hybrid` with all of its stem frozen, `crops.pool`); empty: nothing is kept.
    Takes some hundred kilobytes a crop; the start says how much, and an interrupted one goes on."""
    compile: bool = False
    """Run the student through torch.compile."""
    trackers: tuple[str, ...] = ()
    """Where figures are shown besides log.jsonl: `tensorboard`, `wandb` and others by the names
    Accelerate gives them. One that is missing or out of reach is said and left out."""
    collapse_steps: int = 100
    """Warn when the mean cosine of two crops of one image stays above .98 for so many steps in a
    row; 0 = never."""

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError(f"runtime.keep_last must be >= 1, got {self.keep_last}")
        counts = ("threads", "checkpoint_steps", "micro_batch", "collapse_steps")
        most = dict.fromkeys(counts, 10**9) | {"threads": 1024, "hw_decoder_load": 1}
        least = dict.fromkeys((*counts, "hw_decoder_load"), 0)
        check_bounds("runtime", self, least=least, most=most | {"keep_last": 10**6})
        for name in self.trackers:
            if name not in TRACKERS:
                near = difflib.get_close_matches(name, TRACKERS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TRACKERS)}"
                raise ValueError(f"runtime.trackers: there is no tracker {name!r}; {hint}")

    @property
    def decoding(self) -> DecodeConfig:
        """How every loader of the run decodes."""
        return DecodeConfig(
            backend=self.backend,
            decode=self.decode,
            threads=self.threads or None,
            hw_decoder_load=self.hw_decoder_load,
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides what a run is."""

    data: DataConfig
    crops: CropConfig = field(default_factory=CropConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    saliency: SaliencyConfig = field(default_factory=SaliencyConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        hub = self.objective.hub
        wants_hub = self.objective.contrastive_weight > 0 and hub != "random"
        if wants_hub and not self.crops.salient:
            raise ValueError(
                f"objective.hub = {hub!r} needs a crop beside the random ones, but crops.salient "
                "is false; set crops.salient = true or objective.hub = 'random'"
            )
        if not self.data.is_joint:
            if self.objective.across_sets:
                raise ValueError(
                    "objective.across_sets contrasts images of several sets, and data.sets does "
                    "not name several"
                )
        elif self.train.balance and self.data.share_exponent != 1:
            raise ValueError(
                "train.balance and data.share_exponent both say which images an epoch goes over; "
                "set one of them to its default (0, 1.0)"
            )
        elif self.evaluation.probe == "always":
            raise ValueError(
                "evaluation.probe = 'always' fits one ridge on one scale, and data.sets has "
                f"{len(self.data.sets)}; set it to 'auto', which makes none here"
            )
        width = self.encoder.token_width
        if width is not None:
            check_heads(self.decoder, width)
        if self.objective.compares_images and self.train.batch_size < 2:
            raise ValueError(
                "objective.plcc_weight and objective.rank_weight compare the images of a step, and "
                "train.batch_size is 1; set it to at least 2 (8 or more for a PLCC that says much)"
            )
        if self.decoder.bins and len(self.data.sets) > 1:
            raise ValueError(
                f"decoder.bins = {self.decoder.bins} learns the ratings on one scale, and "
                f"data.sets has {len(self.data.sets)}, each with its own; set decoder.bins = "
                "0, or train on one set"
            )
        if self.objective.deviation is not None and not self.decoder.bins:
            raise ValueError(
                f"objective.deviation = {self.objective.deviation} is of the ratings' "
                "distribution, and decoder.bins = 0 learns none; set decoder.bins (10 to 20 are "
                "usual), or leave objective.deviation out"
            )
        if self.train.start_from and self.encoder.weights:
            raise ValueError(
                f"train.start_from = {self.train.start_from!r} and encoder.weights = "
                f"{self.encoder.weights!r} both say which weights the run starts from; set one of "
                "them to ''"
            )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply `key=value` overrides, the last one winning.

    `path` is a file, or the name of a configuration that comes with the project (`find_config`). A
    file may begin with `base = "FILE"`: it then only says what differs from that file, which is
    found from its own folder.

    Raises:
        ConfigError: If the file is missing (exit code 4) or no TOML, a key is unknown, or a value
            has the wrong type or breaks a rule (exit code 2).
    """
    tree = _read_tree(find_config(path), above=())
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, where=str(path))


def find_config(path: str | Path, *, folders: bool = False) -> Path:
    """The file of a configuration by its path or its name; what is found nowhere is handed back.

    `demo` and `paper/livec` name those that come with the project, and so do `configs/demo.toml`
    and the like where there is no such file. What lies under the path itself is meant first.

    Args:
        path: What was asked for.
        folders: Whether a folder of several may be meant, such as `ablations/ladder`.
    """
    path = Path(path).expanduser()
    is_there = os.path.lexists(path) and (folders or not path.is_dir())
    if is_there or path.is_absolute() or ".." in path.parts:
        return path
    name = path.relative_to("configs") if path.is_relative_to("configs") else path
    inside = [CONFIGS / name, CONFIGS / f"{name}.toml"]
    return next((f for f in inside if f.is_file() or (folders and f.is_dir())), path)


def config_names() -> list[str]:
    """Names of the configurations that come with the project, as `find_config` takes them."""
    files = sorted(CONFIGS.rglob("*.toml"))
    return [file.relative_to(CONFIGS).with_suffix("").as_posix() for file in files]


def load_run_config(path: Path) -> Config:
    """Read the config.toml of a run folder, which an earlier version may have written.

    Raises:
        ConfigError: As in `load_config`.
    """
    return parse_run_config(_read_tree(path, above=()), where=str(path))


def locate_data(config: Config, run: Path) -> Config:
    """A run's configuration with its set and split file where they are seen from here.

    A run is looked at from other folders than it was trained from: a relative path that leads
    nowhere from here is tried from the run's folder and from each above it.
    """

    def located(root: str, split: str) -> tuple[str, str]:
        return _seen_from(root, run), _seen_from(split, run) if "/" in split else split

    data = config.data
    root, split = located(data.root, data.split)
    sets = []
    for one in data.sets:
        place, own = located(one.root, one.split)
        sets.append(dataclasses.replace(one, root=place, split=own))
    data = dataclasses.replace(data, root=root, split=split, sets=tuple(sets))
    return dataclasses.replace(config, data=data)


def _seen_from(text: str, run: Path) -> str:
    if not text or "://" in text or os.path.lexists(text) or os.path.isabs(text):
        return text
    folder = run.resolve()
    found = (place / text for place in (folder, *folder.parents) if os.path.exists(place / text))
    return str(next(found, text))


def parse_run_config(tree: dict[str, Any], *, where: str) -> Config:
    """A run's whole configuration; fields its version did not have mean what it did then.

    Raises:
        ConfigError: As in `parse_config`.
    """
    config = parse_config(tree, where=where)
    if "precision" not in tree.get("runtime", {}):
        config = with_precision(config, "no")
    encoder = encoder_as_written(config.encoder, tree.get("encoder", {}))
    config = dataclasses.replace(config, encoder=encoder)
    if "normalize" in tree.get("encoder", {}) or find_normalization(encoder) == IMAGENET:
        return config
    return dataclasses.replace(config, encoder=dataclasses.replace(encoder, normalize="imagenet"))


def with_precision(config: Config, precision: Literal["no", "bf16", "fp16"]) -> Config:
    """The configuration with the precision that `auto` became."""
    return dataclasses.replace(
        config, runtime=dataclasses.replace(config.runtime, precision=precision)
    )


def parse_config(tree: Mapping[str, Any], *, where: str) -> Config:
    """Check a parsed TOML tree and freeze it.

    Raises:
        ConfigError: On unknown keys, wrong types or broken rules; `where` names the source.
    """
    _check_values(tree, where=where)
    for key, owner in _unknown_keys(tree, Config, prefix=""):
        last = key.rpartition(".")[2]
        elsewhere = [name for name in _known_keys(Config) if name.rpartition(".")[2] == last]
        near = elsewhere or difflib.get_close_matches(last, owner, n=1)
        meant = " or ".join(map(repr, near))
        hint = f"did you mean {meant}?" if near else f"known here: {', '.join(sorted(owner))}"
        raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
    try:
        return msgspec.convert(_with_home(tree), Config)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{where}: {error}{_choices(tree, str(error))}; `lmcl show-config` prints every field"
        ) from error


def _choices(tree: Mapping[str, Any], said: str) -> str:
    """What may stand where a word stood that is none of a field's words; else empty."""
    place = _NO_CHOICE.search(said)
    if place is None:
        return ""
    owner: type = Config
    value: Any = tree
    *tables, name = place[1].split(".")
    for table in tables:
        owner, value = typing.get_type_hints(owner)[table], value[table]
    words = [one for one in _literals(typing.get_type_hints(owner)[name]) if isinstance(one, str)]
    near = difflib.get_close_matches(str(value[name]), words, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"; {meant}there are {', '.join(words)}"


def _literals(hint: Any) -> Iterator[Any]:
    """The values of all `Literal`s in a type."""
    if typing.get_origin(hint) is Literal:
        yield from typing.get_args(hint)
    else:
        for inner in typing.get_args(hint):
            yield from _literals(inner)


def dump_config(config: Config) -> str:
    """The whole effective configuration as TOML; reading it back gives an equal object.

    But for credentials: a URL is written without them (SECURITY.md); they belong into the
    environment of whoever runs.
    """
    text: str = tomli_w.dumps(_redacted(_without_none(dataclasses.asdict(config))))
    return text


def differences(ours: Config, theirs: Config) -> list[str]:
    """Fields in which two configurations differ, as `key: ours / theirs` lines."""
    left, right = dict(_leaves(ours)), dict(_leaves(theirs))
    return [
        f"{key}: {left.get(key)!r} / {right.get(key)!r}"
        for key in {**left, **right}
        if left.get(key) != right.get(key)
    ]


def flatten(config: Config) -> dict[str, str]:
    """Every field by its dotted key, as text."""
    return {key: redact_url(value) for key, value in _leaves(config)}


def binding_differences(ours: Config, theirs: Config) -> list[str]:
    """Those in fields that decide what a run is: what a resumed run may not change.

    Where the data lie, how the machine is used (but for the precision), which epoch is chosen in
    the end and whether a probe is made then may change. A precision left to `auto` is the one the
    run began with.
    """
    free = (
        "runtime.",
        "data.root:",
        "data.cache:",
        "evaluation.select:",
        "train.patience:",
        "evaluation.probe:",
    )
    is_asked = ours.runtime.precision != "auto"
    return [
        line
        for line in differences(ours, theirs)
        if (is_asked and line.startswith("runtime.precision:"))
        or not (line.startswith(free) or _ROOT_OF_SET.match(line))
    ]


def _read_tree(path: Path, *, above: tuple[Path, ...]) -> dict[str, Any]:
    """A file's tables upon those of its base; `above` are the files that led here."""
    led_here = f" (the base of {above[-1]})" if above else ""
    if len(above) > _MOST_BASES:
        raise ConfigError(
            f"{path}{led_here}: {len(above)} files stand on one another, and at most "
            f"{_MOST_BASES} are followed; put some of them together"
        )
    tree = _parse_file(path, led_here)
    if path.resolve() in above:
        raise ConfigError(f"{path}{led_here}: is its own base; name another file, or none")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f'{path}: base = {base!r} is no file name; write base = "other.toml"')
    below = path.parent / os.path.expanduser(base)
    return _merged(_read_tree(below, above=(*above, path.resolve())), tree)


def _parse_file(path: Path, led_here: str) -> dict[str, Any]:
    try:
        if not path.exists():
            raise ConfigError(
                f"{path}{led_here}: there is no such configuration file{looked_at(path)}, nor one "
                f"of that name that comes with the project; {_near_name(path)}`lmcl show-config "
                "--list` names these",
                exit_code=4,
            )
        # Windows editors put a byte order mark in front of UTF-8.
        return _parse_toml(read_text(path, limit_bytes=_MOST_BYTES).removeprefix("\ufeff"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {printable(error)}") from error
    except (OSError, ShardError) as error:
        raise ConfigError(
            f"{path}: cannot be read as a configuration file: {printable(error)}"
        ) from error


def _near_name(path: Path) -> str:
    name = path.relative_to("configs") if path.is_relative_to("configs") else path
    near = difflib.get_close_matches(name.with_suffix("").as_posix(), config_names(), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def _parse_toml(text: str) -> dict[str, Any]:
    """`tomllib.loads`, whose every complaint is a ValueError.

    Raises:
        ValueError: If it is no TOML, or nested or long beyond what any configuration is.
    """
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error


def _check_values(tree: Mapping[str, Any], *, where: str, prefix: str = "") -> None:
    """Refuse what no field can hold, before anything tries to: huge numbers, texts, nesting.

    Raises:
        ConfigError: Names the key.
    """
    if prefix.count(".") > _MOST_DEPTH:
        raise ConfigError(f"{where}: tables are nested more than {_MOST_DEPTH} deep")
    for key, value in tree.items():
        items = value if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, Mapping):
                _check_values(item, where=where, prefix=f"{prefix}{key}.")
            elif problem := _unusable(item):
                raise ConfigError(f"{where}: {printable(prefix + key)} {problem}")


def _unusable(value: object) -> str:
    """What makes a value unusable for every field; empty if nothing does."""
    if isinstance(value, int) and value.bit_length() > 63:
        return f"is an integer of {value.bit_length()} bits; the largest is 2**63 - 1"
    if isinstance(value, str) and len(value) > _MOST_TEXT:
        return f"is a text of {len(value)} characters; at most {_MOST_TEXT} are taken"
    if isinstance(value, str) and any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
        return f"holds a control character ({printable(value, 80)}); take it out"
    return ""


def _redacted(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _redacted(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_redacted(value) for value in node]
    return redact_url(node) if isinstance(node, str) else node


def _merged(below: dict[str, Any], upon: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in upon.items():
        under = merged.get(key)
        if isinstance(under, dict) and isinstance(value, dict):
            merged[key] = _merged(under, value)
        else:
            merged[key] = value
    return merged


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Change one field of a parsed configuration, as `--set KEY=VALUE` does.

    Raises:
        ConfigError: If it is no `key=value`, or the key leads through a value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: expected key=value, e.g. --set train.epochs=3")
    if "\n" in override or "\r" in override:
        raise ConfigError(
            f"--set {override}: holds a line break, and one --set changes one field; write a --set "
            "for each"
        )
    *path, last = key.strip().split(".")
    value = _parse_value(text)
    table = tree
    for name in path:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {name!r} is a value, not a table")
    # A table changes the fields it names and leaves the others, as a file upon its base does.
    table.update(_merged(table, {last: value}))


def _parse_value(text: str) -> Any:
    try:
        parsed = _parse_toml(f"value = {text}")
    except ValueError:
        return _as_written_elsewhere(text)
    return parsed["value"]


def _as_written_elsewhere(text: str) -> str | float | bool:
    """A value that is no TOML: `.02`, `1.`, `True` as other languages write them, or a bare word.

    Shells eat the quotes that TOML wants around strings.
    """
    word = text.strip()
    if word in ("True", "False"):
        return word == "True"
    return float(word) if _LOOSE_NUMBER.fullmatch(word) else text


def _with_home(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tables with `~` expanded in the fields of `_PATHS`."""
    found = dict(tree)
    for key in _PATHS:
        table, _, name = key.partition(".")
        inside = found.get(table)
        value = inside.get(name) if isinstance(inside, Mapping) else None
        if isinstance(inside, Mapping) and isinstance(value, str) and value.startswith("~"):
            found[table] = {**inside, name: os.path.expanduser(value)}
    data = found.get("data")
    sets = data.get("sets") if isinstance(data, Mapping) else None
    if isinstance(data, Mapping) and isinstance(sets, list):
        found["data"] = {**data, "sets": [_set_with_home(one) for one in sets]}
    return found


def _set_with_home(one: Any) -> Any:
    """A table of `data.sets` with `~` expanded in its paths."""
    if not isinstance(one, Mapping):
        return one
    return {
        key: os.path.expanduser(value)
        if key in ("root", "split") and isinstance(value, str) and value.startswith("~")
        else value
        for key, value in one.items()
    }


def _unknown_keys(
    tree: Mapping[str, Any], owner: type, *, prefix: str
) -> Iterator[tuple[str, list[str]]]:
    hints = typing.get_type_hints(owner)
    names = [item.name for item in dataclasses.fields(owner)]
    for key, value in tree.items():
        if key not in names:
            yield prefix + key, names
        elif isinstance(value, Mapping) and dataclasses.is_dataclass(hints[key]):
            yield from _unknown_keys(value, _as_class(hints[key]), prefix=f"{prefix}{key}.")
        elif isinstance(value, list) and (item := _item_class(hints[key])) is not None:
            for number, one in enumerate(value):
                if isinstance(one, Mapping):
                    yield from _unknown_keys(one, item, prefix=f"{prefix}{key}.{number}.")


def _item_class(hint: object) -> type | None:
    """The dataclass that a field holds a tuple of; None if it is no such field."""
    items = typing.get_args(hint) if typing.get_origin(hint) is tuple else ()
    is_table = bool(items) and isinstance(items[0], type) and dataclasses.is_dataclass(items[0])
    return items[0] if is_table else None


def _known_keys(owner: type, prefix: str = "") -> Iterator[str]:
    """Every field below a dataclass by its dotted key."""
    hints = typing.get_type_hints(owner)
    for item in dataclasses.fields(owner):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _known_keys(_as_class(hints[item.name]), f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def _as_class(hint: object) -> type:
    if not isinstance(hint, type) or isinstance(hint, types.GenericAlias):
        raise TypeError(f"{hint} is not a class")
    return hint


def _leaves(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        for item in dataclasses.fields(node):
            yield from _leaves(getattr(node, item.name), f"{prefix}{item.name}.")
    elif isinstance(node, tuple) and node and dataclasses.is_dataclass(node[0]):
        for number, item in enumerate(node):
            yield from _leaves(item, f"{prefix}{number}.")
    else:
        yield prefix.rstrip("."), node


def _without_none(node: Any) -> Any:
    """TOML has no null: an absent field means its default, and only None defaults are None."""
    if isinstance(node, dict):
        return {key: _without_none(value) for key, value in node.items() if value is not None}
    if isinstance(node, tuple):
        return [_without_none(one) for one in node]
    return node
