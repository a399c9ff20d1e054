"""JAX's transformations: jit, grad, vmap, checkpoint, scan, shard_map, and the derivatives that kernels do not have."""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives import BEYOND, assert_close, loss_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashcore_jax
from flashcore_jax import RESIDUAL_NAMES, Unsupported, reference

B, T, S, N, K, H = 4, 17, 33, 4, 2, 32
LENGTHS = {"query_seq_lengths": jnp.array([17, 9, 0, 16]), "key_value_seq_lengths": jnp.array([33, 12, 20, 0])}


def arrays(*batch, seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((*batch, T, N, H), (*batch, S, K, H), (*batch, S, K, H))
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def by(implementation, **options):
    return functools.partial(flashcore_jax.attention, implementation=implementation, is_causal=True, **options)


@functools.cache
def expected_gradients():
    """From the plain reference."""
    return jax.jit(jax.grad(loss_of(functools.partial(reference.attention, is_causal=True)), (0, 1, 2)))(*arrays(B), **LENGTHS)


def test_jit_of_grad_and_value(implementation):
    loss = loss_of(by(implementation))
    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*arrays(B), **LENGTHS)
    assert_close(gradients, expected_gradients())
    np.testing.assert_allclose(value, jax.jit(loss)(*arrays(B), **LENGTHS), rtol=2**-19)


def test_vjp_called_twice(implementation):
    """One forward, two pullbacks: linear in the cotangent."""
    attention = functools.partial(by(implementation), **LENGTHS)

    @jax.jit
    def pull_twice(*arrays):
        out, pull = jax.vjp(attention, *arrays)
        return pull(out), pull(2 * out)

    once, twice = pull_twice(*arrays(B))
    chex.assert_trees_all_equal(jax.tree.map(lambda x: 2 * x, once), twice)


def test_gradient_of_one_argument(implementation):
    loss = loss_of(by(implementation))
    gradient = jax.jit(jax.grad(loss, 1))(*arrays(B), **LENGTHS)
    assert_close(gradient, expected_gradients()[1])


def test_lse_without_out(implementation):
    """A loss of lse alone: out's cotangent is zero, and V's gradient too."""

    def loss(attention, *arrays):
        lse = attention(*arrays, return_lse=True, **LENGTHS)[1]
        return jnp.sum(jnp.sin(jnp.where(jnp.isneginf(lse), 0.0, lse)))

    got = jax.jit(jax.grad(functools.partial(loss, by(implementation)), (0, 1, 2)))(*arrays(B))
    expected = jax.jit(jax.grad(functools.partial(loss, functools.partial(reference.attention, is_causal=True)), (0, 1, 2)))(*arrays(B))
    assert_close(got, expected)
    np.testing.assert_array_equal(got[2], 0.0)


def test_under_x64(implementation):
    """Python's integers are 64 bits wide then, and those of the kernels are not; what comes out keeps its dtype."""
    query, key, value = (
        jax.random.normal(k, (1, 150, n, H)) for k, n in zip(jax.random.split(jax.random.key(3), 3), (2, 1, 1), strict=True)
    )
    loss = loss_of(by(implementation, local_window_size=(140, 0), split_size=128, key_value_seq_lengths=jnp.array([140], jnp.int32)))
    gradients = jax.grad(loss, (0, 1, 2))
    expected = jax.jit(gradients)(query, key, value)
    with jax.enable_x64(True):
        got = jax.jit(gradients)(query, key, value)
    chex.assert_type(got, jnp.float32)
    assert_close(got, expected)


def test_vmap(implementation):
    """Over a second batch axis, lengths included."""
    lengths = {name: jnp.stack([x, x[::-1]]) for name, x in LENGTHS.items()}
    gradient = jax.grad(loss_of(by(implementation)), (0, 1, 2))
    got = jax.jit(jax.vmap(gradient))(*arrays(2, B), **lengths)
    for i in range(2):
        one = jax.jit(gradient)(*(a[i] for a in arrays(2, B)), **{name: x[i] for name, x in lengths.items()})
        assert_close(jax.tree.map(lambda x, i=i: x[i], got), one)


