"""Every mistake is found when traced, has its type, and its message says what was expected, what came, and what to do."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import pytest

import flashcore_jax
from flashcore_jax import ArgumentError, DtypeError, InterpretWarning, OptionError, ShapeError, Unsupported


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def lengths(*shape, dtype=jnp.int32):
    return array(*shape, dtype=dtype)


def traced_for(kind):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


# A right call; each row of the table changes it into a wrong one. Every message holds the words in the last column.
RIGHT = {"query": array(2, 8, 4, 64), "key": array(2, 16, 2, 64), "value": array(2, 16, 2, 32)}

WRONG = [
    ("query without batch", {"query": array(8, 4, 64)}, ShapeError, "[B, T, N, H]"),
    ("key with five axes", {"key": array(1, 2, 16, 2, 64)}, ShapeError, "[B, S, K, H]"),
    ("value without heads", {"value": array(2, 16, 64)}, ShapeError, "[B, S, K, Hv]"),
    ("key's length", {"key": array(2, 15, 2, 64)}, ShapeError, "(2, 15, 2, 64)"),
    ("key's heads", {"key": array(2, 16, 4, 64)}, ShapeError, "(2, 16, 4, 64)"),
    ("key's head dim", {"key": array(2, 16, 2, 32)}, ShapeError, "(2, 16, 2, 32)"),
    ("key and value's batch", {"key": array(3, 16, 2, 64), "value": array(3, 16, 2, 64)}, ShapeError, "3"),
    ("32 heads over 7", {"query": array(2, 8, 32, 64), "key": array(2, 16, 7, 64), "value": array(2, 16, 7, 64)}, ShapeError, "N = 32"),
    ("fewer query heads", {"query": array(2, 8, 1, 64)}, ShapeError, "N = 1"),
    ("no queries", {"query": array(2, 0, 4, 64)}, ShapeError, "size 0"),
    ("no keys", {"key": array(2, 0, 2, 64), "value": array(2, 0, 2, 64)}, ShapeError, "size 0"),
    ("no rows", {"query": array(0, 8, 4, 64), "key": array(0, 16, 2, 64), "value": array(0, 16, 2, 64)}, ShapeError, "size 0"),
    ("head dim 4", {"query": array(2, 8, 4, 4), "key": array(2, 16, 2, 4)}, ShapeError, "multiple of 8 from 8 to 256"),
    ("head dim 65", {"query": array(2, 8, 4, 65), "key": array(2, 16, 2, 65)}, ShapeError, "multiple of 8 from 8 to 256"),
    ("value's head dim 264", {"value": array(2, 16, 2, 264)}, ShapeError, "multiple of 8 from 8 to 256"),
    ("a list", {"query": [[1.0]]}, DtypeError, "list"),
    ("integers", {name: array(*a.shape, dtype=jnp.int8) for name, a in RIGHT.items()}, DtypeError, "int8"),
    ("float64", {name: jax.core.ShapedArray(a.shape, "float64") for name, a in RIGHT.items()}, DtypeError, "float64"),
    ("key of another dtype", {"key": array(2, 16, 2, 64, dtype=jnp.float16)}, DtypeError, "float16"),
    ("value of another dtype", {"value": array(2, 16, 2, 32, dtype=jnp.float32)}, DtypeError, "float32"),
    ("lengths as a list", {"key_value_seq_lengths": [16, 16]}, DtypeError, "int32"),
    ("lengths as floats", {"query_seq_lengths": lengths(2, dtype=jnp.float32)}, DtypeError, "int32"),
    ("lengths of another batch", {"query_seq_lengths": lengths(3)}, ShapeError, "(3,)"),
    ("one length", {"key_value_seq_lengths": lengths()}, ShapeError, "()"),
    ("lengths per head", {"key_value_seq_lengths": lengths(2, 4)}, ShapeError, "(2, 4)"),
    ("is_causal as a number", {"is_causal": 1}, OptionError, "True or False"),
    ("a window of -1", {"local_window_size": -1}, OptionError, "-1"),
    ("a window of three", {"local_window_size": (1, 2, 3)}, OptionError, "(left, right)"),
    ("a window of floats", {"local_window_size": (1.0, 2)}, OptionError, "(left, right)"),
    ("a window of True", {"local_window_size": True}, OptionError, "(left, right)"),
    ("scale of infinity", {"scale": float("inf")}, OptionError, "1e+30"),
    ("scale of NaN", {"scale": float("nan")}, OptionError, "1e+30"),
    ("scale of 1e-50", {"scale": 1e-50}, OptionError, "1e-30"),
    ("scale of 10**400", {"scale": 10**400}, OptionError, "1e+30"),
    ("scale as a string", {"scale": "1"}, OptionError, "1e+30"),
    ("soft cap of 1e-46", {"logits_soft_cap": 1e-46}, OptionError, "1e-30"),
    ("soft cap of 1e40", {"logits_soft_cap": 1e40}, OptionError, "1e+30"),
    ("a soft cap of 0", {"logits_soft_cap": 0.0}, OptionError, "1e-30"),
    ("a soft cap below 0", {"logits_soft_cap": -3.0}, OptionError, "1e-30"),
    ("split_size of 0", {"split_size": 0}, OptionError, "multiple of 128"),
    ("split_size of 100", {"split_size": 100}, OptionError, "multiple of 128"),
    ("split_size of 2048.0", {"split_size": 2048.0}, OptionError, "multiple of 128"),
    ("an unknown precision", {"precision": "double"}, OptionError, "double"),
    ("a precision of 16 bits", {"precision": jax.lax.DotAlgorithmPreset.F16_F16_F32}, OptionError, "float32"),
]


@pytest.mark.parametrize("function", [flashcore_jax.attention, flashcore_jax.explain], ids=["attention", "explain"])
@pytest.mark.parametrize(("changed", "error", "words"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_arguments(function, changed, error, words):
    arguments = RIGHT | changed
    arrays = {name: a for name, a in arguments.items() if hasattr(a, "shape")}
    static = {name: a for name, a in arguments.items() if name not in arrays}

    def call(**arrays):
        return function(**arrays, **static)

    with pytest.raises(error) as raised:
        jax.eval_shape(call, **arrays) if function is flashcore_jax.attention else call(**arrays)
    message = str(raised.value)
    assert words in message
    assert message.startswith("expected ")
    assert message.count("; got ") == 1
    assert message.rindex("; ") > message.index("; got "), "no remedy"
    assert message.isprintable()


def test_the_right_call_is_right():
    out, lse = jax.eval_shape(lambda **arrays: flashcore_jax.attention(**arrays, return_lse=True), **RIGHT)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((2, 8, 4, 32), jnp.bfloat16, (2, 8, 4), jnp.float32)


@pytest.mark.parametrize(
    "changed",
    [
        {"local_window_size": 0},
        {"local_window_size": (3, 0)},
        {"scale": 2},
        {"split_size": None},
        {"split_size": 128},
        {"precision": "highest"},
        {"precision": jax.lax.Precision.DEFAULT},
        {"precision": jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3},
        {"precision": jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6},
        {"logits_soft_cap": 30},
        {"query_seq_lengths": lengths(2), "key_value_seq_lengths": lengths(2, dtype=jnp.uint8)},
        {"query": array(2, 8, 32, 64), "key": array(2, 16, 8, 64), "value": array(2, 16, 8, 64)},
        {"query": array(2, 8, 4, 256), "key": array(2, 16, 2, 256)},
    ],
    ids=str,
)
def test_what_looks_odd_and_is_right(implementation, changed):
    arguments = RIGHT | changed
    arrays = {name: a for name, a in arguments.items() if hasattr(a, "shape")}
    static = {name: a for name, a in arguments.items() if name not in arrays}
    out = jax.eval_shape(lambda **arrays: flashcore_jax.attention(**arrays, **static, implementation=implementation), **arrays)
    assert out.shape == (*arguments["query"].shape[:3], arguments["value"].shape[3])


def test_kinds():
    for error in (ShapeError, DtypeError, OptionError):
        assert issubclass(error, ArgumentError)
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(Unsupported, NotImplementedError)


def test_an_old_gpu_is_unsupported():
    """Traced for a V100: `triton` named raises and says why, None takes another."""
    with traced_for("Tesla V100-SXM2-16GB"):
        explanation = flashcore_jax.explain(**RIGHT)
        assert explanation.implementation == "xla"
        assert "8.0" in explanation.reasons["triton"]
        with pytest.raises(Unsupported, match=r"8\.0.*implementation=None"):
            jax.eval_shape(lambda **arrays: flashcore_jax.attention(**arrays, implementation="triton"), **RIGHT)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="kernels are interpreted on a CPU only")
def test_interpreting_warns_the_caller_once():
    with pytest.warns(InterpretWarning, match="interpreter, slowly") as caught:
        jax.eval_shape(lambda **arrays: flashcore_jax.attention(**arrays, implementation="triton"), **RIGHT)
    assert [warning.filename for warning in caught] == [__file__]
    cache = flashcore_jax.KVCache.create(1, 4, 1, 16, dtype=jnp.float32)
    token = jnp.ones((1, 1, 1, 16))
    with pytest.warns(InterpretWarning) as caught:
        flashcore_jax.attention_with_kv_cache(token, token, token, cache, implementation="triton")
    assert {warning.filename for warning in caught} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flashcore_jax.explain(**RIGHT, implementation="triton").implementation == "triton"


@pytest.mark.mosaic
def test_explain_tells_what_hopper_hands_on():
    """Traced for an H200: a length that the copy engine cannot take, head dims that only Triton's backward takes, and a decode step."""

    def explain(T, S, H=128, **options):
        query, key, value = (jax.ShapeDtypeStruct((1, length, 2, size), jnp.bfloat16) for length, size in ((T, H), (S, H), (S, 128)))
        return flashcore_jax.explain(query, key, value, **options)

    with traced_for("NVIDIA H200"):
        assert explain(512, 512).implementation == "mosaic_gpu"
        assert explain(512, 512).handed_on == {}
        assert str(explain(512, 512)).startswith("takes mosaic_gpu; triton: would run if named")
        odd = explain(512, 513)
        assert set(odd.handed_on) == {"forward", "backward"}
        assert "forward by the Triton kernels: of T = 512 and S = 513 one is no multiple of 8" in str(odd)
        assert "below 128" in explain(120, 512).handed_on["forward"]
        assert "few queries" in explain(1, 512).handed_on["forward"]
        assert set(explain(512, 512, H=256).handed_on) == {"backward"}
        assert explain(512, 512, query_seq_lengths=jax.ShapeDtypeStruct((1,), jnp.int32)).handed_on == {}


