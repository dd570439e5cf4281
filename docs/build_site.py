"""Documentation from the notebooks: the site, the README, and real Quarto where it is installed.

    python docs/build_site.py                  the site, by Sphinx, into _docs/ (warnings are errors)
    python docs/build_site.py readme           README.md from nbs/index.ipynb
    python docs/build_site.py readme --check   exit 1 when README.md is out of date
    python docs/build_site.py quarto           the site, by Quarto, into _docs/

Nothing is executed: the outputs stored in the notebooks are shown. The page list is the sidebar of _quarto.yml.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))
import reference

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "nbs"
PROJECT_PAGES = ["CONTRIBUTING.md", "CHANGELOG.md"]
README_NOTE = "<!-- Generated from nbs/index.ipynb by `make readme`: edit the notebook. -->"


class DocumentationError(Exception):
    """The documentation cannot be built; the message says which file is to be changed."""


def all_notebooks() -> list[str]:
    """Every notebook below nbs/, as a path relative to it."""
    paths = (path for path in NOTEBOOKS.rglob("*.ipynb") if not path.parent.name.startswith("."))
    return sorted(path.relative_to(NOTEBOOKS).as_posix() for path in paths)


def sidebar() -> list[tuple[str, list[str]]]:
    """(section, pages) in the order of _quarto.yml; pages are paths below nbs/."""
    website = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf8"))["website"]
    return [(part["section"], list(part["contents"])) for part in website["sidebar"]["contents"]]


def checked_sidebar(allow_missing: bool = False) -> list[tuple[str, list[str]]]:
    """The sidebar, when it and the notebooks agree. Raises DocumentationError where they differ."""
    sections, notebooks = sidebar(), all_notebooks()
    listed = [page for _, pages in sections for page in pages]
    missing = [page for page in listed if page not in notebooks]
    if allow_missing:
        print(f"pages that do not exist yet: {', '.join(missing) or 'none'}")
        sections = [(name, [page for page in pages if page in notebooks]) for name, pages in sections]
        return [(name, pages) for name, pages in sections if pages]
    problems = [f"_quarto.yml lists {page}, which is not in nbs/" for page in missing]
    problems += [
        f"nbs/{page} is not in the sidebar of _quarto.yml" for page in notebooks if page not in listed
    ]
    if problems:
        raise DocumentationError("; ".join(problems))
    return sections


def read_cells(page: str) -> list[dict]:
    """The cells of a notebook, each source as one string."""
    cells = json.loads((NOTEBOOKS / page).read_text(encoding="utf8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def split_directives(source: str) -> tuple[dict[str, str], str]:
    """nbdev's and Quarto's `#| name value` lines at the head of a cell, and the cell without them.

    `#| export` -> {"export": ""}; `#| echo: false` -> {"echo": "false"}."""
    directives: dict[str, str] = {}
    lines = source.splitlines()
    while lines and (match := re.match(r"#\s*\|\s*([\w-]+):?\s*(.*)", lines[0])):
        directives[match.group(1)] = match.group(2).strip()
        lines.pop(0)
    return directives, "\n".join(lines).strip("\n")


def relink(text: str, page: str, place: Callable[[str], str]) -> str:
    """Rewrite relative link targets of a page; `place` gets the target as a path from the project's root.

    Raises DocumentationError where a link leads neither to a file nor to a listed page."""
    listed = {listed_page for _, pages in sidebar() for listed_page in pages}

    def rewrite(match: re.Match) -> str:
        target, sign, anchor = match.group(2).partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match.group(0)
        path = os.path.normpath(os.path.join("nbs", os.path.dirname(page), target))
        if not (ROOT / path).exists() and path.removeprefix("nbs/") not in listed:
            raise DocumentationError(f"nbs/{page}: the link to '{target}' leads nowhere")
        return f"{match.group(1)}{place(path)}{sign}{anchor})"

    # Inline code may stand inside a link's text, so only fenced blocks are left alone.
    pieces = re.split(r"(^```.*?^```[ ]*$)", text, flags=re.S | re.M)
    return "".join(
        piece if index % 2 else re.sub(r"(\[[^\]]*\]\()([^)\s]+)\)", rewrite, piece)
        for index, piece in enumerate(pieces)
    )


def title_from_front_matter(source: str) -> str:
    """A Quarto front matter block as the heading and subtitle that every other notebook has."""
    values = yaml.safe_load(source.strip().strip("-")) or {}
    subtitle = values.get("subtitle") or values.get("description")
    return f"# {values.get('title', 'Untitled')}" + (f"\n> {subtitle}" if subtitle else "")


def admonitions(text: str) -> str:
    """Quarto callouts as MyST admonitions: `::: {.callout-note}` -> `:::{note}`."""
    return re.sub(r"^(:{3,})\s*\{\.callout-(\w+)[^}]*\}", r"\1{\2}", text, flags=re.M)


# --- the site --------------------------------------------------------------------------------------


def collect_modules(pages: list[str]) -> dict[str, reference.Module]:
    """Page -> module, for the pages that export one."""
    modules = {}
    for page in pages:
        codes = [split_directives(cell["source"]) for cell in read_cells(page) if cell["cell_type"] == "code"]
        name = next((found["default_exp"] for found, _ in codes if "default_exp" in found), None)
        if name is None:
            continue
        module = modules[page] = reference.Module(f"medai_nb.{name}", page)
        for directives, source in codes:
            if "export" in directives:
                module.summaries |= reference.summaries(source)
    return modules


def shown_outputs(cell: dict) -> list[dict]:
    """Stored outputs without widget state, which needs a running kernel."""
    outputs = []
    for output in cell["outputs"]:
        if "data" in output:
            data = {kind: value for kind, value in output["data"].items() if "widget" not in kind}
            if not data:
                continue
            output = output | {"data": data}
        outputs.append(output)
    return outputs


def markdown_cell(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def output_text(cell: dict) -> str:
    """What an `output: asis` cell printed or displayed, as Markdown."""
    parts = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        parts.append("".join(output.get("text") or data.get("text/markdown") or data.get("text/plain") or ""))
    return "\n\n".join(parts)


def stage_code(cell: dict, section: str, targets: dict[str, str], seen: set[str]) -> list[dict]:
    """The cells that the site shows for one code cell."""
    directives, source = split_directives(cell["source"])
    if {"hide", "default_exp"} & directives.keys() or not source:
        return []
    exported = bool({"export", "exports", "exporti"} & directives.keys())
    if exported and reference.is_import_only(source):
        return []
    if directives.get("output") == "asis":
        return [markdown_cell(output_text(cell))]
    tags = [tag for tag in cell["metadata"].get("tags", []) if tag == "parameters"]
    if directives.get("echo") == "false" or "hide_input" in directives:
        tags.append("remove-input")
    if directives.get("output") == "false" or "hide_output" in directives:
        tags.append("remove-output")
    staged = []
    if exported:
        tags.append("hide-input")
        entries = reference.cell_reference(source, targets, seen)
        staged += [markdown_cell(entries)] if entries else []
    elif directives.get("code-fold") == "true":
        tags.append("hide-input")
    metadata = {"tags": tags, "mystnb": {"image": {"alt": f"Figure: {section}"}}}
    outputs = shown_outputs(cell)
    code = {"cell_type": "code", "metadata": metadata, "source": source, "outputs": outputs}
    return [*staged, code | {"execution_count": None}]


def stage_page(page: str, module: reference.Module | None, targets: dict[str, str]) -> dict:
    """The notebook as the site shows it."""
    cells, seen, section = [], set(), page
    for cell in read_cells(page):
        source = cell["source"]
        if cell["cell_type"] == "code":
            cells += stage_code(cell, section, targets, seen)
            continue
        if cell["cell_type"] == "raw":
            source = title_from_front_matter(source)
        headings = re.findall(r"^#+ (.+)$", source, flags=re.M)
        section = headings[-1].replace("`", "") if headings else section
        source = relink(admonitions(source), page, lambda path: site_path(path, page))
        cells.append(markdown_cell(reference.link_names(source, targets)))
    if page != "index.ipynb":
        cells[0]["source"] = insert_origin(cells[0]["source"], page, module)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    cells = [cell | {"id": f"cell-{number}"} for number, cell in enumerate(cells)]
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def insert_origin(source: str, page: str, module: reference.Module | None) -> str:
    """Say under a page's title which notebook and module it is. Raises DocumentationError without a title."""
    title = re.match(r"# .+\n?(\s*(^>.*\n?)+)?", source, flags=re.M)
    if title is None:
        raise DocumentationError(
            f"nbs/{page}: the first cell is to begin with '# Title' and '> what it is for'"
        )
    origin = f"\n\n{{.page-source}}\nNotebook `nbs/{page}`"
    if module:
        origin += f", module `{module.name}`\n\n```{{py:module}} {module.name}\n```"
    return title.group(0) + origin + "\n\n" + source[title.end() :]