def test_vmap_over_lengths_alone(implementation):
    """The same arrays under several lengths."""
    attention = by(implementation, return_lse=True)
    lengths = jnp.array([[33] * B, [0] * B, [1, 2, 3, 32]])
    got = jax.jit(jax.vmap(lambda lengths: attention(*arrays(B), key_value_seq_lengths=lengths)))(lengths)
    for i in range(3):
        expected = reference.attention(*arrays(B), is_causal=True, return_lse=True, key_value_seq_lengths=lengths[i])
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], got), expected, rtol=2**-18, atol=2**-18)


def test_vmap_over_queries_alone(implementation):
    """Keys and values shared by the mapped axis; their gradient is the sum over it."""
    query, key, value = arrays(3)
    loss = loss_of(by(implementation))

    def total(loss, query, key, value):
        return jnp.sum(jax.vmap(loss, (0, None, None))(query, key, value))

    got = jax.jit(jax.grad(functools.partial(total, loss), (0, 1, 2)))(query[:, None], key[:1], value[:1])
    plain = loss_of(functools.partial(reference.attention, is_causal=True))
    expected = jax.jit(jax.grad(functools.partial(total, plain), (0, 1, 2)))(query[:, None], key[:1], value[:1])
    assert_close(got, expected)


def test_scan_over_layers(implementation):
    """A stack of layers in lax.scan, differentiated, with and without remat of each."""
    weights = 0.1 * jax.random.normal(jax.random.key(1), (3, H, H))
    attention = by(implementation)

    def network(attention, weights, x, remat):
        def layer(x, w):
            h = jnp.matmul(x, w, precision="highest")  # on a GPU, JAX's own default is TF32
            return x + attention(h, h[:, :, :K], x[:, :, :K]), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, weights)[0] ** 2)

    x = arrays(2)[0]
    expected = jax.jit(jax.grad(functools.partial(network, functools.partial(reference.attention, is_causal=True)), 0), static_argnums=2)
    for remat in (False, True):
        got = jax.jit(jax.grad(functools.partial(network, attention), 0), static_argnums=2)(weights, x, remat)
        assert_close(got, expected(weights, x, False), calls=len(weights))


def equations(f, *arguments):
    """Those of f's program, the inner ones' too, but of kernels."""

    def of(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn
            if eqn.primitive.name != "pallas_call":
                for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                    if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                        yield from of(getattr(inner, "jaxpr", inner))

    return of(jax.make_jaxpr(f)(*arguments).jaxpr)


def kernels(f, *arguments) -> collections.Counter:
    """How often each Pallas kernel stands in f's program."""
    calls = (eqn.params for eqn in equations(f, *arguments) if eqn.primitive.name == "pallas_call")
    return collections.Counter(str(of.get("name") or of["name_and_src_info"]).split(" ")[0] for of in calls)


@pytest.mark.parametrize(("saved", "forward_kernels"), [((), 2), (RESIDUAL_NAMES, 1)], ids=["saving nothing", "saving the residuals"])
def test_remat_policy_avoids_a_second_forward(saved, forward_kernels):
    """The forward kernel runs again in the backward pass, unless the policy keeps what it named."""
    policy = jax.checkpoint_policies.save_only_these_names(*saved)

    def layer(x):
        return by("triton")(x, x[:, :, :K], x[:, :, :K])

    def loss(layer, x):
        return jnp.sum(layer(jnp.sin(x)) ** 2)

    x = arrays(1)[0]
    gradient = jax.grad(functools.partial(loss, jax.checkpoint(layer, policy=policy)))
    counts = kernels(jax.jit(gradient), x)
    # Three kernels at least, or nothing was counted: the forward, and two for the backward.
    assert sum(counts.values()) == forward_kernels + 2, counts
    assert max(counts.values()) == forward_kernels, counts
    assert_close(jax.jit(gradient)(x), jax.jit(jax.grad(functools.partial(loss, layer)))(x))


@pytest.mark.parametrize(("saved", "forwards"), [((), 2), (RESIDUAL_NAMES, 1)], ids=["saving nothing", "saving the residuals"])
def test_remat_policy_avoids_a_second_forward_of_xla(saved, forwards):
    """Plain JAX has no kernels to count: `ceil`, of the running maximum, stands in the forward only."""
    layer = jax.checkpoint(lambda x: by("xla")(x, x[:, :, :K], x[:, :, :K]), policy=jax.checkpoint_policies.save_only_these_names(*saved))
    program = equations(jax.jit(jax.grad(lambda x: jnp.sum(layer(jnp.sin(x)) ** 2))), arrays(1)[0])
    assert sum(eqn.primitive.name == "ceil" for eqn in program) == forwards


@pytest.mark.parametrize("saved", [(), RESIDUAL_NAMES], ids=["saving nothing", "saving the residuals"])
def test_remat(implementation, saved):
    loss = jax.checkpoint(loss_of(by(implementation)), policy=jax.checkpoint_policies.save_only_these_names(*saved))
    assert_close(jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays(B), **LENGTHS), expected_gradients())


