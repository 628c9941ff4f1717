"""Files that are damaged, foreign, older or newer.

Each is refused by name, with what is wrong and the way out.
"""

import dataclasses
import json
import os
import re
import shutil
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi import ConfigError, DataError, LLCEstimate, VIConfig
from fastvi.results.parts import DrawValues
from fastvi.results.runs import Origin, read_record, read_settings, write_run

ORIGIN = Origin("some_module:target", 3, 2.0, None, 1)
CURVES = np.array([4.0, 1.0, 0.5, 0.0], np.float32)
OPTIONS = {
    "method": "variational",
    "steps": 100,
    "M": 1,
    "r": 0,
    "eval_samples": 16,
    "num_chains": 1,
    "progress": False,
}


def loss(w, batch):
    return 0.5 * jnp.sum(CURVES * w**2) * jnp.mean(batch[0])


def estimate(folder=None, **changes):
    return fastvi.estimate_llc(
        loss, jnp.zeros(4), (jnp.ones((20, 1)),), resume_from=folder, **OPTIONS | changes
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run folder, and progress-fit.npz of its fit beside the run's files."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = estimate(folder / "progress")
    shutil.move(folder / "progress" / "progress-fit.npz", folder / "progress-fit.npz")
    (folder / "progress").rmdir()
    write_run(result, folder, ORIGIN)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def junk(path):
    path.write_bytes(np.random.default_rng(0).bytes(3000))


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def gone(path):
    path.unlink()


def a_folder(path):
    path.unlink()
    path.mkdir()


def dangling(path):
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def looping(path):
    path.unlink()
    path.symlink_to(path)


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def utf16(path):
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-16")


def latin1(path):
    path.write_bytes(b'{"name": "\xe9"}')


def bom(path):
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")


def text(words):
    return lambda path: path.write_text(words, encoding="utf-8")


def edited(change):
    """Change the JSON object of a file."""

    def damage(path):
        values = json.loads(path.read_text(encoding="utf-8"))
        change(values)
        path.write_text(json.dumps(values), encoding="utf-8")

    return damage


def put(*names_and_value):
    """Put a value under names within names."""

    def change(values):
        *names, last, value = names_and_value
        for name in names:
            values = values[name]
        values[last] = value

    return edited(change)


def without(*names):
    def change(values):
        for name in names[:-1]:
            values = values[name]
        del values[names[-1]]

    return edited(change)


def arrays(change, digest=True):
    """Change the arrays of an .npz file, and the digest in result.json with them.

    Another program may do so.
    """

    def damage(path):
        with np.load(path) as stored:
            found = {name: stored[name] for name in stored.files}
        change(found)
        np.savez(path, **found)
        if digest and path.name == "traces.npz":
            from fastvi.results.files import digest_arrays

            put("arrays_digest", digest_arrays(found))(path.with_name("result.json"))

    return damage


def meta(**changes):
    """Change what progress-fit.npz says of itself."""

    def change(found):
        found["meta"] = np.array(json.dumps(json.loads(str(found["meta"])) | changes))

    return arrays(change)


def pickled(path):
    np.savez(path, log_weights=np.array([{}, None], object))


def other_member(path):
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes.txt", "hello")


def scrambled(path):
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 3, len(content) // 3 + 40):
        content[place] ^= 0x55
    path.write_bytes(content)


ANY_FILE = {
    "truncated": (truncated, ""),
    "empty": (emptied, ""),
    "junk": (junk, ""),
    "zeros": (zeros, ""),
    "missing": (gone, "is missing"),
    "folder": (a_folder, "is a folder where a file is wanted"),
    "dangling": (dangling, "is a link to a file that does not exist"),
    "loop": (looping, "cannot be read"),
    "pipe": (a_pipe, "is a device or a pipe"),
}
ANY_JSON = {
    "utf-16": (utf16, "is not UTF-8 text"),
    "latin-1": (latin1, "is not UTF-8 text"),
    "bom": (bom, "is no JSON"),
    "list": (text("[1, 2]"), "holds a list where an object is wanted"),
    "number": (text("3"), "holds a int where an object is wanted"),
    "foreign": (text('{"name": "another program", "version": 3}'), "is not of the format"),
    "deep": (text("[" * 100_000), "is no JSON"),
    "twice": (text('{"format": 1, "format": 2}'), "'format' is given twice"),
    "bare nan": (text('{"format": NaN}'), "NaN is no JSON number"),
    "older": (put("version", 0), "is of the old version 0"),
    "newer": (put("version", 99), "version 99 of its format, this fastvi reads "),
    "version of text": (put("version", "1"), "has no version of the format that could be read"),
    "no version": (without("version"), "has no version"),
}
NAN = {"non_finite": "nan"}
RESULT = {
    "of a newer fastvi": (put("version", 99), "this fastvi reads 8. Upgrade fastvi."),
    "of an older fastvi": (put("version", 2), "is of the old version 2"),
    "missing field": (without("llc"), "lacks 'llc'"),
    "missing entry": (without("curvature", "rank"), "lacks 'curvature.rank'"),
    "extra field": (put("lcc", 1.0), "holds 'lcc', which is no field of it"),
    "text for a number": (put("llc", "2.0"), "has llc = '2.0', which is of the wrong type"),
    "bool for a number": (put("llc", True), "has llc = True, which is of the wrong type"),
    "null for a number": (put("elbo", None), "has elbo = None"),
    "float for a count": (put("dim", 4.0), "has dim = 4.0, which is of the wrong type"),
    "negative count": (put("n_data", -1), "has n_data = -1, which is not an integer >= 1"),
    "nan nbeta": (put("nbeta", NAN), "has nbeta = nan, which is not a finite number > 0"),
    "nan seconds": (put("timings", "total", NAN), "has timings = {"),
    "bad constant": (
        put("llc", {"non_finite": "maybe"}),
        "has 'maybe' where nan, inf or -inf is wanted",
    ),
    "list for a dict": (put("work", [1]), "has work = [1], which is of the wrong type"),
    "no chains": (put("llc_per_chain", []), "has llc_per_chain = []"),
    "text among chains": (put("llc_per_chain", ["a"]), "has llc_per_chain = ['a']"),
    "finding of text": (put("health", ["bad"]), "has health = ['bad']"),
    "unknown severity": (
        put(
            "health", [{"severity": "?", "name": "", "observed": "", "cause": "", "next_step": ""}]
        ),
        "which is not findings",
    ),
    "unknown correction": (
        put("correction", {"method": "magic"}),
        "which is not a reweighted or sampled average",
    ),
    "correction without its numbers": (
        put("correction", {"method": "sample", "khat": 0.1}),
        "lacks 'correction.in_memory'",
    ),
    "text within a part": (
        put("curvature", "rank", "two"),
        "has curvature.rank = 'two', which is of the wrong type",
    ),
    "extra entry": (put("work", "flops", 1.0), "holds 'work.flops', which is no field of it"),
    "config of text": (put("config", "M=1"), "lacks 'config'"),
    "config field": (put("config", "M", 0), "M must be an integer >= 1"),
    "config extra": (put("config", "N", 1), "N must be a field of VIConfig"),
    "config missing": (without("config", "M"), "lacks 'config.M'"),
    "another digest": (put("arrays_digest", "0" * 64), "does not belong to result.json beside it"),
}
TRACES = {
    "pickles": (pickled, "is no archive of arrays"),
    "other member": (other_member, "holds 'notes.txt', which is no array"),
    "scrambled": (scrambled, ""),
    "of another run": (
        arrays(lambda a: a.update(log_weights=a["log_weights"] + 1), digest=False),
        "does not belong",
    ),
    "missing array": (arrays(lambda a: a.pop("log_weights")), "lacks the array 'log_weights'"),
    "missing trace": (arrays(lambda a: a.pop("trace_elbo")), "lacks the array 'trace_elbo'"),
    "unknown array": (arrays(lambda a: a.update(extra=np.zeros(1))), "holds 'extra'"),
    "array of text": (arrays(lambda a: a.update(trace_lr=np.array(["a"]))), "holds 'trace_lr'"),
    "other steps": (
        arrays(lambda a: a.update(trace_lr=a["trace_lr"][:, 1:])),
        "'trace_lr' of the impossible shape",
    ),
    "other chains": (
        arrays(lambda a: a.update(log_weights=np.zeros((9, 4)))),
        "'log_weights' of the impossible",
    ),
    "no draws": (
        arrays(lambda a: a.update(log_weights=np.zeros((1, 0)))),
        "'log_weights' of the impossible",
    ),
    "flat walk": (
        arrays(lambda a: a.update(walk_llc=np.zeros(3))),
        "'walk_llc' of the impossible shape (3,)",
    ),
    "a single array": (lambda path: path.write_bytes(npy()), ""),
}
RUN = {
    "of a newer fastvi": (put("version", 99), "this fastvi reads 4. Upgrade fastvi."),
    "not complete": (put("complete", False), "says that the run was not written to its end"),
    "missing field": (without("seed"), "lacks or has too many of ['seed']"),
    "extra field": (put("sed", 1), "lacks or has too many of ['sed']"),
    "seed of text": (put("seed", "one"), "seed must be an integer >= 0"),
    "float seed": (put("seed", 1.5), "seed must be an integer >= 0; got 1.5"),
    "nan localization": (put("localization", "nan"), "localization must be a finite number >= 0"),
    "target of numbers": (put("target", 3), "TARGET must be module:function"),
    "target with code": (put("target", "os:system('x')"), "TARGET must be module:function"),
    "digests of text": (put("digests", "x"), "has digests or a fingerprint of the wrong type"),
    "of another result": (put("digests", "result.json", "0"), "is not the file of the run"),
}
CONFIG = {
    **{name: ANY_FILE[name] for name in ("missing", "folder", "dangling", "junk", "pipe")},
    **{name: ANY_JSON[name] for name in ("utf-16", "latin-1")},
    "edited": (text("M: 4\n"), "is not the file of the run that run.json tells of"),
}
CHANGED = "is not as it was written"
PROGRESS = {
    **{name: value for name, value in ANY_FILE.items() if name != "missing"},
    "pickles": (pickled, "is no archive of arrays"),
    "scrambled": (scrambled, ""),
    "foreign": (lambda path: np.savez(path, weights=np.zeros(3)), "is not the progress of a fit"),
    "older": (meta(version=0), "is of the old version 0"),
    "newer": (meta(version=99), "Upgrade fastvi."),
    "other format": (meta(format="x"), "is not of the format"),
    "other steps": (meta(done=-1), CHANGED),
    "nan phase": (meta(phases=[1.0, float("nan"), 100]), CHANGED),
    "no identity": (meta(identity=None), CHANGED),
    "missing leaf": (arrays(lambda a: a.pop("leaf_0")), CHANGED),
    "other leaf": (arrays(lambda a: a.update(leaf_0=np.zeros((7, 7)))), CHANGED),
    "one number": (arrays(lambda a: a.update(leaf_0=a["leaf_0"] + 1)), CHANGED),
    "no digest": (arrays(lambda a: a.pop("digest")), CHANGED),
}


def npy():
    import io

    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


def kinds(*tables):
    return [pytest.param(*kind, id=name) for table in tables for name, kind in table.items()]


def refused(read, path, damage, said):
    damage(path)
    with pytest.raises((DataError, ConfigError)) as caught:
        read()
    message = str(caught.value)
    assert str(path.parent) in message
    assert said in message
    assert re.search(r"(Restore|Pass|Run|Upgrade|Name|Delete|check the path)\b", message), message


@pytest.mark.parametrize(("damage", "said"), kinds(ANY_FILE, ANY_JSON, RESULT))
def test_result_json(damage, said, folder):
    refused(lambda: LLCEstimate.load(folder), folder / "result.json", damage, said)


@pytest.mark.parametrize(("damage", "said"), kinds(ANY_FILE, TRACES))
def test_traces_npz(damage, said, folder):
    refused(lambda: LLCEstimate.load(folder), folder / "traces.npz", damage, said)


@pytest.mark.parametrize(("damage", "said"), kinds(ANY_FILE, ANY_JSON, RUN))
def test_run_json(damage, said, folder):
    refused(lambda: read_record(folder), folder / "run.json", damage, said)


@pytest.mark.parametrize(("damage", "said"), kinds(CONFIG))
def test_config_yaml_of_a_run(damage, said, folder):
    refused(
        lambda: read_record(folder),
        folder / "config.yaml",
        damage,
        said if said != "is not UTF-8 text" else "",
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("M: [1", "while parsing a flow sequence"),
        ("M: 1\nM: 2\n", "'M' is given twice"),
        ("flow: {depth: 1, depth: 2}", "'depth' is given twice"),
        ("- 1\n", "give names with values"),
        ("3", "give names with values"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("stepz: 3", "did you mean 'steps'?"),
        ("M: 0", "M must be an integer >= 1"),
    ],
)
def test_settings_that_are_none(words, said, folder):
    refused(lambda: read_settings(folder), folder / "config.yaml", text(words), said)
    with pytest.raises(ConfigError, match=re.escape(said)):
        VIConfig.create(folder / "config.yaml")


@pytest.mark.parametrize(("damage", "said"), kinds(PROGRESS))
def test_progress_npz(damage, said, folder):
    refused(lambda: estimate(folder), folder / "progress-fit.npz", damage, said)


def test_nobody_is_let_read(folder, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    with pytest.raises(
        DataError, match=r"result\.json cannot be read \(.*Permission denied.*Restore both files"
    ):
        LLCEstimate.load(folder)


def same(one, other):
    assert type(one) is type(other)
    if dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            if field.compare:
                same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            same(one[name], other[name])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            same(*pair)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, strict=True)
    else:
        assert one == other or (one != one and other != other)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"llc": float("nan"), "llc_sem": float("inf"), "elbo": -0.0, "converged": False},
        {"config": VIConfig(latent_basis=np.eye(4)[:, :2], r_per_component=(1,) * 8, lr=1 / 3)},
        {
            "health": (
                fastvi.results.findings.Finding("note", "naïve ± <b>", "“seen”", "\ud800", "\n"),
            )
        },
        {
            "log_weights": np.array([[1.0, np.nan, -np.inf, 1e-300]]),
            "draws": DrawValues(*(np.full((1, 4), x) for x in (1e-300, np.inf, np.nan))),
            "init_loss": 5e-324,
        },
    ],
)
def test_a_saved_estimate_comes_back_exactly(changes, whole, tmp_path):
    result = dataclasses.replace(LLCEstimate.load(whole), **changes)
    same(LLCEstimate.load(result.save(tmp_path)), result)
    same(LLCEstimate.load(LLCEstimate.load(tmp_path).save(tmp_path)), result)


def test_a_fresh_estimate_comes_back_exactly(whole):
    """The same programs in the same process: the same bits."""
    same(
        LLCEstimate.load(whole),
        dataclasses.replace(estimate(), timings=LLCEstimate.load(whole).timings),
    )
