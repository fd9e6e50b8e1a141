"""FastAPI: a service starts without a C++ compiler, serves requests eagerly, and recovers under load.

    .venv-recipes/bin/python examples/recipes/fastapi_service.py

`make recipes` creates that environment. The model is compiled in place, once, when the service starts. The endpoint is
a plain `def`: FastAPI runs it in a thread pool, so a request that waits for the compiler does not block the event loop
or `/health`. In an `async def` it would. The policy waits in seconds, because a number of requests says nothing about
when a machine is repaired.

`/health` returns the statistics, and `/metrics` exposes them for Prometheus.
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
# For this demonstration: retry every second, whatever a failure costs. In production use the default policy.
compile_with_fallback(model, name="model", dynamic=True, policy=RetryPolicy(wait=1, max_overhead=float("inf")))


@app.post("/predict")
def predict(rows: list[list[float]]) -> list[float]:
    with torch.inference_mode():
        return [float(y) for y in model(torch.tensor(rows)).flatten()]


@app.get("/health")
def health() -> dict[str, Any]:
    """Return 200 in every state, because eager answers are correct. Alert on the state; do not restart."""
    compiled = compiled_function(model)
    return {"state": compiled.state.value, **compiled.stats.as_dict()}


app.mount("/metrics", prometheus_client.make_asgi_app())


def load(client: TestClient, seed: int, enough: threading.Event) -> int:
    """Send requests until `enough` is set, and compare with an eager model. Returns the number of answers."""
    numbers, answers = torch.Generator().manual_seed(seed), 0
    while not enough.wait(0.03):
        rows = torch.randn(seed + 2, 8, generator=numbers)
        answer = torch.tensor(client.post("/predict", json=rows.tolist()).raise_for_status().json())
        torch.testing.assert_close(answer, eager_twin(rows).flatten().detach(), atol=1e-4, rtol=1e-4)
        answers += 1
    return answers


def wait_for(client: TestClient, come_true: Callable[[dict[str, Any]], bool]) -> Any:
    """Poll `/health` until it meets the condition."""
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
        # For all threads, unlike testing.broken_compiler(). The cache is empty, because a cache hit needs no compiler.
        os.environ.update(CXX=str(missing), TORCHINDUCTOR_CACHE_DIR=f"{folder}/inductor")
        with TestClient(app) as client:
            clients = [pool.submit(load, client, seed, enough) for seed in range(CLIENTS)]
            try:
                broken = wait_for(client, lambda health: health["failures"] >= 2)
                missing.symlink_to(compiler)
                print(">>> the compiler is installed; the service is not notified")
                repaired = wait_for(client, lambda health: health["compiled_calls"] >= 50)
            finally:
                enough.set()
            answers = sum(each.result() for each in clients)
            metrics = client.get("/metrics").text

    print("GET /metrics:", *(line for line in metrics.splitlines() if line.startswith("compile_retry_state")), sep="\n")
    assert broken["state"] == "fallback", "it fell back"
    assert broken["compiled_calls"] == 0 < broken["eager_calls"], "it answered eagerly without a compiler"
    assert (repaired["state"], repaired["recoveries"]) == ("compiled", 1), "it recovered"
    assert compiled_function(model).stats.calls == answers, "each request was one call"
    assert 'compile_retry_state{function="model",state="compiled"} 1.0' in metrics, "Prometheus sees the state"
    assert 'compile_retry_recoveries_total{function="model"} 1.0' in metrics, "and the recovery"


if __name__ == "__main__":
    main()
