"""``python -m compile_retry run``, the plug-in that PyTorch loads, and the variables that operators set."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import compile_retry
from compile_retry import RetryPolicy, compile_with_fallback
from compile_retry.__main__ import main

PROGRAM = """
import os, pickle, sys
import torch

class Mine: pass

print(__name__, sys.argv[1:], __spec__ and __spec__.name, sys.path[0], sys.warnoptions)
assert type(pickle.loads(pickle.dumps(Mine()))) is Mine
asked = []

def backend(graph_module, inputs):
    asked.append(1)
    if len(asked) == 1:
        raise OSError(28, "No space left on device")
    return graph_module.forward

model = torch.nn.Linear(2, 2)
compiled = torch.compile(model, backend=backend)
for _ in range(3):
    torch.testing.assert_close(compiled(torch.ones(1, 2)), model(torch.ones(1, 2)))
assert "compile_retry" in sys.modules and len(asked) == 2
print("recovered", flush=True)
if "--killed" in sys.argv:
    os.kill(os.getpid(), 15)
sys.exit(7)
"""

# Trains on two ranks, each of which fails once.
DISTRIBUTED = """
import os, pathlib, signal, sys, time
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

asked = []

def backend(graph_module, inputs):
    asked.append(1)
    if len(asked) == 1:
        raise OSError(28, "No space left on device")
    return graph_module.forward

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), pathlib.Path(sys.argv[1])
model = torch.nn.Linear(2, 1)
compiled = DistributedDataParallel(torch.compile(model, backend=backend))
for step in range(4):
    compiled(torch.full((1, 2), float(rank + step))).sum().backward()
    assert torch.equal(model.weight.grad, torch.full((1, 2), step + 0.5))
    model.zero_grad()
assert len(asked) == 2 and dist.get_world_size() == 2

def end(*args):
    folder.joinpath(f"terminated {rank}").touch()
    sys.exit()

if "--wait" in sys.argv:
    signal.signal(signal.SIGTERM, end)
    folder.joinpath(f"waits {rank}").touch()
    time.sleep(300)
dist.barrier()  # torchrun ends the other rank as soon as one has failed
sys.stderr.flush()
os._exit(3)  # threads of Gloo may abort a process that ends in the usual way
"""

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a program, with the plug-in of pyproject.toml installed, whatever pip has installed."""
    project = Path(__file__).parents[2]
    section = project.joinpath("pyproject.toml").read_text().partition('[project.entry-points."torch.backends"]\n')[2]
    entry_point = re.fullmatch(r'(\w+) = "([\w:]+)"', section.partition("\n")[0])
    assert entry_point
    metadata = tmp_path / "site" / "test_of_compile_retry-0.dist-info"
    metadata.mkdir(parents=True)
    metadata.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: test-of-compile-retry\nVersion: 0\n")
    metadata.joinpath("entry_points.txt").write_text(f"[torch.backends]\n{entry_point[1]} = {entry_point[2]}\n")
    source = Path(compile_retry.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (source, tmp_path / "site", tmp_path))))
    monkeypatch.setenv("COMPILE_RETRY_WAIT", "0")
    monkeypatch.setenv("COMPILE_RETRY_MAX_OVERHEAD", "inf")
    monkeypatch.delenv("COMPILE_RETRY", raising=False)
    tmp_path.joinpath("program.py").write_text(PROGRAM)
    tmp_path.joinpath("distributed.py").write_text(DISTRIBUTED)
    return tmp_path


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.usefixtures("measured")
def test_a_script(installed: Path) -> None:
    """It runs as with plain python: arguments, main module, interpreter options and exit status; and it recovers."""
    ended = run("-W", "once", "-m", "compile_retry", "run", str(installed / "program.py"), "-m", "--", "--help")
    assert ended.returncode == 7, ended.stderr
    assert ended.stdout.splitlines() == [
        f"__main__ ['-m', '--', '--help'] None {installed} ['once']",
        "recovered",
    ]
    assert "Linear: attempt 1 failed in call 1" in ended.stderr
    assert "Linear: recovered in call 2" in ended.stderr


