"""`python -m flashcore_jax` says what is here, and its exit code whether it is right."""

import pathlib
import subprocess
import sys

import flashcore_jax
from flashcore_jax import __main__ as command
from flashcore_jax import implementations

ROOT = pathlib.Path(__file__).parents[1]
TABLES = ["Which implementation a call takes", "Errors against float64", "Milliseconds, causal"]


def test_quick_run_is_right():
    run = subprocess.run([sys.executable, "-m", "flashcore_jax", "--quick"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"flashcore_jax {flashcore_jax.__version__}" in run.stdout
    places = [run.stdout.index(title) for title in TABLES]
    assert places == sorted(places)
    for name in ("triton", "xla"):
        assert any(name in line for line in run.stdout[places[1] : places[2]].splitlines()), f"{name} was not checked"
    assert "Everything was right" in run.stdout


def test_a_wrong_implementation_fails(monkeypatch, capsys):
    module = implementations.module("xla")
    attend = module.attend

    def with_one_percent_too_much(*arguments):
        out, lse = attend(*arguments)
        return out * 1.01, lse

    monkeypatch.setattr(module, "attend", with_one_percent_too_much)
    monkeypatch.setattr(command, "times", lambda workloads: True)
    assert command.main(["--quick"]) != 0
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert "Everything was right" not in printed


def test_a_failing_implementation_fails(monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(implementations.module("xla"), "attend", fail)
    monkeypatch.setattr(command, "times", lambda workloads: True)
    assert command.main(["--quick"]) != 0
    assert "FAILED: RuntimeError: no such kernel" in capsys.readouterr().out
