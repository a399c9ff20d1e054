"""A small LLaMA learns to write Python from the standard library's own source files, through `flashcore_jax.attention`.

    python docs/examples/tiny_llama.py                           about a minute on two CPU cores
    python docs/examples/tiny_llama.py --implementation triton   the same on an NVIDIA GPU, through the Triton kernels

The model is LLaMA's in small: RMSNorm, rotary positions, grouped-query attention, SwiGLU. A token is a byte.
"""

import argparse
import dataclasses
import json
import sysconfig
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


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 4
    width: int = 128
    hidden: int = 384
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    implementation: str | None = None


def rotate(x):
    """Rotary positions (Su et al., "RoFormer", 2021): x [B, T, N, H], each pair of features turned by its position's angle."""
    T, H = x.shape[1], x.shape[-1]
    frequency = 10_000.0 ** (-jnp.arange(0, H, 2) / H)
    angle = jnp.arange(T)[:, None, None] * frequency
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], axis=-1)


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        def project(heads):
            return nnx.LinearGeneral(config.width, (heads, config.head_dim), use_bias=False, rngs=rngs)

        self.query, self.key, self.value = project(config.query_heads), project(config.kv_heads), project(config.kv_heads)
        self.out = nnx.LinearGeneral((config.query_heads, config.head_dim), config.width, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.implementation = config.implementation

    def __call__(self, x):
        query, key, value = rotate(self.query(x)), rotate(self.key(x)), self.value(x)
        return self.out(flashcore_jax.attention(query, key, value, is_causal=True, implementation=self.implementation))


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

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """Tokens int32[B, T] to the next token's logits float32[B, T, 256]."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embed = nnx.Embed(BYTES, config.width, rngs=rngs)
        self.blocks = nnx.Sequential(*(Block(config, rngs) for _ in range(config.layers)))
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, BYTES, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.norm(self.blocks(self.embed(tokens))))


def loss_of(model, tokens):
    """Mean cross-entropy of each byte given those before it, in nats: tokens int32[B, T + 1]."""
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()


evaluate = nnx.jit(loss_of)


@nnx.jit
def train_step(model, optimizer, tokens):
    loss, gradients = nnx.value_and_grad(loss_of)(model, tokens)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def continue_text(model, tokens, start, key):
    """Writes tokens[0, start:] anew, each from the whole sequence before it; what lies after it is hidden by causality."""

    def write(i, tokens):
        logits = model(tokens)[0, i - 1]
        return tokens.at[0, i].set(jax.random.categorical(jax.random.fold_in(key, i), logits / 0.5))

    return jax.lax.fori_loop(start, tokens.shape[1], write, tokens)


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
    parser.add_argument("--implementation", choices=["xla", "triton"], help="of the attention; default: the best one here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/tiny_llama.png"), help="picture of the loss curve")
    parser.add_argument("--losses", type=Path, help="JSON file for the losses of all steps")
    parser.add_argument("--quick", action="store_true", help="one layer, short sequences, few steps: some seconds")
    args = parser.parse_args(arguments)
    if args.quick:
        args.steps, args.batch, args.length = 20, 4, 64
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
        progress.set_postfix(loss=f"{losses[-1]:.3f}")

    rng = np.random.default_rng(args.seed)
    validation_loss = float(np.mean([evaluate(model, sample(validation, rng, args.batch, args.length)) for _ in range(16)]))
    print(f"loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last, {validation_loss:.3f} on the validation text")

    draw(losses, validation_loss, args.out)
    print(f"loss curve: {args.out}")
    if args.losses:
        args.losses.write_text(json.dumps({"training": losses, "validation": validation_loss}))

    prompt = b"    def __init__(self, "
    tokens = jnp.zeros((1, args.length), jnp.int32).at[0, : len(prompt)].set(jnp.array(list(prompt)))
    written = continue_text(model, tokens, len(prompt), jax.random.key(args.seed))
    print(f"a sample, after the prompt {prompt.decode()!r}:\n\n{bytes(np.asarray(written[0], np.uint8)).decode(errors='replace')}")


if __name__ == "__main__":
    main()
