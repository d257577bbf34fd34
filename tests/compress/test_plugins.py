"""Compressors of installed packages, as entry points of a package on the path."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import plan
from vlm_jax.checkpoints import orbax
from vlm_jax.compress import catalog, contract, plugins
from vlm_jax.config.arguments import load_config
from vlm_jax.core.errors import UserError
from vlm_jax.core.structs import Evidence
from vlm_jax.models import connector
from vlm_jax.sizing import compression, cost, zoo

ROOT = Path(__file__).parents[2]
LAW = (ROOT / "experiments" / "published_law" / "law.json").read_text()
PLAN = ["--family", "reasoning", "--question-tokens", "50", "--answer-tokens", "20", "--tflops", "5"]

GOOD = """
from functools import partial
from vlm_jax.compress import pooling
from vlm_jax.compress.contract import Compressor

ROW = Compressor(
    pooling.no_weights, pooling.pool, pooling.pool_tokens, pooling.pool_cost, partial(pooling.defaults, "corners")
)
"""
MINE = GOOD.replace('"corners"', '"mine"')


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a package with a module of that text and its entry points."""

    def write(package: str, text: str, **points: str) -> None:
        """A package of one module, or of the files that "# NAME" introduces in the text."""
        folder = tmp_path / package
        info = folder / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        files = re.split(rf"^# ({package}/\w+\.py)$", text, flags=re.MULTILINE)
        (folder / f"{package}.py").write_text(files[0])
        for name, content in zip(files[1::2], files[2::2], strict=True):
            (folder / package).mkdir(exist_ok=True)
            (folder / name).write_text(content)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        listed = "\n".join(f"{name} = {value}" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{listed}\n")
        monkeypatch.syspath_prepend(folder)
        sys.modules.pop(package, None)
        forget()

    def forget() -> None:
        plugins.entry_points.cache_clear()
        plugins.load.cache_clear()
        compression.compressor_cost.cache_clear()

    yield write
    monkeypatch.undo()
    forget()


def test_a_package_adds_a_row(install) -> None:
    install("corners_package", GOOD, corners="corners_package:ROW")
    model = catalog.model_spec(zoo.encoder("siglip-b16-224"), "corners", 4, zoo.decoder("qwen1.5-1.8b"))
    pool = catalog.model_spec(zoo.encoder("siglip-b16-224"), "pool", 4, zoo.decoder("qwen1.5-1.8b"))
    assert model.compressor.name == "corners"
    assert cost.flops(model, 10, 3) == cost.flops(pool, 10, 3)
    with pytest.raises(UserError, match="unknown compressor 'corner': did you mean 'corners'"):
        catalog.row("corner")


@pytest.mark.parametrize(
    ("text", "name", "value", "message"),
    [
        ("import no_such_module", "mine", "broken:ROW", r"'mine': .*broken:ROW of package broken cannot be imported"),
        ("x = 1 / 0", "mine", "broken:ROW", "ZeroDivisionError: division by zero"),
        ("", "mine", "broken:ROW", "cannot be imported .*ROW"),
        ("ROW = 3", "mine", "broken:ROW", "expected a Compressor, got int"),
        (GOOD, "pool", "broken:ROW", r"'pool': .*has the name of a built-in one \(rename it\)"),
        ("import sys; sys.exit(0)", "mine", "broken:ROW", r"cannot be imported \(SystemExit: 0\)"),
        ("from vlm_jax.compress.contract import Compressor as ROW", "mine", "broken:ROW", "got the class Compressor"),
    ],
)
def test_a_bad_package_is_one_line(install, text: str, name: str, value: str, message: str) -> None:
    install("broken", text, **{name: value})
    with pytest.raises(UserError, match=message) as caught:
        catalog.row(name)
    assert "\n" not in str(caught.value)
    catalog.row("resampler")  # another name is not affected


def test_two_packages_of_one_name(install) -> None:
    install("first", GOOD, corners="first:ROW")
    install("second", GOOD, corners="second:ROW")
    with pytest.raises(UserError, match=r"expected one package of that name, got .* and .*uninstall one"):
        catalog.row("corners")


def _use(name: str) -> None:
    """Sizes, prices and traces a model of the compressor."""
    model = catalog.model_spec(zoo.encoder("glyph-64"), name, 4, zoo.decoder("d48"))
    cost.flops(model, 10, 3)
    catalog.for_decoder(model.compressor, model.decoder)
    evidence = Evidence(jnp.ones((2, model.encoder.patches, model.encoder.width)))

    def run(key: jax.Array) -> jax.Array:
        return connector.compress(nn.meta.unbox(connector.init_weights(key, model)), evidence, model).tokens

    assert jax.eval_shape(run, jax.random.key(0)).shape == (2, 4, model.decoder.width)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cost=lambda spec, q: 1 / 0", "cost of POINT raised ZeroDivisionError: division by zero"),
        ("cost=lambda spec, q: 5.0", r"cost of POINT: expected a Cost of finite numbers, got 5\.0 \(float\)"),
        ("cost=3", "POINT: expected cost to be a function, got int"),
        ("tokens_out=lambda grid: 1 / 0", "tokens_out of POINT raised ZeroDivisionError"),
        ("tokens_out=lambda grid: [4]", "tokens_out of POINT: expected a tuple of ascending integers"),
        ("tokens_out=lambda grid: (16, 4)", "tokens_out of POINT: expected a tuple of ascending integers"),
        ("defaults=lambda *_: exit(0)", "defaults of POINT raised SystemExit: 0"),
        ("defaults=lambda *_: None", r"defaults of POINT: expected a CompressorSpec, got None \(NoneType\)"),
        ('defaults=partial(pooling.defaults, "m3")', "defaults of POINT: expected a spec .* 'mine', got 'm3'"),
        ("for_decoder=lambda *_: None", "for_decoder of POINT: expected a CompressorSpec"),
        ("problem=lambda spec: None", "problem of POINT: expected text"),
        ("stages=lambda *_: ((1, 4),)", "stages of POINT: expected a tuple of DropStage"),
        ("init_weights=lambda *_: {}['x']", "init_weights of POINT raised KeyError: 'x'"),
        ("init_weights=lambda *_: None", "init_weights of POINT: expected a dict of arrays"),
        ("apply=lambda w, e, s: bool(e.tokens.sum())", "apply of POINT raised TracerBoolConversionError"),
        ("apply=lambda w, e, s: bool(w['x'])", "apply of POINT raised KeyError: 'x'"),
        ('reads=frozenset({"tokens", "foo"})', "POINT: expected reads to name some of .*, got foo"),
        ('reads="tokens"', "POINT: expected reads to be a frozenset, got str"),
        ('reads=frozenset({"keys", "tokens"})', "POINT: expected attention to name the block whose keys it reads"),
        ('elastic="nested"', "POINT: expected elastic to be one of no, prefix, ladder, got 'nested'"),
        ('projector="conv"', "POINT: expected projector to be one of linear, mlp, mlp_silu, got 'conv'"),
        ("reads_places=None", "POINT: expected reads_places=True or False, got None"),
    ],
)
def test_a_bad_row_or_function_is_one_line_that_names_the_entry_point(install, change: str, message: str) -> None:
    install("broken", f"{MINE}\nROW = ROW._replace({change})", mine="broken:ROW")
    message = message.replace("POINT", "entry point broken:ROW of package broken")
    with pytest.raises(plugins.PluginError, match=f"^compressor 'mine': {message}") as caught:
        _use("mine")
    assert "\n" not in str(caught.value)
    assert (caught.value.__cause__ is not None) == (" raised " in message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tokens_out=lambda grid: ()", "cannot give tokens=4 on a 8 x 8 patch grid; possible: none$"),
        ("apply=lambda *_: None", "expected apply to give a Prefix, got NoneType"),
        (
            "apply=lambda w, e, s: pooling.Prefix(e.tokens[:, :3])",
            r"expected apply to give tokens of shape \(2, 4, 128\), got \(2, 3, 128\)",
        ),
        (
            "apply=lambda w, e, s: pooling.Prefix(e.tokens[:, :4], e.tokens[:, :4] > 0)",
            r"expected apply to give mask of shape \(2, 4\), got \(2, 4, 128\)",
        ),
        (
            'attention=lambda e: (99, "heads"), reads=frozenset({"tokens", "keys"})',
            "expected attention to name blocks from 1 to 4 of encoder glyph-64, got 99",
        ),
        (
            'taps=lambda e: (99,), reads=frozenset({"tokens", "taps"})',
            "expected taps to name blocks from 1 to 4 of encoder glyph-64, got 99",
        ),
        ('reads=frozenset({"tokens", "class_token"})', "expected an encoder with a class token, got glyph-64"),
    ],
)
def test_a_row_that_does_not_fit_is_one_line(install, change: str, message: str) -> None:
    install("broken", f"{MINE}\nROW = ROW._replace({change})", mine="broken:ROW")
    with pytest.raises(UserError, match=rf"^compressor 'mine':? {message}") as caught:
        _use("mine")
    assert "\n" not in str(caught.value)


