from importlib import metadata

project = "compile-retry"
author = "compile-retry contributors"
copyright = f"2026, {author}"
release = version = metadata.version(project)

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxcontrib.mermaid",
]
exclude_patterns = ["_build", "*-table*.md"]  # included by other pages

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_maximum_signature_line_length = 100

# What a reader of the API reference has imported already.
doctest_global_setup = """
import torch
from compile_retry import *
"""

copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = f"compile-retry {release}"

nitpicky = True
nitpick_ignore_regex = [
    # No inventory of other projects is loaded: the build must work without a network.
    ("py:.*", r"(collections|contextlib|datetime|logging|matplotlib|torch|tenacity|types|typing)\..*"),
    # For type checkers only, told under its public name, or of the standard library.
    ("py:class", r"Axes|Retrying|nn\.Module|timedelta|compile_retry\._report\.Report"),
    # Type variables have no page.
    ("py:(class|obj)", r"([\w.]+\.)?_?[A-Z]"),
]
