"""Compressors of installed packages, as entry points of a package on the path."""

import sys
from pathlib import Path

import pytest

from vlm_jax.compress import catalog, plugins
from vlm_jax.core.errors import UserError
from vlm_jax.sizing import cost, zoo

GOOD = """
from functools import partial
from vlm_jax.compress import pooling
from vlm_jax.compress.contract import Compressor

ROW = Compressor(
    pooling.no_weights, pooling.pool, pooling.pool_tokens, pooling.pool_cost, partial(pooling.defaults, "corners")
)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a package with a module of that text and its entry points."""

    def write(package: str, text: str, **points: str) -> None:
        folder = tmp_path / package
        info = folder / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{package}.py").write_text(text)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        listed = "\n".join(f"{name} = {value}" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{listed}\n")
        monkeypatch.syspath_prepend(folder)
        sys.modules.pop(package, None)
        forget()

    def forget() -> None:
        plugins.entry_points.cache_clear()
        plugins.load.cache_clear()

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
