"""Torch modules under fastvi: what a gradient costs beside torch alone, and llc beside jax.

Three models. A digits classifier 64-256-256-10, d = 85,002: 400 gradients on batches of 64 by torch
alone, and by fastvi's loss in a scan, one walker and eight side by side. The byte transformer of
`bench.problems` with the same weights in jax and in torch: loss, gradient and llc, and the seconds
of the passes that the estimate took, replayed by torch alone. A GPT-2 of transformers of 2 layers,
trained on the same bytes: its llc, those of its heads, and the same weights written in jax.

python -m bench.torch_models digits
python -m bench.torch_models bytes --weights lm.npz     of bench.language_model --save
python -m bench.torch_models gpt2
"""

import argparse
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from sklearn.datasets import load_digits

import fastvi
from bench import harness
from bench.language_model import Model
from bench.problems import CONTEXT, HEADS, WIDTH
from fastvi._compilation import CompileWatch
from fastvi.integrations.torch import torch_loss
from fastvi.integrations.torch.model import ModuleLoss
from fastvi.target.ravel import ravel_loss

TABLE = "torch"
F = torch.nn.functional
GRADIENTS, BATCH, WALKERS, ROUNDS = 400, 64, 8, 5
GPT2_WIDTH, STEPS = 64, 400
GPT2_LAYOUTS = {
    "transformer.h.*.attn.c_attn.weight": "d (3 h c)",
    "transformer.h.*.attn.c_attn.bias": "(3 h c)",
    "transformer.h.*.attn.c_proj.weight": "(h c) d",
}
OPTIONS = {"nbeta": 30.0, "localization": 300.0, "budget": 6000.0, "progress": False}


class Tree(torch.nn.Module):
    """A pytree of arrays as parameters, whose names sort as jax sorts the leaves."""

    def __init__(self, tree):
        super().__init__()
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for name, one in pairs:
            if isinstance(one, (dict, list, tuple)):
                self.add_module(str(name), Tree(one))
            else:
                self.register_parameter(str(name), torch.nn.Parameter(torch.tensor(np.array(one))))

    def __getitem__(self, name):
        return getattr(self, str(name))


class ByteTransformer(Tree):
    """`bench.problems.byte_transformer` in torch."""

    def forward(self, tokens):
        x = F.embedding(tokens, self["bytes"]) + self["places"]
        for block in self["blocks"].children():
            x = x + attend(block["attention"], normalize(block["before"], x))
            wide, narrow = block["wide"], block["narrow"]
            hidden = normalize(block["between"], x) @ wide[0] + wide[1]
            x = x + F.gelu(hidden, approximate="tanh") @ narrow[0] + narrow[1]
        return normalize(self["last"], x) @ self["unembedding"]


def normalize(norm, x):
    return F.layer_norm(x, (WIDTH,), norm["scale"], norm["shift"])


