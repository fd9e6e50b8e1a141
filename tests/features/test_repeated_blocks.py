"""`compile_repeated_blocks()`: the modules that it compiles, and their names in log lines and events."""

from __future__ import annotations

import copy
import io
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from compile_retry import (
    CompileState,
    RetryPolicy,
    compile_repeated_blocks,
    compile_with_fallback,
    compiled_function,
    report,
)
from compile_retry.events import AttemptFailed, Event
from compile_retry.testing import FakeClock, assert_compiled, record_events
from support import Compiler, first, train

EVERY_STEP = RetryPolicy.every(calls=12)


class Block(nn.Module):
    def __init__(self, size: int = 8, inner: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, inner), nn.Linear(inner, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return y


class Gate(nn.Module):
    """Another block. It has parameters but no submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.weight)


class Special(Block): ...


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.blocks(x)
        return y


def run(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(part, (nn.ModuleList, nn.ModuleDict)):  # these have no forward
        for each in part.children():
            x = run(each, x)
        return x
    y: torch.Tensor = part(x)
    return y


class Model(nn.Module):
    """Runs its parts one after the other."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.children():
            x = run(part, x)
        return x


class Diffuser(Model):
    """Names its blocks, as a model from diffusers does."""

    _repeated_blocks = ("Block", "Gate", "Absent")


class Undeclared(Model):
    """Names no blocks, as most models from diffusers."""

    _repeated_blocks = ()


def blocks(n: int = 3) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(n))


def gates(n: int = 2) -> nn.ModuleList:
    return nn.ModuleList(Gate() for _ in range(n))


def linear() -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(8, 8) for _ in range(2))


def compiled(model: nn.Module) -> str:
    """Return the names of the compiled modules."""

    def names() -> Iterator[str]:
        for name, part in model.named_modules():
            try:
                compiled_function(part)
            except TypeError:
                continue
            yield name

    return " ".join(names())


FOUND: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a list": (lambda: Model(layers=blocks()), "layers.0 layers.1 layers.2"),
    "a dictionary": (lambda: Model(layers=nn.ModuleDict({"a": Block(), "b": Block()})), "layers.a layers.b"),
    "a sequence": (lambda: Model(layers=nn.Sequential(Block(), Block())), "layers.0 layers.1"),
    "two lists": (lambda: Model(encoder=blocks(2), gates=gates()), "encoder.0 encoder.1 gates.0 gates.1"),
    "a list of lists": (
        lambda: Model(stages=nn.ModuleList([blocks(2), blocks(2)])),
        "stages.0.0 stages.0.1 stages.1.0 stages.1.1",
    ),
    "one outside the list": (lambda: Model(first=Block(), layers=blocks(2)), "first layers.0 layers.1"),
    "blocks with blocks inside": (lambda: Model(layers=nn.ModuleList([Pair(), Pair()])), "layers.0 layers.1"),
    "a list of linear layers": (lambda: Model(layers=blocks(2), linear=linear()), "layers.0 layers.1"),
    "a list of one": (lambda: Model(layers=blocks(2), gates=gates(1)), "layers.0 layers.1"),
    "a mixed list": (
        lambda: Model(layers=nn.ModuleList([Gate(), Pair()])),
        "layers.1.blocks.0 layers.1.blocks.1",
    ),
    "declared": (lambda: Diffuser(layers=nn.ModuleList([Gate(), Block()]), others=linear()), "layers.0 layers.1"),
    "declared, and none": (lambda: Undeclared(layers=blocks(2)), "layers.0 layers.1"),
}


@pytest.mark.parametrize("case", FOUND)
def test_the_blocks_that_it_finds(case: str) -> None:
    """By default, they are those that the model declares, or those of its lists of equal modules."""
    make, expected = FOUND[case]
    model = make()
    assert compile_repeated_blocks(model, backend="eager") is model
    assert compiled(model) == expected


NAMED: dict[str, tuple[Any, str]] = {
    "a class": (Block, "first pair.blocks.0 pair.blocks.1 special"),
    "a name": ("Block", "first pair.blocks.0 pair.blocks.1 special"),
    "a subclass": (Special, "special"),
    "a class and a name": ([Gate, "Pair"], "gate pair"),
    "a set": ({"Special"}, "special"),
    "one that is there and one that is not": (("Gate", "Absent"), "gate"),
}


@pytest.mark.parametrize("case", NAMED)
def test_the_blocks_that_one_names(case: str) -> None:
    """A class, its name, or several: subclasses match, and of blocks inside blocks the outermost."""
    block, expected = NAMED[case]
    model = Model(first=Block(), gate=Gate(), pair=Pair(), special=Special())
    compile_repeated_blocks(model, block, backend="eager")
    assert compiled(model) == expected


