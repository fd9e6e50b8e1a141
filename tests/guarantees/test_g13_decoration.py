"""The callables and options that the decorator accepts, and failures of torch.compile() itself."""

from __future__ import annotations

import functools
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx

from compile_retry import CompileState, RetryPolicy, compile_with_fallback
from support import Compiler, full_disk, wait_until_waiting

EVERY_CALL = RetryPolicy(wait=None, wait_calls=1)
SECOND_CALL = RetryPolicy(wait=None, wait_calls=2)
X = torch.ones(3)


def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def test_three_ways() -> None:
    """The decorator works without arguments, with arguments, and as a function."""

    @compile_with_fallback
    def bare(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    @compile_with_fallback(backend="eager", name="mine")
    def with_arguments(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    called = compile_with_fallback(sine, backend="eager", policy=EVERY_CALL)
    assert (bare.name, with_arguments.name, called.name) == ("bare", "mine", "sine")
    assert (bare.policy, called.policy) == (RetryPolicy(clock=bare.policy.clock), EVERY_CALL)
    for fn in (with_arguments, called):
        assert (fn.state, fn.stats.calls) == (CompileState.PENDING, 0)
        torch.testing.assert_close(fn(X), X.sin())
        assert (fn.state, fn.stats.calls) == (CompileState.COMPILED, 1)


async def coroutine() -> None: ...


async def async_generator() -> AsyncIterator[int]:
    yield 1


def generator() -> Iterator[int]:
    yield 1


class Generating:
    def __call__(self) -> Iterator[int]:
        yield 1


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (coroutine, "coroutine function"),
        (async_generator, "async generator function"),
        (generator, "generator function"),
        (functools.partial(generator), "generator function"),
        (Generating(), "generator function"),
        (staticmethod(generator), "a generator function"),
        (torch.nn.Linear, "the class Linear"),
        (3, "not 3"),
        ("sine", "not 'sine'"),
        (property(sine), "property object"),
    ],
)
@pytest.mark.parametrize("with_arguments", [False, True])
def test_what_cannot_be_decorated(fn: Any, message: str, with_arguments: bool) -> None:
    """Objects that cannot be decorated raise at decoration, and the error says what is allowed."""
    with pytest.raises(TypeError, match=message):
        compile_with_fallback(dynamic=True)(fn) if with_arguments else compile_with_fallback(fn)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"foo": 1}, TypeError, "argument 'foo'; known arguments: policy, name, .*fullgraph"),
        ({"dynamc": True}, TypeError, "unknown torch.compile argument 'dynamc'; did you mean 'dynamic'\\? known"),
        ({"polcy": None}, TypeError, "unknown torch.compile argument 'polcy'; did you mean 'policy'\\? known"),
        (
            {"max_overhed": 0.1},
            TypeError,
            r"did you mean 'max_overhead'\? If so, use policy=RetryPolicy\(max_overhead=0.1\)\. known arguments",
        ),
        (
            {"wait": 30},
            TypeError,
            r"^wait is not an argument of compile_with_fallback\(\); use policy=RetryPolicy\(wait=30\)$",
        ),
        ({"wait_calls": 5}, TypeError, r"use policy=RetryPolicy\(wait_calls=5\)$"),
        ({"stop": []}, TypeError, r"use policy=RetryPolicy\(stop=\.\.\.\)$"),
        ({"retry": bool}, TypeError, r"use policy=RetryPolicy\(retry=\.\.\.\)$"),
        ({"max_overhead": 0.1}, TypeError, r"use policy=RetryPolicy\(max_overhead=0.1\)$"),
        ({"clock": bool}, TypeError, r"use policy=RetryPolicy\(clock=\.\.\.\)$"),
        ({"attempts": 3}, TypeError, r"use policy=RetryPolicy\(stop=stop_after_attempt\(3\)\), with .* from tenacity$"),
        (
            {"max_attempts": 3},
            TypeError,
            r"policy=RetryPolicy\(stop=stop_after_attempt\(3\)\), with stop_after_attempt f",
        ),
        (
            {"timeout": 60},
            TypeError,
            r"policy=RetryPolicy\(stop=stop_after_delay\(60\)\), with stop_after_delay from t",
        ),
        ({"fullgraph": "yes"}, TypeError, "fullgraph must be True or False, not 'yes'"),
        ({"disable": None}, TypeError, "disable must be True or False, not None"),
        ({"dynamic": "auto"}, TypeError, "dynamic must be True, False or None, not 'auto'"),
        ({"backend": 3}, TypeError, "backend must be the name of a backend or a callable, not 3"),
        ({"backend": "inductr"}, ValueError, "backend 'inductr'; did you mean 'inductor'.*known backends: .*eager"),
        ({"mode": 3}, TypeError, "mode must be a string or None, not 3"),
        ({"mode": "fastest"}, ValueError, "mode 'fastest'; .*known modes: .*max-autotune"),
        ({"options": [1]}, TypeError, "options must be a dict or None"),
        (
            {"options": {"max_autotun": True}},
            ValueError,
            r"'max_autotun'; did you mean 'max_autotune' or .{,80}\? torch\._inductor\.list_options\(\) returns all",
        ),
        ({"options": {"zz": 1}}, ValueError, r"^unknown torch\.compile option 'zz'; torch\._inductor.list_op.{,40}$"),
        ({"options": {"max_autotune": "yes"}}, ValueError, "max_autotune"),
        ({"mode": "max-autotune", "options": {"max_autotune": True}}, ValueError, "both given"),
        ({"name": 3}, TypeError, "name must be a string or None, not 3"),
        ({"policy": 3}, TypeError, "policy must be a RetryPolicy, a tenacity.Retrying or None, not 3"),
        ({"policy": RetryPolicy}, TypeError, "policy must be"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """Invalid arguments raise at decoration, with and without a function, and the error says what is allowed."""
    with pytest.raises(error, match=message):
        compile_with_fallback(sine, **options)
    with pytest.raises(error, match=message):
        compile_with_fallback(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "default"},
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune-no-cudagraphs", "dynamic": False},
        {"options": {"max-autotune": False, "trace.enabled": False}},
        {"options": {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}},
        {"backend": "aot_eager", "fullgraph": True},
        {"backend": "inductor", "dynamic": True},
        {"backend": "eager"},
        {"backend": None},
    ],
    ids=lambda options: " ".join([*options, *map(str, options.values())]).partition(" at 0x")[0],
)
def test_options_pass_through(options: dict[str, Any]) -> None:
    """All options of torch.compile are accepted and passed on unchanged, and the function compiles with them."""
    seen: list[dict[str, Any]] = []
    real, given = torch.compile, {**options}

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append({k: (dict(v) if isinstance(v, dict) else v) for k, v in kwargs.items()})
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", spy)
        patch.setattr(torch._inductor.compile_fx, "compile_fx", lambda graph_module, *_, **__: graph_module.forward)
        with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):  # no compiler is asked for vector instructions
            fn = compile_with_fallback(sine, **options)
            torch.testing.assert_close(fn(X), X.sin())
    assert fn.stats.compiled_calls == 1
    assert options == given
    assert {k: v for k, v in seen[0].items() if k not in ("backend", "isolate_recompiles")} == {
        k: v for k, v in options.items() if k != "backend"
    }


