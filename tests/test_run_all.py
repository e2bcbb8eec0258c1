"""The table of benchmarks, from figures that were told."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def run_all(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("run_all")


def test_a_benchmark_that_tells_its_figures_is_a_row_with_its_verdict(
    run_all, tmp_path, monkeypatch
):
    script = tmp_path / "made.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import figures\n"
        "figures.tell_ratios('one / other', [1.0, 1.25, 2.0])\n"
        "figures.tell('memory', 3.0)\n"
    )
    made = run_all.Benchmark(str(script), "a try", {"one / other": "≤ 1.15", "memory": "≥ 3"})
    needy = run_all.Benchmark("b.py --data_dir DATA", "more", {"x": ""})
    absent = run_all.Benchmark("c.py", "less", {"x": ""}, ("a_moon",))
    monkeypatch.setattr(run_all, "BENCHMARKS", (made, needy, absent))
    monkeypatch.setattr(run_all, "INSTALLS", {"a_moon": "'.[moon]'"})
    out = tmp_path / "table"
    monkeypatch.setattr(sys, "argv", ["run_all.py", f"--out={out}"])
    run_all.main()
    text = out.with_suffix(".md").read_text()
    assert "| a try (1) | one / other | ≤ 1.15 | 1.250 [1.125 1.625] | no |" in text
    assert "|  | memory | ≥ 3 | 3.000 | yes |" in text
    assert "2. `b.py --data_dir DATA`: needs --data_dir" in text
    assert "3. `c.py`: needs a_moon: pip install '.[moon]'." in text
    # What was measured is not measured again; what was missing is looked at anew.
    script.unlink()
    monkeypatch.setattr(run_all, "BENCHMARKS", (made, needy))
    run_all.main()
    assert "1.250 [1.125 1.625]" in out.with_suffix(".md").read_text()


def test_a_benchmark_that_fails_or_is_silent_is_told(run_all, tmp_path):
    failing = run_all.measure(run_all.Benchmark(str(tmp_path / "none.py"), "", {"x": ""}), None)
    assert failing["missing"] == "failed with exit status 2"
    silent = tmp_path / "silent.py"
    silent.write_text("")
    with pytest.raises(SystemExit, match="did not tell x"):
        run_all.measure(run_all.Benchmark(str(silent), "", {"x": ""}), None)


def test_every_command_is_a_file_that_is_there(run_all):
    for benchmark in run_all.BENCHMARKS:
        assert (run_all.ROOT / benchmark.command.split()[0]).exists()
        assert benchmark.goals
