from pathlib import Path

import pytest

from lmcl.config import binding_differences, differences, dump_config, load_config, parse_config
from lmcl.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text("[data]\nroot = 'x'\nsplit = 'y'\n" + text)
    return path


@pytest.mark.parametrize(
    "path", sorted((REPO / "configs").rglob("*.toml")), ids=lambda path: path.stem
)
def test_every_shipped_configuration_loads(path: Path) -> None:
    assert load_config(path).data.root


def test_a_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(REPO / "configs" / "demo.toml", ["objective.intra_weight='balanced'"])
    (tmp_path / "again.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.toml") == config


def test_the_last_override_wins_and_is_parsed_as_toml(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, ""), ["train.epochs=3", "train.epochs=5"])
    assert config.train.epochs == 5


def test_a_bare_word_is_a_string(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, ""), ["teacher.update=epoch"]).teacher.update == "epoch"


@pytest.mark.parametrize(
    ("text", "override", "words"),
    [
        pytest.param("[train]\nepoch = 3\n", "", ["train.epoch", "epochs"], id="misspelt"),
        pytest.param("[nonsense]\na = 1\n", "", ["nonsense", "known here"], id="unknown-table"),
        pytest.param("", "train.lr=1", ["did you mean 'schedule.lr'?"], id="elsewhere"),
        pytest.param("[train]\nepochs = 'x'\n", "", ["epochs", "int"], id="wrong-type"),
        pytest.param("[train]\nepochs = 0\n", "", ["epochs", ">= 1"], id="broken-rule"),
        pytest.param("[objective]\nkeys = 'both'\n", "", ["keys"], id="unknown-choice"),
        pytest.param("[crops]\nsalient = false\n", "", ["hub", "salient"], id="cross-field"),
        pytest.param("[train\n", "", ["TOML"], id="no-toml"),
        pytest.param("", "runtime.trackers=['wandbb']", ["did you mean 'wandb'"], id="tracker"),
        pytest.param("", "runtime.keep_last=0", ["keep_last", ">= 1"], id="keep-nothing"),
        pytest.param("", "runtime.micro_batch=-1", ["micro_batch", ">= 0"], id="negative"),
        *(
            pytest.param("", override, [override.split("=")[0]], id=override)
            for override in [
                "train.betas=[2.0, 0.9]",
                "train.betas=[0.9, nan]",
                "train.clip=nan",
                "train.clip=inf",
                "train.weight_decay=nan",
                "train.seed=12345678901234567890",
                "decoder.heads=0",
                "decoder.queries=0",
                "evaluation.batch_size=0",
                "objective.intra_weight=-1",
                "objective.intra_weight=nan",
                "objective.temperature=nan",
                "objective.contrastive_weight=nan",
                "schedule.lr=nan",
                "schedule.lr=inf",
                "schedule.warmup_epochs=nan",
                "schedule.decay=nan",
                "schedule.final_fraction=-1",
                "teacher.beta=nan",
                "encoder.width=0",
                "encoder.heads=0",
                "encoder.depth=-1",
                "encoder.patch=0",
                "encoder.frozen=-1",
            ]
        ),
        pytest.param(
            "[encoder]\nname = 'conv-vit'\nwidth = 50\n",
            "encoder.heads=4",
            ["encoder.heads is 4", "encoder.width"],
            id="heads-do-not-divide-the-width",
        ),
        pytest.param(
            "[encoder]\nname = 'conv-vit'\n",
            "encoder.width=54",
            ["encoder.width is 54", "multiple of 4"],
            id="width-without-sines",
        ),
        pytest.param(
            "[encoder]\nname = 'conv-vit'\n",
            "decoder.heads=5",
            ["decoder.heads is 5", "divisor of 192"],
            id="decoder-heads",
        ),
        pytest.param("", "train.epochs", ["key=value"], id="no-equals-sign"),
        pytest.param("", "train.epochs.x=1", ["epochs"], id="value-as-table"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(
    tmp_path: Path, text: str, override: str, words: list[str]
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(path, [override] if override else [])
    assert error.value.exit_code == 2
    for word in words:
        assert word in str(error.value)


def test_a_missing_file_says_where_others_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ls configs") as error:
        load_config(tmp_path / "nothing.toml")
    assert error.value.exit_code == 4


def test_differences_name_the_fields() -> None:
    tree = {"data": {"root": "a", "split": "b"}}
    ours = parse_config(tree, where="ours")
    theirs = parse_config({**tree, "train": {"epochs": 3}}, where="theirs")
    assert differences(ours, theirs) == ["train.epochs: 9 / 3"]


def test_a_resumed_run_may_change_the_machine_and_not_the_experiment() -> None:
    tree = {"data": {"root": "a", "split": "b"}}
    ours = parse_config(tree, where="ours")
    moved = parse_config(
        {"data": {"root": "c", "split": "b"}, "runtime": {"threads": 3, "precision": "bf16"}},
        where="moved",
    )
    assert binding_differences(ours, moved) == ["runtime.precision: 'no' / 'bf16'"]
