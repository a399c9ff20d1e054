"""The house's layers: a module imports only lower ones, and `import flashcore_jax` stays light."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

PACKAGE = "flashcore_jax"
ROOT = pathlib.Path(__file__).parents[1]

# A name stands for its module and everything below it. Modules of one layer do not import each other, except inside one
# package (`tuning`, and each implementation's folder under `kernels`).
LAYERS = [
    {"axes"},
    {"errors", "sharding", "masks", "rows", "online_softmax"},
    {"logits", "problem", "reference"},
    {"tuning"},
    {"kernels.xla", "kernels.triton"},
    {"kernels.mosaic_gpu"},
    {"implementations"},
    {"attention", "cache"},
    {"kv_attention"},
    {"", "kernels"},  # the package's own index; empty
    {"flax_adapters", "testing"},
    {"__main__"},
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}

RUN_TIME = {"jax", "jaxlib", "numpy", "jaxtyping"}
EXTRAS = {"flax_adapters": {"flax"}}


def name_of(path: pathlib.Path) -> str:
    """flashcore_jax/kernels/triton/__init__.py -> kernels.triton"""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def house_of(module: str) -> str:
    """The name in LAYERS that a module belongs to."""
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        if ".".join(parts[:n]) in LAYER_OF:
            return ".".join(parts[:n])
    raise AssertionError(f"{module} has no layer: add it to LAYERS here and to the design")


def imports_of(path: pathlib.Path):
    """(line, dotted name) of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def own_module(dotted: str) -> str | None:
    """The module of this package that an import reaches: `from flashcore_jax import masks` and `..masks import Band` reach masks."""
    package, _, rest = dotted.partition(".")
    if package != PACKAGE:
        return None
    return rest if rest in FILES else rest.rpartition(".")[0]


@pytest.mark.parametrize("module", FILES)
def test_imports_only_lower_layers(module):
    house = house_of(module)
    for line, dotted in imports_of(FILES[module]):
        target = own_module(dotted)
        if target is None:
            continue
        other = house_of(target)
        allowed = LAYER_OF[other] < LAYER_OF[house] or (other == house and module != target)
        assert allowed, f"{FILES[module]}:{line} imports {dotted}: {other!r} is not below {house!r}"
        assert not (house.startswith("kernels.") and other == "reference"), f"{FILES[module]}:{line}: kernels do not know the reference"
        if house == "reference":
            assert other in ("axes", "masks"), f"{FILES[module]}:{line}: the reference shares no arithmetic with the kernels"


@pytest.mark.parametrize("module", FILES)
def test_imports_only_run_time_dependencies(module):
    known = RUN_TIME | EXTRAS.get(module, set()) | sys.stdlib_module_names | {PACKAGE}
    for line, dotted in imports_of(FILES[module]):
        assert dotted.split(".")[0] in known, f"{FILES[module]}:{line} imports {dotted}: not a run-time dependency"
        if "pallas" in dotted:
            assert module.startswith("kernels."), f"{FILES[module]}:{line} imports {dotted} outside kernels/"


LOOK = """
import sys, time
import jax
before = set(sys.modules)
start = time.perf_counter()
import flashcore_jax
seconds = time.perf_counter() - start
import json
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""


def test_import_is_light():
    """Adds < 0.3 s to `import jax` (the best of three: the machine may be busy), and nothing that a call may never need."""
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", LOOK], cwd=ROOT, check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    heavy = ("flax", "optax", "chex", "matplotlib", "benchmarks", "jax.experimental.pallas", "jax._src.pallas", f"{PACKAGE}.kernels.")
    loaded = [name for name in runs[0][1] if name.startswith(heavy)]
    assert not loaded, f"import {PACKAGE} loads {loaded}"
    assert min(seconds for seconds, _ in runs) < 0.3


CALL = """
import sys
import jax, jax.numpy as jnp
import flashcore_jax
device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
array = jax.ShapeDtypeStruct((1, 512, 2, 128), jnp.bfloat16)
with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
    jax.eval_shape(lambda q, k, v: flashcore_jax.attention(q, k, v, implementation={name!r}), array, array, array)
print(*sys.modules)
"""


@pytest.mark.parametrize(("name", "heavy"), [("xla", "pallas"), ("triton", "jax.experimental.mosaic.gpu")])
def test_a_named_implementation_loads_no_other(name, heavy):
    """Traced for an H200, where `None` asks them all."""
    script = CALL.format(name=name)
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert f"{PACKAGE}.kernels.{name}" in loaded
    assert not [module for module in loaded if heavy in module]