def test_a_module(installed: Path) -> None:
    """It runs as with python -m, dies of a signal as such, and its strict mode and plug-ins are kept."""
    ended = run("-m", "compile_retry", "run", "-m", "program", "--killed", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert ended.returncode == -signal.SIGTERM, ended.stderr
    assert ended.stdout.startswith("__main__ ['--killed'] program ")
    strict = run("-m", "compile_retry", "run", "-m", "program", COMPILE_RETRY="strict")
    assert strict.returncode == 1
    assert "No space left on device" in strict.stderr


@pytest.mark.long
def test_torchrun(installed: Path) -> None:
    """``torchrun -m compile_retry run`` trains on two ranks, each of which recovers, and reports their exit status."""
    program = str(installed / "distributed.py")
    ended = run(*TORCHRUN, "-m", "compile_retry", "run", program, str(installed))
    assert ended.returncode == 1
    assert re.search(r"exitcode *: 3 ", ended.stderr), ended.stderr
    assert ended.stderr.count("Linear: recovered in call 2") == 2


@pytest.mark.long
def test_a_signal_to_torchrun(installed: Path) -> None:
    """SIGTERM reaches the programs that ``torchrun --no-python python -m compile_retry run`` has started."""
    program = ("-m", "compile_retry", "run", str(installed / "distributed.py"), str(installed), "--wait")
    launcher = subprocess.Popen(
        [sys.executable, *TORCHRUN, "--no-python", sys.executable, *program], stderr=subprocess.PIPE, text=True
    )
    with launcher:
        while launcher.poll() is None and len(list(installed.glob("waits *"))) < 2:
            time.sleep(0.1)
        launcher.terminate()
        _, errors = launcher.communicate(timeout=120)
    assert sorted(path.name for path in installed.glob("terminated *")) == ["terminated 0", "terminated 1"], errors
    assert errors.count("Linear: recovered in call 2") == 2


@pytest.mark.usefixtures("measured")
def test_the_plug_in(installed: Path) -> None:
    """``COMPILE_RETRY=install`` is enough where PyTorch loads plug-ins. Without it, the package is not imported."""
    program = str(installed / "program.py")
    assert run(program, COMPILE_RETRY="install").returncode == 7
    assert "OSError" in run(program).stderr
    nothing = run("-c", "import torch, sys; assert 'compile_retry' not in sys.modules")
    assert nothing.returncode == 0, nothing.stderr
    first = run("-c", "import compile_retry, torch; assert torch.compile.__wrapped__", COMPILE_RETRY="install")
    assert first.returncode == 0, first.stderr


@pytest.mark.usefixtures("measured")
def test_a_plug_in_that_cannot_be_loaded(installed: Path) -> None:
    """The program runs without it, and the log says so."""
    installed.joinpath("tenacity.py").write_text("raise ImportError('broken')")
    program = "import sys, torch; print('imported')"
    ended = run("-c", program, PYTHONPATH=f"{installed}{os.pathsep}{os.environ['PYTHONPATH']}", COMPILE_RETRY="install")
    assert ended.stdout == "imported\n", ended.stderr
    assert "COMPILE_RETRY=install has no effect" in ended.stderr


def test_wrong_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """``run`` needs a script or a module, and has a help text."""
    for arguments in (["run"], ["run", "-m"], ["run", "--nonsense"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended:
        main(["run", "--help"])
    assert ended.value.code == 0
    assert "(SCRIPT | -m MODULE) [ARGUMENT ...]" in capsys.readouterr().out


def test_a_copy_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """``run`` says that PyTorch cannot load it."""
    monkeypatch.setattr("compile_retry.__main__.entry_points", lambda **selection: ())
    with pytest.raises(SystemExit, match="compile_retry is not installed"):
        main(["run", "program.py"])


def sine(x: Any) -> Any:
    return x.sin()


def test_policies_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables take precedence over the code, one by one."""
    policy = RetryPolicy(wait=5, max_overhead=0.5)
    assert compile_with_fallback(sine, policy=policy).policy is policy
    monkeypatch.setenv("COMPILE_RETRY_WAIT", "7.5")
    found = compile_with_fallback(sine, policy=policy).policy
    assert (found.wait, found.max_overhead) == (7.5, 0.5)
    monkeypatch.setenv("COMPILE_RETRY_MAX_OVERHEAD", "inf")
    found = compile_with_fallback(sine).policy
    assert (found.wait, found.max_overhead) == (7.5, math.inf)


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("COMPILE_RETRY_WAIT", "soon", "a number of seconds, at least 0"),
        ("COMPILE_RETRY_WAIT", "-1", "a number of seconds, at least 0"),
        ("COMPILE_RETRY_MAX_OVERHEAD", "20", "above 0 and at most 1"),
    ],
)
def test_wrong_values(
    variable: str, value: str, allowed: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are ignored, with one warning that says what is allowed."""
    monkeypatch.setenv(variable, value)
    policy = RetryPolicy(wait=5)
    with caplog.at_level(logging.WARNING, logger="compile_retry"):
        assert [compile_with_fallback(sine, policy=policy).policy for _ in range(2)] == [policy, policy]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"{variable}={value} is ignored; it must be {allowed}")
