"""Sphinx settings; the pages themselves are staged from nbs/ by build_site.py."""

import configparser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
parser.read(ROOT / "settings.ini", encoding="utf8")
settings = parser["DEFAULT"]

project = settings["title"]
author = settings["author"]
project_copyright = settings["copyright"]
version = release = settings["version"]

extensions = ["myst_nb"]
myst_enable_extensions = ["attrs_block", "colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

# What the committed notebooks show is what the site shows: nothing is executed here.
nb_execution_mode = "off"
nb_merge_streams = True
# Progress bars go to stderr: a person at a terminal wants them, a reader does not.
nb_output_stderr = "remove"
nb_code_prompt_show = "Show the source"
nb_code_prompt_hide = "Hide the source"

# Quotation marks in docstrings are code as often as not.
smartquotes = False
add_module_names = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 90
modindex_common_prefix = ["medai_nb."]

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