@pytest.mark.parametrize("over", ["batch", "heads"])
def test_shard_map(implementation, over):
    """Two devices, each with its rows or its heads: the gradients of the whole."""
    if jax.device_count() < 2:
        pytest.skip("one device")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spec, lengths_spec = (P("x"), P("x")) if over == "batch" else (P(None, None, "x"), P())
    # The interpreter's loops mix varying and unvarying values, which shard_map's check refuses; compiled kernels pass it.
    check = not (implementation == "triton" and jax.default_backend() == "cpu")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec,) * 3 + (lengths_spec,) * 2, out_specs=(spec,) * 3, check_vma=check)
    def gradients(query, key, value, query_lengths, key_lengths):
        loss = loss_of(by(implementation, query_seq_lengths=query_lengths, key_value_seq_lengths=key_lengths))
        return jax.grad(loss, (0, 1, 2))(query, key, value)

    sharded = (jax.device_put(a, NamedSharding(mesh, spec)) for a in arrays(B))
    assert_close(gradients(*sharded, *LENGTHS.values()), expected_gradients())


AXIS_TYPES = pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=lambda axis_type: axis_type.name)
SPECS = (P(), P("x"), P("x", None, "y"), P(("x", "y")), P(None, "x"), P(None, None, ("x", "y")))


@pytest.mark.parametrize(("spec", "jitted"), [*((spec, True) for spec in SPECS), (P("x", None, "y"), False)], ids=str)
@AXIS_TYPES
def test_a_mesh(mesh_of, implementation, axis_type, spec, jitted):
    """Explicit axes are what `jax.make_mesh` gives by default, automatic ones what most models have."""
    mesh = mesh_of(axis_type)
    sharding = NamedSharding(mesh, spec)
    # Rows and whole key/value heads, of which there are two, stay where they are; others are gathered.
    whole = spec != P(None, "x") and (spec != P(None, None, ("x", "y")) or mesh.size == 2)
    query, key, value = arrays(B)
    query = jax.device_put(query if spec != P(None, "x") else query[:, :16], sharding)
    if whole:
        key, value = (jax.device_put(x, sharding) for x in (key, value))
    lengths = {"key_value_seq_lengths": LENGTHS["key_value_seq_lengths"]}
    function = jax.value_and_grad(loss_of(by(implementation, **lengths)), (0, 1, 2))
    with jax.set_mesh(mesh):  # JAX's own derivatives ask for it, where they are not jitted
        got = (jax.jit(function) if jitted else function)(query, key, value)
    assert_close(got, function(*jax.device_get((query, key, value))))
    out = by(implementation, **lengths)(query, key, value)
    if axis_type == AxisType.Explicit:
        spec = spec if whole else P()
        assert jax.typeof(out).sharding.spec == P(*spec, *[None] * (4 - len(spec)))
    elif whole:
        assert out.sharding.is_equivalent_to(sharding, out.ndim)
        if implementation != "xla":  # where XLA sees through all of it, it may do as it likes
            assert "all-gather" not in jax.jit(function).lower(query, key, value).compile().as_text()


@AXIS_TYPES
def test_rows_of_query_and_heads_of_key_on_one_mesh_axis(mesh_of, implementation, axis_type):
    """Only one of them can stay."""
    mesh = mesh_of(axis_type)
    query, key, value = arrays(B)
    laid_out = (
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in ((query, P("x")), (key, P(None, None, "x")), (value, P("y", None, "x")))
    )
    assert_close(jax.jit(by(implementation))(*laid_out), by(implementation)(query, key, value))