@pytest.mark.mosaic
def test_explain_of_a_cache():
    """Traced for an H200: a prompt, a token for few rows and for many, four for many, a capacity that the copy engine cannot take; and what the call
    itself would raise."""

    def explain(T, capacity=1024, layers=None, B=2, N=4, **options):
        cache = jax.eval_shape(lambda: flashcore_jax.KVCache.create(B, capacity, 2, 128, layers=layers))
        arrays = [jax.ShapeDtypeStruct((B, T, heads, 128), jnp.bfloat16) for heads in (N, 2, 2)]
        return flashcore_jax.explain_with_kv_cache(*arrays, cache, **options)

    with traced_for("NVIDIA H200"):
        assert explain(512).implementation == "mosaic_gpu"
        assert explain(512).handed_on == {}
        for B in (2, 64):
            assert "forward" not in explain(1, layers=3, layer=1, B=B).handed_on
        assert "few queries" in explain(4, layers=3, layer=1, B=64).handed_on["forward"]
        assert "forward" not in explain(1, B=64, N=32).handed_on
        assert "few queries" in explain(1, B=64, N=20).handed_on["forward"], "ten rows: the copy engine takes eight"
        assert "(a cache's S is its capacity) one is no multiple of 8" in explain(512, 1001).handed_on["forward"]
        assert explain(512, implementation="triton").implementation == "triton"
        with pytest.raises(OptionError, match="layer"):
            explain(1, layers=3)
        with pytest.raises(OptionError, match="split_size"):
            explain(1, split_size=100)


