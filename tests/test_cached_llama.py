"""A model of LLaMA's shape that writes with a cache writes what it writes without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashcore_jax import KVCache, attention_with_kv_cache, reference

VOCABULARY, WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 64, 128, 2, 4, 2, 16
PROMPTS, NEW = (12, 3, 1, 7), 200


def random_llama():
    """Weights of a LLaMA-shaped model, the layers stacked."""
    keys = iter(jax.random.split(jax.random.key(5), 9))

    def matrix(*shape, size=1.0):
        return size * jax.random.normal(next(keys), shape) / np.sqrt(shape[-2])

    layers = {
        "query": matrix(LAYERS, WIDTH, HEADS * HEAD_DIM, size=2.0),
        "key": matrix(LAYERS, WIDTH, KV_HEADS * HEAD_DIM, size=2.0),
        "value": matrix(LAYERS, WIDTH, KV_HEADS * HEAD_DIM),
        "out": matrix(LAYERS, HEADS * HEAD_DIM, WIDTH),
        "gate": matrix(LAYERS, WIDTH, HIDDEN),
        "up": matrix(LAYERS, WIDTH, HIDDEN),
        "down": matrix(LAYERS, HIDDEN, WIDTH),
    }
    return {"embed": jax.random.normal(next(keys), (VOCABULARY, WIDTH)), "layers": layers, "head": matrix(WIDTH, VOCABULARY, size=3.0)}


def times(x, w):
    return jnp.matmul(x, w, precision="highest")  # on a GPU, JAX's own default is TF32


def rms_norm(x):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def rotate(x, position):
    """Rotary positions: x [B, T, N, H] turned by the angles of each token's own position [B, T]."""
    angle = position[:, :, None, None] * 100.0 ** (-jnp.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], axis=-1)


def llama(model, tokens, position, attention, state):
    """Logits [B, T, V], and the state that `attention(query, key, value, layer, state)` hands on from layer to layer."""

    def layer(carry, weights_and_index):
        (x, state), (w, index) = carry, weights_and_index
        h = rms_norm(x)
        query, key, value = (times(h, w[name]).reshape(*h.shape[:2], -1, HEAD_DIM) for name in ("query", "key", "value"))
        out, state = attention(rotate(query, position), rotate(key, position), value, index, state)
        x = x + times(out.reshape(*out.shape[:2], -1), w["out"])
        h = rms_norm(x)
        return (x + times(jax.nn.silu(times(h, w["gate"])) * times(h, w["up"]), w["down"]), state), None

    x = model["embed"][tokens]
    (x, state), _ = jax.lax.scan(layer, (x, state), (model["layers"], jnp.arange(LAYERS)))
    return times(rms_norm(x), model["head"]), state


@functools.cache
def uncached_generation():
    """Tokens [B, S] and logits [B, NEW, V]: each token from the whole sequence before it, by the plain reference."""
    model, lengths, tokens = random_llama(), jnp.array(PROMPTS), prompts()
    rows, position = jnp.arange(len(PROMPTS)), jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def attention(query, key, value, layer, state):
        return reference.attention(query, key, value, is_causal=True), state

    @jax.jit
    def generate(tokens):
        def write(i, carry):
            tokens, seen = carry
            logits = llama(model, tokens, position, attention, None)[0][rows, lengths + i - 1]
            return tokens.at[rows, lengths + i].set(jnp.argmax(logits, axis=-1)), seen.at[:, i].set(logits)

        return jax.lax.fori_loop(0, NEW, write, (tokens, jnp.zeros((len(PROMPTS), NEW, VOCABULARY))))

    return generate(tokens)


def prompts():
    """int32[B, longest prompt + NEW], padded on the right with a token that is none."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (len(PROMPTS), max(PROMPTS) + NEW))
    return jnp.asarray(np.where(np.arange(tokens.shape[1]) < np.array(PROMPTS)[:, None], tokens, 0), jnp.int32)


@pytest.mark.parametrize("implementation", ["xla", pytest.param("triton", marks=pytest.mark.gpu)])
def test_a_llama_writes_the_same_200_tokens_with_and_without_a_cache(implementation):
    """Four prompts of different lengths, padded, in one prefill; then one jitted while_loop, each row at its own position."""
    model, lengths = random_llama(), jnp.array(PROMPTS)
    tokens = prompts()
    rows = jnp.arange(len(PROMPTS))

    def forward(tokens, counts, cache):
        def attention(query, key, value, layer, cache):
            return attention_with_kv_cache(query, key, value, cache, layer=layer, query_seq_lengths=counts, implementation=implementation)

        position = cache.length[0][:, None] + jnp.arange(tokens.shape[1])
        logits, cache = llama(model, tokens, position, attention, cache)
        return logits[rows, counts - 1], cache

    @jax.jit
    def generate(tokens, cache):
        def write(state):
            i, tokens, logits, cache, seen = state
            new = jnp.argmax(logits, axis=-1).astype(tokens.dtype)
            tokens, seen = tokens.at[rows, lengths + i].set(new), seen.at[:, i].set(logits)
            return i + 1, tokens, *forward(new[:, None], jnp.ones_like(lengths), cache), seen

        logits, cache = forward(tokens[:, : max(PROMPTS)], lengths, cache)
        start = (0, tokens, logits, cache, jnp.zeros((len(PROMPTS), NEW, VOCABULARY)))
        _, tokens, _, cache, seen = jax.lax.while_loop(lambda state: state[0] < NEW, write, start)
        return tokens, seen, cache

    cache = KVCache.create(len(PROMPTS), max(PROMPTS) + NEW, KV_HEADS, HEAD_DIM, layers=LAYERS, dtype=jnp.float32)
    written, logits, cache = generate(tokens, cache)
    cache.check()
    np.testing.assert_array_equal(cache.length, np.broadcast_to(np.array(PROMPTS) + NEW, (LAYERS, len(PROMPTS))))
    expected, expected_logits = uncached_generation()
    np.testing.assert_array_equal(written, expected)
    # The test means something: the text does not repeat itself, and no choice was close. One could fall otherwise where both of its
    # logits are off by half the gap between them; they are held to half of that.
    for b, length in enumerate(PROMPTS):
        assert len(set(np.array(expected[b, length : length + NEW]).tolist())) >= VOCABULARY // 4
    two_best = jnp.sort(expected_logits, axis=-1)[..., -2:]
    closest = jnp.min(two_best[..., 1] - two_best[..., 0])
    assert jnp.max(jnp.abs(logits - expected_logits)) < closest / 4
