"""Settings of Sphinx; ``make docs`` builds into ``docs/_build``."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "modicum"
author = "The modicum authors"
release = metadata.version("modicum")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "modicum_methods"]
exclude_patterns = ["_build", "_ext"]
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # the table of knobs on each page says it better
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Cost", "notes_style"), ("Deviates", "notes_style"), ("Reference", "notes_style")]

html_theme = "furo"
html_title = f"modicum {release}"
html_theme_options = {"sidebar_hide_name": False}
