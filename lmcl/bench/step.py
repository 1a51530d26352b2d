"""`lmcl bench step`: what one optimiser step costs, part by part, beside the usual loop.

Both loops run in turn in every round, and ratios are taken within a round: on a shared machine that
is the figure to trust. Images are made on the spot; the model's first weights are random.
"""

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

from lmcl.bench.contrastive import matmul_rate
from lmcl.bench.record import Record, append, make_record, to_json
from lmcl.bench.step_cases import Loop, OurLoop, PlainLoop, Round, crop_flops, views
from lmcl.bench.step_data import StepData, make_step_data
from lmcl.bench.stopwatch import AROUND, NETWORKS, Part
from lmcl.config import Config, load_config, with_precision
from lmcl.errors import LmclError
from lmcl.models.precision import choose_precision

LEAST_NETWORKS = 0.9
"""Share of a step's time that the networks' forward and backward must at least have."""
MOST_AROUND = 0.1
"""Share that loss, moving average, saliency and logging may have together."""
MOST_GAP = 0.03
"""Share of a round by the clock that its parts together may miss or count twice."""
LEAST_MFU_ON_GPU = 0.45
"""Share of the measured speed of a matrix product that a compiled step must reach there."""
MOST_WAIT_ON_GPU = 0.02
MOST_OBJECTIVE_ON_GPU = 0.01
LEAST_RATIO_ON_GPU = 8.0
"""Crops per second, against the usual loop."""

_DTYPES: dict[str, str] = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all cases of one batch size share."""

    config: Config
    codec: str
    steps: int
    """Optimiser steps of a round."""
    workers: int
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is measured."""
        return self.device.type == "cuda"

    @property
    def crops(self) -> int:
        """Crops of a round."""
        return self.steps * self.config.train.batch_size * views(self.config)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All rounds of one loop."""

    name: str
    rounds: tuple[Round, ...]
    peak_bytes: int
    engines: str
    """Device, decoder and loss."""

    def share(self, parts: Sequence[Part]) -> list[float]:
        """Share of some parts in the time of each round."""
        return [sum(r.spent.parts[p] for p in parts) / r.spent.total for r in self.rounds]

    def seconds(self, part: Part) -> list[float]:
        """Seconds of a part in each round."""
        return [r.spent.parts[part] for r in self.rounds]

    @property
    def totals(self) -> list[float]:
        """Seconds of each round, by the clock."""
        return [r.spent.wall for r in self.rounds]

    @property
    def gaps(self) -> list[float]:
        """Share of each round by which the sum of its parts differs from the clock."""
        return [r.spent.gap for r in self.rounds]


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything measured at one batch size."""

    loops: tuple[Measured, ...]
    """Ours first, the usual loop last."""
    matmul_rate: float
    """Operations per second of a large matrix product: the fastest of one in every round."""


def run(
    *,
    config_file: Path | None,
    overrides: tuple[str, ...],
    device: str | None,
    batch_sizes: str | None,
    steps: int | None,
    rounds: int,
    codec: str,
    workers: int,
    compiled: bool | None,
    output: Path | None,
    as_json: bool,
    no_progress: bool,
) -> None:
    r"""Measure an optimiser step: its parts, crops per second, memory, and the usual loop.

    \b
    Example:
      lmcl bench step --set train.batch_size=8 --output benchmarks/results/step.jsonl
    """
    place = _device(device)
    on_gpu = place.type == "cuda"
    for size in _sizes(batch_sizes):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            own = () if size is None else (f"train.batch_size={size}",)
            settings, data = _prepare(
                work, config_file, (*overrides, *own), place,
                codec=codec, steps=steps or (20 if on_gpu else 2), workers=workers,
            )  # fmt: skip
            also_compiled = on_gpu if compiled is None else compiled
            results = measure_step(
                settings, data, work, rounds=rounds, compiled=also_compiled, show=not no_progress
            )
        records = step_records(settings, results)
        # Each batch size at once: a sweep that runs out of memory leaves what it has.
        if output is not None:
            append(records, output)
        click.echo(
            "\n".join(map(to_json, records)) if as_json else step_table(settings, results, records)
        )


