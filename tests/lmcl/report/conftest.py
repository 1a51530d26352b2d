"""Run folders as the trainer leaves them, with images whose quality is really visible."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lmcl.evaluation.predictions import make_predictions

DISTORTIONS = ("blur", "noise", "jpeg", "pixelation")


def _content(rng: np.random.Generator) -> Image.Image:
    """Dead leaves: coloured discs over each other."""
    y, x = np.mgrid[0:96, 0:128]
    picture = np.zeros((96, 128, 3), dtype=np.uint8)
    for _ in range(60):
        cy, cx, r = rng.uniform(0, 96), rng.uniform(0, 128), rng.uniform(4, 26)
        picture[(y - cy) ** 2 + (x - cx) ** 2 < r * r] = rng.integers(20, 240, 3)
    return Image.fromarray(picture)


def _distorted(image: Image.Image, kind: str, level: int, rng: np.random.Generator) -> Image.Image:
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(0.7 * level))
    if kind == "noise":
        noisy = np.asarray(image) + rng.normal(scale=9 * level, size=(96, 128, 3))
        return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    if kind == "jpeg":
        out = io.BytesIO()
        image.save(out, "JPEG", quality=34 - 6 * level)
        return Image.open(out)
    return image.resize((128 // (2 * level), 96 // (2 * level))).resize((128, 96), 0)


def _curves(rng: np.random.Generator, steps: int = 12, epochs: int = 4) -> str:
    lines = []
    for epoch in range(epochs):
        for step in range(steps):
            t = (epoch * steps + step) / (epochs * steps)
            lines.append(
                {
                    "event": "step",
                    "epoch": epoch,
                    "step": step,
                    "images": 16,
                    "loss": 0.5 * np.exp(-2 * t) + 0.2 + 0.01 * rng.normal(),
                    "l1": 0.28 * np.exp(-2 * t) + 0.06 + 0.005 * rng.normal(),
                    "contrastive": 2.6 * np.exp(-t) + 0.04 * rng.normal(),
                    "intra_share": 0.1 + 0.25 * t + 0.01 * rng.normal(),
                    "intra_similarity": 0.5 + 0.3 * t + 0.01 * rng.normal(),
                    "positive_similarity": 0.55 + 0.35 * t + 0.01 * rng.normal(),
                    "lr": 2e-4 * (0.1 if epoch == 3 else 1.0),
                    "images_per_s": 21.0 + rng.normal(),
                    "data_wait": 0.02,
                    "time_s": 6.0 * (epoch * steps + step),
                }
            )
        lines.append({"event": "epoch", "epoch": epoch, "val_srcc": 0.5 + 0.1 * epoch})
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture(scope="session")
def make_run():
    """Write a run folder: contents x distortions x levels, errors of a given size."""

    def write(
        root: Path,
        *,
        contents: int = 12,
        noise: float = 9.0,
        seed: int = 0,
        pictures: bool = True,
        split: str = "70-10-20-seed123-00",
    ) -> Path:
        # Images and scores stay the same for every seed: runs over one test part can be paired.
        rng, own = np.random.default_rng(7), np.random.default_rng([seed, 1])
        rows = [(c, d, level) for c in range(contents) for d in DISTORTIONS for level in (1, 2, 3)]
        n = len(rows)
        scenes = [_content(rng) for _ in range(contents)]
        level = np.array([r[2] for r in rows])
        mos = np.clip(96 - 24 * level + rng.normal(scale=7, size=n), 0, 100)
        bias = own.normal(scale=noise / 2, size=contents)[[r[0] for r in rows]]
        prediction = 12 + 0.82 * mos + bias + own.normal(scale=noise, size=n)
        box = np.stack(
            [own.integers(0, 60, n), own.integers(0, 80, n), np.full(n, 36), np.full(n, 36)], axis=1
        )
        table = make_predictions(
            id=np.arange(n) + 100,
            path=[f"{d}/scene-{c:02d} <{d}> {lv}.png" for c, d, lv in rows],
            mos=mos,
            prediction=prediction,
            prediction_unit=prediction / 100,
            mos_std=np.full(n, 8.0),
            group=[f"scene-{r[0]:02d}" for r in rows],
            distortion=[r[1] for r in rows],
            level=level,
            subset=["indoor" if r[0] % 3 else "night & fog" for r in rows],
            part="test",
            size=np.tile([96, 128], (n, 1)),
            box=box,
        )
        table.write_csv(root / "predictions" / "test.csv")
        (root / "config.toml").write_text(
            f'[data]\nset = "demo"\nsplit = "{split}"\n[train]\nseed = {seed}\nlr = 2e-4\n'
        )
        (root / "log.jsonl").write_text(_curves(own))
        (root / "metrics.json").write_text(json.dumps({"srcc": 0.9}))
        (root / "environment.json").write_text(
            json.dumps({"started": "2026-11-23T03:00:00Z", "device": "cpu", "cores": 2})
        )
        (root / "protocol.json").write_text(
            json.dumps(
                {
                    "set": "demo",
                    "set_version": 3,
                    "split": split,
                    "split_hash": "3f2a" * 8,
                    "protocol": "70-10-20",
                    "selection": "epoch 4, the highest SRCC on the val part",
                    "part": "test",
                    "counts": {"train": 600, "val": 80, "test": n},
                    "crops": "10 x 96 px, grid, deterministic",
                    "score": {"kind": "mos", "low": 0.0, "high": 100.0, "higher_is_better": True},
                    "synthetic": True,
                    "note": "This set is synthetic: nobody rated its images.",
                    "train_seconds": 288.0,
                }
            )
        )
        embedding = own.normal(scale=0.4, size=(n, 16)) + np.outer(mos / 25, np.ones(16))
        np.savez(root / "embeddings.npz", id=table.id, embedding=embedding.astype(np.float32))
        if pictures:
            for folder in ("thumbs", "attention"):
                (root / folder).mkdir(exist_ok=True)
            ramp = np.add.outer(np.hanning(14), np.hanning(14))
            for key, (c, d, lv) in zip(table.id.tolist(), rows, strict=True):
                picture = _distorted(scenes[c], d, lv, rng)
                picture.convert("RGB").save(root / "thumbs" / f"{key}.jpg", quality=80)
                grey = np.roll(ramp * 127, int(own.integers(14)), axis=1).astype(np.uint8)
                Image.fromarray(grey).save(root / "attention" / f"{key}.png")
        return root

    return write
