"""A run that starts from a finished model: with all of its weights, and never from a wrong one."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from lmcl.cli.main import cli
from lmcl.config import Config, load_config
from lmcl.errors import ConfigError, LmclError
from lmcl.models.named import find_model
from lmcl.models.normalization import find_normalization
from lmcl.models.pretrained import ModelCard, load_model, save_model
from lmcl.models.quality_model import QualityModel
from lmcl.models.training_images import TRAINING_IMAGES, read_training_images
from lmcl.training.checkpoint import list_checkpoints
from lmcl.training.setup import fit, plan, prepare
from shards import ScoreScale
from shards.cli import cli as shard_cli
from shards.read import open_set
from shards.splits.split import load_split

HYBRID = ("encoder.name=hybrid", "encoder.patch=16")
Tiny = Callable[..., Config]
SQUEEZE = (
    *("encoder.name='squeezenet-vit'", "encoder.patch=32"),
    *("crops.size=64", "saliency.view=64"),
)


@pytest.fixture(scope="module")
def learned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of a run of one epoch."""
    run = tmp_path_factory.mktemp("learned") / "run"
    fit(tiny("train.epochs=1"), run, progress=False)
    return run / "model"


def test_student_and_teacher_start_with_every_weight_of_the_model(
    tiny: Tiny, learned: Path, tmp_path: Path
) -> None:
    run = prepare(
        tiny(f"train.start_from='{learned}'", "train.seed=5"), tmp_path, resume="", progress=False
    )
    kept = load_file(learned / "model.safetensors")
    for model in (run.core, run.teacher.model):
        state = model.state_dict()
        assert state.keys() == kept.keys()
        assert all(torch.equal(state[name], kept[name]) for name in kept)
    run.loader.close()


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of the hub's client
def test_train_starts_from_a_model_on_a_hub_as_from_its_folder(
    hub: Any, tiny: Tiny, learned: Path, tmp_path: Path
) -> None:
    name = "hf://somebody/something"
    invoke(["push", str(learned.parent), name])
    made = []
    for source, output in ((name, tmp_path / "away"), (str(learned), tmp_path / "here")):
        start = (f"train.start_from='{source}'", "train.seed=5", "schedule.lr=1e-5")
        changes = tiny.overrides("saliency.layers=1", "train.epochs=1", *start)  # type: ignore[attr-defined]
        settings = [part for change in changes for part in ("--set", change)]
        invoke(["train", "--config", "smoke", "--no-progress", "--output", str(output), *settings])
        made.append(load_file(output / "model" / "model.safetensors"))
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())
    kept = load_file(learned / "model.safetensors")["panel.members"]
    assert (made[0]["panel.members"] - kept).abs().max() < 1e-3
    fresh = prepare(tiny("train.seed=5"), tmp_path / "fresh", resume="", progress=False)
    assert (fresh.core.panel.members.detach() - kept).abs().max() > 1e-3
    fresh.loader.close()


