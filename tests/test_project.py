"""The repository keeps its promises: notebooks and modules, settings, sizes, commands named in the documentation."""

import ast
import configparser
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if not path.parent.name.startswith("."))
JOBS = sorted((ROOT / "nbs" / "jobs").glob("*.ipynb"))
PAGES_WITH_COMMANDS = ["README.md", "CONTRIBUTING.md"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def cells_of(path: Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def exported_module(path: Path) -> str | None:
    for cell in cells_of(path):
        if match := re.search(r"^#\s*\|\s*default_exp\s+(\S+)", cell["source"], flags=re.M):
            return match.group(1)
    return None


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf8")
    return parser["DEFAULT"]


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


# --- notebooks and modules -------------------------------------------------------------------------


def test_every_module_has_exactly_one_notebook():
    exported = [module for path in NOTEBOOKS if (module := exported_module(path))]
    assert len(exported) == len(set(exported)), f"two notebooks export one module: {sorted(exported)}"
    package = ROOT / "medai_nb"
    modules = {
        path.relative_to(package).with_suffix("").as_posix().replace("/", ".")
        for path in package.rglob("*.py")
        if path.name not in {"__init__.py", "_modidx.py"}
    }
    assert modules == set(exported)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_is_small_enough_to_read(path):
    assert len(cells_of(path)) <= 80
    assert path.stat().st_size <= 150 * 1024


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_begins_with_a_title_and_a_subtitle(path):
    assert re.match(r"# \S.*\n+> \S", cells_of(path)[0]["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_shows_no_failed_cell(path):
    failed = [
        output["ename"]
        for cell in cells_of(path)
        for output in cell.get("outputs", [])
        if output["output_type"] == "error"
    ]
    assert failed == []


@pytest.mark.parametrize("path", JOBS, ids=name_of)
def test_stage_notebook_has_one_parameters_cell(path):
    tags = [tag for cell in cells_of(path) for tag in cell["metadata"].get("tags", [])]
    assert tags.count("parameters") == 1


@pytest.mark.parametrize("path", JOBS, ids=name_of)
def test_stage_notebook_defines_no_library_code(path):
    source = "\n".join(cell["source"] for cell in cells_of(path) if cell["cell_type"] == "code")
    defined = [
        node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    assert defined == []


def test_the_six_stages_are_there_and_the_package_carries_them():
    names = [path.name for path in JOBS]
    assert [name[:2] for name in names] == ["01", "02", "03", "04", "05", "06"]
    assert sorted(path.name for path in (ROOT / "medai_nb" / "jobs").glob("*.ipynb")) == names


@pytest.mark.parametrize("path", sorted((ROOT / "medai_nb").rglob("*.py")), ids=name_of)
def test_module_imports_neither_nbdev_nor_fastcore(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert not imported & {"nbdev", "fastcore", "execnb"}


def test_modules_import_only_modules_with_smaller_numbers():
    number = {
        f"medai_nb.{module}": int(path.name[:2]) for path in NOTEBOOKS if (module := exported_module(path))
    }
    upward = []
    for path in NOTEBOOKS:
        for cell in cells_of(path):
            if exported_module(path) is None or not re.match(r"#\s*\|\s*exports?i?\b", cell["source"]):
                continue
            for node in ast.walk(ast.parse(cell["source"])):
                names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                upward += [
                    f"{path.name} imports {name}"
                    for name in names
                    if number.get(name, -1) > int(path.name[:2])
                ]
    # The one exception stands in CONTRIBUTING.md: the name `demo` is a source of records like a file.
    assert upward == ["10_records.ipynb imports medai_nb.demo_corpus"]


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, medai_nb; print(*{'torch', 'transformers', 'pandas', 'matplotlib'} & sys.modules.keys())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""


# --- what does not belong into a repository --------------------------------------------------------


def test_no_tracked_file_knows_the_machine_it_was_written_on():
    """Paths of one machine, and hosts of package indexes, work nowhere else."""
    # Put together here, so that this file does not contain what it looks for.
    patterns = [
        r"(?<![\w.])/(?:home|Users)/\w+/",
        r"(?<![\w.])/tmp/(?!\.\.\.)\w+",
        r"(?<![\w./-])/w" + r"ork/\w+",
        r"(?:pypi|files\.python" + r"hosted|registry\.npm" + r"js)\.(?:org|com)/",
        r"(?:--index" + r"-url|--extra-index" + r"-url|--trusted" + r"-host)\b",
    ]
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf8")
        except UnicodeDecodeError:
            continue
        for pattern in patterns:
            found += [f"{name_of(path)}: {match.group(0)}" for match in re.finditer(pattern, text)]
    assert found == []


def test_no_tracked_file_is_large():
    large = {
        name_of(path): path.stat().st_size for path in tracked_files() if path.stat().st_size > 5_000_000
    }
    assert large == {}


# --- settings --------------------------------------------------------------------------------------


def requirements_of(key: str) -> list[Requirement]:
    return [Requirement(item) for line in settings()[key].splitlines() for item in line.split()]


def constrained_versions() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf8").splitlines()
    pairs = (re.match(r"([\w.-]+)==([^\s;#]+)", line) for line in lines)
    return {match.group(1).lower().replace("_", "-"): match.group(2) for match in pairs if match}


@pytest.mark.parametrize("key", [key for key in settings() if key.endswith("requirements")])
def test_settings_and_constraints_agree(key):
    pinned = constrained_versions()
    for requirement in requirements_of(key):
        name = requirement.name.lower().replace("_", "-")
        assert name in pinned, f"{name} has no exact version in constraints.txt"
        assert requirement.specifier.contains(pinned[name], prereleases=True), (
            f"{requirement} against {pinned[name]}"
        )


def test_every_required_library_has_its_reason_in_contributing():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf8").lower()
    table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    missing = [item.name for item in requirements_of("requirements") if item.name.lower() not in table]
    assert missing == []


def test_quarto_and_settings_name_the_same_project():
    website = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf8"))["website"]
    assert website["title"] == settings()["title"]
    assert website["description"] == settings()["description"]
    assert website["repo-url"] == settings()["git_url"]
    assert (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_the_version_is_one_and_the_changelog_knows_it():
    version = settings()["version"]
    assert f'__version__ = "{version}"' in (ROOT / "medai_nb" / "__init__.py").read_text(encoding="utf8")
    assert version in (ROOT / "CHANGELOG.md").read_text(encoding="utf8")


# --- commands that the documentation names ---------------------------------------------------------


def documentation_texts() -> dict[str, str]:
    texts = {name: (ROOT / name).read_text(encoding="utf8") for name in PAGES_WITH_COMMANDS}
    for path in sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb")):
        texts[name_of(path)] = "\n".join(
            cell["source"] for cell in cells_of(path) if cell["cell_type"] == "markdown"
        )
    return texts


def named_commands(program: str) -> list[tuple[str, list[str]]]:
    """(where, words) of each command in a shell block or in inline code: `medai run a.yaml -p x=1`."""
    found = []
    for where, text in documentation_texts().items():
        blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
        inline = re.findall(rf"`({program} [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
        lines = [line for block in blocks for line in block.splitlines()] + inline
        for line in lines:
            words = shlex.split(line, comments=True)
            if words[:1] == [program] and len(words) > 1:
                found.append((where, words))
    return found


def test_every_make_target_in_the_documentation_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf8")
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.M))
    named = {(where, words[1]) for where, words in named_commands("make")}
    assert {target for _, target in named} >= {"quickstart", "test", "docs"}
    assert {(where, target) for where, target in named if target not in targets} == set()


def test_every_medai_command_in_the_documentation_is_accepted(capsys):
    """Command lines are parsed as they stand; a command that is only mentioned must exist."""
    from medai_nb.cli import build_parser

    named = named_commands("medai")
    assert {words[1] for _, words in named} >= {"run", "config", "doctor"}
    refused = []
    for where, words in named:
        arguments = words[1:] if len(words) > 2 else [words[1], "--help"]
        try:
            build_parser().parse_args(arguments)
        except SystemExit as stop:
            if stop.code:
                refused.append((where, " ".join(words), capsys.readouterr().err.splitlines()[-1]))
    assert refused == []


def test_settings_in_the_documentation_exist():
    """Every `-p key=value` and every YAML example is accepted by the configuration, or by that of the server."""
    from medai_nb.config import RunConfig, resolve_name
    from medai_nb.serving_config import ServingConfig

    for _, words in named_commands("medai"):
        for flag, value in zip(words, words[1:]):
            if flag == "-p":
                resolve_name(value.partition("=")[0])
    for where, text in documentation_texts().items():
        for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.S):
            settings = yaml.safe_load(block)
            read = ServingConfig.model_validate if set(settings) & {"host", "tls_cert"} else RunConfig.load
            assert read(settings), where
