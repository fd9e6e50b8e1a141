"""Makes pytest run the ``python`` and ``pycon`` blocks of the Markdown files it is given (``make snippets``)."""

from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser, SkipParser


class PyconBlockParser(PythonCodeBlockParser):
    """Sybil itself passes over ``pycon`` blocks without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.codeblock_parser = CodeBlockParser("pycon", PythonEvaluator())


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), PyconBlockParser(), SkipParser()],
    patterns=["*.md"],
).pytest()
