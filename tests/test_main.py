"""`python -m flashcore_jax` says what is here, and its exit code whether it is right."""

import pathlib
import subprocess
import sys

import pytest

import flashcore_jax
from flashcore_jax import __main__ as command
from flashcore_jax import implementations

ROOT = pathlib.Path(__file__).parents[1]
TABLES = ["Which implementation a call takes", "Errors against float64", "prefill == decode, bfloat16", "Milliseconds, causal"]


def test_quick_run_is_right():
    run = subprocess.run([sys.executable, "-m", "flashcore_jax", "--quick"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"flashcore_jax {flashcore_jax.__version__}" in run.stdout
    places = [run.stdout.index(title) for title in TABLES]
    assert places == sorted(places)
    checked, _, timed = (run.stdout[start:stop].splitlines() for start, stop in zip(places[1:], [*places[2:], None], strict=True))
    for name in ("triton", "xla"):
        for kind in ("bfloat16, causal", "decode"):
            assert any(line.startswith(kind) and name in line for line in checked), f"{kind} was not checked through {name}"
    for name in ("flashcore", "jax.nn"):
        assert any(line.startswith("decode") and name in line for line in timed), f"{name} did not decode on the clock"
    assert "Everything was right" in run.stdout


@pytest.mark.host
def test_a_wrong_implementation_fails(monkeypatch, capsys):
    module = implementations.module("xla")
    attend = module.attend

    def with_five_percent_too_much(*arguments):
        out, lse = attend(*arguments)
        return out * 1.05, lse

    monkeypatch.setattr(module, "attend", with_five_percent_too_much)
    monkeypatch.setattr(command, "times", lambda *workloads: True)
    assert command.main(["--quick"]) != 0
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert "Everything was right" not in printed


def test_a_wrong_decode_step_fails(monkeypatch, capsys):
    module = implementations.module("xla")
    attend = module.attend

    def with_five_percent_too_much(query, *arguments):
        out, lse = attend(query, *arguments)
        return (out * 1.05 if query.shape[1] == 1 else out), lse

    monkeypatch.setattr(module, "attend", with_five_percent_too_much)
    monkeypatch.setattr(implementations, "_MODULES", {"xla": implementations._MODULES["xla"]})  # None takes it on a GPU too
    monkeypatch.setattr(command, "promises_bits", lambda workload: True)
    assert not command.correctness([], command.DECODE_KINDS[:1])
    assert not command.equality(["bfloat16"])
    assert capsys.readouterr().out.count("WRONG") == 2


@pytest.mark.host
def test_a_failing_implementation_fails(monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(implementations.module("xla"), "attend", fail)
    monkeypatch.setattr(command, "times", lambda *workloads: True)
    assert command.main(["--quick"]) != 0
    assert "FAILED: RuntimeError: no such kernel" in capsys.readouterr().out
