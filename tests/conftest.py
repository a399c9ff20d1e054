"""What every test shares: the machine it runs on, the implementations it runs over, and the warnings that are expected."""

import glob
import os

os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=4",  # on a CPU, for shard_map
        "--xla_gpu_autotune_level=0",  # no search for the fastest matrix product in every test
        # Without a GPU most of the time goes into programs that are compiled once and run once: a quarter less of it.
        *([] if glob.glob("/dev/nvidia[0-9]*") else ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]),
        os.environ.get("XLA_FLAGS", ""),
    ]
)
os.environ["FLASHCORE_TILES"] = ""  # the shipped tiles, whatever the developer has tuned
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # pytest-xdist's workers share the GPU
# One thread for each worker's oracles: numpy's threads of all workers together take minutes for what one does in a second.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Workers that are done take tests over from others, since tests differ much in time."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.option.dist == "load" else None


def pytest_collection_modifyitems(items):
    here = {
        "gpu": (on_gpu(), "means something on an NVIDIA GPU only"),
        "hopper": (on_hopper(), "means something on an NVIDIA Hopper GPU with jax 0.11 only"),
        "mosaic": (has_mosaic(), "the kernels for Hopper need jax 0.11"),
        "host": (not on_gpu(), "runs nothing on a GPU: machines without one have it"),
    }
    for item in items:
        for marker, (is_here, reason) in here.items():
            if not is_here and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def has_mosaic() -> bool:
    """Of jax alone, here and in `on_hopper` of the machine: if the implementation wrongly declines, its tests fail."""
    return jax.__version_info__ >= (0, 11)


def on_hopper() -> bool:
    """Whether "mosaic_gpu" must run here."""
    return on_gpu() and jax.devices()[0].compute_capability == "9.0" and has_mosaic()


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request) -> str:
    """Every implementation by name: `triton` is compiled where there is a GPU, and interpreted elsewhere."""
    return request.param


@pytest.fixture
def mesh_of():
    """A mesh with axes "x" and "y" of one type, two devices by two or by one."""

    def mesh(axis_type):
        if jax.device_count() < 2:
            pytest.skip("one device")
        count = 4 if jax.device_count() >= 4 else 2
        return jax.make_mesh((2, count // 2), ("x", "y"), axis_types=(axis_type,) * 2, devices=jax.devices()[:count])

    return mesh
