from importlib import metadata
from urllib.parse import urlsplit

project = "compile-retry"
author = "compile-retry contributors"
copyright = f"2026, {author}"
release = version = metadata.version(project)

# From [project.urls] in pyproject.toml.
urls = dict(line.split(", ") for line in metadata.metadata(project).get_all("Project-URL"))

extensions = [
    "myst_parser",
    "notfound.extension",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxcontrib.mermaid",
    "sphinxext.opengraph",
]
exclude_patterns = ["_build", "*-table*.md"]  # included by other pages

myst_enable_extensions = ["colon_fence", "deflist", "substitution"]
myst_heading_anchors = 3
myst_substitutions = {"repository": f"[repository]({urls['Source']})"}

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

# The build must work without a network. So these inventories list only the names that are used here, as plain text.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", "inventories/python.txt"),
    "tenacity": ("https://tenacity.readthedocs.io/en/latest", "inventories/tenacity.txt"),
    "torch": ("https://docs.pytorch.org/docs/stable", "inventories/torch.txt"),
}

html_theme = "furo"
html_title = f"compile-retry {release}"
html_baseurl = urls["Documentation"]
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_theme_options = {
    "source_repository": urls["Source"],
    "source_branch": "main",
    "source_directory": "docs/",
    "footer_icons": [{"name": "Repository", "url": urls["Source"], "html": "Repository", "class": ""}],
}
pygments_dark_style = "github-dark"
mermaid_height = "auto"
mermaid_fullscreen = False

notfound_urls_prefix = urlsplit(html_baseurl).path

ogp_site_url = html_baseurl
ogp_image = "_static/timeline.png"
ogp_image_alt = "Seconds per step: eager steps between failed attempts, then compiled ones"

nitpicky = True
nitpick_ignore_regex = [
    # For type checkers only, told under its public name, or in no inventory of PyTorch's.
    ("py:class", r"Axes|Retrying|nn\.Module|timedelta|compile_retry\._report\.Report"),
    ("py:class", r"torch\.utils\.hooks\.RemovableHandle|torch\.distributed\..*|Ranks"),
    # Type variables have no page.
    ("py:(class|obj)", r"([\w.]+\.)?_?[A-Z]"),
]