@pytest.mark.parametrize(
    ("explain", "call"),
    [(flashcore_jax.explain, flashcore_jax.attention), (flashcore_jax.explain_with_kv_cache, flashcore_jax.attention_with_kv_cache)],
    ids=["attention", "attention_with_kv_cache"],
)
def test_explain_takes_the_arguments_of_the_call(explain, call):
    of_explain, of_attention = (inspect.signature(f).parameters for f in (explain, call))
    assert list(of_explain) == list(of_attention)
    assert [p.default for p in of_explain.values()] == [p.default for p in of_attention.values()]


@pytest.mark.parametrize("implementation", ["cudnn", ["xla"], 1])
def test_an_implementation_that_there_is_not(implementation):
    for f in (flashcore_jax.attention, flashcore_jax.explain):
        with pytest.raises(OptionError, match="expected implementation to be None or one of 'mosaic_gpu', 'triton', 'xla'; got "):
            jax.eval_shape(lambda f=f, **arrays: f(**arrays, implementation=implementation), **RIGHT)


@pytest.mark.parametrize("precision", [False, 0, "exact"])
def test_what_is_no_precision(precision):
    with pytest.raises(OptionError, match=f"got {precision!r}"):
        jax.eval_shape(lambda **arrays: flashcore_jax.attention(**arrays, precision=precision), **RIGHT)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU")
