"""How `make docs` builds the site: from the Markdown pages as they are, so that links to README.md are checked."""

from __future__ import annotations

import taskkd

project = "taskkd"
author = "The taskkd authors"
copyright = "2026, the taskkd authors"  # noqa: A001
version = release = taskkd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "benchmarks/README.md"]
exclude_patterns = [".*", "docs/_build", "docs/site", "runs", "tests", "taskkd", "build", "dist"]

myst_heading_anchors = 4
myst_links_external_new_tab = False
suppress_warnings = ["myst.header"]  # README.md has subheadings where a reader of a code host wants them

default_role = "code"  # `name` in a docstring
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_custom_sections = [("Shapes", "params_style")]
napoleon_use_rtype = False

nitpicky = True
# Types of other packages (their pages are not linked), and aliases of types, which are written out in the text.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!taskkd\b).*"),
    (r"py:class", r"taskkd\.(images\.Source|gates\.Gate|segmentation\.labels\.Labels)"),
]

html_theme = "furo"
html_title = "taskkd"
html_static_path = ["site"]
html_css_files = ["site.css"]
html_extra_path = ["site/root"]
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False
html_copy_source = False
