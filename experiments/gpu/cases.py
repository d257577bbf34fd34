"""Runs the cases of a part: prepared a few at a time in parallel, measured one after another, each result written."""

import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from experiments.gpu.results import Results

_ERROR_CHARACTERS = 600


class Case(NamedTuple):
    """One result. `prepare` compiles, in a thread beside others; `measure` gets what it returned and has the device to
    itself."""

    name: str
    prepare: Callable[[], Any]
    measure: Callable[[Any], dict[str, Any]]
    may_not_fit: bool = False  # then too little memory is a result, and not an error


def run_cases(part: str, cases: Sequence[Case], results: Results, deadline: float, workers: int) -> None:
    """Measures the cases that have no result yet, in their order. None is begun after `deadline` (`time.monotonic`).
    An exception becomes the case's result, and the next one runs.
    """
    done = results.measured(part)
    missing = [case for case in cases if case.name not in done]
    print(f"{part}: {len(missing)} of {len(cases)} cases to measure", flush=True)
    prepared: dict[str, Future[Any]] = {}
    with ThreadPoolExecutor(workers) as pool:
        for number, case in enumerate(missing):
            if time.monotonic() > deadline:
                print(f"{part}: out of time; the same command measures the rest", flush=True)
                return
            if case.name not in prepared:
                prepared = {each.name: pool.submit(each.prepare) for each in missing[number : number + workers]}
                wait(prepared.values())
            row = results.add(part, case.name, **_outcome(case, prepared[case.name]))
            print(row, flush=True)


def _outcome(case: Case, future: Future[Any]) -> dict[str, Any]:
    start = time.monotonic()
    try:
        values = case.measure(future.result())
    except Exception as error:
        if case.may_not_fit and "RESOURCE_EXHAUSTED" in str(error):
            return {"fits": False}
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]}
    return {**values, "measuring_secs": round(time.monotonic() - start, 2)}