@pytest.mark.parametrize(
    ("implementation", "axis_type"),
    [
        pytest.param(
            "xla", AxisType.Explicit, marks=pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax 0.10 reshapes no such array")
        ),
        ("xla", AxisType.Auto),
        ("triton", AxisType.Auto),
    ],
    ids=str,
)
def test_vmap_over_an_axis_that_is_shared_out(mesh_of, implementation, axis_type):
    """Pallas's interpreter and its Mosaic GPU route do not take such an axis where it is explicit."""
    mesh = mesh_of(axis_type)
    several = arrays(2, B)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.vmap(by(implementation)))(*(jax.device_put(x, NamedSharding(mesh, P("x"))) for x in several))
    assert_close(got, jax.vmap(by(implementation))(*several))


def traced_in_a_shard_map(f, of_arrays, of_results, *arrays):
    """With shard_map's checks, for two H200s."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((2,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=of_arrays, out_specs=of_results)).trace(*arrays)


@pytest.mark.parametrize("implementation", ["xla", "triton", None])
@pytest.mark.parametrize("varying", ["query", "key and value", "lengths"])
def test_only_some_arrays_vary_over_a_shard_map(implementation, varying):
    """The others are the same on all devices: so are not the results, and the others' gradients are sums over devices."""
    X, same = P("x"), P()
    specs = {"query": (X, same, same, same), "key and value": (same, X, X, same), "lengths": (same, same, same, X)}[varying]
    shapes = ((2, 128, 4, 64), (2, 128, 2, 64), (2, 128, 2, 64), (2,))
    shapes = [(4, *shape[1:]) if spec == X else shape for shape, spec in zip(shapes, specs, strict=True)]
    array = [jax.ShapeDtypeStruct(shape, jnp.int32 if len(shape) == 1 else jnp.bfloat16) for shape in shapes]

    def attend(query, key, value, lengths):
        return flashcore_jax.attention(query, key, value, key_value_seq_lengths=lengths, is_causal=True, implementation=implementation)

    def gradients(*arrays):
        return jax.grad(lambda *a: jnp.sum(attend(*a, arrays[3]).astype(jnp.float32)), (0, 1, 2))(*arrays[:3])

    traced_in_a_shard_map(attend, specs, X, *array)
    traced_in_a_shard_map(gradients, specs, specs[:3], *array)
    with pytest.raises(ValueError, match="out_specs"):  # where it is claimed that all devices have one result
        traced_in_a_shard_map(attend, specs, same, *array)


def test_the_gradient_of_what_is_the_same_on_all_devices(mesh_of, monkeypatch):
    """Is the sum over them. shard_map's checks do not take Pallas's interpreter: the reference stands in for the kernels."""
    mesh = mesh_of(AxisType.Auto)

    def forward(query, key, value, rows, problem):
        out, lse = reference.attention(query, key, value, is_causal=True, return_lse=True)
        return out, lse.swapaxes(1, 2)

    def backward(query, key, value, rows, out, lse, dout, dlse, problem):
        return jax.vjp(lambda *a: forward(*a, rows, problem), query, key, value)[1]((dout, dlse))

    for name, step in (("forward", forward), ("backward", backward)):
        monkeypatch.setattr(f"flashcore_jax.kernels.triton.{name}", step)
    query, key, value = (x[:rows, :5] for x, rows in zip(arrays(B), (mesh.size, 1, 1), strict=True))  # sizes that no other test has traced
    loss = loss_of(by("triton"))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(("x", "y")), P(), P()), out_specs=(P(("x", "y")), P(), P()))
    def gradients(query, key, value):
        return jax.grad(loss, (0, 1, 2))(query, key, value)

    expected = jax.grad(
        lambda q, k, v: loss_of(functools.partial(reference.attention, is_causal=True))(q, *(jnp.repeat(x, mesh.size, 0) for x in (k, v))),
        (0, 1, 2),
    )
    assert_close(gradients(query, key, value), expected(query, key, value))