def test_without_a_gpu_explain_says_so():
    explanation = flashcore_jax.explain(**RIGHT)
    assert explanation.implementation == "xla"
    assert "GPU" in explanation.reasons["triton"]
    assert "xla" in str(explanation)


@pytest.mark.gpu
def test_the_gpu_is_chosen():
    explanation = flashcore_jax.explain(**RIGHT)
    assert explanation.reasons["triton"] is None
    assert explanation.reasons["xla"] is None
    assert explanation.implementation == ("triton" if explanation.reasons["mosaic_gpu"] else "mosaic_gpu")


LONG = jax.ShapeDtypeStruct((1, 512, 2, 128), jnp.float16)


@pytest.mark.mosaic
def test_a_large_soft_cap_is_not_for_the_rough_tanh():
    """tanh's error is multiplied by the cap: beyond 1024 Hopper's kernels, which have no other tanh, leave the call to Triton's."""
    with traced_for("NVIDIA H200"):
        assert flashcore_jax.explain(LONG, LONG, LONG, logits_soft_cap=1024.0).implementation == "mosaic_gpu"
        explanation = flashcore_jax.explain(LONG, LONG, LONG, logits_soft_cap=1025.0)
    assert explanation.implementation == "triton"
    assert "soft cap of 1025" in explanation.reasons["mosaic_gpu"]


def test_an_old_jax_leaves_hopper_to_triton(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with traced_for("NVIDIA H200"):
        explanation = flashcore_jax.explain(LONG, LONG, LONG)
        assert explanation.implementation == "triton"
        with pytest.raises(Unsupported, match=r"jax 0\.11 or newer.*implementation=None"):
            flashcore_jax.explain(LONG, LONG, LONG, implementation="mosaic_gpu")
    assert explanation.reasons["mosaic_gpu"] == "it needs jax 0.11 or newer"
