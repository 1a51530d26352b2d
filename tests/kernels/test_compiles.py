"""Every shipped kernel is compiled for three chips without a GPU, and the cubin is read back."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OTHER_TRITON = os.environ.get("LMCL_TRITON_SITE", "")
"""Folder of another unpacked Triton to compile with (scripts/check_triton36.sh makes one)."""


def compile_all(folder: Path, *arguments: str) -> list[dict[str, object]]:
    """In a process of its own: this one runs the kernels interpreted, and caches would lie."""
    environment = dict(os.environ, TRITON_CACHE_DIR=str(folder), TRITON_DEFAULT_FP_FUSION="1")
    environment.pop("TRITON_INTERPRET", None)
    if OTHER_TRITON:
        environment["PYTHONPATH"] = OTHER_TRITON
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "compile_kernels.py"), *arguments],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def faults(facts: dict[str, object]) -> list[str]:
    """The rules stand beside the script, for scripts/check_triton36.sh judges by them too."""
    script = runpy.run_path(str(ROOT / "scripts" / "read_compile_facts.py"))
    return script["faults"](facts)


FEW = ["log_sums", "symmetric_sums", "pair_gradient-online", "finish_gradient", "hub_gradient"]


def test_the_kernels_of_a_training_step_compile_for_one_chip_without_spills(tmp_path: Path) -> None:
    asked = ["--capability", "90", "--width", "256", "--variant", *FEW]
    everything = compile_all(tmp_path, *asked)
    assert len(everything) == len(FEW)
    for facts in everything:
        assert faults(facts) == [], facts


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.timeout(900)
def test_no_spills_tensor_cores_and_asynchronous_copies(capability: int, tmp_path: Path) -> None:
    everything = compile_all(tmp_path, "--capability", str(capability), "--width", "256", "384")
    assert len(everything) == 36
    for facts in everything:
        assert faults(facts) == [], facts


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("dtypes", "widths"),
    [
        (["bf16"], ["64", "128"]),
        (["fp16"], ["64", "128", "256", "384"]),
        (["fp32"], ["64", "128", "256"]),
    ],
    ids=["bf16-narrow", "fp16", "fp32"],
)  # fmt: skip
def test_the_other_element_types_and_widths_likewise(
    capability: int, dtypes: list[str], widths: list[str], tmp_path: Path
) -> None:
    for facts in compile_all(
        tmp_path, "--capability", str(capability), "--dtype", *dtypes, "--width", *widths
    ):
        assert faults(facts) == [], facts


HEAVY = (
    "log_sums", "log_sums-online", "symmetric_sums", "mean_columns", "mean_columns-online",
    "pair_gradient", "pair_gradient-online",
)  # fmt: skip
SERIALISED = {("mean_columns-online", 512), ("mean_columns-online", 768)}
"""Heavy kernels of sm_90 that wait for each product: no tile was found that does not (0110)."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_on_hopper_every_other_width_waits_for_few_products(tmp_path: Path) -> None:
    widths = ("64", "128", "192", "320", "512", "768")
    lines = compile_all(tmp_path, "--capability", "90", "--width", *widths, "--variant", *HEAVY)
    assert {(facts["variant"], facts["width"]) for facts in lines if faults(facts)} == SERIALISED


