"""FastAPI: a service starts on a machine without a C++ compiler, answers all the same, and recovers under load.

    .venv-recipes/bin/python examples/recipes/fastapi_service.py

`make recipes` makes that environment. Decorated is the model, in place, once, when the service starts. The endpoint is
a plain `def`: FastAPI runs it in a pool of threads, so a request that waits for the compiler holds up neither the
event loop nor `/health`. In an `async def` it would. The policy waits in seconds: a number of requests says nothing
about when a machine is repaired.

The books are in the answers to `/health`, and for Prometheus under `/metrics`.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import prometheus_client
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from torch import nn

from compile_retry import RetryPolicy, compile_with_fallback, compiled_function

CLIENTS = 4


app = FastAPI()
model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1)).eval()
eager_twin = copy.deepcopy(model)  # to compare with
# Impatient, for a demonstration: as often as every second, whatever failing costs. Yours is the default.
compile_with_fallback(model, name="model", dynamic=True, policy=RetryPolicy(wait=1, max_overhead=float("inf")))


@app.post("/predict")
def predict(rows: list[list[float]]) -> list[float]:
    with torch.inference_mode():
        return [float(y) for y in model(torch.tensor(rows)).flatten()]


@app.get("/health")
def health() -> dict[str, Any]:
    """200 in any state: eager answers are right answers. Alert on the state, do not restart for it."""
    compiled = compiled_function(model)
    return {"state": compiled.state.value, **compiled.stats.as_dict()}


app.mount("/metrics", prometheus_client.make_asgi_app())


def load(client: TestClient, seed: int, enough: threading.Event) -> int:
    """Ask until it is enough, and compare with an eager model. Returns how many answers there were."""
    numbers, answers = torch.Generator().manual_seed(seed), 0
    while not enough.wait(0.03):
        rows = torch.randn(seed + 2, 8, generator=numbers)
        answer = torch.tensor(client.post("/predict", json=rows.tolist()).raise_for_status().json())
        torch.testing.assert_close(answer, eager_twin(rows).flatten().detach(), atol=1e-4, rtol=1e-4)
        answers += 1
    return answers


def wait_for(client: TestClient, come_true: Callable[[dict[str, Any]], bool]) -> Any:
    """Watch the service's health until it is as wanted."""
    deadline = time.monotonic() + 60
    while not come_true(health := client.get("/health").json()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"it is still {health}")
        time.sleep(0.05)
    print(f"GET /health: {health}")
    return health


def main() -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    assert compiler, "this recipe needs a C++ compiler"
    enough = threading.Event()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ThreadPoolExecutor(CLIENTS) as pool:
        missing = Path(folder, Path(compiler).name)
        # In all threads, which testing.broken_compiler() is not; and an empty cache: what is in it needs no compiler.
        os.environ.update(CXX=str(missing), TORCHINDUCTOR_CACHE_DIR=f"{folder}/inductor")
        with TestClient(app) as client:
            clients = [pool.submit(load, client, seed, enough) for seed in range(CLIENTS)]
            try:
                broken = wait_for(client, lambda health: health["failures"] >= 2)
                missing.symlink_to(compiler)
                print(">>> the compiler is installed; nobody tells the service")
                repaired = wait_for(client, lambda health: health["compiled_calls"] >= 50)
            finally:
                enough.set()
            answers = sum(each.result() for each in clients)
            metrics = client.get("/metrics").text

    print("GET /metrics:", *(line for line in metrics.splitlines() if line.startswith("compile_retry_state")), sep="\n")
    assert broken["state"] == "fallback", "it fell back"
    assert broken["compiled_calls"] == 0 < broken["eager_calls"], "without a compiler it answered, eagerly"
    assert (repaired["state"], repaired["recoveries"]) == ("compiled", 1), "it recovered"
    assert compiled_function(model).stats.calls == answers, "each request was one call"
    assert 'compile_retry_state{function="model",state="compiled"} 1.0' in metrics, "Prometheus sees the state"
    assert 'compile_retry_recoveries_total{function="model"} 1.0' in metrics, "and the recovery"


if __name__ == "__main__":
    main()
