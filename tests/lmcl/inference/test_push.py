"""Models on a hub: pushed and scored by the commands, through the real client."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

import lmcl
from lmcl.cli.main import main
from lmcl.inference.scores_file import read_rows
from lmcl.inference.torchmetrics import ImageQuality
from lmcl.models.folders import MODEL_FILES
from lmcl.models.named import STARTER_FOLDER, locate_model

# The client's own upload of large files, with the HTTP library it has today.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

NAME = "me/photos"
URL = f"hf://{NAME}"


def run(*words: Any) -> int:
    """Exit code of the main command."""
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def score(model: str, photos: Path, output: Path, *more: str) -> int:
    line = ("score", photos / "img.00.jpg", "--model", model, "--output", output, "--device", "cpu")
    return run(*line, "--no-progress", *more)


def origin(output: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads(output.with_name(f"{output.name}.origin.json").read_text())
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in MODEL_FILES}


def publish(hub: Any, folder: Path, *, name: str = NAME, **more: bytes) -> str:
    """Put a model there by the back door; its commit."""
    module = sys.modules["hub_server"]
    there = hub.repositories.setdefault(name, module.Repository())
    commit: str = there.commit(files_of(folder) | more)
    return commit


@pytest.fixture
def calibrated(model_folder: Path, tmp_path: Path) -> Path:
    """A model folder with something beside it that stays at home."""
    folder = tmp_path / "run" / "model"
    shutil.copytree(model_folder, folder)
    (folder / "thresholds.json").write_text('{"format_version": 1, "rules": []}')
    (folder / "notes.txt").write_text("mine")
    (folder / "export").mkdir()
    (folder / "export" / "model.onnx").write_bytes(b"mine")
    return folder


def test_a_pushed_model_scores_as_the_folder_does(
    hub, calibrated, photos, tmp_path, capsys
) -> None:
    assert run("push", calibrated.parent, URL) == 0
    said = capsys.readouterr().out
    there = hub.repositories[NAME]
    assert there.newest == files_of(calibrated) | {".gitattributes": b""}
    for file, data in files_of(calibrated).items():
        assert f"  {file}: {len(data):,} bytes" in said
    assert "licence: other" in said
    assert "left out: export, notes.txt" in said
    assert f"--model {URL}@{there.refs['main']}" in said

    here, away = tmp_path / "here.csv", tmp_path / "away.csv"
    assert score(str(calibrated), photos, here) == score(URL, photos, away) == 0
    assert [r.score for r in read_rows(here)] == [r.score for r in read_rows(away)]
    assert origin(away)["source"] == f"{URL}@{there.refs['main']}"
    assert origin(away)["model"] == origin(here)["model"]


def test_a_dry_run_says_what_would_go_and_asks_nobody(hub, calibrated, capsys) -> None:
    assert run("push", calibrated, URL, "--dry-run", "--private") == 0
    said = capsys.readouterr().out
    assert f"{URL} (private)" in said
    assert "model.safetensors" in said
    assert not hub.asked


def test_a_private_model_needs_a_token_that_nobody_sees(
    hub, calibrated, photos, tmp_path, monkeypatch, capsys
) -> None:
    assert run("push", calibrated, URL, "--private") == 0
    assert hub.repositories[NAME].is_private
    output = tmp_path / "s.csv"
    assert score(URL, photos, output) == 0
    monkeypatch.setenv("HF_TOKEN", "another")
    assert run("push", calibrated, URL) == 4
    assert "401 (Invalid username or password.); set a token" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    assert score(URL, photos, tmp_path / "t.csv") == 4
    found = capsys.readouterr()
    assert "private" in found.err
    assert "HF_TOKEN" in found.err
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if hub.token.encode() in path.read_bytes()]
    assert hub.token not in found.out + found.err


def test_private_is_not_promised_where_the_repository_is_public(hub, calibrated, capsys) -> None:
    publish(hub, calibrated)
    before = dict(hub.repositories[NAME].commits)
    assert run("push", calibrated, URL, "--private") == 2
    assert "public" in capsys.readouterr().err
    assert hub.repositories[NAME].commits == before


def test_a_push_takes_the_place_of_the_whole_model(hub, calibrated, model_folder) -> None:
    publish(hub, calibrated, **{"calibration.json": b"{}", "photo.jpg": b"theirs"})
    assert run("push", model_folder, URL) == 0
    assert hub.repositories[NAME].newest == files_of(model_folder) | {"photo.jpg": b"theirs"}
    count = len(hub.repositories[NAME].commits)
    assert run("push", model_folder, f"{URL}@main") == 2
    assert len(hub.repositories[NAME].commits) == count


def _remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _link(folder: Path, name: str) -> None:
    (folder.parent / name).write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to(folder.parent / name)


def _link_to_other(folder: Path, name: str) -> None:
    (folder.parent / name).write_text("somebody's secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder.parent / name)


def _no_list(folder: Path, name: str) -> None:
    (folder / name).write_text("[]")


def _cut(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-9])


@pytest.mark.parametrize(
    ("harm", "file", "code"),
    [
        (_remove, "config.json", 4),
        (_remove, "model.safetensors", 4),
        (_remove, "README.md", 4),
        (_link, "README.md", 5),
        (_link, "model.safetensors", 5),
        (_cut, "config.json", 5),
        (_cut, "model.safetensors", 5),
        (_cut, "thresholds.json", 5),
        (_no_list, "training_images.json", 5),
    ],
)
def test_what_is_no_whole_model_folder_is_not_pushed(
    hub, calibrated, capsys, harm, file, code
) -> None:
    harm(calibrated, file)
    assert run("push", calibrated, URL) == code
    assert file in capsys.readouterr().err
    assert not hub.asked


@pytest.mark.parametrize("file", MODEL_FILES)
def test_a_link_is_refused_before_what_it_leads_to_is_read(hub, calibrated, capsys, file) -> None:
    _link_to_other(calibrated, file)
    assert run("push", calibrated, URL) == 5
    assert f"{file}: a link" in capsys.readouterr().err
    assert not hub.asked


def test_only_the_files_of_a_model_folder_come(hub, model_folder, tmp_path) -> None:
    others = {f"part-{k}.bin": b"x" for k in range(3000)}
    code = {"model.py": b"raise SystemExit", "pytorch_model.bin": b"pickle"}
    commit = publish(hub, model_folder, **others, **code)
    found = locate_model(URL)
    assert found.source == f"{URL}@{commit}"
    assert {path.name for path in found.folder.iterdir()} == files_of(model_folder).keys()
    assert hub.files_asked == files_of(model_folder).keys()
    assert len(hub.asked) < 25


def test_what_is_in_the_cache_is_not_asked_for_again(hub, model_folder, monkeypatch) -> None:
    commit = publish(hub, model_folder)
    folder = locate_model(URL).folder
    hub.asked.clear()
    assert locate_model(f"{URL}@{commit}").folder == folder
    assert not hub.asked
    assert locate_model(URL).folder == folder
    assert len(hub.asked) == 1
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert locate_model(URL).source == f"{URL}@{commit}"
    assert not hub.asked


def test_a_branch_that_moved_is_another_model_and_offline_the_last_one_seen(
    hub, model_folder, monkeypatch
) -> None:
    first = publish(hub, model_folder)
    assert locate_model(URL).source.endswith(first)
    second = publish(hub, model_folder, **{"README.md": b"another card"})
    assert locate_model(URL).source.endswith(second)
    assert locate_model(f"{URL}@{first}").source.endswith(first)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert locate_model(URL).source.endswith(second)


def test_without_a_network_the_cache_serves_and_that_is_said(
    hub, model_folder, monkeypatch, caplog
) -> None:
    commit = publish(hub, model_folder)
    locate_model(URL)
    hub.refuses = (503, "maintenance")
    assert locate_model(URL).source == f"{URL}@{commit}"
    assert "503 (maintenance)" in caplog.text
    assert "the copy in the cache is taken" in caplog.text


def test_another_revision_does_not_continue_a_scores_file(
    hub, model_folder, make_model, photos, tmp_path, capsys, caplog
) -> None:
    first, output = publish(hub, model_folder), tmp_path / "s.csv"
    assert score(URL, photos, output) == 0
    carded = publish(hub, model_folder, **{"README.md": b"another card"})
    assert score(URL, photos, output, "--resume") == 0
    assert f"{URL}@{first} before, {URL}@{carded} now" in caplog.text
    other = publish(hub, make_model(tmp_path / "other", note="another"))
    capsys.readouterr()
    assert score(URL, photos, output, "--resume") == 5
    assert f"{URL}@{carded} before, {URL}@{other} now" in capsys.readouterr().err
    assert score(f"{URL}@{first}", photos, output, "--resume") == 0


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("hf://me/nothing", 4, "no such model, or a private one"),
        (f"{URL}@v9", 4, "no revision 'v9'"),
        ("hf://me/empty", 5, "holds no config.json"),
        ("hf://me/weightless", 5, "holds no model.safetensors"),
        ("hf://me/others", 5, "not a model card of this version"),
        ("hf://me/huge", 5, "more than the 1,048,576 allowed"),
        ("hf://datasets/me/photos", 2, "hf://USER/NAME"),
    ],
)
def test_what_cannot_be_had_is_a_sentence(
    hub, model_folder, photos, tmp_path, capsys, name, code, says
) -> None:
    publish(hub, model_folder)
    files, module = files_of(model_folder), sys.modules["hub_server"]
    for other, held in {
        "empty": {"a.txt": b""},
        "weightless": {"config.json": files["config.json"]},
        "others": files | {"config.json": b'{"model_type": "bert"}'},
        "huge": files | {"README.md": bytes((1 << 20) + 1)},
    }.items():
        hub.repositories[f"me/{other}"] = module.Repository()
        hub.repositories[f"me/{other}"].commit(held)
    assert score(name, photos, tmp_path / "s.csv") == code
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not (tmp_path / "s.csv").exists()
    # Of what is no model of ours, no weights were asked for.
    assert "model.safetensors" not in hub.files_asked


def test_offline_without_a_copy_is_a_sentence(hub, photos, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert score(URL, photos, tmp_path / "s.csv") == 4
    said = capsys.readouterr().err
    assert "HF_HUB_OFFLINE" in said
    assert "does not hold it" in said
    assert not hub.asked


@pytest.mark.parametrize("file", [*("config.json", "README.md", "model.safetensors")])
def test_a_download_that_breaks_off_leaves_nothing_that_looks_finished(
    hub, calibrated, monkeypatch, capsys, photos, tmp_path, file
) -> None:
    publish(hub, calibrated)
    hub.spoil = lambda method, name, data: data[:-1] if name == file else data
    assert score(URL, photos, tmp_path / "s.csv") == 1
    assert "broke off" in capsys.readouterr().err
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    assert not list(cache.rglob("model.safetensors"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert score(URL, photos, tmp_path / "s.csv") == 4
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.spoil = lambda method, name, data: data
    assert score(URL, photos, tmp_path / "s.csv") == 0


def test_a_file_larger_than_it_says_is_cut_off(hub, model_folder, monkeypatch) -> None:
    publish(hub, model_folder)
    hub.spoil = lambda method, name, data: data + bytes(1 << 24) if name == "README.md" else data
    with pytest.raises(lmcl.errors.LmclError, match="more than the") as found:
        locate_model(URL)
    assert found.value.exit_code == 5
    assert not list(Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("README.md"))


@pytest.mark.parametrize("status", [401, 403, 429, 500])
def test_what_a_hub_refuses_is_a_sentence(hub, calibrated, capsys, status) -> None:
    hub.refuses = (status, f"no, {hub.token}\x1b[2J")
    assert run("push", calibrated, URL) in (1, 4)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert hub.token not in said
    assert "\x1b" not in said


def test_the_endpoint_of_the_environment_is_asked(hub) -> None:
    code = f"from lmcl.cli.main import main; main(['score', 'x', '--model', '{URL}'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(Path(lmcl.__file__).parents[1]), "HF_ENDPOINT": hub.url},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4, done.stderr
    assert f"{hub.url} has no such model" in done.stderr
    assert hub.asked[-1] == f"HEAD /{NAME}/resolve/main/config.json"


def test_load_metric_export_and_saliency_take_a_name(
    hub, model_folder, photos, tmp_path, monkeypatch
) -> None:
    commit = publish(hub, model_folder)
    monkeypatch.chdir(tmp_path)
    expected = lmcl.load(model_folder, device="cpu").score(photos / "img.00.jpg")
    model = lmcl.load(URL, device="cpu")
    assert model.source == f"{URL}@{commit}"
    assert model.score(photos / "img.00.jpg") == expected
    assert ImageQuality(URL).scorer.source == model.source
    assert run("saliency", photos / "img.00.jpg", "--model", URL, "--output", "looks") == 0
    assert run("export", URL, "--format", "safetensors") == 0
    assert files_of(tmp_path / "export" / "model") == files_of(model_folder)


@pytest.mark.parametrize(
    "line",
    [
        ("calibrate", URL),
        ("threshold", URL, "--bad-below", "0.4", "--recall", "0.9"),
        ("eval", URL),
        ("report", URL),
    ],
    ids=lambda line: line[0],
)
def test_what_writes_into_a_run_refuses_a_name(hub, capsys, line) -> None:
    assert run(*line) == 2
    assert "a model on a hub, and this needs a run folder" in capsys.readouterr().err
    assert not hub.asked


def test_the_starter_travels_too(hub, tmp_path) -> None:
    assert run("push", "starter", "hf://me/starter") == 0
    assert files_of(locate_model("hf://me/starter").folder) == files_of(STARTER_FOLDER)
