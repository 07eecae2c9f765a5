"""The op benchmark: what it counts, and a small run from the command line."""

import json

import pytest

from retentive.bench import op
from retentive.bench.command import main
from retentive.errors import InputError


def test_flops_are_counted_at_a_chunk_of_64():
    # By hand: per head and token 2·64·192 inside a chunk and 4·64·128 through the state,
    # 24576 + 32768 = 57344; three times that, for 8 heads.
    options = op.OpBenchmark()
    assert op.flops_per_token("retnet", options, 2048) == 3 * 8 * 57344
    # Attention: q·k and p·v with the 2, 3 and 4 keys of the tokens of a text of 3, 2 on average.
    assert op.flops_per_token("attention", options, 3) == 3 * 8 * 2 * 2 * 2 * 64


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