def attend(matrices, x):
    split = (*x.shape[:2], HEADS, WIDTH // HEADS)
    query, keys, values = ((x @ matrices[i]).view(split).transpose(1, 2) for i in range(3))
    found = F.scaled_dot_product_attention(query, keys, values, is_causal=True)
    return found.transpose(1, 2).reshape(x.shape) @ matrices[3]


def next_byte_loss(model, batch):
    """Return the mean over sequences and places of the cross-entropy of the next byte."""
    outputs = model(batch[0][:, :-1])
    return F.cross_entropy(outputs.flatten(0, 1), batch[0][:, 1:].flatten())


def bare_gradients(module, loss, data, count, size):
    """Return a function that steps down `count` gradients by torch alone."""
    parameters, tensors = list(module.parameters()), tuple(map(torch.from_numpy, data))

    def run():
        for number in range(count):
            rows = slice(number * size % (len(data[0]) - size), None)
            batch = tuple(one[rows][:size] for one in tensors)
            slopes = torch.autograd.grad(loss(module, batch), parameters)
            with torch.no_grad():
                for one, slope in zip(parameters, slopes, strict=True):
                    one.sub_(slope, alpha=1e-6)

    return run


def scanned(loss_fn, params, data, count, size, walkers):
    """Return a function that does the same by walkers side by side, in one program."""
    objective, center = ravel_loss(loss_fn, params)
    arrays = tuple(map(jnp.asarray, data))

    def of_walker(w, number):
        start = number * size % (len(data[0]) - size)
        batch = tuple(jax.lax.dynamic_slice_in_dim(one, start, size) for one in arrays)
        return objective.value_and_grad(w, batch)[1]

    def step(points, number):
        numbers = number * walkers + jnp.arange(walkers)
        return points - 1e-6 * jax.vmap(of_walker)(points, numbers), None

    run = jax.jit(lambda points: jax.lax.scan(step, points, jnp.arange(count // walkers))[0])
    points = jnp.tile(center, (walkers, 1))
    return lambda: run(points)


def digits_rows():
    """Time gradients of a classifier, in turn; the least of each."""
    torch.manual_seed(0)
    inputs, targets = load_digits(return_X_y=True)
    data = (inputs.astype(np.float32) / 16, targets)
    layers = [torch.nn.Linear(64, 256), torch.nn.Linear(256, 256), torch.nn.Linear(256, 10)]
    first, second, last = layers
    module = torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.ReLU(), last)

    def each(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none")

    candidates = {
        "torch alone": bare_gradients(
            module, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), data, GRADIENTS, BATCH
        )
    }
    for name, loss in (("mean", F.cross_entropy), ("each", each)):
        loss_fn, params = torch_loss(module, loss)
        for walkers in (1, WALKERS):
            arguments = (loss_fn, params, data, GRADIENTS, BATCH, walkers)
            candidates[f"{name}, {walkers} walkers"] = scanned(*arguments)
    found = harness.against("torch alone", candidates, ROUNDS)
    return [
        row("digits", name, seconds=one.seconds[1], ratio=one.ratio[1], least_ratio=one.least)
        for name, one in found.items()
    ]


def row(model, name, **values):
    """Return a row of the table; what does not apply stays empty."""
    columns = ("llc", "sem", "seconds", "compile_s", "ratio", "least_ratio", "difference")
    return {"model": model, "name": name} | dict.fromkeys(columns, "") | values


class Recorder:
    """Within a block, keeps the kind of each pass through torch, and its number of examples."""

    def __enter__(self):
        self.passes, self._kept = [], (ModuleLoss.values, ModuleLoss.slope)
        ModuleLoss.values = self._recording("values")
        ModuleLoss.slope = self._recording("slope")
        return self

    def __exit__(self, *_):
        ModuleLoss.values, ModuleLoss.slope = self._kept

    def _recording(self, name):
        method = getattr(ModuleLoss, name)

        def call(model, flat, batch, tried):
            self.passes.append((name, len(batch[0])))
            return method(model, flat, batch, tried)

        return call


def replayed(module, loss, data, passes):
    """Return the seconds of the same passes by torch alone."""
    parameters, tokens = list(module.parameters()), torch.from_numpy(data)
    began = time.perf_counter()
    for kind, size in passes:
        batch = (tokens[:size],)
        if kind == "slope":
            torch.autograd.grad(loss(module, batch), parameters)
        else:
            with torch.no_grad():
                loss(module, batch)
    return time.perf_counter() - began


def timed(loss_fn, params, data, key):
    """Return an estimate, its seconds, and those of compiling."""
    began = time.perf_counter()
    with CompileWatch() as watch:
        result = fastvi.estimate_llc(loss_fn, params, data, key=key, **OPTIONS)
    return result, time.perf_counter() - began, watch.seconds


def byte_rows(weights):
    """Compare the byte transformer in torch with the same weights in jax."""
    model = Model(weights)
    tokens = np.asarray(model.tokens, np.int64)
    module = ByteTransformer(model.params).eval()
    loss_fn, params = torch_loss(module, batch_loss=next_byte_loss)
    rows, data = [], (model.tokens,)
    both = {"torch": (loss_fn, params), "jax": (model.tree_loss, model.params)}
    values = {}
    for name, (loss, point) in both.items():
        value, slope = jax.jit(jax.value_and_grad(loss))(point, (model.tokens[:64],))
        leaves = jax.tree_util.tree_leaves(slope)
        values[name] = float(value), np.concatenate([np.ravel(one) for one in leaves])
    (ours, slope), (theirs, known) = values.values()
    rows.append(row("bytes", "loss", difference=abs(ours - theirs)))
    off = np.max(np.abs(slope - known)) / np.max(np.abs(known))
    rows.append(row("bytes", "gradient, relative", difference=float(off)))
    for key in range(3):
        for name, (loss, point) in both.items():
            with Recorder() as recorder:
                result, seconds, compiling = timed(loss, point, data, key)
            rows.append(
                row(
                    "bytes",
                    f"{name}, key {key}",
                    llc=result.llc,
                    sem=result.llc_sem,
                    seconds=seconds,
                    compile_s=compiling,
                )
            )
            if name == "torch":
                alone = replayed(module, next_byte_loss, tokens, recorder.passes)
                ratio = (seconds - compiling) / alone
                count = f"{len(recorder.passes)} passes of {sum(n for _, n in recorder.passes)}"
                rows.append(row("bytes", f"the same {count} by torch", seconds=alone, ratio=ratio))
            print(harness.as_text(rows[-2:]), flush=True)
    return rows


def small_gpt2(tokens):
    """Return a GPT-2 of transformers, trained for some hundred steps of Adam on the text."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": HEADS, "n_embd": GPT2_WIDTH, "n_positions": CONTEXT}
    ids = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ids)).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        rows = torch.randint(0, len(tokens), (32,))
        gpt2_loss(model, {"tokens": tokens[rows]}).backward()
        optimizer.step()
        schedule.step()
    return model


def gpt2_loss(model, batch):
    """Return the mean cross-entropy of the next byte."""
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    outputs = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def gpt2_in_jax(params, batch):
    """Return the same of the same parameters, by their names in torch."""
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]

    def normalize(name, x):
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * params[f"{name}.weight"] + params[f"{name}.bias"]

    def linear(name, x):
        return x @ params[f"{name}.weight"] + params[f"{name}.bias"]

    def attend(name, x):
        split = (*x.shape[:2], HEADS, GPT2_WIDTH // HEADS)
        parts = jnp.split(linear(f"{name}.c_attn", x), 3, axis=-1)
        query, keys, values = (part.reshape(split) for part in parts)
        found = jax.nn.dot_product_attention(query, keys, values, is_causal=True)
        return linear(f"{name}.c_proj", found.reshape(x.shape))

    words = params["transformer.wte.weight"]
    x = words[inputs] + params["transformer.wpe.weight"][: inputs.shape[1]]
    for layer in ("transformer.h.0", "transformer.h.1"):
        x = x + attend(f"{layer}.attn", normalize(f"{layer}.ln_1", x))
        hidden = linear(f"{layer}.mlp.c_fc", normalize(f"{layer}.ln_2", x))
        x = x + linear(f"{layer}.mlp.c_proj", jax.nn.gelu(hidden))
    every = jax.nn.log_softmax(normalize("transformer.ln_f", x) @ words.T)
    return -jnp.mean(jnp.take_along_axis(every, targets[..., None], axis=-1))


def gpt2_rows(weights):
    """Estimate a GPT-2 and its heads, in torch and in jax."""
    tokens = np.asarray(Model(weights).tokens, np.int64)
    module = small_gpt2(torch.from_numpy(tokens))
    loss_fn, params = torch_loss(module, batch_loss=gpt2_loss)
    data, rows = {"tokens": tokens}, []
    heads = fastvi.attention_heads(params, GPT2_LAYOUTS, HEADS)
    print(fastvi.preview(params, heads), flush=True)
    for name, loss in (("torch", loss_fn), ("jax", gpt2_in_jax)):
        result, seconds, compiling = timed(loss, params, data, 0)
        found = {f"all {result.dim}": result}
        print(name, result.init_loss, result.llc, result.llc_sem, flush=True)
        found |= dict(fastvi.estimate_parts(loss, params, data, heads, **OPTIONS))
        for part, one in found.items():
            values = {"llc": one.llc, "sem": one.llc_sem, "seconds": one.timings.total}
            rows.append(row("gpt2", f"{name}, {part}", **values, compile_s=one.timings.compile))
            print(harness.as_text(rows[-1:]), flush=True)
    return rows


def main(arguments):
    """Run one of the comparisons, and record its rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.torch_models")
    parser.add_argument("which", choices=["digits", "bytes", "gpt2"])
    parser.add_argument("--weights", help="a .npz of bench.language_model, in place of training")
    asked = parser.parse_args(arguments)
    rows = {
        "digits": digits_rows,
        "bytes": lambda: byte_rows(asked.weights),
        "gpt2": lambda: gpt2_rows(asked.weights),
    }[asked.which]()
    harness.record(TABLE, rows)
    print(harness.as_text(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
