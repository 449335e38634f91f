"""Settings of the documentation site: `python -m sphinx -W -n -b html docs build/docs` builds it."""

import os
import re
import sys
import urllib.request
import warnings
from pathlib import Path
from typing import Any

from docutils import nodes

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # the package that these pages are about, not an installed one

import lightning_znorm

project = "lightning-znorm"
author = "The lightning-znorm authors"
copyright = f"{author}. Apache License 2.0"
version = release = lightning_znorm.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "internal_names",  # these three are in docs/_extensions
    "mathml",
    "repository_files",
]
exclude_patterns = ["_static", "_extensions"]
default_role = "literal"  # docstrings write code and names in single backticks

# Markdown
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4  # links such as page.md#a-heading are checked
highlight_language = "text"  # of blocks that name none

# The reference
autodoc_inherit_docstrings = False  # Lightning's own methods are documented by Lightning
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes that are also members are described once
warnings.filterwarnings("ignore", r"\w+\.pooled is now called std_over", FutureWarning)  # autodoc reads every attribute

# Other packages' names may be in type hints and docstrings. Of ours, a misspelt one fails the build.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:class", r"(collections\.abc|pathlib)\.\w+"),
    (r"py:.*", r"(torch|torchmetrics|torchvision|lightning|pytorch_lightning|monai|numpy|PIL|matplotlib|rich)(\..*)?"),
    (r"py:exc", r"MisconfigurationException"),
    (r"py:class", r"Figure"),  # matplotlib's, which is imported for the type checker alone
]

# Links to other packages' sites: only if asked for, and only to those that answer, because a build needs no network.
inventories = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "lightning": "https://lightning.ai/docs/pytorch/stable/",
    "torchmetrics": "https://lightning.ai/docs/torchmetrics/stable/",
}


def answers(address: str) -> bool:
    """Return whether a site has an inventory that can be read now."""
    try:
        with urllib.request.urlopen(f"{address}objects.inv", timeout=10) as response:
            return bool(response.status == 200)
    except OSError:
        return False


asked_for = os.environ.get("ZNORM_DOCS_INVENTORIES") == "1"
intersphinx_mapping = {name: (url, None) for name, url in inventories.items() if asked_for and answers(url)}

# Looks
html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"lightning-znorm {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/logo.svg"
html_logo = "_static/logo.svg"
html_copy_source = False
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True


def say_attributes(app: Any, document: nodes.document) -> None:
    """Let the list of a class's attributes be headed as in the docstring, which is not Sphinx's word for it."""
    for name in document.findall(nodes.field_name):
        if name.astext() == "Variables":
            name.children = [nodes.Text("Attributes")]


def keep_sentences(app: Any, kind: str, name: str, described: Any, options: Any, lines: list[str]) -> None:
    """Keep a sentence under Returns whole: Napoleon takes words before a colon for a type unless it comes first."""
    for number, line in enumerate(lines[:-1]):
        if line.strip() == "Returns:":
            text = lines[number + 1].lstrip()
            lines[number + 1] = f"{lines[number + 1].removesuffix(text)}: {text}"


def link_pages(app: Any, kind: str, name: str, described: Any, options: Any, lines: list[str]) -> None:
    """Let pages that docstrings name, such as ``docs/performance.md``, be links; a terminal shows the file's name."""
    lines[:] = [re.sub(r"``docs/([\w/-]+)\.md``", r":doc:`docs/\1.md </\1>`", line) for line in lines]


def setup(app: Any) -> None:
    """Register what these settings need."""
    app.connect("autodoc-process-docstring", link_pages)
    app.connect("autodoc-process-docstring", keep_sentences, priority=100)  # before Napoleon
    app.connect("doctree-read", say_attributes)