def measure_step(
    settings: Settings, data: StepData, work: Path, *, rounds: int, compiled: bool, show: bool
) -> Results:
    """Every loop in every round, one after the other, after a round that does not count."""
    config, device = settings.config, settings.device
    rates: list[float] = []
    with ExitStack() as stack:
        ours = stack.enter_context(closing(OurLoop(config, work / "ours", device)))
        loops: dict[str, Loop] = {"ours": ours}
        if compiled:
            runtime = dataclasses.replace(config.runtime, compile=True)
            other = OurLoop(dataclasses.replace(config, runtime=runtime), work / "compiled", device)
            loops["ours_compiled"] = stack.enter_context(closing(other))
        plain = PlainLoop(
            config,
            data,
            steps=ours.steps,
            preprocessing=ours.preprocessing,
            device=device,
            workers=settings.workers,
        )
        loops["plain_loop"] = stack.enter_context(closing(plain))
        found: dict[str, list[Round]] = {name: [] for name in loops}
        for _ in tqdm(range(rounds), unit="round", disable=None if show else True):
            rates.append(matmul_rate(device.type, _DTYPES[config.runtime.precision]))
            for name, loop in loops.items():
                found[name].append(loop.round())
        return Results(
            loops=tuple(
                Measured(
                    name=name,
                    rounds=tuple(found[name]),
                    peak_bytes=loop.peak_bytes,
                    engines=loop.engines,
                )
                for name, loop in loops.items()
            ),
            matmul_rate=max(rates),
        )


def step_records(settings: Settings, results: Results) -> list[Record]:
    """Speeds, parts, shares with their targets, and the ratio to the usual loop."""
    flops = crop_flops(settings.config, settings.device)
    *ours, plain = results.loops
    records: list[Record] = []
    for one in results.loops:
        records += _loop_records(settings, one, flops, results.matmul_rate)
    for one in ours:
        ratios = [b / a for a, b in zip(one.totals, plain.totals, strict=True)]
        case = f"ratio_{one.name}_to_plain_loop"
        least = LEAST_RATIO_ON_GPU if settings.on_gpu else 1.0
        records.append(_record(settings, one, case, ratios, unit="x", target=least))
    return records


def step_table(settings: Settings, results: Results, records: Sequence[Record]) -> str:
    """Milliseconds per crop of each part and loop, and where the difference comes from."""
    measured = results.loops
    heads = "".join(f"{one.name:>16}" for one in measured)
    lines = [f"batch {settings.config.train.batch_size} images, ms per crop:{heads}"]
    for part in Part:
        cells = "".join(f"{_ms(settings, one.seconds(part)):16.3f}" for one in measured)
        lines.append(f"  {part:<32}{cells}")
    cells = "".join(f"{_ms(settings, one.totals):16.3f}" for one in measured)
    lines.append(f"  {'all':<32}{cells}")
    lines += [_line(record) for record in records if "part_" not in record.case]
    return "\n".join([*lines, explain(settings, measured[0], measured[-1])])


def explain(settings: Settings, ours: Measured, plain: Measured) -> str:
    """The parts in which two loops differ most, in milliseconds per crop, largest first."""
    gaps = {
        part: _ms(settings, plain.seconds(part)) - _ms(settings, ours.seconds(part))
        for part in Part
    }
    largest = sorted(gaps, key=lambda part: -abs(gaps[part]))[:4]
    total = _ms(settings, plain.totals) - _ms(settings, ours.totals)
    spelled = ", ".join(f"{part} {gaps[part]:+.3f}" for part in largest)
    return (
        f"{plain.name} takes {total:+.3f} ms per crop against {ours.name}: {spelled} "
        "(medians of parts need not add up)"
    )


def _loop_records(
    settings: Settings, measured: Measured, flops: int, peak: float
) -> Iterator[Record]:
    speeds = [settings.crops / total for total in measured.totals]
    yield _record(
        settings,
        measured,
        measured.name,
        speeds,
        unit="crops/s",
        has_costs=True,
        mfu=round(float(np.median(speeds)) * flops / peak, 4),
        gflop_per_crop=round(flops / 1e9, 4),
        matmul_tflops=round(peak / 1e12, 4),
    )
    for part in Part:
        milliseconds = [1e3 * seconds / settings.steps for seconds in measured.seconds(part)]
        share = round(float(np.median(measured.share([part]))), 5)
        case = f"{measured.name}_part_{part}"
        yield _record(settings, measured, case, milliseconds, unit="ms/step", share=share)
    case = f"{measured.name}_gap_of_parts"
    yield _record(settings, measured, case, measured.gaps, unit="share", most=MOST_GAP)
    if measured.name != "plain_loop":
        yield from _share_records(settings, measured)
        if settings.on_gpu and measured.name == "ours_compiled":
            rates = [speed * flops / peak for speed in speeds]
            case = f"{measured.name}_mfu"
            yield _record(settings, measured, case, rates, unit="share", target=LEAST_MFU_ON_GPU)


def _share_records(settings: Settings, measured: Measured) -> Iterator[Record]:
    """Shares of a step that the design sets a bound to; the bounds differ with the device."""
    bounds: list[tuple[str, Sequence[Part], float | None, float | None]] = (
        [
            ("networks", NETWORKS, None, None),
            ("around", AROUND, None, MOST_AROUND),
            ("data_wait", [Part.WAIT], None, MOST_WAIT_ON_GPU),
            ("objective", [Part.OBJECTIVE], None, MOST_OBJECTIVE_ON_GPU),
        ]
        if settings.on_gpu
        else [
            ("networks", NETWORKS, LEAST_NETWORKS, None),
            ("around", AROUND, None, MOST_AROUND),
        ]
    )
    for name, parts, least, most in bounds:
        yield _record(
            settings,
            measured,
            f"{measured.name}_share_{name}",
            measured.share(parts),
            unit="share",
            target=least,
            most=most,
        )


