"""The benchmark measures equal work: every case gives the same loss and the same gradients."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from lmcl.bench import contrastive_cases
from lmcl.cli.bench import contrastive as command


def _value_and_gradients(name: str, m: int = 60) -> list[torch.Tensor]:
    inputs = contrastive_cases.make_inputs(m, 16, 5, dtype=torch.float32, device="cpu")
    loss = contrastive_cases.CASES[name]()(*inputs, 0.1)
    loss.backward()
    return [loss.detach(), inputs[0].grad, inputs[1].grad]


@pytest.mark.parametrize("name", ["careful_eager", "inf_cl", "chunked", "fused"])
def test_every_case_is_the_same_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_cases, "_INF_CL_TILE", 16)
    torch.testing.assert_close(
        _value_and_gradients(name), _value_and_gradients("naive_eager"), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", ["supcon", "info_nce", "clip"])
def test_the_losses_of_others_are_their_dense_code(name: str) -> None:
    torch.testing.assert_close(
        _value_and_gradients(name)[:2], _value_and_gradients(f"{name}_dense")[:2], rtol=1e-4,
        atol=1e-6,
    )  # fmt: skip


def test_the_compiled_chunks_are_the_same_loss_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(contrastive_cases, "_CHUNK", 16)
    truth = _value_and_gradients("naive_eager")
    for name in ("careful_compiled", "chunked_compiled"):
        torch.testing.assert_close(_value_and_gradients(name), truth, rtol=1e-4, atol=1e-6)


def test_the_command_writes_lines_and_a_chart(tmp_path: Path) -> None:
    lines, picture = tmp_path / "lines.jsonl", tmp_path / "chart.svg"
    done = CliRunner().invoke(
        command,
        ["--rows", "100", "--width", "16", "--case", "chunked", "--case", "fused",
         "--device", "cpu", "--rounds", "1", "--output", str(lines), "--chart", str(picture),
         "--no-progress"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [record["params"]["phase"] for record in records] == ["forward", "backward", "both"]
    assert all(record["case"] == "chunked" for record in records)
    assert "chunked" in picture.read_text()
