"""Parts of a language model in one call, beside an estimate of each mask by itself.

The byte transformer of `bench.problems`: its 8 heads, 2 MLPs and embeddings. The same key, budget
and posterior for both. Programs are all that the process compiles during a call.
The peak of memory is that of the process after the one call.

python -m bench.parts                      trains first
python -m bench.parts --weights lm.npz     those that bench.language_model --save has written
"""

import argparse
import resource
import sys
import time

import jax

import fastvi
from bench import harness
from bench.language_model import Model
from bench.problems import HEADS, LAYERS
from fastvi._compilation import PROGRAMS, CompileWatch

TABLE = "parts"
OPTIONS = {"nbeta": 30.0, "localization": 300.0, "budget": 6000.0, "progress": False}


def parts_of(params) -> dict:
    """Return heads, MLPs and embeddings by name."""
    layouts = {f"blocks/*/attention/{number}": "d (h c)" for number in range(3)}
    heads = fastvi.attention_heads(params, {**layouts, "blocks/*/attention/3": "(h c) d"}, HEADS)
    mlps = {
        f"mlp {layer}": [f"blocks/{layer}/wide", f"blocks/{layer}/narrow"]
        for layer in range(LAYERS)
    }
    return {**heads, **mlps, "embeddings": ["bytes", "places", "unembedding"]}


def forget() -> None:
    """Drop what was compiled."""
    PROGRAMS.clear()
    jax.clear_caches()


def by_themselves(model: Model, parts: dict) -> tuple[dict, dict]:
    """Estimate each part alone, nothing kept between; return estimates and programs by name."""
    found, programs = {}, {}
    for name, part in parts.items():
        forget()
        is_mask = not isinstance(part, list)
        mask = part if is_mask else fastvi.select_part(model.params, part)
        with CompileWatch() as watch:
            found[name] = fastvi.estimate_llc(
                model.tree_loss, model.params, (model.tokens,), param_mask=mask, **OPTIONS
            )
        programs[name] = watch.programs
    return found, programs


def main(arguments: list[str]) -> None:
    """Run both, and record a row for each part and one for all."""
    parser = argparse.ArgumentParser(prog="python -m bench.parts")
    parser.add_argument("--weights", help="a .npz of bench.language_model, in place of training")
    model = Model(parser.parse_args(arguments).weights)
    parts = parts_of(model.params)
    began = time.perf_counter()
    with CompileWatch() as watch:
        together = fastvi.estimate_parts(
            model.tree_loss, model.params, (model.tokens,), parts, **OPTIONS
        )
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # of Linux, in KiB
    print(together.summary(), flush=True)
    began = time.perf_counter()
    alone, programs = by_themselves(model, parts)
    alone_seconds = time.perf_counter() - began
    rows = [
        {
            "part": name,
            "size": one.dim,
            "llc": one.llc,
            "sem": one.llc_sem,
            "alone_llc": alone[name].llc,
            "alone_sem": alone[name].llc_sem,
            "sample_gradients": one.sample_gradients,
            "alone_sample_gradients": alone[name].sample_gradients,
            "seconds": one.timings.total,
            "compile_s": one.timings.compile,
            "alone_seconds": alone[name].timings.total,
            "alone_compile_s": alone[name].timings.compile,
            "programs": "",
            "alone_programs": programs[name],
            "peak_mb": "",
        }
        for name, one in together.items()
    ]
    added = ("size", "sample_gradients", "alone_sample_gradients", "compile_s", "alone_compile_s")
    total = dict.fromkeys(rows[0], "") | {name: sum(row[name] for row in rows) for name in added}
    total |= {"part": "all", "seconds": seconds, "alone_seconds": alone_seconds}
    total |= {"programs": watch.programs, "alone_programs": sum(programs.values())}
    total |= {"peak_mb": peak}
    rows.append(total)
    harness.record(TABLE, rows)
    print(harness.as_text(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