def invoke(words: list[str]) -> None:
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_a_run_from_a_model_resumes_bit_for_bit(tiny: Tiny, learned: Path, tmp_path: Path) -> None:
    config = tiny(f"train.start_from='{learned}'")
    fit(config, tmp_path / "whole", progress=False)
    middle = list_checkpoints(tmp_path / "whole" / "checkpoints")[0]
    fit(config, tmp_path / "again", resume=str(middle), progress=False)
    one, two = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "again")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_stem_that_was_frozen_may_learn_in_the_run_that_follows(
    tiny: Tiny, learned: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    config = tiny(*SQUEEZE, f"train.start_from='{folder}'")
    card = replace(
        load_model(learned).card,
        encoder=replace(config.encoder, frozen=13),
        crops=config.crops,
        saliency=config.saliency,
        training_set="another set",
    )
    model = QualityModel(card.encoder, card.decoder, crop_size=64, view_size=64)
    save_model(folder, model, card)
    run = prepare(config, tmp_path / "run", resume="", progress=False)
    run.loader.close()
    left, right = model.state_dict(), run.core.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert all(one.requires_grad for one in run.core.parameters())


def test_a_model_of_another_split_of_the_same_set_is_refused(
    tiny: Tiny, learned: Path, tmp_path: Path
) -> None:
    other = tiny(f"train.start_from='{learned}'", "data.split='70-10-20-seed123-01'")
    said = r"10 of the 10 images of the val part and 0 of the 10 .* was chosen by 10 of that test"
    with pytest.raises(ConfigError, match=said) as refused:
        prepare(other, tmp_path / "run", resume="", progress=False)
    assert refused.value.exit_code == 5


def test_an_older_model_of_another_split_of_a_set_of_that_name_is_refused(
    tiny: Tiny, learned: Path, tmp_path: Path
) -> None:
    older = Path(shutil.copytree(learned, tmp_path / "model"))
    (older / TRAINING_IMAGES).unlink()
    other = tiny(f"train.start_from='{older}'", "data.split='70-10-20-seed123-01'")
    with pytest.raises(ConfigError, match="may have learned from images that this") as refused:
        prepare(other, tmp_path / "run", resume="", progress=False)
    assert refused.value.exit_code == 5


@dataclass(frozen=True)
class OwnSet:
    """A packed table and the names of its splits."""

    root: Path
    split: str = "70-10-20-seed123-00"


def pack(folder: Path, pictures: dict[str, bytes], scores: list[float], *options: str) -> OwnSet:
    """`lmcl-shard build table` and `split` of some pictures."""
    (folder / "photos").mkdir(parents=True)
    for name, data in pictures.items():
        (folder / "photos" / name).write_bytes(data)
    rows = "".join(f"{name},{score}\n" for name, score in zip(pictures, scores, strict=True))
    (folder / "labels.csv").write_text(f"path,score\n{rows}")
    images = ("--images", str(folder / "photos"), "--score-range", "1", "5", "--no-progress")
    for words in (
        ("build", "table", str(folder / "labels.csv"), *images, "--output", str(folder), *options),
        ("split", str(folder), "--repeats", "1"),
    ):
        done = CliRunner().invoke(shard_cli, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    return OwnSet(root=folder)


@pytest.fixture(scope="module")
def pictures(demo_set: Path) -> list[bytes]:
    packed = open_set(demo_set)
    return [packed.read_bytes(id) for id in packed.ids().tolist()]


@pytest.fixture(scope="module")
def own(pictures: list[bytes], tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a run on an own set of thirty pictures, called as sets were before."""
    folder = tmp_path_factory.mktemp("own")
    names = {f"{number:04d}.img": data for number, data in enumerate(pictures[:30])}
    packed = pack(folder / "first", names, [1 + n % 4 for n in range(30)], "--name", "table")
    fit(tiny(f"data.root='{packed.root}'", "train.epochs=1"), folder / "run", progress=False)
    return folder / "run" / "model"


def test_another_own_set_of_the_same_name_and_file_names_passes(
    own: Path, pictures: list[bytes], tiny: Tiny, tmp_path: Path
) -> None:
    names = {f"{number:04d}.img": data for number, data in enumerate(pictures[30:])}
    other = pack(tmp_path / "second", names, [1 + n % 4 for n in range(30)], "--name", "table")
    config = tiny(f"data.root='{other.root}'", "train.epochs=1", f"train.start_from='{own}'")
    fit(config, tmp_path / "run", progress=False)
    seen = read_training_images(tmp_path / "run" / "model")
    before = read_training_images(own)
    assert seen is not None
    assert before is not None
    train = load_split(open_set(other.root), other.split).train
    assert seen.learned.count == before.learned.count + len(train)
    assert seen.knows_all


def test_the_same_images_in_a_set_of_another_name_are_caught(
    own: Path, pictures: list[bytes], tiny: Tiny, tmp_path: Path
) -> None:
    names = {f"other-{number}.img": data for number, data in enumerate(pictures[5:35])}
    other = pack(tmp_path / "mine", names, [1 + n % 4 for n in range(30)])
    assert open_set(other.root).name == "mine"
    config = tiny(f"data.root='{other.root}'", f"train.start_from='{own}'")
    with pytest.raises(ConfigError, match="the same byte for byte") as refused:
        plan(config, tmp_path / "run")
    assert refused.value.exit_code == 5
    split = load_split(open_set(other.root), other.split)
    seen = read_training_images(own)
    assert seen is not None
    hits = seen.learned.holds(open_set(other.root).samples.sha256[split.test]).sum()
    assert f"and {hits} of the {len(split.test)} of the test part of mine" in str(refused.value)


def test_what_a_model_before_the_one_started_from_had_seen_counts_too(
    own: Path, pictures: list[bytes], tiny: Tiny, tmp_path: Path
) -> None:
    names = {f"b{number}.img": data for number, data in enumerate(pictures[30:])}
    second = pack(tmp_path / "second", names, [1 + n % 4 for n in range(30)])
    between = tiny(f"data.root='{second.root}'", "train.epochs=1", f"train.start_from='{own}'")
    fit(between, tmp_path / "run", progress=False)
    names = {f"c{number}.img": data for number, data in enumerate(pictures[:30])}
    third = pack(tmp_path / "third", names, [1 + n % 3 for n in range(30)])
    last = tiny(f"data.root='{third.root}'", f"train.start_from='{tmp_path / 'run' / 'model'}'")
    with pytest.raises(ConfigError, match="the same byte for byte"):
        plan(last, tmp_path / "last")


def test_a_checkpoint_does_not_go_on_with_other_images_of_the_same_names(
    own: Path, pictures: list[bytes], tiny: Tiny, tmp_path: Path
) -> None:
    names = {f"{number:04d}.img": data for number, data in enumerate(pictures[30:])}
    other = pack(tmp_path / "other", names, [1 + n % 4 for n in range(30)], "--name", "table")
    changes = [f"data.root='{other.root}'", "train.epochs=2"]
    config = load_config(own.parent / "config.toml", changes)
    with pytest.raises(ConfigError, match="was trained on other data than"):
        plan(config, own.parent, resume="auto")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("encoder.width=64", r"has encoder\.width = 48 \(here 64\); take over the \[encoder\]"),
        ("encoder.patch=4", r"has encoder\.patch = 8 \(here 4\); take"),
        ("encoder.depth=2", r"has encoder\.depth = 1 \(here 2\); take"),
        ("decoder.queries=3", r"has decoder\.queries = 6 \(here 3\); take over the \[decoder\]"),
    ],
    ids=["width", "patch", "depth", "decoder"],
)
def test_a_model_of_another_architecture_is_refused_by_the_fields_that_differ(
    tiny: Tiny, learned: Path, tmp_path: Path, change: str, said: str
) -> None:
    config = tiny(f"train.start_from='{learned}'", change)
    with pytest.raises(ConfigError, match=said) as refused:
        prepare(config, tmp_path / "run", resume="", progress=False)
    assert refused.value.exit_code == 5


@pytest.mark.parametrize("width", [0, 4], ids=["asks for none", "keeps it"])
def test_a_damage_head_is_left_out_only_where_the_configuration_asks_for_none(
    tiny: Tiny, tmp_path: Path, width: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    config = tiny(*SQUEEZE, f"decoder.damage={width}", f"train.start_from='{folder}'")
    card = replace(_card(config), decoder=replace(config.decoder, damage=4))
    model = QualityModel(card.encoder, card.decoder, crop_size=64, view_size=64)
    save_model(folder, model, card)
    with caplog.at_level("INFO"):
        run = prepare(config, tmp_path / "run", resume="", progress=False)
    run.close()
    left, right = model.state_dict(), run.core.state_dict()
    assert any(name.startswith("damage.") for name in right) is bool(width)
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert ("decoder.damage = 4 keeps it" in caplog.text) is not bool(width)


def test_two_sources_of_first_weights_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="both say which weights the run starts from"):
        tiny("train.start_from='runs/a/model'", "encoder.weights='stem.npz'")


def test_a_missing_model_folder_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(LmclError, match=r"config\.json: missing; a model folder holds") as refused:
        prepare(
            tiny(f"train.start_from='{tmp_path / 'gone'}'"),
            tmp_path / "run",
            resume="",
            progress=False,
        )
    assert refused.value.exit_code == 4


def test_the_configuration_for_own_images_goes_on_from_the_starter(
    demo_set: Path, tmp_path: Path
) -> None:
    data = (f"data.root='{demo_set}'", "data.split='70-10-20-seed123-00'", "runtime.cells=''")
    run = prepare(load_config("mine", data), tmp_path, resume="", progress=False)
    run.loader.close()
    starter = load_model(find_model("starter"))
    assert (run.preprocessing.mean, run.preprocessing.std) == (starter.card.mean, starter.card.std)
    left, right = starter.model.state_dict(), run.core.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not any(one.requires_grad for one in run.core.encoder.stem.layers.parameters())


def test_a_model_fed_with_other_pixels_is_refused_with_the_field_that_helps(
    tiny: Tiny, learned: Path, tmp_path: Path
) -> None:
    config = tiny(f"train.start_from='{learned}'", "encoder.normalize='half'")
    with pytest.raises(ConfigError, match=r"set encoder\.normalize = \[\[0\.485, ") as refused:
        prepare(config, tmp_path / "run", resume="", progress=False)
    assert refused.value.exit_code == 5
    numbers = "[[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]"
    config = tiny(f"train.start_from='{learned}'", f"encoder.normalize={numbers}")
    prepare(config, tmp_path / "run", resume="", progress=False).loader.close()


@pytest.mark.parametrize(
    "encoder",
    [
        ["encoder.name=vit_tiny_patch16_224", "encoder.patch=8"],
        ["encoder.name=eva02_tiny_patch14_224", "encoder.patch=8"],
        [*HYBRID, "encoder.stem=vit_tiny_patch16_224", "encoder.levels=['blocks.0']"],
    ],
    ids=["vit", "eva02", "stem"],
)
def test_a_model_goes_on_with_crops_of_another_size(
    tiny: Tiny, tmp_path: Path, encoder: list[str]
) -> None:
    folder = tmp_path / "model"
    small = [*encoder, "encoder.width=48", "encoder.heads=3", "decoder.heads=3"]
    before = tiny(*small)
    torch.manual_seed(3)
    model = QualityModel(before.encoder, before.decoder, crop_size=32, view_size=32)
    save_model(folder, model, _card(before))
    sizes = ("crops.size=64", "saliency.view=64", "saliency.window=1")
    after = tiny(*small, *sizes, f"train.start_from='{folder}'")
    run = prepare(after, tmp_path / "run", resume="", progress=False)
    run.close()
    left, right = model.state_dict(), run.core.state_dict()
    changed = [name for name in left if left[name].shape != right[name].shape]
    assert [name.rpartition(".")[2] for name in changed] == ["pos_embed"]
    assert all(torch.equal(left[name], right[name]) for name in left if name not in changed)
    mean = [state[changed[0]][:, 1:].mean(dim=1) for state in (left, right)]
    torch.testing.assert_close(mean[0], mean[1], atol=2e-3, rtol=0)


def test_a_model_whose_positions_cannot_be_resampled_is_refused_with_its_size(
    tiny: Tiny, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    small = [
        *("encoder.name=hybrid", "encoder.stem=swin_tiny_patch4_window7_224"),
        *("encoder.levels=['layers.0']", "encoder.width=48", "encoder.heads=3", "decoder.heads=3"),
    ]
    before = tiny(*small, "crops.size=16", "saliency.view=16")
    model = QualityModel(before.encoder, before.decoder, crop_size=16, view_size=16)
    save_model(folder, model, _card(before))
    with pytest.raises(
        ConfigError, match=r"set crops\.size = 16 and saliency\.view = 16"
    ) as refused:
        prepare(
            tiny(*small, f"train.start_from='{folder}'"), tmp_path / "r", resume="", progress=False
        )
    assert refused.value.exit_code == 5


def test_a_model_with_numbers_that_are_not_finite_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(f"train.start_from='{tmp_path / 'model'}'")
    model = QualityModel(config.encoder, config.decoder, crop_size=32, view_size=32)
    with torch.no_grad():
        model.panel.head.weight.fill_(torch.nan)
    save_model(tmp_path / "model", model, _card(config))
    with pytest.raises(LmclError, match=r"NaN or infinite numbers in 1 of .*panel\.head\.weight"):
        prepare(config, tmp_path / "run", resume="", progress=False)


def _card(config: Config) -> ModelCard:
    mean, std = find_normalization(config.encoder)
    return ModelCard(
        encoder=config.encoder,
        decoder=config.decoder,
        crops=config.crops,
        saliency=config.saliency,
        score=ScoreScale(kind="mos", low=0.0, high=1.0, higher_is_better=True),
        training_set="another set",
        split="s",
        split_hash="ab" * 16,
        decode="torch-pillow",
        mean=mean,
        std=std,
    )
