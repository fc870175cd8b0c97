"""Each planted fault turns its test red. That the tests are green without a fault, the suite itself shows."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import headscope
from tests.faults.faults import FAULTS
from tests.faults.planting import Fault, FunctionNotFound

TESTS = Path(__file__).parent.parent
BROKEN = {"TypeError", "AttributeError", "NameError", "ImportError"}  # the fault itself does not fit its function


@pytest.fixture(scope="module")
def runner() -> Iterator[subprocess.Popen[str]]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    source = str(Path(headscope.__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.runner"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=TESTS.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": source},
    )
    assert answer_of(process) == {"ready": True}
    yield process
    process.communicate()


def answer_of(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    return json.loads(line) if line else pytest.fail("the runner of the planted faults has ended")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_turns_its_test_red(fault: Fault, runner: subprocess.Popen[str], tmp_path: Path) -> None:
    fault.original()
    log = tmp_path / "log"
    print(json.dumps({"fault": FAULTS.index(fault), "log": str(log)}), file=runner.stdin, flush=True)
    failed = answer_of(runner)["failed"]
    printed = log.read_text("utf-8")
    assert failed, f"{fault.test} did not fail\n{printed}"
    test, error = failed[0]
    assert test.split("[")[0] == f"tests/{fault.test}", printed
    assert error not in BROKEN, f"{fault.test} failed by {error}: mend the fault\n{printed}"


def test_faults_are_few_and_differ() -> None:
    assert len(FAULTS) <= 40
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_names_a_function_and_a_test_that_exist(fault: Fault) -> None:
    assert fault.original()[2] is not None
    file, _, test = fault.test.partition("::")
    tree = ast.parse((TESTS / file).read_text("utf-8"))
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file} has no {test}"


@pytest.mark.parametrize(
    "target", ["headscope.ops.no_module:f", "headscope.ops.scores:no_function", "headscope.ops.scores:Scores.no_method"]
)
def test_a_fault_whose_function_is_gone_is_named(target: str) -> None:
    def all_heads_are_one(original: object) -> object:
        return original

    with pytest.raises(FunctionNotFound, match=f"'all heads are one' is planted in {target}"):
        Fault(target, "ops/test_masks.py::test_masks_combine_with_and_or_and_not", all_heads_are_one).original()