def test_mode_and_options_reach_the_backend() -> None:
    """A callable backend gets mode and options as from torch.compile, and Inductor gets them as configuration."""
    seen: list[dict[str, Any]] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any], **kwargs: Any) -> Any:
        seen.append(kwargs)
        return gm.forward

    compile_with_fallback(sine, backend=backend, options={"a": 1})(X)
    compile_with_fallback(sine, backend=backend, mode="b")(X)
    assert seen == [{"options": {"a": 1}}, {"mode": "b"}]

    configs: list[Any] = []
    real = torch._inductor.compile_fx.compile_fx

    def spy(*args: Any, **kwargs: Any) -> Any:
        configs.append(kwargs["config_patches"])
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._inductor.compile_fx, "compile_fx", spy)
        compile_with_fallback(lambda x: x.cos() + 1, options={"epilogue_fusion": False})(X)
        compile_with_fallback(lambda x: x.cos() + 1, mode="max-autotune-no-cudagraphs")(X)
    assert configs[0] == {"epilogue_fusion": False}
    assert configs[1] == torch._inductor.list_mode_options("max-autotune-no-cudagraphs")


def test_a_backends_reset_and_config_are_kept() -> None:
    """torch._dynamo.reset() calls a backend's reset()."""
    compiler = Compiler()
    resets: list[int] = []
    compiler.reset = lambda: resets.append(1)
    fn = compile_with_fallback(sine, backend=compiler)
    fn(X)
    torch._dynamo.reset()
    assert resets == [1]


def test_torch_compile_itself_fails() -> None:
    """The failure is survived and retried like any other. Tests can patch torch.compile after the decoration."""
    real, left, calls = torch.compile, 2, []

    def flaky(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        calls.append(fn.stats.calls + 1)
        left -= 1
        if left >= 0:
            raise full_disk()
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", flaky)
        fn = compile_with_fallback(sine, backend=Compiler(), policy=SECOND_CALL)
        for _ in range(8):
            torch.testing.assert_close(fn(X), X.sin())
    assert calls == [1, 3, 5]
    stats = fn.stats
    assert (stats.eager_calls, stats.compiled_calls, stats.failures, stats.recoveries) == (4, 4, 2, 1)
    assert fn.last_failure is not None
    assert (fn.last_failure.stage, fn.last_failure.frame[0]) == ("torch.compile", "sine")
    assert fn.state is CompileState.COMPILED


def test_torch_compile_itself_fails_for_a_function_without_tensors() -> None:
    """Its success is the recovery, although no code follows."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise full_disk()

    fn = compile_with_fallback(lambda a: a + 1, backend=Compiler(), policy=EVERY_CALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", broken)
        fn(1)
    assert fn.state is CompileState.FALLBACK
    assert fn(1) == 2
    assert (fn.stats.failures, fn.stats.recoveries, fn.state) == (1, 1, CompileState.PENDING)


def test_torch_compile_cannot_work() -> None:
    """A permanent failure of torch.compile() is not retried, unless the user asks for it."""
    calls: list[int] = []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        raise NotImplementedError("not on this platform")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", broken)
        fn = compile_with_fallback(sine, backend=Compiler(), policy=EVERY_CALL)
        for _ in range(5):
            fn(X)
        assert (len(calls), fn.state, fn.stats.eager_calls) == (1, CompileState.GAVE_UP, 5)
    fn.retry_now()
    fn(X)
    assert (fn.stats.compiled_calls, fn.state) == (1, CompileState.COMPILED)


def test_torch_compile_is_patched_away() -> None:
    """Tests may replace torch.compile by the identity or any other callable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda fn, **options: fn)
        fn = compile_with_fallback(sine, dynamic=True, whatever=1)
        torch.testing.assert_close(fn(X), X.sin())
    assert (fn.stats.eager_calls, fn.state) == (1, CompileState.PENDING)


