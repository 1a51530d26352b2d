"""Pixels are normalised as the pretrained model wants them."""

from pathlib import Path

import pytest

from lmcl.config import load_config, load_run_config
from lmcl.errors import ConfigError
from lmcl.models.encoder import EncoderConfig
from lmcl.models.normalization import IMAGENET, NAMED, find_normalization

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
        ("conv-vit", IMAGENET),
        ("squeezenet-vit", IMAGENET),
    ],
)
def test_a_model_is_fed_as_timm_says(name: str, expected: object) -> None:
    assert find_normalization(EncoderConfig(name=name)) == expected


@pytest.mark.parametrize(
    ("stem", "expected"),
    [("tf_efficientnet_lite0", HALF), ("resnet18", IMAGENET), ("squeezenet1_1", IMAGENET)],
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