def test_arrays_that_are_not_on_the_mesh_in_force(mesh_of, implementation):
    """Explicit axes, and nothing laid out over them."""
    mesh, expected = mesh_of(AxisType.Explicit), by(implementation)(*arrays(B), **LENGTHS)
    with jax.set_mesh(mesh):
        assert_close(by(implementation)(*arrays(B), **LENGTHS), expected)


@pytest.mark.parametrize(
    "strictly", [lambda: jax.numpy_dtype_promotion("strict"), lambda: jax.numpy_rank_promotion("raise")], ids=["dtypes", "ranks"]
)
def test_without_jax_numpys_promotions(implementation, strictly):
    """As some code bases forbid them."""
    with strictly():
        loss = loss_of(by(implementation, local_window_size=(5, 0), logits_soft_cap=3.0))
        jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays(B), **LENGTHS)
        query, key, value = (x[:, :9] for x in arrays(B))
        for layers in (None, 2):
            cache = flashcore_jax.KVCache.create(B, S, K, H, layers=layers, dtype=jnp.float32)
            options = {"query_seq_lengths": LENGTHS["query_seq_lengths"], "layer": layers and 1, "implementation": implementation}

            def loss(query, cache, options=options):
                return flashcore_jax.attention_with_kv_cache(query, key, value, cache, **options)[0].sum()

            jax.jit(jax.grad(loss, (0, 1), allow_int=True)).trace(query, cache)
            cache.truncate(jnp.arange(B)).reset(0).reset(jnp.arange(B) > 1)


# --- derivatives beyond the first reverse one


def scalar(attention, x):
    return loss_of(attention)(x, 0.5 * x[:, :, :K], jnp.sin(x[:, :, :K]))


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("derivative", BEYOND)
def test_kernels_have_the_first_reverse_derivative_only(derivative, jitted):
    run = functools.partial(BEYOND[derivative], functools.partial(scalar, by("triton")))
    if jitted and derivative == "jvp":
        # JAX itself finds this one, when the program that holds it is lowered: attention() has returned by then.
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jit(run)(arrays(1)[0])
    else:
        with pytest.raises(Unsupported, match='implementation="xla"'):
            (jax.jit(run) if jitted else run)(arrays(1)[0])


@pytest.mark.parametrize("derivative", BEYOND)
def test_xla_has_them_all(derivative):
    x = arrays(1)[0]
    options = {"logits_soft_cap": 4.0, "local_window_size": (9, 2)}
    got = jax.jit(functools.partial(BEYOND[derivative], functools.partial(scalar, by("xla", **options))))(x)
    plain = functools.partial(reference.attention, is_causal=True, **options)
    expected = jax.jit(functools.partial(BEYOND[derivative], functools.partial(scalar, plain)))(x)
    assert_close(got, expected, calls=4)  # a second derivative adds the products of two first ones: four times their error


@pytest.mark.parametrize("name", LENGTHS)
def test_gradient_of_a_vmap_over_lengths(implementation, name):
    """The other way round than above: what is differentiated is the batched call. A block's condition is then one for each row."""
    lengths = jnp.stack([LENGTHS[name], LENGTHS[name][::-1]])
    loss = loss_of(lambda *arrays, **options: by(implementation)(*arrays[:3], **{name: arrays[3]}, **options))
    got = jax.jit(jax.grad(lambda *arrays: jnp.sum(jax.vmap(loss)(*arrays, lengths)), (0, 1, 2)))(*arrays(2, B))
    expected = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))(*arrays(2, B), lengths)
    assert_close(got, expected)


def test_second_derivative_of_a_vmap_over_lengths():
    query, key, value = (x[:, :1, :6, :1] for x in arrays(2, B))
    lengths = jnp.array([[4], [6]])

    def loss(query):
        one = functools.partial(flashcore_jax.attention, implementation="xla")
        return jnp.sum(jax.vmap(lambda q, k, v, n: one(q, k, v, key_value_seq_lengths=n))(query, key, value, lengths) ** 2)

    def dense(query):
        return jnp.sum(jax.vmap(lambda q, k, v, n: reference.attention(q, k, v, key_value_seq_lengths=n))(query, key, value, lengths) ** 2)

    direction = jnp.ones_like(query)
    got, expected = (jax.jvp(jax.grad(f), (query,), (direction,))[1] for f in (loss, dense))
    assert_close(got, expected)