def test_arguments_of_the_policy_while_torch_compile_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused by a torch.compile that takes anything, but not by one that has such an argument."""
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    with pytest.raises(TypeError, match=r"use policy=RetryPolicy\(stop=stop_after_delay\(60\)\)"):
        compile_with_fallback(sine, timeout=60)
    monkeypatch.setattr(torch, "compile", lambda fn, *, backend, timeout: fn)
    torch.testing.assert_close(compile_with_fallback(sine, timeout=60)(X), X.sin())


def test_an_unknown_torch() -> None:
    """If torch's internals have changed, functions run eagerly, and the log says why."""

    def unknown(x: torch.Tensor) -> torch.Tensor:
        return x

    unknown.__dict__["_torchdynamo_orig_callable"] = sine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda fn, **options: unknown)
        fn = compile_with_fallback(sine, policy=EVERY_CALL)
        torch.testing.assert_close(fn(X), X.sin())
    assert fn.last_failure is not None
    assert "compile_retry cannot find Dynamo's frame callback in torch" in fn.last_failure.message


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_modules_that_cannot_be_compiled_in_place() -> None:
    """TorchScript modules and results of torch.compile() raise at decoration."""
    with pytest.raises(TypeError, match="TorchScript module"):
        compile_with_fallback(torch.jit.script(torch.nn.Linear(1, 1)))
    with pytest.raises(TypeError, match=r"returned by torch\.compile\(\)"):
        compile_with_fallback(torch.compile(torch.nn.Linear(1, 1)))


def test_a_patched_torch_compile_that_knows_fewer_options() -> None:
    """A patched torch.compile gets only options that it accepts."""
    real = torch.compile

    def older(model: Any, *, backend: Any, dynamic: bool | None = None) -> Any:
        return real(model, backend=backend, dynamic=dynamic)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", older)
        fn = compile_with_fallback(sine, backend=Compiler(), dynamic=False)
        fn(X)
    assert fn.stats.compiled_calls == 1


def test_ahead_of_time_inductor() -> None:
    """options={"use_aoti": True} selects the same compiler as in torch.compile."""
    made: list[Any] = []
    real: Any = torch._TorchCompileAOTInductorWrapper

    def spy(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_TorchCompileAOTInductorWrapper", spy)
        patch.setattr(torch, "compile", lambda fn, **options: fn)
        compile_with_fallback(sine, options={"use_aoti": True, "max_autotune": False})(X)
    assert [arguments[:2] for arguments in made] == [(None, {"max_autotune": False})] * 2


def test_two_threads_call_a_new_function() -> None:
    """Two threads call torch.compile() only once."""
    calls: list[int] = []
    real, results = torch.compile, list[torch.Tensor]()
    second = threading.Thread(target=lambda: results.append(fn(X)))

    def slow(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        second.start()
        wait_until_waiting(second)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", slow)
        fn = compile_with_fallback(sine, backend=Compiler())
        results.append(fn(X))
        second.join()
    assert len(calls) == 1
    assert fn.stats.compiled_calls == 2
    torch.testing.assert_close(results, [X.sin()] * 2)


def test_torch_without_newer_internals() -> None:
    """The check of fullgraph=True, which only newer versions have, is omitted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch._C._dynamo.eval_frame, "set_fullgraph_compiled_frame_count", raising=False)
        fn = compile_with_fallback(sine, backend=Compiler(lambda inputs: full_disk()), dynamic=False)
        for n in (3, 4):
            fn(torch.ones(n))
        assert fn.stats.eager_calls == 2


def test_torch_without_isolated_recompiles() -> None:
    """Below 2.12, each function is compiled as a copy, so that twenty closures of one factory all compile."""

    def make(k: float) -> Any:
        def scale(x: torch.Tensor, *, by: float = k) -> torch.Tensor:
            return x * by * k

        return compile_with_fallback(scale, backend=Compiler())

    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch._C._dynamo.eval_frame, "set_eval_frame_isolate_recompiles_id", raising=False)
        functions = [make(float(k)) for k in range(20)]
        for k, fn in enumerate(functions):
            torch.testing.assert_close(fn(X), X * k * k)
    assert [fn.stats.compiled_calls for fn in functions] == [1] * 20
