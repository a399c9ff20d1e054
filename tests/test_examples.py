"""The examples run, learn the same through every implementation, and generate with a cache what full attention would give."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashcore_jax

EXAMPLES = pathlib.Path(__file__).parents[1] / "docs" / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny_llama():
    for package in ("flax", "matplotlib", "optax", "tqdm"):
        pytest.importorskip(package)
    return load("tiny_llama")


@pytest.mark.filterwarnings("ignore::flashcore_jax.InterpretWarning")
def test_tiny_llama_learns_the_same_through_xla_and_triton(tiny_llama, tmp_path, capsys):
    losses = {}
    for name in ("xla", "triton"):
        picture, numbers = tmp_path / f"{name}.png", tmp_path / f"{name}.json"
        tiny_llama.main(["--quick", "--implementation", name, "--out", str(picture), "--losses", str(numbers)])
        losses[name] = json.loads(numbers.read_text())
        printed = capsys.readouterr().out
        assert f"attention takes {name}" in printed
        assert "tokens/s" in printed
        assert "cached == full forward" in printed
        assert picture.read_bytes().startswith(b"\x89PNG")
    xla, triton = (losses[name]["training"] for name in ("xla", "triton"))
    assert xla[0] > 5.0  # it knows nothing: log 256 = 5.5
    assert np.mean(xla[-5:]) < 3.5
    np.testing.assert_allclose(triton[:5], xla[:5], rtol=1e-4)
    np.testing.assert_allclose(triton, xla, rtol=1e-2)  # rounding errors grow from step to step
    np.testing.assert_allclose(losses["triton"]["validation"], losses["xla"]["validation"], rtol=1e-2)


@pytest.fixture(scope="module")
def generated(tiny_llama):
    """generate(stops, limit) of an untrained model, for two prompts of different lengths."""
    config = tiny_llama.Config(layers=1)
    model = tiny_llama.Llama(config, tiny_llama.nnx.Rngs(0))
    prompts, lengths = jnp.array([[1, 2, 3, 4], [5, 6, 0, 0]]), jnp.array([4, 2])

    def generate(stops, limit=6):
        cache = flashcore_jax.KVCache.create(2, 4 + limit, config.kv_heads, config.head_dim, layers=1, dtype=jnp.float32)
        texts, logits, cache = tiny_llama.generate(model, prompts, lengths, jnp.array(stops), jax.random.key(0), cache, limit)
        assert not cache.overflowed.any()
        return model, config, texts, cache.length[0], logits

    return generate


def test_tiny_llama_stops_each_row_at_its_own_byte(generated):
    never = -1
    _, _, texts, lengths, _ = generated([never, never])
    assert lengths.tolist() == [10, 8]
    stop = int(texts[0, 6])
    assert stop not in texts[0, 4:6]
    _, _, stopped, lengths, _ = generated([stop, never])
    assert lengths.tolist() == [7, 8]
    assert jnp.all(stopped[0, :7] == texts[0, :7])
    assert not stopped[0, 7:].any()
    assert jnp.all(stopped[1] == texts[1])


def test_tiny_llama_notices_a_phantom_key(tiny_llama, generated, monkeypatch):
    """One slot too many, of zeros, in the decode steps: float32 bounds are far below what it does."""
    right = flashcore_jax.attention_with_kv_cache

    def with_a_phantom_key(query, key, value, cache, layer=None, **options):
        out, cache = right(query, key, value, cache, layer=layer, **options)
        if query.shape[1] == 1 and layer is not None:
            out = flashcore_jax.attention(query, cache.key[layer], cache.value[layer], key_value_seq_lengths=cache.length[layer] + 1)
        return out, cache

    monkeypatch.setattr(flashcore_jax, "attention_with_kv_cache", with_a_phantom_key)
    results = generated([-1, -1], limit=5)  # a limit of its own, so that the function above is traced
    with pytest.raises(AssertionError, match="cached != full forward"):
        tiny_llama.compare(*results)


def test_decode_loop_writes_what_full_attention_writes():
    decode_loop = load("decode_loop")
    texts, cache = decode_loop.main()
    prompts = ([3, 1, 4, 1, 5, 9], [2, 7])
    for prompt, text, length in zip(prompts, texts.tolist(), cache.length.tolist(), strict=True):
        text = text[: length - len(prompt) + 1]  # the last one is not in the cache: it was not needed any more
        query, key, value = (decode_loop.WEIGHTS[name][jnp.array([prompt + text])] for name in ("query", "key", "value"))
        out = flashcore_jax.attention(query, key, value, is_causal=True)[0]
        should = jnp.argmax(jnp.einsum("tnh,nhw->tw", out, decode_loop.WEIGHTS["out"]), axis=-1)
        assert text == should[len(prompt) - 1 : -1].tolist()
    assert texts[0, -1] == decode_loop.STOP != texts[1, -1]  # one row stops early, one at the limit
