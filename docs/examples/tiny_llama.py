"""A small LLaMA learns to write Python from the standard library's own source files, and then writes some with a key/value cache.

    python docs/examples/tiny_llama.py      about a minute on two CPU cores; on an NVIDIA GPU through the Triton kernels, by default

The model is LLaMA's in small: RMSNorm, rotary positions, grouped-query attention, SwiGLU. A token is a byte.
"""

import argparse
import dataclasses
import functools
import json
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import flashcore_jax

BYTES = 256
PROMPTS = {"    def __init__(self, ": ":", "import ": "\n", "class ": ":", "    if self.": "\n"}  # each with the byte that ends its text


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 4
    width: int = 128
    hidden: int = 384
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    implementation: str | None = None


def rotate(x, positions):
    """Rotary positions (Su et al., "RoFormer", 2021): x [B, T, N, H], each pair of features turned by its position's angle."""
    H = x.shape[-1]
    frequency = 10_000.0 ** (-jnp.arange(0, H, 2) / H)
    angle = positions[..., None, None] * frequency
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        def project(heads):
            return nnx.LinearGeneral(config.width, (heads, config.head_dim), use_bias=False, rngs=rngs)

        self.query, self.key, self.value = project(config.query_heads), project(config.kv_heads), project(config.kv_heads)
        self.out = nnx.LinearGeneral((config.query_heads, config.head_dim), config.width, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.implementation = config.implementation

    def project(self, x, positions):
        return rotate(self.query(x), positions), rotate(self.key(x), positions), self.value(x)

    def __call__(self, x, positions, lengths, cache, layer):
        query, key, value = self.project(x, positions)
        options = {"query_seq_lengths": lengths, "is_causal": True, "implementation": self.implementation}
        if cache is None:
            out = flashcore_jax.attention(query, key, value, key_value_seq_lengths=lengths, **options)
        else:
            out, cache = flashcore_jax.attention_with_kv_cache(query, key, value, cache, layer=layer, **options)
        return self.out(out), cache


class SwiGLU(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.gate = nnx.Linear(config.width, config.hidden, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(config.width, config.hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(config.hidden, config.width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.attention_norm, self.attention = nnx.RMSNorm(config.width, rngs=rngs), Attention(config, rngs)
        self.mlp_norm, self.mlp = nnx.RMSNorm(config.width, rngs=rngs), SwiGLU(config, rngs)

    def __call__(self, x, *where):
        attended, cache = self.attention(self.attention_norm(x), *where)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache


class Llama(nnx.Module):
    """Tokens int32[B, T] to the next token's logits float32[B, T, 256], and the cache with the tokens appended.

    lengths int32[B]: the real tokens of each row, the first ones. A stacked cache holds all layers: each uses its own of it.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embed = nnx.Embed(BYTES, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, BYTES, use_bias=False, rngs=rngs)

    def __call__(self, tokens, lengths=None, cache=None):
        positions = jnp.arange(tokens.shape[1])
        if cache is not None:  # a row's new tokens stand behind those it has
            positions += cache.length[0][:, None]
        x = self.embed(tokens)
        for layer, block in enumerate(self.blocks):
            x, cache = block(x, positions, lengths, cache, layer)
        return self.head(self.norm(x)), cache


def loss_of(model, tokens):
    """Mean cross-entropy of each byte given those before it, in nats: tokens int32[B, T + 1]."""
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1])[0], tokens[:, 1:]).mean()


evaluate = nnx.jit(loss_of)


@nnx.jit
def train_step(model, optimizer, tokens):
    loss, gradients = nnx.value_and_grad(loss_of)(model, tokens)
    optimizer.update(model, gradients)
    return loss


@functools.partial(jax.jit, static_argnames="limit", donate_argnames="cache")
def generate(model, prompts, lengths, stops, key, cache, limit):
    """Continues each row of right-padded prompts int32[B, P] until its stop byte int32[B], or by `limit` bytes.

    Returns the texts int32[B, P + limit], the logits behind each of their bytes, and the cache: its length is the texts' length.
    """
    B, P = prompts.shape
    rows = jnp.arange(B)

    def choose(step, logits):
        return jax.random.categorical(jax.random.fold_in(key, step), logits / 0.5)

    def write_one(state):
        step, live, byte, texts, logits, cache = state
        at = jnp.where(live, cache.length[0], P + limit)  # the last is no place of the text: a row that stopped writes nothing
        texts = texts.at[rows, at].set(byte, mode="drop")
        new, cache = model(byte[:, None], live.astype(jnp.int32), cache)
        logits = logits.at[rows, at].set(new[:, 0], mode="drop")
        return step + 1, live & (byte != stops), choose(step + 1, new[:, 0]), texts, logits, cache

    new, cache = model(prompts, lengths, cache)
    texts, logits = jnp.pad(prompts, ((0, 0), (0, limit))), jnp.pad(new, ((0, 0), (0, limit), (0, 0)))
    state = (0, jnp.ones(B, bool), choose(0, new[rows, lengths - 1]), texts, logits, cache)
    return jax.lax.while_loop(lambda state: (state[0] < limit) & jnp.any(state[1]), write_one, state)[3:]


def write(model, config, limit, key):
    """Generates twice, for the time without compilation, and holds the logits against one forward of the whole texts."""
    lengths = jnp.array([len(prompt) for prompt in PROMPTS])
    prompts = jnp.array([list(prompt.ljust(max(lengths)).encode()) for prompt in PROMPTS])  # the padding is never read
    stops = jnp.array([ord(stop) for stop in PROMPTS.values()])
    sizes = (len(PROMPTS), prompts.shape[1] + limit, config.kv_heads, config.head_dim)
    cache = flashcore_jax.KVCache.create(*sizes, layers=config.layers, dtype=jnp.float32)
    texts, logits, cache = generate(model, prompts, lengths, stops, key, cache, limit)
    start = time.perf_counter()
    texts, logits, cache = jax.block_until_ready(generate(model, prompts, lengths, stops, key, cache.reset(), limit))
    seconds = time.perf_counter() - start
    cache.check()  # raises if a row has had no room

    for text, length, prompt in zip(np.asarray(texts, np.uint8), cache.length[0], PROMPTS, strict=True):
        print(f"\nafter {prompt!r}:\n{bytes(text[:length]).decode(errors='replace').rstrip()}")
    written = int(jnp.sum(cache.length[0] - lengths))
    print(f"\n{written} tokens in {seconds:.3f} s, {written / seconds:,.0f} tokens/s (second run)")
    compare(model, config, texts, cache.length[0], logits)


def compare(model, config, texts, lengths, logits):
    """Raises unless the cache gave what one forward of the whole texts gives: all logits, and one layer's attention alone.

    XLA's matrix products may add in another order when their shape is another one. A sum of n products in float32 then moves by
    about sqrt(n) / 2 ulps, and float32 attention may be 16 ulps off (docs/numerics.md): `allowed` is their sum over the layers, for
    both forwards, if no layer magnifies it. One phantom key made 1e6 ulps. In 16 bits, attention has the same bits on a GPU.
    """
    full, _ = jax.jit(lambda model, *tokens: model(*tokens))(model, texts, lengths)
    real = (jnp.arange(texts.shape[1]) < lengths[:, None])[..., None]
    apart = ulps(jnp.where(real, logits - full, 0), full)
    allowed = 2 * (config.layers * (3 * config.width**0.5 / 2 + config.hidden**0.5 / 2 + 16) + config.width**0.5 / 2)

    first = model.blocks[0]
    arrays = first.attention.project(first.attention_norm(model.embed(texts)), jnp.arange(texts.shape[1]))
    name = flashcore_jax.explain(*arrays, implementation=config.implementation).implementation
    exact = name != "xla" and jax.default_backend() == "gpu"
    arrays = [x.astype(jnp.bfloat16 if exact else jnp.float32) for x in arrays]
    attention_apart = ulps(difference_of_both_ways(*arrays, config.implementation), arrays[2])
    bits = "bit for bit in bfloat16" if exact and attention_apart == 0 else f"within {attention_apart:.1f} ulps"
    if not (apart <= allowed and attention_apart <= (0 if exact else 2 * 16)):
        raise AssertionError(f"cached != full forward: logits {apart:.1f} ulps apart (allowed {allowed:.0f}), attention alone {bits}")
    print(f"cached == full forward: all logits within {apart:.1f} float32 ulps (allowed {allowed:.0f}), attention alone {bits}")


def ulps(difference, scale):
    """The largest difference, in float32 ulps of the largest number of `scale`; NaN if there is one."""
    return float(jnp.max(jnp.abs(difference)) / jnp.max(jnp.abs(scale))) * 2**23


@functools.partial(jax.jit, static_argnames="implementation")
def difference_of_both_ways(query, key, value, implementation):
    """Causal attention by a prefill of the first half and then token by token, less that of one call."""
    half = query.shape[1] // 2
    cache = flashcore_jax.KVCache.create(*key.shape, dtype=key.dtype)
    call = functools.partial(flashcore_jax.attention_with_kv_cache, implementation=implementation)
    first, cache = call(query[:, :half], key[:, :half], value[:, :half], cache)

    def step(cache, token):
        out, cache = call(*(x[:, None] for x in token), cache)
        return cache, out[:, 0]

    _, rest = jax.lax.scan(step, cache, [x[:, half:].swapaxes(0, 1) for x in (query, key, value)])
    full = flashcore_jax.attention(query, key, value, is_causal=True, implementation=implementation)
    return jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1) - full


def read_text():
    """The standard library's modules in alphabetical order, as bytes: every tenth for validation, the others for training."""
    files = [np.frombuffer(path.read_bytes(), np.uint8) for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    return np.concatenate([text for i, text in enumerate(files) if i % 10]), np.concatenate(files[::10])


def sample(text, rng, batch, length):
    """int32[batch, length + 1], at random places of the text."""
    starts = rng.integers(len(text) - length, size=(batch, 1))
    return jnp.asarray(text[starts + np.arange(length + 1)], jnp.int32)


def draw(losses, validation_loss, path):
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, linewidth=1, label="training")
    axes.axhline(validation_loss, color="tab:orange", linestyle="--", label=f"validation, at the end: {validation_loss:.2f}")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="tiny LLaMA on Python's standard library")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--length", type=int, default=128, help="bytes per sequence")
    parser.add_argument("--limit", type=int, default=100, help="bytes written after each prompt, at most")
    parser.add_argument("--implementation", choices=["xla", "triton", "mosaic_gpu"], help="of the attention; default: the best one here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/tiny_llama.png"), help="picture of the loss curve")
    parser.add_argument("--losses", type=Path, help="JSON file for the losses of all steps")
    parser.add_argument("--quick", action="store_true", help="one layer, short sequences, few steps: some seconds")
    args = parser.parse_args(arguments)
    if args.quick:
        args.steps, args.batch, args.length, args.limit = 20, 4, 64, 8
    return args


def main(arguments=None):
    args = parse(arguments)
    config = Config(layers=1 if args.quick else Config.layers, implementation=args.implementation)
    model = Llama(config, nnx.Rngs(args.seed))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup_steps=args.steps // 10, decay_steps=args.steps)
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)), wrt=nnx.Param)
    training, validation = read_text()
    rng = np.random.default_rng(args.seed)

    heads = (config.query_heads, config.kv_heads, config.kv_heads)
    arrays = (jax.ShapeDtypeStruct((args.batch, args.length, n, config.head_dim), jnp.float32) for n in heads)
    print(f"attention {flashcore_jax.explain(*arrays, is_causal=True, implementation=args.implementation)}")
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{parameters:,} parameters, {len(training):,} bytes of text, on {jax.devices()[0].device_kind}")

    losses = []
    progress = tqdm(range(args.steps), unit=" tokens", unit_scale=args.batch * args.length)
    for _ in progress:
        losses.append(float(train_step(model, optimizer, sample(training, rng, args.batch, args.length))))
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)

    rng = np.random.default_rng(args.seed)
    validation_loss = float(np.mean([evaluate(model, sample(validation, rng, args.batch, args.length)) for _ in range(16)]))
    print(f"loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last, {validation_loss:.3f} on the validation text")

    draw(losses, validation_loss, args.out)
    print(f"loss curve: {args.out}")
    if args.losses:
        args.losses.write_text(json.dumps({"training": losses, "validation": validation_loss}))

    with jax.default_matmul_precision("highest"):  # float32 products on a GPU too: TF32 ones would hide a wrong key in their error
        write(model, config, args.limit, jax.random.key(args.seed))


if __name__ == "__main__":
    main()