def site_path(path: str, page: str) -> str:
    """A path from the project's root as the site's page at `page` links to it."""
    if path in PROJECT_PAGES:
        place = path
    elif path.startswith("nbs/") and path.endswith(".ipynb"):
        place = path.removeprefix("nbs/")
    else:
        raise DocumentationError(
            f"nbs/{page}: '{path}' is no page of the site: name the file instead of linking it"
        )
    return os.path.relpath(place, os.path.dirname(page) or ".")


def reference_page(modules: dict[str, reference.Module], targets: dict[str, str]) -> str:
    """One page with every public name and what it does."""
    lines = ["# Reference", "> Every public name, by module", ""]
    for page, module in modules.items():
        lines += [f"## {module.name}", "", f"[Notebook](<{page}>)", ""]
        for name, summary in module.summaries.items():
            text = reference.docstring_markdown(summary, targets)
            lines.append(f"- {{py:obj}}`{name} <{module.name}.{name}>`" + (f": {text}" if text else ""))
        lines.append("")
    return "\n".join(lines)


def page_tree(sections: list[tuple[str, list[str]]]) -> str:
    """The hidden tables of contents that make Sphinx's sidebar."""
    sections = [*sections, ("Project", ["reference.md", *PROJECT_PAGES])]
    trees = []
    for name, pages in sections:
        entries = "\n".join(page.rpartition(".")[0] for page in pages if page != "index.ipynb")
        trees.append(f"```{{toctree}}\n:hidden:\n:caption: {name}\n:maxdepth: 1\n\n{entries}\n```")
    return "\n\n".join(trees)


