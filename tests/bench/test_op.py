"""The op benchmark: what it counts, and a small run from the command line."""

import json

import pytest

from retentive.bench import op
from retentive.bench.command import main
from retentive.bench.roofline import Op, roofline
from retentive.errors import InputError


def test_flops_are_counted_at_a_chunk_of_64():
    # By hand: per head and token 2·64·192 inside a chunk and 4·64·128 through the state,
    # 24576 + 32768 = 57344; three times that, for 8 heads.
    sizes = {"heads": 8, "key_dim": 64, "value_dim": 128, "tokens": 3}
    assert op.flops_per_token("retnet", sizes) == 3 * 8 * 57344
    # Attention: q·k and p·v with the 1, 2 and 3 keys of the tokens of a sequence, 2 on average.
    assert op.flops_per_token("attention", sizes) == 3 * 8 * 2 * 2 * 2 * 64


def test_defaults_are_those_of_the_device():
    cpu, gpu = op.OpBenchmark(device="cpu"), op.OpBenchmark(device="cuda")
    assert [case["tokens"] for case in cpu.cases()] == [2048, 8192, 32768, 131072]
    assert {(case["heads"], case["key_dim"], case["batch"]) for case in cpu.cases()} == {(8, 64, 1)}
    assert (cpu.dtype, cpu.step, cpu.key_sizes) == ("float32", False, ["tokens"])
    assert gpu.cases()[0] == {
        "heads": 8, "key_dim": 256, "value_dim": 512, "batch": 4, "tokens": 8192
    }  # fmt: skip
    assert {case["batch"] * case["tokens"] for case in gpu.cases()} == {32768}
    assert {case["heads"] * case["key_dim"] for case in gpu.cases()} == {2048}
    assert (gpu.dtype, gpu.step, gpu.key_sizes) == (
        "bfloat16",
        True,
        ["key_dim", "batch", "tokens"],
    )
    assert gpu.entries("op")[0].contender.name == "retnet-triton"


def test_rooflines_by_hand():
    """One head of K 64 and V 128, 2 bytes a number, on a machine of 1 FLOP/s or 1 byte/s.

    Forward 128·192 + 4·64·128 = 57344 FLOPs, backward 128·448 + 10·64·128 = 139264; forward 384
    numbers, backward 640, at least. With stored states at C = 64 forward 3·192 + 2·128 = 832
    numbers and backward 1024 + 4·128 = 1536; by memory alone the largest C is best.
    """
    one = Op(tokens=1, heads=1, K=64, V=128, size=2)
    products = roofline(one, 1.0, float("inf"))
    assert products == {"design": 57344 + 139264, "floor": 57344 + 139264}
    memory = roofline(one, float("inf"), 1.0)
    assert memory["floor"] == 2 * (384 + 640)
    assert memory["design"] == 2 * (576 + 2 * 8 + 1024 + 4 * 8)
    many = roofline(Op(tokens=5, heads=3, K=64, V=128, size=2), 1.0, 2.0)
    both = roofline(one, 1.0, 2.0)
    assert many["floor"] == 15 * both["floor"] == 15 * (57344 + 139264)


def test_a_run_is_a_table_a_file_and_figures(quick_limits, local_processes, tmp_path, capsys):
    out = tmp_path / "new" / "op.json"
    sizes = ["--heads", "1", "--key-dim", "8", "--value-dim", "8", "--lengths", "64", "100"]
    names = "retnet,retnet-parallel,retnet-recurrent,retnet-reference,attention,"
    names += "flash-linear-attention"
    rest = ["--rounds", "2", "--device", "cpu", "--contenders", names, "--out", str(out)]
    assert main(["op", *sizes, *rest]) == 0
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert [row["case"]["tokens"] for row in rows] == [64] * 6 + [100] * 6
    assert [row["contender"] for row in rows[:6]] == names.split(",")
    for row in rows[:5]:
        assert row["error"] is None and len(row["samples"]) == len(row["forward"]) == 2
        assert row["memory"]["peak"] >= row["memory"]["start"] > 0
    assert "need a CUDA device" in rows[5]["error"]
    assert result["limits"]["gemm_flops"] == [1e11] * 4
    shown = capsys.readouterr().out
    assert "need a CUDA device" in shown and "retnet-recurrent: recurrent" in shown
    again = ["--rounds", "1", "--device", "cpu", "--contenders", "retnet", "--compare", str(out)]
    assert main(["op", *sizes, *again, "--figures", str(tmp_path / "drawn")]) == 0
    assert "against the older run" in capsys.readouterr().out
    assert (tmp_path / "drawn" / "op.svg").exists()
    for kind in ("png", "svg"):
        assert (tmp_path / "new" / f"op.{kind}").stat().st_size > 1000


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["opp"], "unknown benchmark 'opp' .did you mean 'op'"),
        (["op", "--lengths", "0"], "lengths must be at least 64, got 0"),
        (["op", "--rounds", "0"], "rounds must be at least 1, got 0"),
        (["op", "--round", "3"], "did you mean --rounds"),
        (["op", "--contenders", "retnet,torchscal"], "'torchscal' of bench op .*'torchscale'"),
        (["op", "--compare", "nowhere.json"], "no file nowhere.json"),
        (["op", "--lengths", "99999999999"], "does not fit: about .* GiB of .* GiB free"),
    ],
)
def test_bad_options_are_refused(argv, words):
    with pytest.raises(InputError, match=words) as caught:
        main(argv)
    assert "\n" not in str(caught.value)
