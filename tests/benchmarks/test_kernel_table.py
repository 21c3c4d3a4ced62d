"""Nsight Compute's CSV, both layouts, as one table."""

from pathlib import Path

import pytest

from benchmarks import kernel_table
from benchmarks.kernel_table import ROOFS, TIME, read, short, table

MATVEC = "void headroom::(anonymous namespace)::matvec_kernel<(int)1, (int)2, (headroom::MatvecOut)3>(headroom::Matvec)"
GEMM = "headroom::<unnamed>::gemm_kernel<128, 64>(const headroom::Gemm &, int)"
BEGIN = '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size"'
BEGIN += ',"Device","CC"'


def launch(number: int, name: str) -> str:
    return f'"{number}","1234","python3.12","127.0.0.1","{name}","1","7","(128, 1, 1)","(480, 1, 1)","0","9.0"'


def details() -> str:
    """The default page: a line a metric."""
    lines = ["==PROF== Connected to process 1234", f'{BEGIN},"Section Name","Metric Name","Metric Unit","Metric Value"']
    values = [  # number, kernel, ns, DRAM bytes, % of DRAM, tensor, L2, SM
        (0, MATVEC, "2,000", "8,000,000", "80.00", "0.00", "50.00", "20.00"),
        (1, GEMM, "5,000", "1,000,000", "10.00", "71.50", "30.00", "60.00"),
        (2, MATVEC, "6,000", "16,000,000", "60.00", "0.00", "50.00", "20.00"),
    ]
    names = [TIME, kernel_table.BYTES, *ROOFS.values()]
    units = ["ns", "byte", "%", "%", "%", "%"]
    for number, kernel, *numbers in values:
        for name, unit, value in zip(names, units, numbers, strict=True):
            lines.append(f'{launch(number, kernel)},"Command line profiler metrics","{name}","{unit}","{value}"')
    return "\n".join([*lines, "==PROF== Disconnected from process 1234", ""])


def raw() -> str:
    """`--page raw`: a line a launch, units in a line of their own; one metric could not be read."""
    names = [TIME, ROOFS["DRAM"], ROOFS["tensor"]]
    head = BEGIN + "".join(f',"{name}"' for name in names)
    units = ",".join(['""'] * 11) + ',"us","%","%"'
    return "\n".join([head, units, f'{launch(0, GEMM)},"3.5","12.5","n/a"', ""])


def test_launches_of_a_kernel_are_one_line() -> None:
    first, second = read(details())
    assert first.name == "matvec_kernel<1, 2, 3>" and second.name == "gemm_kernel<128, 64>"
    assert first.launches == 2 and first.seconds == pytest.approx(8e-6) and first.bytes == 24_000_000
    assert first.percent["DRAM"] == pytest.approx((2 * 80 + 6 * 60) / 8)
    assert (first.roof, second.roof) == ("DRAM", "tensor")


def test_a_line_a_launch_and_metrics_that_are_not_there() -> None:
    (kernel,) = read(raw())
    assert kernel.seconds == pytest.approx(3.5e-6) and kernel.percent == {"DRAM": 12.5} and kernel.roof == "latency"


def test_markdown() -> None:
    lines = table(read(details())).splitlines()
    assert lines[2] == "| `matvec_kernel<1, 2, 3>` | 2 | 8.0 | 62 % | 24.00 | 65 | 0 | 50 | 20 | DRAM |"
    assert lines[3] == "| `gemm_kernel<128, 64>` | 1 | 5.0 | 38 % | 1.00 | 10 | 72 | 30 | 60 | tensor |"
    assert lines[4].startswith("| **all** | 3 | 13.0 |")
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("void at::native::vectorized_elementwise_kernel<(int)4, at::native::F<c10::Half>>(int, T1)",
         "at::native::vectorized_elementwise_kernel<4, at::native::F<c10::Half>>"),
        ("headroom::embed_kernel(const int *, (anonymous namespace)::X)", "embed_kernel"),
        ("plain", "plain"),
    ],
)  # fmt: skip
def test_names(name: str, wanted: str) -> None:
    assert short(name) == wanted


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    good.write_text(details(), encoding="utf-8")
    bad.write_text("==ERROR== ERR_NVGPUCTRPERM\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["kernel_table", str(good)])
    kernel_table.main()
    assert capsys.readouterr().out == table(read(details()))
    monkeypatch.setattr("sys.argv", ["kernel_table", str(bad)])
    with pytest.raises(SystemExit) as end:
        kernel_table.main()
    assert end.value.code == 2 and "no kernel with" in capsys.readouterr().err