def _record(
    settings: Settings,
    measured: Measured,
    case: str,
    values: Sequence[float],
    *,
    unit: str,
    has_costs: bool = False,
    target: float | None = None,
    most: float | None = None,
    **more: float,
) -> Record:
    """One line; `target` is the least and `most` the greatest median that meets the design.

    Args:
        settings: What all cases share.
        measured: The loop the line is of.
        case: Its name.
        values: One a round.
        unit: Of the values.
        has_costs: Whether the loop's processor time and memory belong to the line.
        target: Least median.
        most: Greatest median.
        more: Further entries of `params`.
    """
    config = settings.config
    median = float(np.median(values))
    params: dict[str, int | float | str | bool] = {
        "batch": config.train.batch_size,
        "views": views(config),
        "crop": config.crops.size,
        "encoder": config.encoder.name,
        "precision": config.runtime.precision,
        "codec": settings.codec,
        "steps": settings.steps,
        "threads": torch.get_num_threads(),
        "workers": settings.workers,
        **more,
    }
    if target is not None:
        params |= {"target": target, "met": median >= target}
    if most is not None:
        params |= {"most": most, "met": median <= most}
    cpu, peak_bytes = None, None
    if has_costs:
        images = settings.steps * config.train.batch_size
        cpu = round(float(np.median([1e3 * r.cpu / images for r in measured.rounds])), 3)
        peak_bytes = measured.peak_bytes
    gpu = torch.cuda.get_device_name() if settings.on_gpu else None
    return make_record(
        "step", case, values, unit=unit, params=params, cpu_ms_per_image=cpu,
        peak_bytes=peak_bytes, device=gpu, engines=measured.engines,
    )  # fmt: skip


def _prepare(
    work: Path,
    config_file: Path | None,
    overrides: Sequence[str],
    device: torch.device,
    *,
    codec: str,
    steps: int,
    workers: int,
) -> tuple[Settings, StepData]:
    """The run to be measured, on images made for it: as many as one round takes."""
    empty = work / "defaults.toml"
    empty.write_text("", encoding="utf-8")
    place = (f"data.root='{work}'", "data.split=''", "evaluation.select='last'")
    file = config_file or empty
    images = steps * load_config(file, (*overrides, *place)).train.batch_size
    data = make_step_data(work, codec, images)
    place = (f"data.root='{data.root}'", f"data.split='{data.split}'", place[-1])
    # The rate of the first epoch lasts: how a rate decays is not what is measured.
    config = load_config(file, (*overrides, *place, "train.epochs=1000000"))
    precision = choose_precision(config.runtime.precision, device).name
    config = with_precision(config, precision)
    settings = Settings(config=config, codec=codec, steps=steps, workers=workers, device=device)
    return settings, data


def _device(asked: str | None) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise LmclError("--device cuda: there is no GPU here that torch can use; leave it out")
    if asked == "cpu" and has_gpu:
        raise LmclError(
            "--device cpu: a run takes the GPU where there is one; hide it from this process: "
            "CUDA_VISIBLE_DEVICES= lmcl bench step"
        )
    return torch.device("cuda" if has_gpu else "cpu")


def _sizes(text: str | None) -> list[int | None]:
    if text is None:
        return [None]
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 8,16,32") from error
    if min(sizes) < 1:
        raise click.BadParameter(f"{text!r}: a batch has at least one image")
    return list(sizes)


def _ms(settings: Settings, seconds: Sequence[float]) -> float:
    """Median over rounds, milliseconds per crop."""
    return 1e3 * float(np.median(seconds)) / settings.crops


def _line(record: Record) -> str:
    verdict = ""
    if "met" in record.params:
        bound = f">= {record.params['target']}" if "target" in record.params else ""
        bound = bound or f"<= {record.params['most']}"
        verdict = f"  wanted {bound}: {'met' if record.params['met'] else 'MISSED'}"
    if record.peak_bytes is not None:
        verdict = (
            f"  {record.cpu_ms_per_image:.1f} ms of processor time per image, "
            f"{record.peak_bytes / 2**20:.0f} MiB, "
            f"{record.params['mfu']:.1%} of a matrix product's speed"
        )
    return (
        f"{record.case:32} {record.median:10.3f} {record.unit:8} "
        f"[{record.p10:.3f} .. {record.p90:.3f}]{verdict}"
    )
