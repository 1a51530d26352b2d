import pytest
import torch

from pipeline.normalize import normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float64, 1e-6)],
    ids=["f32", "bf16", "f64"],
)
def test_normalised_crops_equal_the_formula(dtype: torch.dtype, tolerance: float) -> None:
    crops = torch.randint(0, 256, (2, 3, 17, 17, 3), dtype=torch.uint8)
    exact = (crops.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    exact = exact.flatten(0, 1).permute(0, 3, 1, 2)
    out = normalize(crops, mean=MEAN, std=STD, dtype=dtype)
    assert out.dtype == dtype
    assert ((out.double() - exact).abs() <= tolerance * exact.abs().clamp_min(1)).all()


def test_rows_are_image_major_and_memory_is_channels_last() -> None:
    crops = torch.arange(6, dtype=torch.uint8).reshape(2, 3, 1, 1, 1).expand(2, 3, 4, 4, 3)
    out = normalize(crops.contiguous(), mean=(0.0,) * 3, std=(1 / 255,) * 3)
    assert out[:, 0, 0, 0].round().tolist() == [0, 1, 2, 3, 4, 5]
    assert out.is_contiguous(memory_format=torch.channels_last)
