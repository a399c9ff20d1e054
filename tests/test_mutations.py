"""The suite notices kernels broken on purpose. A few of them; `python tests/mutations.py` has all."""

import pathlib

import pytest
from mutations import MUTATIONS, ROOT, survives

_HOPPER = pytest.param("Hopper: values are let go before they were multiplied", marks=[pytest.mark.mosaic, pytest.mark.host])


@pytest.mark.parametrize("name", ["no mask of key columns", "query position shifted by one", "interleaved heads", _HOPPER])
def test_a_mutation_turns_its_tests_red(name):
    output = survives(name)
    assert output is None, output


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_applies(name):
    """Its old text stands exactly once in the source as it is now."""
    for edit in MUTATIONS[name].edits:
        assert pathlib.Path(ROOT, "flashcore_jax", edit.file).read_text().count(edit.old) == 1, edit.old
