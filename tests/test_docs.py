"""The documentation: README, site, and the translation of notebooks into pages."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_builder():
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs" / "build_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = load_builder()
reference = builder.reference


def code_cell(source, outputs=(), tags=()):
    return {
        "cell_type": "code",
        "source": source,
        "outputs": list(outputs),
        "metadata": {"tags": list(tags)},
        "execution_count": 1,
    }


def stage(cell, targets=None):
    return builder.stage_code(cell, "Section", targets or {}, set())


def test_no_page_needs_a_typesetter_of_formulas():
    """The site asks no other host for anything, and has none of its own: TeX would be shown as it is written."""
    for notebook in sorted((ROOT / "nbs").rglob("*.ipynb")):
        for cell in json.loads(notebook.read_text())["cells"]:
            text = re.sub(r"`[^`]*`", "", "".join(cell["source"]))
            assert cell["cell_type"] == "code" or not re.search(r"\$[^$\n]+\$", text), notebook.name


# --- README ----------------------------------------------------------------------------------------


def test_readme_is_what_the_index_notebook_gives():
    assert (ROOT / "README.md").read_text(encoding="utf8") == builder.readme_text()


def test_readme_check_fails_when_it_is_out_of_date(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", symlinks=True)
    for name in ("_quarto.yml", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").write_text("old", encoding="utf8")
    monkeypatch.setattr(builder, "ROOT", tmp_path)
    monkeypatch.setattr(builder, "NOTEBOOKS", tmp_path / "nbs")
    assert builder.main(["readme", "--check"]) == 1
    assert (tmp_path / "README.md").read_text(encoding="utf8") == "old", "a check writes nothing"
    assert builder.main(["readme"]) == 0
    assert builder.main(["readme", "--check"]) == 0


def test_links_of_the_readme_lead_to_files():
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(encoding="utf8"), flags=re.S)
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if ":" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target.partition("#")[0]).exists()] == []


def test_a_link_to_nowhere_is_named():
    with pytest.raises(builder.DocumentationError, match="index.ipynb.*'nowhere.ipynb'"):
        builder.relink("see [this](nowhere.ipynb)", "index.ipynb", lambda path: path)


# --- the page list ---------------------------------------------------------------------------------


def test_sidebar_lists_every_notebook_once():
    listed = [page for _, pages in builder.sidebar() for page in pages]
    assert len(listed) == len(set(listed))
    assert sorted(listed) == builder.all_notebooks()


def test_a_missing_page_stops_the_build(monkeypatch):
    monkeypatch.setattr(builder, "sidebar", lambda: [("Start", [*builder.all_notebooks(), "99_gone.ipynb"])])
    with pytest.raises(builder.DocumentationError, match="99_gone.ipynb"):
        builder.checked_sidebar()


def test_an_unlisted_notebook_stops_the_build(monkeypatch):
    monkeypatch.setattr(builder, "sidebar", lambda: [("Start", ["index.ipynb"])])
    with pytest.raises(builder.DocumentationError, match="00_config.ipynb is not in the sidebar"):
        builder.checked_sidebar()


# --- from notebook to page -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["#| hide\nsecret = 1", "#| default_exp records", "#| export\nimport os", ""]
)
def test_cells_that_say_nothing_to_a_reader_are_left_out(source):
    assert stage(code_cell(source)) == []


def test_an_exported_function_becomes_a_reference_entry_and_folded_source():
    source = '#| export\ndef half(value: float, *, digits: int = 2) -> float:\n    "Half of `value`."\n    return value'
    entry, code = stage(code_cell(source))
    assert "{py:function} half(value: float, *, digits: int=2) -> float" in entry["source"]
    assert "Half of `value`." in entry["source"]
    assert code["metadata"]["tags"] == ["hide-input"]
    assert "#|" not in code["source"]


def test_a_class_entry_has_its_fields_methods_and_no_private_names():
    source = (
        'class Span(Base):\n    "A stretch of text."\n\n    start: int = 0\n    "First character."\n\n'
        '    def length(self) -> int:\n        "Characters."\n\n    def _hidden(self):\n        "No."\n'
    )
    entry = reference.cell_reference(source, {"Base": "medai_nb.base.Base"}, set())
    assert "{py:class} Span" in entry and "{py:obj}`Base <medai_nb.base.Base>`" in entry
    assert "{py:attribute} start" in entry and "First character." in entry
    assert "{py:method} length() -> int" in entry
    assert "_hidden" not in entry


def test_comments_beside_parameters_are_documentation():
    source = (
        'def cut(\n    text: str,  # the note\n    length: int = 3,  # characters\n) -> str:\n    "Cut."\n'
    )
    entry = reference.cell_reference(source, {}, set())
    assert ":param text: the note" in entry and ":param length: characters" in entry


def test_angle_brackets_in_docstrings_are_text():
    assert reference.docstring_markdown("Writes runs/<name> and `runs/<name>`.", {}) == (
        "Writes runs/\\<name> and `runs/<name>`."
    )


def test_aligned_parameters_of_a_docstring_are_a_list():
    docstring = """Cut a text.

    text    what is cut,
            not how
    limit   characters

    Raises ValueError for none."""
    assert reference.docstring_markdown(docstring, {}) == (
        "Cut a text.\n\n\n- `text`: what is cut,\n  not how\n- `limit`: characters\n\n\nRaises ValueError for none."
    )
    assert reference.parameter_list("a  b\nAfter.") == "\n- `a`: b\n\nAfter."


def test_public_names_in_prose_become_links_and_ordinary_words_do_not():
    module = reference.Module("medai_nb.trainer", "44_trainer.ipynb", {"train": "", "LoRATrainer": ""})
    targets = reference.link_targets([module])
    linked = reference.link_names(
        "The `train` split, `train()` and `LoRATrainer`.\n\n# `LoRATrainer`\n", targets
    )
    assert linked == (
        "The `train` split, {py:obj}`train() <medai_nb.trainer.train>` and "
        "{py:obj}`LoRATrainer <medai_nb.trainer.LoRATrainer>`.\n\n# `LoRATrainer`\n"
    )
    fenced = "```python\n`LoRATrainer`\n```"
    assert reference.link_names(fenced, targets) == fenced


def test_a_name_with_two_homes_is_not_linked():
    modules = [reference.Module(f"medai_nb.{name}", f"{name}.ipynb", {"read_all": ""}) for name in ("a", "b")]
    assert reference.link_targets(modules) == {}


def test_output_asis_becomes_markdown():
    output = {"output_type": "stream", "name": "stdout", "text": ["**bold**\n"]}
    (cell,) = stage(code_cell("#| output: asis\nprint('**bold**')", [output]))
    assert (cell["cell_type"], cell["source"]) == ("markdown", "**bold**\n")


def test_echo_false_shows_the_output_alone():
    output = {"output_type": "stream", "name": "stdout", "text": "42\n"}
    (cell,) = stage(code_cell("#| echo: false\nprint(42)", [output]))
    assert cell["metadata"]["tags"] == ["remove-input"] and cell["outputs"] == [output]


def test_widget_state_is_left_out():
    widget = {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}}}
    (cell,) = stage(code_cell("show()", [widget]))
    assert cell["outputs"] == []


def test_quarto_callouts_and_front_matter_are_translated():
    assert builder.admonitions("::: {.callout-note}\nText\n:::") == ":::{note}\nText\n:::"
    assert builder.title_from_front_matter("---\ntitle: Notes\nsubtitle: Short\n---") == "# Notes\n> Short"


def test_a_page_without_title_is_named():
    with pytest.raises(builder.DocumentationError, match="10_records.ipynb: the first cell"):
        builder.insert_origin("No title", "10_records.ipynb", None)


# --- the site --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. Sphinx's extensions are a development extra."""
    pytest.importorskip("myst_nb", reason="the documentation extra is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, str(ROOT / "docs" / "build_site.py"), "--output", str(folder / "html")]
    command += ["--workspace", str(folder / "workspace")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return folder / "html"


def test_site_has_a_page_for_every_notebook(site):
    pages = [site / page.replace(".ipynb", ".html") for _, listed in builder.sidebar() for page in listed]
    assert [page for page in pages if not page.is_file()] == []


def test_site_shows_signatures_docstrings_and_stored_pictures(site):
    config = (site / "00_config.html").read_text(encoding="utf8")
    assert 'id="medai_nb.config.load_config"' in config
    assert "A stable hash of settings" in config
    with_pictures = [page for page in site.rglob("*.html") if "_images/" in page.read_text(encoding="utf8")]
    assert with_pictures
    for page in with_pictures:
        for name in re.findall(r'src="(?:\.\./)*(_images/[^"]+)"', page.read_text(encoding="utf8")):
            assert (site / name).is_file()


def test_site_asks_no_other_host_for_anything(site):
    """Pages load in a closed network: scripts, styles, fonts and pictures are all in the folder."""
    asked = {}
    for page in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = page.read_text(encoding="utf8")
        text = re.sub(r'<link rel="(?:canonical|index|search|next|prev)"[^>]*>', "", text)
        hosts = re.findall(r'<(?:script|img|iframe|source)[^>]*\ssrc="(?:https?:)?//([^/"]+)', text)
        hosts += re.findall(r'<link[^>]*\shref="(?:https?:)?//([^/"]+)', text)
        hosts += re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//([^/\"')]+)", text)
        if hosts:
            asked[page.name] = hosts
    assert asked == {}


def test_site_can_be_searched_offline(site):
    index = (site / "searchindex.js").read_text(encoding="utf8")
    names = json.loads(index.removeprefix("Search.setIndex(").removesuffix(")"))["docnames"]
    assert "00_config" in names and "tutorials/02_troubleshooting" in names


# --- Quarto ----------------------------------------------------------------------------------------


def test_a_missing_quarto_is_said_and_nothing_is_installed(monkeypatch, capsys):
    monkeypatch.setattr(builder.shutil, "which", lambda name: None)
    monkeypatch.setattr(builder.subprocess, "run", lambda *_, **__: pytest.fail("something was started"))
    assert builder.main(["quarto"]) == 1
    assert "quarto is not installed" in capsys.readouterr().err
