"""The shortest whole decode loop: prompts of different lengths, one prefill, then one token after the other inside `jax.jit`.

    python docs/examples/decode_loop.py

There is no model around the attention: random numbers embed the tokens, and project them to queries, keys, values and back.
"""

import functools

import jax
import jax.numpy as jnp

from flashcore_jax import KVCache, attention_with_kv_cache

B, N, K, H, WORDS, STOP, LIMIT = 2, 4, 2, 32, 64, 12, 16
SHAPES = {"query": (WORDS, N, H), "key": (WORDS, K, H), "value": (WORDS, K, H), "out": (N, H, WORDS)}
WEIGHTS = {name: jax.random.normal(jax.random.key(i), shape) for i, (name, shape) in enumerate(SHAPES.items())}


def next_token(tokens, lengths, cache):
    """The token behind the last real one of each row: tokens int32[B, T], lengths int32[B]."""
    query, key, value = (WEIGHTS[name][tokens] for name in ("query", "key", "value"))
    out, cache = attention_with_kv_cache(query, key, value, cache, query_seq_lengths=lengths)
    last = out[jnp.arange(B), jnp.maximum(lengths, 1) - 1]
    return jnp.argmax(jnp.einsum("bnh,nhw->bw", last, WEIGHTS["out"]), axis=-1), cache


@functools.partial(jax.jit, donate_argnames="cache")  # donated: the loop writes into the caller's buffers
def generate(prompts, lengths, cache):
    def unfinished(state):
        step, token, _, _ = state
        return (step < LIMIT) & jnp.any(token != STOP)

    def decode(state):
        step, token, texts, cache = state
        following, cache = next_token(token[:, None], (token != STOP).astype(jnp.int32), cache)
        token = jnp.where(token == STOP, STOP, following)  # a row that has stopped appends nothing, and stays stopped
        return step + 1, token, texts.at[:, step].set(token), cache

    token, cache = next_token(prompts, lengths, cache)
    texts = jnp.full((B, LIMIT), STOP).at[:, 0].set(token)
    return jax.lax.while_loop(unfinished, decode, (1, token, texts, cache))[2:]


def main():
    prompts, lengths = jnp.array([[3, 1, 4, 1, 5, 9], [2, 7, 0, 0, 0, 0]]), jnp.array([6, 2])  # right-padded
    cache = KVCache.create(B, prompts.shape[1] + LIMIT, K, H, dtype=jnp.float32)
    texts, cache = generate(prompts, lengths, cache)
    cache.check()  # raises if a row has had no room
    for text, length in zip(texts, cache.length, strict=True):
        print(f"{text.tolist()}, {length} tokens in the cache")
    return texts, cache


if __name__ == "__main__":
    main()
