import os
from pathlib import Path

import pytest

from lmcl.config import (
    binding_differences,
    differences,
    dump_config,
    flatten,
    load_config,
    parse_config,
    with_precision,
)
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
                "schedule.final_fraction=2",
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
        pytest.param(
            "[train]\nbackbone_lr_scale = 0\n",
            "train.layer_decay=0.8",
            ["train.layer_decay = 0.8 has nothing to change"],
            id="rates-of-layers-that-stay",
        ),
        pytest.param(
            "",
            "encoder.normalize=[[123.7, 116.3, 103.5], [58.4, 57.1, 57.4]]",
            ["pixels are in [0, 1]", "divide both triples by 255"],
            id="means-of-pixels-to-255",
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
    with pytest.raises(ConfigError, match="lmcl show-config --list") as error:
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
    assert binding_differences(ours, moved) == []
    assert binding_differences(with_precision(ours, "no"), moved) == [
        "runtime.precision: 'no' / 'bf16'"
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("x = " + "[" * 20000, ["nested too deeply"], id="brackets"),
        pytest.param("[a" + ".a" * 40 + "]\nx = 1\n", ["nested"], id="tables"),
        pytest.param("[train]\nepochs = 1" + "0" * 400 + "\n", ["train.epochs", "bits"], id="int"),
        pytest.param("[data]\nroot = '" + "x" * 9000 + "'\nsplit = 'y'", ["9000"], id="text"),
        pytest.param('[encoder]\nname = "a\\u0007b"\n', ["encoder.name", "control"], id="control"),
        pytest.param("x = '" + "y" * (2 << 20) + "'", ["bytes"], id="two-megabytes"),
    ],
)
def test_an_absurd_file_is_one_short_sentence(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert len(str(error.value).encode()) <= 2048
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "field",
    [
        *("runtime.threads", "train.epochs", "train.batch_size", "encoder.width", "encoder.depth"),
        *("decoder.queries", "saliency.view", "saliency.layers", "crops.size", "crops.random"),
        *("crops.evaluation", "schedule.decay_epochs", "schedule.lr", "evaluation.batch_size"),
        *("runtime.checkpoint_steps", "runtime.keep_last", "runtime.micro_batch", "train.clip"),
    ],
)
def test_a_number_beyond_any_sensible_one_is_refused_by_name(tmp_path: Path, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        load_config(write(tmp_path, ""), [f"{field}=4000000000"])


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf[data]\nroot = 'x'\nsplit = 'y'\n")
    assert load_config(path).data.root == "x"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("objective.contrastive_weight=.02", 0.02),
        ("objective.contrastive_weight=1.", 1.0),
        ("objective.contrastive_weight=.5e-1", 0.05),
        ("objective.contrastive_weight= .25 ", 0.25),
        ("train.flip=True", True),
        ("train.flip=False", False),
        ("data.split=.hidden", ".hidden"),
    ],
)
def test_set_takes_numbers_as_other_languages_write_them(text: str, value: object) -> None:
    assert flatten(load_config("demo", [text]))[text.partition("=")[0]] == str(value)


def test_a_table_in_set_changes_the_fields_it_names_and_leaves_the_others(tmp_path: Path) -> None:
    path = write(tmp_path, "[train]\nepochs = 7\nseed = 3\n")
    assert load_config(path, ["train={epochs=4}"]).train.epochs == 4
    assert load_config(path, ["train={epochs=4}"]).train.seed == 3


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_break_in_set_is_refused_not_cut_off(tmp_path: Path, end: str) -> None:
    with pytest.raises(ConfigError, match="line break"):
        load_config(write(tmp_path, ""), [f"train.epochs=3{end}train.seed=5"])


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.toml")
    with pytest.raises(ConfigError, match=r"run\.toml"):
        load_config(tmp_path / "run.toml")


def test_a_chain_of_bases_ends(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.toml").write_text(f"base = '{number + 1}.toml'\n")
    with pytest.raises(ConfigError, match="stand on one another"):
        load_config(tmp_path / "0.toml")


def test_a_written_configuration_holds_no_credentials(tmp_path: Path) -> None:
    root = "https://me:geheim@host/set?X-Signature=geheim"
    config = load_config(write(tmp_path, ""), [f"data.root='{root}'"])
    assert config.data.root == root
    for text in (dump_config(config), str(flatten(config))):
        assert "geheim" not in text
        assert "host/set" in text


def test_the_chosen_epoch_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    best = load_config(write(tmp_path, ""), ["evaluation.select='best'"])
    last = load_config(write(tmp_path, ""), ["evaluation.select='last'"])
    assert binding_differences(best, last) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("objective.rank_loss=margine", "did you mean 'margin'? there are fidelity, margin;"),
        ("runtime.precision=fp32", "there are auto, no, bf16, fp16;"),
        ("objective.intra_weight=balance", "balanced"),
        ("schedule.shape=cos", "cosine"),
    ],
)
def test_a_word_that_a_field_does_not_know_is_answered_by_those_it_does(
    change: str, said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("demo", [change])
    assert said in str(refused.value)
