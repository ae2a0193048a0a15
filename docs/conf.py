"""The documentation site: ``make docs`` builds it into ``docs/_build``, and fails on any warning."""

project = "refold"
author = "The refold developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_typehints = "none"  # the sentences say what arrays are
html_theme = "furo"
html_title = "refold"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