FEW_SPILLS = {(80, "mean_columns", 768), (100, "mean_columns-online", 768)}
"""Up to six spill instructions, of which at most one in the loop."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_widest_rows_compile_for_the_other_chips(tmp_path: Path) -> None:
    arguments = ("--capability", "80", "100", "--width", "512", "768", "--variant", *HEAVY)
    lines = compile_all(tmp_path, *arguments)
    broken = [facts for facts in lines if faults(facts)]
    names = {(facts["capability"], facts["variant"], facts["width"]) for facts in broken}
    assert names == FEW_SPILLS
    assert all(facts["spills"] <= 6 and facts["mma"] for facts in broken)
    assert all(facts["loop_spills"] <= 1 for facts in broken)


def test_wide_rows_are_summed_in_two_launches() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "compile_kernels.py"))
    for width, parts in ((512, [0]), (528, [1, 2]), (768, [1, 2])):
        plan = script["load"]("tuning").make_plan(width, "bf16", 90)
        for variant in ("mean_columns", "pair_gradient-online"):
            launches = script["launches_of"](variant, plan)
            assert [sizes["PART"] for _, sizes, _, _ in launches] == parts


def test_the_miscompile_pattern_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "transposed.py").write_text(
        "import triton, triton.language as tl\n"
        "@triton.jit\n"
        "def transposed(p_in, p_out, SIZE: tl.constexpr):\n"
        "    o = tl.arange(0, SIZE)\n"
        "    x = tl.load(p_in + o[:, None] * SIZE + o[None, :])\n"
        "    y = tl.dot(x, tl.trans(x)).to(tl.bfloat16)\n"
        "    tl.store(p_out + o[:, None] * SIZE + o[None, :], tl.dot(tl.trans(y), x))\n"
    )
    script = (
        "import sys; sys.path[:0] = ['scripts', sys.argv[1]]\n"
        "import compile_kernels as ck, triton, transposed as t\n"
        "source = ck.ASTSource(t.transposed, {'p_in': '*bf16', 'p_out': '*fp32', "
        "'SIZE': 'constexpr'}, {(2,): 128}, {(0,): [['tt.divisibility', 16]]})\n"
        "made = triton.compile(source, target=ck.GPUTarget('cuda', 90, 32))\n"
        "print(ck.transposed_dot_results(made.asm['ttgir']))\n"
    )
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)],
        capture_output=True, text=True, check=False, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 0


FACTS = {
    "variant": "log_sums-online", "capability": 90, "dtype": "bf16", "width": 256, "spills": 0,
    "loop_spills": 0, "stack_bytes": 0, "shared_bytes": 100_000, "transposed_dot_results": 0,
    "tensor_memory": 0,
    "mma": 20, "wgmma": 20, "async_copies": 8, "waits": 2, "warp_rows": 128, "tile": [128, 64, 8],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"spills": 151, "stack_bytes": 640}, "151 spill instructions, 640 stack bytes"),
        ({"spills": 1, "capability": 80}, "1 spill instructions, 0 stack bytes"),
        ({"spills": 1, "variant": "finish_rows"}, "1 spill instructions, 0 stack bytes"),
        ({"loop_spills": 11}, "11 spill instructions in the loop"),
        ({"loop_spills": 1, "capability": 100}, "1 spill instructions in the loop"),
        ({"shared_bytes": 300_000}, "300000 bytes of shared memory are more than the chip has"),
        ({"tensor_memory": 576}, "576 columns of tensor memory are more than the chip has"),
        ({"mma": 0}, "no tensor-core instruction"),
        ({"wgmma": 0}, "no wgmma"),
        ({"async_copies": 0}, "no asynchronous copy"),
        ({"wgmma": 48, "waits": 48}, "48 wgmma are waited for 48 times: serialised"),
        (
            {"tile": [64, 64, 8]},
            "warps are laid out over 128 rows of a tile of 64: they compute the same twice",
        ),
    ],
)
def test_a_broken_rule_is_a_sentence(changes: dict[str, object], sentence: str) -> None:
    assert faults(FACTS) == []
    assert faults(FACTS | changes) == [sentence]


def test_spills_are_counted_in_the_loop_that_multiplies() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "compile_kernels.py"))
    sass = (
        "/*0000*/ STL [R1], R2 ; /*0010*/ LDL R2, [R1] ; /*0020*/ HGMMA R24 ;\n"
        "/*0030*/ LDL R3, [R1] ; /*0040*/ @P0 BRA 0x20 ; /*0050*/ LDL R4, [R1] ; /*0060*/ EXIT ;"
    )
    assert script["loop_spills"](sass) == 1
    layout = "#nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], x = [16]}>"
    assert script["warp_rows"](layout) == 128
    assert script["warp_rows"]("#nvidia_mma<{versionMajor = 2, warpsPerCTA = [8, 1]}>") == 0
