"""The configurations that come with the project say what their names promise."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from lmcl.cli.main import cli
from lmcl.config import differences, load_config
from lmcl.errors import ConfigError
from lmcl.sweep.plan import config_files

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SETS = ("live", "csiq", "tid2013", "kadid10k", "livec", "koniq10k", "flive", "spaq")
LADDER = sorted((CONFIGS / "ablations" / "ladder").glob("*.toml"))
ABLATIONS = sorted(path for path in (CONFIGS / "ablations").iterdir() if path.is_dir())
VALUE = re.compile(r"^\w+ = ")
MARK = re.compile(r"# \[(paper|family|ours)\]")


def changed(ours: Path, theirs: Path) -> set[str]:
    lines = differences(load_config(ours), load_config(theirs))
    return {line.partition(":")[0] for line in lines}


@pytest.mark.parametrize("name", SETS)
def test_each_of_the_eight_sets_has_its_configuration(name: str) -> None:
    config = load_config(CONFIGS / "paper" / f"{name}.toml")
    assert config.data.root == f"data/{name}"
    assert config.data.split == ("official" if name == "flive" else "70-10-20-seed123-00")


@pytest.mark.parametrize("name", SETS)
def test_show_config_prints_a_whole_run_from_a_file_with_a_base(name: str) -> None:
    done = CliRunner().invoke(cli, ["show-config", str(CONFIGS / "paper" / f"{name}.toml")])
    assert done.exit_code == 0, done.output
    assert f'root = "data/{name}"' in done.output
    assert 'name = "deit3_small_patch16_224"' in done.output
    assert "base" not in done.output.split("[data]")[0]


@pytest.mark.parametrize("path", sorted((CONFIGS / "paper").glob("*.toml")), ids=lambda p: p.stem)
def test_every_value_of_a_paper_configuration_names_its_source(path: Path) -> None:
    for line in path.read_text().splitlines():
        if VALUE.match(line) and not line.startswith(("base = ", "root = ")):
            assert MARK.search(line), line


def test_the_papers_settings_are_those_the_paper_states() -> None:
    config = load_config(CONFIGS / "paper" / "livec.toml")
    assert (config.crops.random, config.crops.size, config.crops.salient) == (10, 224, True)
    assert (config.saliency.layers, config.saliency.window) == (3, 8)
    assert (config.train.epochs, config.schedule.lr, config.schedule.decay_epochs) == (9, 2e-4, 3)
    assert (config.teacher.update, config.objective.intra_weight) == ("epoch", 1.0)
    assert not config.objective.include_positive


def test_the_ladder_climbs_one_idea_at_a_time() -> None:
    assert [path.stem[0] for path in LADDER] == ["0", "1", "2", "3", "4", "5", "6"]
    steps = [changed(LADDER[i], LADDER[i - 1]) for i in range(1, len(LADDER))]
    assert steps == [
        {"objective.contrastive_weight", "objective.hub", "objective.intra_weight"},
        {"objective.hub", "teacher.update"},
        {"teacher.update"},
        {"objective.intra_weight"},
        {"objective.intra_weight"},
        {"objective.overlap_aware"},
    ]


def test_the_ladder_on_the_starters_stem_climbs_one_idea_at_a_time() -> None:
    files = config_files([Path("ablations/starter-ladder")])
    steps = [changed(files[i], files[i - 1]) for i in range(1, len(files))]
    assert steps == [
        {"objective.contrastive_weight", "objective.hub", "objective.intra_weight"},
        {"objective.intra_weight"},
        {"objective.hub"},
    ]
    assert load_config(files[-1]).teacher.update == "step"


@pytest.mark.parametrize(
    "folder",
    [f for f in ABLATIONS if f.name not in ("ladder", "starter-ladder")],
    ids=lambda folder: folder.name,
)
def test_an_ablation_varies_one_field_and_holds_the_base_as_one_case(folder: Path) -> None:
    files = sorted(folder.glob("*.toml"))
    fields = [changed(file, CONFIGS / "ablations" / "base.toml") for file in files]
    assert len(set().union(*fields)) == 1
    assert fields.count(set()) == 1


def test_a_base_is_found_from_the_files_own_folder_and_overridden(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "base.toml").write_text(
        "[data]\nroot = 'x'\nsplit = 'y'\n[train]\nepochs = 3\nseed = 4\n"
    )
    file = tmp_path / "inner" / "own.toml"
    file.write_text("base = '../base.toml'\n[train]\nepochs = 5\n")
    config = load_config(file, ["train.seed=6"])
    assert (config.data.root, config.train.epochs, config.train.seed) == ("x", 5, 6)


@pytest.mark.parametrize("name", ["demo", "configs/demo.toml", "configs/demo", "demo.toml"])
def test_a_configuration_that_comes_along_is_known_by_its_name_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert load_config(name) == load_config(CONFIGS / "demo.toml")


def test_a_file_under_the_path_itself_is_meant_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    Path("configs/demo.toml").write_text("[data]\nroot = 'mine'\nsplit = 'y'\n")
    assert load_config("configs/demo.toml").data.root == "mine"


def test_a_folder_that_comes_along_is_known_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_files([Path("ablations/ladder")]) == LADDER


@pytest.mark.parametrize("name", ["paper/livc", "../configs/demo.toml", "/configs/demo.toml"])
def test_a_name_that_is_none_tells_where_the_names_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"lmcl show-config --list") as error:
        load_config(name)
    assert error.value.exit_code == 4
    assert ("did you mean 'paper/livec'?" in str(error.value)) is (name == "paper/livc")


def test_the_list_names_every_file_and_each_name_is_taken() -> None:
    names = CliRunner().invoke(cli, ["show-config", "--list"]).output.split()
    assert len(names) == len(list(CONFIGS.rglob("*.toml")))
    assert all(load_config(name) for name in names)


def test_a_missing_base_is_named_with_the_file_that_wants_it(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("base = 'gone.toml'\n")
    with pytest.raises(ConfigError, match=r"gone\.toml \(the base of .*own\.toml\)") as error:
        load_config(tmp_path / "own.toml")
    assert error.value.exit_code == 4


def test_a_file_that_is_its_own_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("base = 'b.toml'\n")
    (tmp_path / "b.toml").write_text("base = 'a.toml'\n")
    with pytest.raises(ConfigError, match="its own base"):
        load_config(tmp_path / "a.toml")


def test_a_base_that_is_no_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("base = 3\n")
    with pytest.raises(ConfigError, match="no file name"):
        load_config(tmp_path / "a.toml")


def test_an_unknown_key_of_a_base_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("[data]\nroot = 'x'\nsplit = 'y'\n[train]\nepoch = 3\n")
    (tmp_path / "a.toml").write_text("base = 'base.toml'\n")
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        load_config(tmp_path / "a.toml")
