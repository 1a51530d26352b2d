"""The method on plain tensors: saliency, crops, loss, update of the teacher (docs/glossary.md).

`python examples/minimal_loop.py` trains on noise for a few steps and needs no data set. The product
does the same with shards, DALI, fused kernels and several ranks; tests/test_extend.py holds that
`student_loss` is the loss of its training step.

Source: "Local Manifold Learning for No-Reference Image Quality Assessment", arXiv 2406.19247.
"""

import copy

import torch
from torch import Tensor
from torch.nn import functional

from lmcl.models.encoder import EncoderConfig
from lmcl.models.quality_model import DecoderConfig, QualityModel

CROP, VIEW, RANDOM = 64, 64, 4
"""Sides of a crop and of the whole-image view in pixels; random crops of an image (H)."""
WINDOW, LAYERS = 2, 1
"""Salient window in tokens (M), and last encoder layers that are averaged (K)."""
A, TAU = 0.1, 0.1
"""Weight of the contrastive term, and its temperature."""


def salient_corners(teacher: QualityModel, images: Tensor) -> Tensor:
    """Top left corner, in pixels, of the crop around the window with the most CLS attention."""
    view = functional.interpolate(images, (VIEW, VIEW), mode="bilinear", antialias=True)
    with torch.no_grad():
        attention = teacher.encoder.cls_attention(view, layers=LAYERS)  # (b, g, g)
    sums = functional.avg_pool2d(attention[:, None], WINDOW, stride=1)[:, 0]
    best, grid = sums.flatten(1).argmax(1), attention.shape[-1]
    window_at = torch.stack([best // sums.shape[-1], best % sums.shape[-1]], dim=1)
    extent = torch.tensor(images.shape[-2:])
    centre = (window_at + WINDOW / 2) / grid * extent
    return (centre - CROP / 2).round().long().clamp(min=0).minimum(extent - CROP)


def cut_crops(images: Tensor, salient: Tensor) -> Tensor:
    """(b, H + 1, 3, s, s): the random crops of each image, then its salient one."""
    high = torch.tensor(images.shape[-2:]) - CROP + 1
    corners = (torch.rand(len(images), RANDOM, 2) * high).long()
    corners = torch.cat([corners, salient[:, None]], dim=1)
    cut = [
        torch.stack([image[:, y : y + CROP, x : x + CROP] for y, x in places.tolist()])
        for image, places in zip(images, corners, strict=True)
    ]
    return torch.stack(cut)


def information_loss(f: Tensor, s: Tensor) -> Tensor:
    """-<f_i, s_t>/tau + log of the sum over all other random crops of exp(<f_i, f_j>/tau), mean.

    Args:
        f: (t, h, d) unit-length embeddings of the random crops.
        s: (t, d) those of the salient crops, t images.
    """
    rows = f.flatten(0, 1)
    similar = rows @ rows.T / TAU
    itself = torch.eye(len(rows), dtype=torch.bool)
    negatives = similar.masked_fill(itself, -torch.inf).logsumexp(dim=1)
    positive = (f * s[:, None]).sum(dim=2).flatten() / TAU
    return (negatives - positive).mean()


def student_loss(student: QualityModel, crops: Tensor, mos: Tensor) -> Tensor:
    """(1 - a) L1(score of each random crop, MOS of its image) + a L_info."""
    output = student(crops.flatten(0, 1))
    f = output.embedding.unflatten(0, crops.shape[:2])
    score = output.score.unflatten(0, crops.shape[:2])[:, :RANDOM]
    l1 = (score - mos[:, None]).abs().mean()
    return (1 - A) * l1 + A * information_loss(f[:, :RANDOM], f[:, RANDOM])


def main(steps: int = 3) -> None:
    """Train on noise whose mean is its quality."""
    torch.manual_seed(0)
    encoder = EncoderConfig(name="conv-vit", width=48, depth=1)
    student = QualityModel(encoder, DecoderConfig(heads=3), crop_size=CROP, view_size=VIEW)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.05)
    for step in range(steps):
        mos = torch.rand(8)
        images = torch.randn(8, 3, 96, 128) + mos[:, None, None, None]
        loss = student_loss(student, cut_crops(images, salient_corners(teacher, images)), mos)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.lerp_(fast.detach(), 0.05)
        print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
