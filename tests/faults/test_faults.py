"""Each planted fault turns its test red; the source as it is leaves them all green.

One process imports what is slow once and forks for each fault, so that a fault costs little more than its test.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.faults import FAULTS, Fault

TESTS = Path(__file__).parent.parent
SOURCE = TESTS.parent / "src" / "headscope"
RUNNER = """
import os, sys
import hypothesis, jaxtyping, pytest, torch, torch.utils.checkpoint  # what every test needs, imported once
import transformers.models.llama.modeling_llama, transformers.modeling_utils, transformers.cache_utils
torch.set_num_threads(1)
jaxtyping.install_import_hook = lambda *names: None  # faults are found by numbers, not by shapes
for line in sys.stdin:
    source, log, *tests = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        sys.path.insert(0, source)
        out = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1), os.dup2(out, 2)
        code = pytest.main(["-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:warnings", *tests])
        import headscope
        same = headscope.__file__.startswith(source)
        os._exit(int(code) if same else 99)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runner:
    """Runs tests against a copy of the source; gives pytest's exit code and what it printed."""

    def __init__(self, home: Path) -> None:
        self.home, self.count = home, 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=TESTS.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def copy(self) -> Path:
        """A fresh copy of the package."""
        self.count += 1
        source = self.home / f"copy{self.count}"
        shutil.copytree(SOURCE, source / "headscope", ignore=shutil.ignore_patterns("static"))
        return source

    def run(self, source: Path, *tests: str) -> tuple[int, str]:
        log = source / "log"
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(source, log, *(str(TESTS / test) for test in tests), sep="\t", file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        return code, log.read_text("utf-8")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    made = Runner(tmp_path_factory.mktemp("faults"))
    yield made
    made.process.communicate()


def plant(fault: Fault, source: Path) -> None:
    """Change the copy, or say that the source has moved on."""
    path = source / "headscope" / fault.file
    text = path.read_text("utf-8")
    found = text.count(fault.old)
    if found != 1:
        pytest.fail(
            f"the fault {fault.name!r} cannot be planted: src/headscope/{fault.file} holds this text {found} times, "
            f"wanted once:\n{fault.old}\nBring tests/faults/faults.py up to date with the source."
        )
    path.write_text(text.replace(fault.old, fault.new), "utf-8")


def test_without_a_fault_all_is_green(runner: Runner) -> None:
    code, printed = runner.run(runner.copy(), *{fault.test: None for fault in FAULTS})
    assert code == 0, printed


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_turns_its_test_red(fault: Fault, runner: Runner) -> None:
    source = runner.copy()
    plant(fault, source)
    code, printed = runner.run(source, fault.test)
    assert code == 1, f"exit code {code}: the test did not fail\n{printed}"
    name = re.escape(fault.test.split("::")[1].split("[")[0])
    assert re.search(rf"FAILED .*::{name}\b", printed), printed


def test_a_fault_whose_text_is_gone_says_so(tmp_path: Path) -> None:
    (tmp_path / "headscope").mkdir()
    (tmp_path / "headscope" / "scores.py").write_text("nothing of the kind", "utf-8")
    fault = Fault("lost", "scores.py", "a text of 1887", "", "test_masks.py::test_masks_combine")
    with pytest.raises(pytest.fail.Exception, match=r"src/headscope/scores\.py holds this text 0 times(.|\n)*1887"):
        plant(fault, tmp_path)
