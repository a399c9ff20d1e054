"""What every test shares: the machine it runs on, the implementations it runs over, and the warnings that are expected."""

import os

# Four devices on a CPU, for shard_map; on a GPU, no search for the fastest matrix product in every test.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=4 --xla_gpu_autotune_level=0 {os.environ.get('XLA_FLAGS', '')}"
os.environ["FLASHCORE_TILES"] = ""  # the shipped tiles, whatever the developer has tuned
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # pytest-xdist's workers share the GPU

import jax
import pytest

import flashcore_jax

pytest.register_assert_rewrite("cache_helpers", "derivatives")

IMPLEMENTATIONS = ("xla", "triton")
EXPECTED_WARNINGS = (
    "ignore:The Pallas Triton backend:DeprecationWarning",  # JAX deprecated the route; no other warning of JAX's is expected
    "ignore::flashcore_jax.InterpretWarning",  # on a CPU the kernels are interpreted: that is how they are reached there
)


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def pytest_configure(config):
    for line in EXPECTED_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
    if hasattr(config, "cache"):  # the second run of the suite compiles nothing anew
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_collection_modifyitems(items):
    if not on_gpu():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="means something on an NVIDIA GPU only"))


def requires(implementation: str, query, key, value, **options):
    """Skips the test if this implementation is `mosaic_gpu` and declines the call, and tells why."""
    reason = implementation == "mosaic_gpu" and flashcore_jax.explain(query, key, value, **options).reasons[implementation]
    if reason:
        pytest.skip(reason)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request) -> str:
    """Every implementation by name: `triton` is compiled where there is a GPU, and interpreted elsewhere."""
    return request.param
