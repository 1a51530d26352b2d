"""Pixels are normalised as the pretrained model wants them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lmcl.config import Config, load_config, load_run_config
from lmcl.errors import ConfigError
from lmcl.inference.export import CropQuality
from lmcl.inference.scorer import open_scorer
from lmcl.models.encoder import EncoderConfig
from lmcl.models.normalization import IMAGENET, NAMED, Normalization, find_normalization
from lmcl.models.pretrained import ModelCard, save_model
from lmcl.training.setup import prepare
from shards import ScoreScale

HALF, CLIP = NAMED["half"], NAMED["clip"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deit3_small_patch16_224", IMAGENET),
        ("vit_base_patch16_224.augreg_in21k", HALF),
        ("vit_base_patch16_clip_224.openai", CLIP),
        ("eva02_tiny_patch14_224.mim_in22k", CLIP),
        ("vit_small_patch14_reg4_dinov2", IMAGENET),
        ("vit_base_patch16_siglip_224", HALF),
        ("vit_base_r50_s16_224", HALF),
        ("vit_pe_core_base_patch16_224", HALF),
        ("conv-vit", IMAGENET),
        ("squeezenet-vit", IMAGENET),
    ],
)
def test_a_model_is_fed_as_timm_says(name: str, expected: object) -> None:
    assert find_normalization(EncoderConfig(name=name)) == expected


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("tf_efficientnet_lite0", HALF),
        ("resnet18", IMAGENET),
        ("squeezenet1_1", IMAGENET),
        ("swin_tiny_patch4_window7_224", IMAGENET),
        ("vit_base_patch16_siglip_224", HALF),
        ("convnext_base.clip_laion2b", CLIP),
    ],
)
def test_a_hybrid_is_fed_as_its_stem_is(stem: str, expected: object) -> None:
    assert find_normalization(EncoderConfig(name="hybrid", stem=stem)) == expected


def test_a_configuration_can_say_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[data]\nroot = "x"\nsplit = "y"\n')
    named = load_config(path, ["encoder.normalize='clip'"])
    assert find_normalization(named.encoder) == CLIP
    numbers = load_config(path, ["encoder.normalize=[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]"])
    assert find_normalization(numbers.encoder) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    for wrong in ("'middle'", "[[0.1, 0.2, 0.3], [0.4, 0.5, 0.0]]", "[[0.1], [0.4]]"):
        with pytest.raises(ConfigError):
            load_config(path, [f"encoder.normalize={wrong}"])


def test_a_run_of_a_version_without_the_field_keeps_what_it_had(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        '[data]\nroot = "x"\nsplit = "y"\n[encoder]\nname = "vit_base_patch16_clip_224.openai"\n'
    )
    assert find_normalization(load_run_config(path).encoder) == IMAGENET
    assert find_normalization(load_config(path).encoder) == CLIP


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_base_patch16_clip_224", CLIP),
        ("eva02_tiny_patch14_224", CLIP),
        ("vit_tiny_patch16_224", HALF),
        ("vit_tiny_r_s16_p8_224", HALF),
        ("deit3_small_patch16_224", IMAGENET),
    ],
    ids=["clip", "eva02", "augreg", "hybrid", "deit3"],
)
def test_what_a_model_learned_with_is_what_it_scores_and_is_exported_with(
    tiny: Callable[..., Config], tmp_path: Path, name: str, expected: Normalization
) -> None:
    small = ("encoder.width=48", "encoder.heads=3", "decoder.heads=3", "encoder.patch=4")
    config = tiny(f"encoder.name={name}", *small, "saliency.window=1")
    run = prepare(config, tmp_path / "run", resume="", progress=False)
    run.close()
    given = run.preprocessing
    assert (given.mean, given.std) == expected
    card = ModelCard(
        encoder=config.encoder,
        decoder=config.decoder,
        crops=config.crops,
        saliency=config.saliency,
        score=ScoreScale(kind="mos", low=0.0, high=1.0, higher_is_better=True),
        training_set="demo",
        split="s",
        split_hash="ab" * 16,
        decode="torch-pillow",
        mean=given.mean,
        std=given.std,
    )
    save_model(tmp_path / "model", run.core, card)
    scorer = open_scorer(str(tmp_path / "model"), device="cpu", engine="torch")
    assert (scorer.card.mean, scorer.card.std) == expected
    crops = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    mean, std = (torch.tensor(channels)[:, None, None] for channels in expected)
    pixels = (torch.from_numpy(crops).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        truth = run.core.eval()(pixels).score.numpy()
        exported = CropQuality(scorer)(torch.from_numpy(crops))[0].numpy()
    scored = scorer.engine.forward([crops], batch_images=1).quality[0]
    np.testing.assert_allclose(scored, truth, atol=1e-5)
    np.testing.assert_allclose(exported, truth, atol=1e-5)
