from pathlib import Path

import pytest
from click.testing import CliRunner

from lmcl.cli.main import cli

READS_A_RUN = {
    "calibrate": (),
    "eval": (),
    "report": (),
    "threshold": ("--bad-below", "0.4", "--recall", "0.9"),
}


@pytest.mark.parametrize("command", READS_A_RUN)
@pytest.mark.parametrize("asked", ["runs/x/model", "alone", "starter"])
def test_a_model_in_the_place_of_a_run_is_named_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, asked: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/x/model", "alone"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (tmp_path / folder / name).touch()
    (tmp_path / "runs" / "x" / "config.toml").touch()
    done = CliRunner().invoke(cli, [command, asked, *READS_A_RUN[command]])
    said = str(done.exception)
    assert said.startswith(f"{asked}: a model")
    assert ("name its run, runs/x" in said) == (asked == "runs/x/model")
    assert getattr(done.exception, "exit_code", 0) == 2