def stage_site(sections: list[tuple[str, list[str]]], folder: Path) -> None:
    """Write what Sphinx reads."""
    pages = [page for _, pages in sections for page in pages]
    modules = collect_modules(pages)
    targets = reference.link_targets(list(modules.values()))
    for page in pages:
        notebook = stage_page(page, modules.get(page), targets)
        if page == "index.ipynb":
            notebook["cells"].append(markdown_cell(page_tree(sections)) | {"id": "page-tree"})
        place = folder / page
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf8")
    for page in PROJECT_PAGES:
        text = (ROOT / page).read_text(encoding="utf8")
        text = relink(text, f"../{page}", lambda path, page=page: site_path(path, page))
        (folder / page).write_text(text, encoding="utf8")
    (folder / "reference.md").write_text(reference_page(modules, targets), encoding="utf8")


def build_site(output: Path, workspace: Path, allow_missing: bool) -> int:
    """Build the site in `workspace` and put it at `output` when it is whole; Sphinx's exit status."""
    from sphinx.cmd.build import main as sphinx_build

    source, html = workspace / "source", workspace / "html"
    shutil.rmtree(workspace, ignore_errors=True)
    stage_site(checked_sidebar(allow_missing), source)
    strict = [] if allow_missing else ["-W", "--keep-going"]
    arguments = ["-q", "-b", "html", *strict, "-c", str(ROOT / "docs"), "-d", str(workspace / "doctrees")]
    status = sphinx_build([*arguments, str(source), str(html)])
    if status == 0:
        shutil.rmtree(output, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(html, output)
        print(f"documentation: {output / 'index.html'}")
    return status


# --- the README ------------------------------------------------------------------------------------


def readme_text() -> str:
    """README.md as nbs/index.ipynb gives it: prose, code and what the code printed."""
    parts = [README_NOTE]
    for cell in read_cells("index.ipynb"):
        directives, source = split_directives(cell["source"])
        if "hide" in directives or not source:
            continue
        if cell["cell_type"] == "markdown":
            parts.append(relink(source, "index.ipynb", lambda path: path))
            continue
        parts.append(f"```python\n{source}\n```")
        printed = output_text(cell).strip()
        parts += [f"```text\n{printed}\n```"] if printed else []
    return "\n\n".join(parts) + "\n"


def write_readme(check: bool) -> int:
    """Write README.md, or say whether it is what the notebook gives."""
    path = ROOT / "README.md"
    text = readme_text()
    if path.is_file() and path.read_text(encoding="utf8") == text:
        print("README.md is up to date")
        return 0
    if check:
        print(
            "README.md is not what nbs/index.ipynb gives: run `make readme`",
            file=sys.stderr,
        )
        return 1
    path.write_text(text, encoding="utf8")
    print("README.md written from nbs/index.ipynb")
    return 0


# --- Quarto ----------------------------------------------------------------------------------------


def build_with_quarto(output: Path) -> int:
    """The same pages by Quarto. nbdev_docs would try to install a missing Quarto, so it is looked for first."""
    if shutil.which("quarto") is None:
        print(
            "quarto is not installed: `python docs/build_site.py` builds the site without it", file=sys.stderr
        )
        return 1
    from nbdev.serve import proc_nbs

    checked_sidebar()
    processed = Path(proc_nbs(str(NOTEBOOKS), n_workers=0, force=True))
    status = subprocess.run(["quarto", "render", "--no-cache"], cwd=processed).returncode
    if status == 0:
        shutil.rmtree(output, ignore_errors=True)
        shutil.move(processed / "_docs", output)
    return status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["site", "readme", "quarto"], default="site")
    parser.add_argument("--output", type=Path, default=ROOT / "_docs", help="the site's folder")
    parser.add_argument(
        "--workspace", type=Path, default=ROOT / "build" / "site", help="emptied, then worked in"
    )
    parser.add_argument("--check", action="store_true", help="readme: compare, write nothing")
    parser.add_argument(
        "--allow-missing", action="store_true", help="site: pages may be missing, warnings too"
    )
    options = parser.parse_args(arguments)
    try:
        if options.what == "readme":
            return write_readme(options.check)
        if options.what == "quarto":
            return build_with_quarto(options.output)
        return build_site(options.output.resolve(), options.workspace.resolve(), options.allow_missing)
    except DocumentationError as error:
        print(f"documentation: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
