"""The documentation site: ``make docs`` builds it into ``docs/_build``, and fails on any warning."""

project = "refold"
author = "The refold developers"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "refold"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
