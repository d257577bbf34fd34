"""compute.remat=auto: the first policy whose compiled step fits."""

import dataclasses

import jax
import pytest

from vlm_jax import build, job
from vlm_jax.build import Network, fitting
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import StageSpec
from vlm_jax.distributed import partitioning
from vlm_jax.sizing import remat


@pytest.fixture(scope="module")
def network() -> Network:
    """A run whose blocks keep more than everything else takes."""
    fields = {"compute.remat": "auto", "data.batch_rows": "64", "evaluation.batch_examples": "64"}
    spec = resolve(load_config("configs/vlm.py:smoke,llm=d24,tokens=4", fields))
    compute = dataclasses.replace(spec.compute, strategy="replicated", mesh=(1, 1, 1))
    spec = dataclasses.replace(spec, compute=compute)
    return build.lay_out(spec, partitioning.make_plan(compute, jax.devices()[:1]))


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The policies that were compiled, each with the real program, which is compiled once."""
    names: list[str] = []

    def recorded(network: Network, stage: StageSpec) -> fitting.Program:
        names.append(network.model.compute.remat)
        return _compiled(network, stage)

    monkeypatch.setattr(fitting, "compile_step", recorded)
    return names


_programs: dict[tuple[str, str], fitting.Program] = {}
_compile_step = fitting.compile_step


def _compiled(network: Network, stage: StageSpec) -> fitting.Program:
    key = (network.model.compute.remat, stage.name)
    if key not in _programs:
        _programs[key] = _compile_step(network, stage)
    return _programs[key]


def peak(network: Network, policy: str) -> float:
    return max(_compiled(fitting.with_remat(network, policy), stage).memory.peak for stage in network.spec.stages)


def test_the_policy_is_the_first_that_fits(network: Network) -> None:
    """More memory never gives more recomputation."""
    peaks = {policy: peak(network, policy) for policy in remat.POLICIES}
    assert peaks["none"] > peaks["dots"] > peaks["block"]
    limits = sorted(bound / (1 - fitting.MARGIN) * factor for bound in peaks.values() for factor in (1.001, 0.999))
    order = []
    for limit in limits:
        choice = fitting.choose(network, network.spec.stages, limit)
        fits = [policy for policy in remat.POLICIES if peaks[policy] <= limit * (1 - fitting.MARGIN)]
        assert choice.fits == bool(fits)
        assert choice.policy == (fits[0] if fits else "block")
        order.append(remat.POLICIES.index(choice.policy))
    assert order == sorted(order, reverse=True)


def test_what_cannot_fit_is_not_compiled(network: Network, compiled: list[str]) -> None:
    """The estimate is a lower bound of what each compiled program takes."""
    for policy in remat.POLICIES:
        least = max(fitting._least_bytes(network, stage, policy) for stage in network.spec.stages)
        assert least <= peak(network, policy)
    least = fitting._least_bytes(network, network.spec.stages[-1], "none")
    fitting.choose(network, network.spec.stages, 0.99 * least)
    assert compiled
    assert "none" not in compiled


def test_training_uses_the_choice_and_its_spec_stays(network: Network) -> None:
    enough = 1.1 * peak(network, "none")
    fitted, choice = fitting.fitted(network, enough, network.spec.stages)
    assert (fitted.model.compute.remat, fitted.spec) == ("none", network.spec)
    assert choice.programs
    unknown, choice = fitting.fitted(network, None, network.spec.stages)
    assert (unknown.model.compute.remat, choice) == ("none", None)
    assert fitting.usable_bytes(network.plan) is None  # a CPU
    spec = dataclasses.replace(network.spec, compute=dataclasses.replace(network.spec.compute, remat="dots"))
    given = network._replace(spec=spec)
    assert fitting.fitted(given, 1.0, spec.stages) == (given, None)


def test_training_reports_the_choice(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "usable_bytes", lambda plan: 2.0**40)
    notices: list[str] = []
    run = job._fitted(build.Run(network, (), None), network.spec.stages, notices.append)
    assert run.network.model.compute.remat == "none"
    (notice,) = notices
    assert notice.startswith("compute.remat=auto: none (")
    assert notice.endswith("of 1024.00 GiB of a device)")


def test_no_policy_that_fits_is_one_line_with_what_helps(network: Network) -> None:
    with pytest.raises(UserError) as error:
        fitting.fitted(network, 2.0**20, network.spec.stages)
    text = str(error.value)
    assert "compute.remat=auto: expected a train step that fits in 0.00 GiB" in text
    assert "compute.microbatches=2" in text
    assert "\n" not in text
