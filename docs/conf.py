"""Sphinx settings of the decodelab site; `docs/build.py` prepares the pages and calls Sphinx with this file."""

import tomllib
from pathlib import Path

_urls = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]

project = "decodelab"
author = "The decodelab maintainers"
copyright = author
extensions = ["myst_nb", "sphinx_copybutton", "sphinx.ext.mathjax", "sphinx.ext.githubpages"]
exclude_patterns = ["**/.*"]
language = "en"

# Notebooks come with the outputs of a real run and are never run here.
nb_execution_mode = "off"
nb_merge_streams = True
nb_output_stderr = "remove"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}
nb_code_prompt_show = "Show {type}"
nb_code_prompt_hide = "Hide {type}"
myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "colon_fence", "attrs_inline", "attrs_block", "strikethrough", "tasklist"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
myst_strikethrough_no_warning = True
suppress_warnings = ["myst.strikethrough"]

# MathJax lies in _static (npm package mathjax 3.2.2, Apache-2.0), so no page asks another host for anything.
mathjax_path = "mathjax-tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}, "svg": {"fontCache": "global"}}

python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"
copybutton_selector = "div.cell_input pre, div.highlight-python pre, div.highlight-bash pre, div.highlight-console pre"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "decodelab"
html_baseurl = _urls["Documentation"]
html_static_path = ["_static"]
html_css_files = ["decodelab.css"]
html_js_files = [("decodelab.js", {"defer": "defer"})]
html_favicon = "_static/mark.svg"
html_context = {"default_mode": "auto"}
html_sourcelink_suffix = ""
html_show_sphinx = False
html_last_updated_fmt = None
html_theme_options = {
    "logo": {"image_light": "_static/mark.svg", "image_dark": "_static/mark.svg", "text": "decodelab", "alt_text": "decodelab, home"},
    "repository_url": _urls["Repository"],
    "repository_branch": "main",
    "path_to_docs": "nbs",
    "use_repository_button": True,
    "use_issues_button": True,
    "use_download_button": True,
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    "navbar_persistent": [],
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "toc_title": "On this page",
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "github-dark",
}