def test_a_block_with_two_names() -> None:
    """It is compiled once, and has its first name."""
    block = Block()
    again = nn.Sequential(block)
    model = nn.Sequential(nn.Sequential(block), Gate(), again)
    x = torch.randn(2, 8)
    expected = model(x)
    compile_repeated_blocks(model, Block, backend="eager")
    assert repr(compiled_function(again[0])) == "<CompiledFunction Block (0.0): pending>"
    torch.testing.assert_close(model(x), expected)
    assert compiled_function(block).stats.compiled_calls == 2


def test_a_model_of_its_blocks_class() -> None:
    """The model itself is not one of its blocks. Those without a forward of their own are located at the call."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    compile_repeated_blocks(
        model, nn.Sequential, backend=Compiler(first(1)), policy=RetryPolicy(wait=1e6, clock=FakeClock())
    )
    assert compiled(model) == "0 1"
    model(torch.randn(2, 8))
    failure = compiled_function(model[0]).last_failure
    assert failure is not None
    assert failure.frame[:2] == ("Sequential", __file__)


@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        ("Blok", ValueError, "Model has no module of class Blok; candidates for block: Block (3)"),
        ([Special, "Blok"], ValueError, "Model has no module of class Special, Blok; candidates for block: Block (3)"),
        ((), ValueError, "found no repeated blocks in Model; candidates for block: Block (3)"),
        (3, TypeError, "block must be a module class, its name, or several of either, not 3"),
        (int, TypeError, "block must be a module class, its name, or several of either, not <class 'int'>"),
        (Block(), TypeError, "block must be a module class, its name, or several of either, not an instance of Block"),
        (blocks(), TypeError, "block must be a module class, its name, or several of either, not an instance of Block"),
    ],
    ids=str,
)
def test_wrong_blocks(block: Any, error: type[Exception], message: str) -> None:
    """The message says what is allowed. If nothing is found, it names the classes that the model has more than once."""
    model = Model(gate=Gate(), layers=blocks())
    with pytest.raises(error) as raised:
        compile_repeated_blocks(model, block)
    assert str(raised.value) == message
    assert compiled(model) == ""


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "inducktor"}, ValueError, "did you mean 'inductor'"),
        ({"dinamic": True}, TypeError, "did you mean 'dynamic'"),
        ({"retries": 3}, TypeError, "use policy=RetryPolicy(stop=stop_after_attempt(3))"),
        ({"name": 3}, TypeError, "name must be a string or None, not 3"),
        ({"policy": 3}, TypeError, "policy must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """They raise as in `compile_with_fallback()`. Nothing has been compiled."""
    model = Model(layers=blocks())
    with pytest.raises(error, match=re.escape(message)):
        compile_repeated_blocks(model, **options)
    assert compiled(model) == ""


def test_models_without_blocks() -> None:
    """A model without repeated blocks, one that torch.compile() has wrapped, and no model at all are refused."""
    with pytest.raises(ValueError, match="found no repeated blocks in Linear; candidates for block: none"):
        compile_repeated_blocks(nn.Linear(8, 8))
    mixed = nn.ModuleList([Block(), Block(), Gate()])
    with pytest.raises(ValueError, match=r"found no repeated blocks in Model; candidates for block: Block \(2\)"):
        compile_repeated_blocks(Model(layers=mixed))
    wrapped: Any = torch.compile(Model(layers=blocks()))
    with pytest.raises(TypeError, match=r"this module was returned by torch.compile\(\)"):
        compile_repeated_blocks(wrapped)
    with pytest.raises(TypeError, match=r"model must be an nn.Module, not \[Block"):
        compile_repeated_blocks([Block()])  # type: ignore[type-var]  # must be refused


def test_a_block_that_cannot_be_compiled() -> None:
    """If one of the blocks cannot be compiled in place, none is."""
    model = Model(layers=blocks(2))
    model.add_module("last", torch.compile(Block()))  # type: ignore[arg-type]  # torch's annotation is too wide
    with pytest.raises(TypeError, match=r"this module was returned by torch.compile\(\)"):
        compile_repeated_blocks(model, ["Block", "OptimizedModule"])
    assert compiled(model) == ""


def test_they_speak_together(caplog: pytest.LogCaptureFixture) -> None:
    """Twelve blocks fail once and recover. Each transition has one line, with their number and their names."""
    eager = Model(layers=blocks(12))
    ours, compiler = copy.deepcopy(eager), Compiler(first(1))
    compile_repeated_blocks(ours, backend=compiler, policy=EVERY_STEP)
    with caplog.at_level(logging.INFO, "compile_retry"), record_events() as events:
        torch.testing.assert_close(train(ours), train(eager))
    lines = [record.message.partition(": ") for record in caplog.records if record.name == "compile_retry"]
    assert [(who, what.split()[0]) for who, _, what in lines] == [
        ("Block x12 (layers.0 ... layers.11)", word) for word in ("attempt", "compiled", "recovered")
    ]
    assert {event.who for event in events} == {"Block x12 (layers.0 ... layers.11)"}
    assert {event.fqns for event in events} == {tuple(f"layers.{i}" for i in range(12))}
    assert {(event.function, event.functions) for event in events} == {("Block", 12)}
    functions = [compiled_function(block) for block in ours.get_submodule("layers").children()]
    assert {function.state for function in functions} == {CompileState.COMPILED}
    assert {function.stats.calls for function in functions} == {6}
    assert sum(function.stats.failures for function in functions) == 1


def failed_event(model: nn.Module) -> Event:
    with record_events(kinds={"failed"}) as events:
        model(torch.randn(2, 8))
    (event,) = events
    assert isinstance(event, AttemptFailed)
    return event


def test_names_of_one_two_and_many() -> None:
    """One or two blocks are all named. Blocks of unknown names are counted only."""
    options: dict[str, Any] = {"policy": RetryPolicy(wait=1e6, clock=FakeClock())}
    one = compile_repeated_blocks(Model(layer=Block()), Block, backend=Compiler(first(1)), **options)
    two = compile_repeated_blocks(Model(layers=blocks(2)), backend=Compiler(first(1)), **options)
    compiler = Compiler(first(1))
    some = compile_repeated_blocks(Model(layers=blocks(2)), backend=compiler, **options)
    other = compile_with_fallback(Block(), backend=compiler, **options)
    assert failed_event(one).who == "Block (layer)"
    assert failed_event(two).who == "Block x2 (layers.0, layers.1)"
    assert failed_event(some).who == "Block x3 (layers.0, layers.1)"
    assert compiled_function(other).state is CompileState.FALLBACK


def test_a_name_of_ones_own() -> None:
    """With a name, the blocks of one model do not share with the equal blocks of another."""
    student, teacher = Model(layers=blocks(2)), Model(layers=blocks(2))
    compiler = Compiler(first(1))
    for name, model in (("student", student), ("teacher", teacher)):
        compile_repeated_blocks(model, backend=compiler, policy=RetryPolicy(wait=1e6, clock=FakeClock()), name=name)
    assert failed_event(student).who == "student x2 (layers.0, layers.1)"
    teacher(torch.randn(2, 8))
    assert compiled_function(teacher.get_submodule("layers.0")).state is CompileState.COMPILED


def test_blocks_of_two_classes() -> None:
    """Each class has its own attempts, its own line and its own hold-off."""
    eager = Diffuser(layers=blocks(4), gates=gates(2))
    ours, compiler = copy.deepcopy(eager), Compiler(first(1))
    compile_repeated_blocks(ours, backend=compiler, policy=RetryPolicy(wait=1e6, clock=FakeClock()))
    with record_events() as events:
        torch.testing.assert_close(train(ours, 3), train(eager, 3))
    assert [event.who for event in events if event.kind in ("failed", "compiled")][:2] == [
        "Block x4 (layers.0 ... layers.3)",
        "Gate x2 (gates.0, gates.1)",
    ]
    states = [compiled_function(ours.get_submodule(name)).state for name in ("layers.0", "gates.0")]
    assert states == [CompileState.FALLBACK, CompileState.COMPILED]


@pytest.mark.parametrize("fails", [0, 1])
def test_blocks_of_different_shapes_compile_as_often_as_with_stock(fails: int) -> None:
    """The compiler runs as often as with stock, plus once for a failed attempt."""
    eager = Model(wide=nn.ModuleList(Block(8, 32) for _ in range(3)), narrow=blocks())
    stock, ours = copy.deepcopy(eager), copy.deepcopy(eager)
    counts = Compiler(), Compiler(first(fails))
    for part in stock.modules():
        if isinstance(part, Block):
            part.compile(backend=counts[0])
    compile_repeated_blocks(ours, backend=counts[1], policy=RetryPolicy.every(calls=1))
    expected = train(eager)
    torch.testing.assert_close(train(stock), expected)
    torch.testing.assert_close(train(ours), expected)
    assert counts[1].asked - fails == counts[0].asked <= 4
    for name in ("wide.0", "narrow.2"):
        assert_compiled(ours.get_submodule(name))


def test_the_message_of_assert_compiled() -> None:
    """It names the block."""
    model = compile_repeated_blocks(Model(layers=blocks(2)), backend="eager")
    with pytest.raises(AssertionError, match=r"^Block \(layers\.1\) is not compiled"):
        assert_compiled(model.get_submodule("layers.1"))


def test_checkpoints_and_copies() -> None:
    """The keys of the state are those of a plain model, a saved model loads as one, and a copy shares the code."""
    compiler, plain = Compiler(), Model(layers=blocks(3))
    model = compile_repeated_blocks(copy.deepcopy(plain), backend=compiler)
    x = torch.randn(2, 8)
    expected = plain(x)
    torch.testing.assert_close(model(x), expected)
    attempts = compiler.asked
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())

    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), expected)
    function = compiled_function(twin.get_submodule("layers.2"))
    assert (repr(function), function.stats.calls) == ("<CompiledFunction Block (layers.2): compiled>", 1)
    assert compiler.asked == attempts
    with record_events() as events:
        twin(torch.randn(2, 3, 8))
    assert {event.who for event in events} == {"Block x6 (layers.0 ... layers.2)"}
    assert {event.fqns for event in events} == {("layers.0", "layers.1", "layers.2")}
    assert "Block x6 (layers.0 ... layers.2)" in [group.name for group in report().groups]

    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert compiled(loaded) == ""
    torch.testing.assert_close(loaded(x), expected)
    compile_repeated_blocks(loaded, backend="eager")
    torch.testing.assert_close(loaded(x), expected)


def test_a_second_time() -> None:
    """The blocks are compiled anew, with the new options."""
    model = compile_repeated_blocks(Model(layers=blocks(2)), backend=Compiler(first(9)))
    model(torch.randn(2, 8))
    compile_repeated_blocks(model, backend="eager")
    model(torch.randn(2, 8))
    stats = compiled_function(model.get_submodule("layers.0")).stats
    assert (stats.calls, stats.compiled_calls) == (1, 1)


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:.*barrier.*:UserWarning")
@pytest.mark.parametrize("compiles", ["the model", "the wrapper"])
def test_ddp(compiles: str) -> None:
    """The blocks under DDP fall back, recover and train. Compiled through the wrapper, they have its names for them."""
    eager = Model(layers=blocks(4))
    plain = copy.deepcopy(eager)
    options: dict[str, Any] = {"backend": Compiler(first(1)), "policy": RetryPolicy.every(calls=4)}
    if compiles == "the model":
        compile_repeated_blocks(plain, **options)
    model = nn.parallel.DistributedDataParallel(plain)
    if compiles == "the wrapper":
        compile_repeated_blocks(model, **options)
    with record_events() as events:
        torch.testing.assert_close(train(model), train(eager))
    prefix = "module." if compiles == "the wrapper" else ""
    assert [event.kind for event in events].count("recovered") == 1
    assert {event.who for event in events} == {f"Block x4 ({prefix}layers.0 ... {prefix}layers.3)"}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("compiled_first", [True, False])
def test_fsdp(compiled_first: bool) -> None:
    """Sharded blocks are found under their name, although FSDP2 replaces their class. They fall back and recover."""
    eager = Model(layers=blocks(3))
    model, mesh = copy.deepcopy(eager), init_device_mesh("cpu", (1,))
    if compiled_first:
        compile_repeated_blocks(model, "Block", backend=Compiler(first(1)), policy=RetryPolicy.every(calls=3))
    for part in (*model.get_submodule("layers").children(), model):
        fully_shard(part, mesh=mesh)
    if not compiled_first:
        compile_repeated_blocks(model, "Block", backend=Compiler(first(1)), policy=RetryPolicy.every(calls=3))
    with record_events(kinds={"failed", "recovered"}) as events:
        *losses, weight = train(model)[:7]
    assert isinstance(weight, DTensor)
    torch.testing.assert_close([*losses, weight.full_tensor()], train(eager)[:7])
    assert [event.kind for event in events] == ["failed", "recovered"]
    assert compiled(model) == "layers.0 layers.1 layers.2"


@pytest.mark.parametrize("block", [None, Block])
def test_activation_checkpointing(block: type[nn.Module] | None) -> None:
    """Blocks are compiled with their checkpointing or, if their class is given, inside it."""
    eager = Model(layers=blocks(3))
    model = Model(layers=nn.ModuleList(checkpoint_wrapper(each) for each in blocks(3)))
    model.load_state_dict(eager.state_dict())
    compile_repeated_blocks(model, block, backend=Compiler(first(1)), policy=RetryPolicy.every(calls=3))
    torch.testing.assert_close(train(model), train(eager))
    inside = "._checkpoint_wrapped_module" if block else ""
    assert compiled(model) == " ".join(f"layers.{i}{inside}" for i in range(3))
    assert_compiled(model.get_submodule(f"layers.0{inside}"))
