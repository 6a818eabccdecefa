"""The site of the documentation: ``make docs`` builds it into out/site; a warning is an error."""

import fastres

project = "fastres"
author = "the fastres authors"
project_copyright = author
version = release = fastres.__version__

# The pages lie where a reader of the repository looks for them, so that their links work there too.
root_doc = "docs/index"
include_patterns = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/*.md"),
    *("benchmarks/NOTES.md", "benchmarks/results/*/latest.md", "kernels/experimental/README.md"),
]
exclude_patterns = [".venv*", "build", "dist", "fastres", "out", "tests"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"fastres {release}"
html_extra_path = ["site"]  # index.html, which leads on to docs/index.html

myst_heading_anchors = 3  # links such as performance.md#when-it-is-slower
napoleon_use_ivar = True  # Attributes: entries have no line of their own in the contents
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # nn.Module's text on forward says nothing about ours
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
suppress_warnings = ["toc.not_included"]  # a page may be reached by links alone
nitpicky = True
nitpick_ignore_regex = [
    ("py:(class|exc|obj)", ".*"),  # of PyTorch and Python, whose sites this build does not read
]
