"""A small demo set, made once, and configurations that train on it in seconds."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from lmcl.config import Config, load_config
from shards.build.build import build
from shards.datasets.demo import open_demo, write_demo
from shards.read import open_set
from shards.splits.draw import make_splits
from shards.splits.split import write_split

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def demo_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six synthetic contents of ten pictures each, packed and split."""
    folder = tmp_path_factory.mktemp("demo")
    labels = write_demo(folder / "images", contents=6)
    shards = folder / "shards"
    build(open_demo(labels.parent), shards, workers=1)
    for split in make_splits(open_set(shards), repeats=2):
        write_split(shards, split)
    return shards


@pytest.fixture(scope="session")
def tiny(demo_set: Path) -> "ConfigMaker":
    """Makes configurations of runs that take about a second an epoch."""
    return ConfigMaker(demo_set)


class ConfigMaker:
    """`tiny("train.epochs=3")` is configs/smoke.toml on the demo set with that change."""

    def __init__(self, shards: Path) -> None:
        self.shards = shards

    def overrides(self, *changes: str) -> list[str]:
        """What `--set` would say."""
        small = ("crops.size=32", "saliency.view=32", "saliency.window=2", "crops.random=3")
        return [f"data.root='{self.shards}'", *small, "encoder.depth=1", *changes]

    def __call__(self, *changes: str) -> Config:
        names = ("saliency.layers=1",)
        return load_config(REPO / "configs" / "smoke.toml", self.overrides(*names, *changes))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in hub that the real client asks, with a cache and a token store of its own."""
    path = Path(__file__).resolve().parents[1] / "hub_server.py"
    spec = importlib.util.spec_from_file_location("hub_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hub_server"] = module
    spec.loader.exec_module(module)
    server = module.HubServer()
    # The client reads its environment when it is imported; here is what it would have read.
    values = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in values.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", server.token)
    try:
        yield server
    finally:
        server.end()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Toy networks run fastest, and most repeatably, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