def test_a_class_token_may_be_optional(install) -> None:
    change = 'reads=frozenset({"tokens", "class_token"}), class_token_optional=True'
    install("optional", f"{MINE}\nROW = ROW._replace({change})", mine="optional:ROW")
    _use("mine")


def test_readable_fields_are_those_of_evidence() -> None:
    assert {*contract.READABLE, "mask", "question_mask"} == set(Evidence._fields)


def test_the_package_in_contributing_works_and_is_priced_without_jax(install, tmp_path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("    # my_package/row.py\n")[2]
    text = text[: re.search(r"^\S", text, re.MULTILINE).start()]
    install(
        "my_package",
        "# my_package/__init__.py\n# my_package/row.py\n" + re.sub("^    ", "", text, flags=re.MULTILINE),
        mine="my_package.row:ROW",
    )
    (tmp_path / "my_package" / "my_package.py").unlink()
    _use("mine")
    spec = catalog.model_spec(zoo.encoder("glyph-64"), "mine", (4, 16), zoo.decoder("d48")).compressor
    row, rng = catalog.row("mine"), np.random.default_rng(0)
    weights, tokens = (
        {"mix": {"kernel": jnp.asarray(rng.normal(size=(128, 128)), jnp.float32)}},
        rng.normal(size=(2, 64, 128)),
    )
    out = row.apply(weights, Evidence(jnp.asarray(tokens, jnp.float32)), dataclasses.replace(spec, tokens=4)).tokens
    cells = tokens.reshape(2, 2, 4, 2, 4, 128).mean((2, 4)).reshape(2, 4, 128)
    np.testing.assert_allclose(out, cells @ weights["mix"]["kernel"], rtol=1e-4, atol=1e-4)
    program = (
        "import sys; from vlm_jax.compress import catalog; from vlm_jax.sizing import cost, zoo\n"
        "cost.flops(catalog.model_spec(zoo.encoder('glyph-64'), 'mine', 4, zoo.decoder('d48')), 10, 3)\n"
        "assert not {'jax', 'jaxlib', 'flax'} & set(sys.modules), 'imported'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": f"{tmp_path / 'my_package'}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_lists_of_names_have_each_once_and_only_what_can_be_used(install) -> None:
    install("first", GOOD, pool="first:ROW", broken="first:MISSING")
    install("second", f"{MINE}\nROW = ROW._replace(elastic='ladder', reads_places=False)", mine="second:ROW")
    assert sorted(catalog.names()) == sorted({*catalog.ROWS, "broken", "mine"})
    with pytest.raises(UserError, match=r"serve one V \(elastic: resampler, .*, pyramiddrop, mine\)$"):
        load_config("configs/vlm.py:compressor=quecc,elastic=1+4")
    merging = dataclasses.replace(zoo.encoder("glyph-64"), merge=(8, 8, 8, 8))
    with pytest.raises(UserError, match=r"merged tokens do not have \(none, .*, voco, mine do not\)$"):
        catalog.check_encoder("resampler", merging)


@pytest.mark.parametrize(
    ("points", "name", "message"),
    [
        ({}, "mine", r"compressor 'mine' is neither built in nor of an installed package \(install it\)$"),
        ({"mine": "broken:ROW"}, "mine", "compressor 'mine': entry point broken:ROW of package broken cannot be imp"),
        ({"tokenpacker": "broken:ROW"}, "tokenpacker", r"compressor 'tokenpacker': .* built-in one \(rename it\)$"),
    ],
)
def test_a_law_or_run_of_a_compressor_that_cannot_be_used(install, tmp_path, capsys, points, name, message) -> None:
    install("broken", "x = 1 / 0", **points)
    law, workdir = tmp_path / "law.json", tmp_path / "run"
    law.write_text(LAW.replace('"name": "tokenpacker"', f'"name": "{name}"'))
    with pytest.raises(UserError, match=f"^{law}: {message}"):
        plan.main(["--law", str(law), *PLAN])
    assert plan.main(["--law", str(law), *PLAN, "--compressors", "pool"]) == 0
    workdir.mkdir()
    (workdir / "spec.json").write_text(json.dumps({"model": {"compressor": {"name": name}}}))
    with pytest.raises(UserError, match=f"^{workdir}: {message}"):
        orbax.read_spec(workdir)
    capsys.readouterr()
