"""Runs one test for each planted fault: torch and headscope are imported once, then one forked child for each fault.

It reads lines of JSON, {"fault": number, "log": file}, and answers each with {"failed": [[test, error], …]}.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

import headscope

SLOW_IMPORTS = ("hypothesis", "transformers.modeling_utils", "transformers.models.llama.modeling_llama")
TESTS = Path(__file__).parent.parent


class Failures:
    """A plugin of pytest: which tests failed, and by what kind of error."""

    def __init__(self) -> None:
        self.failed: list[list[str]] = []

    def pytest_exception_interact(self, node: pytest.Item, call: pytest.CallInfo[object]) -> None:
        assert call.excinfo is not None
        self.failed.append([node.nodeid, call.excinfo.typename])


def run(number: int, log: str, answer: int) -> None:
    """Plant the fault and run its test; in the child."""
    from tests.faults.faults import FAULTS
    from tests.faults.planting import plant

    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    fault, failures = FAULTS[number], Failures()
    plant(fault)
    options = ["-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    pytest.main([*options, str(TESTS / fault.test)], plugins=[failures])
    os.write(answer, json.dumps({"failed": failures.failed}).encode())


def no_shape_checks(*names: object) -> Any:
    """Take the place of jaxtyping's hook."""


def main() -> None:
    jaxtyping.install_import_hook = no_shape_checks  # faults are to show in numbers, not in shapes
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(headscope.__path__, "headscope."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            try:
                run(request["fault"], request["log"], write)
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        print(answer.decode() or json.dumps({"failed": []}), flush=True)


if __name__ == "__main__":
    main()
