"""The reference: signatures and docstrings of what notebooks export, read without importing anything."""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


@dataclass
class Module:
    """A library module: its name, its page, and the first docstring line of each public name."""

    name: str
    page: str
    summaries: dict[str, str] = field(default_factory=dict)


def public_definitions(body: list[ast.stmt]) -> Iterator[Definition]:
    """Functions and classes whose names have no leading underscore; `__call__` is a public name too."""
    for node in body:
        if isinstance(node, Definition) and (not node.name.startswith("_") or node.name == "__call__"):
            yield node


def split_code(text: str) -> list[tuple[bool, str]]:
    """Markdown in pieces of (is it code?, text): fenced blocks and inline code are not prose."""
    pieces = re.split(r"(^(?:```+|~~~+)[^\n]*\n.*?^(?:```+|~~~+)[ ]*$|`+[^`\n]+`+)", text, flags=re.S | re.M)
    return [(index % 2 == 1, piece) for index, piece in enumerate(pieces) if piece]


def link_targets(modules: list[Module]) -> dict[str, str]:
    """What prose may say -> full name, for public names that mean one thing.

    Names that look like code (`load_env`, `RunConfig`) are linked as they are; ordinary words (`train` is
    also a split) only when they are written as a call, `train()`."""
    homes: dict[str, list[str]] = {}
    for module in modules:
        for name in module.summaries:
            homes.setdefault(name, []).append(f"{module.name}.{name}")
    targets = {}
    for name, full_names in homes.items():
        if len(full_names) == 1:
            targets[f"{name}()"] = full_names[0]
            if "_" in name or name != name.lower():
                targets[name] = full_names[0]
    return targets


def link_names(text: str, targets: dict[str, str]) -> str:
    """Turn `name` in prose into a link to its reference; headings and link texts stay as they are."""
    linked, line = [], ""
    for is_code, piece in split_code(text):
        name = piece.strip("`")
        in_link_text = line.rfind("[") > line.rfind("]")
        if is_code and name in targets and not line.startswith("#") and not in_link_text:
            linked.append(f"{{py:obj}}`{name} <{targets[name]}>`")
        else:
            linked.append(piece)
        line = (line + piece).rpartition("\n")[2]
    return "".join(linked)


def parameter_list(text: str) -> str:
    """Lines of the form `name  meaning` as a Markdown list; lines that are indented below one belong to it."""
    lines, listed = [], False
    for line in text.splitlines():
        item = re.fullmatch(r"(\w[\w, ]*?) {2,}(\S.*)", line)
        if item:
            lines += [*([] if listed else [""]), f"- `{item[1]}`: {item[2]}"]
            listed = True
        elif listed and line.startswith(" "):
            lines.append(f"  {line.strip()}")
        else:
            lines += [*([""] if listed else []), line]
            listed = False
    return "\n".join(lines)


def docstring_markdown(docstring: str | None, targets: dict[str, str]) -> str:
    """A docstring as Markdown: parameters are a list, and `<name>` outside code is text, not a tag."""
    text = parameter_list(inspect.cleandoc(docstring or ""))
    prose = (piece if is_code else piece.replace("<", "\\<") for is_code, piece in split_code(text))
    return link_names("".join(prose), targets)


def parameter_comments(node: Function, source: str) -> dict[str, str]:
    """Parameter -> the comment on its line, for signatures with one parameter a line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {
        token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT
    }
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    lines = [argument.end_lineno for argument in arguments]
    return {
        argument.arg: comments[argument.end_lineno]
        for argument in arguments
        if argument.end_lineno in comments
        and lines.count(argument.end_lineno) == 1
        and node.lineno < argument.end_lineno < node.body[0].lineno
    }


def signature(node: Function, bound: bool) -> str:
    """`(path: str = '.env') -> list[str]`; without `self` where the function is bound."""
    arguments = ast.parse(f"def shown({ast.unparse(node.args)}): ...").body[0].args
    if bound:
        (arguments.posonlyargs or arguments.args).pop(0)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(arguments)}){returns}"


def directive(kind: str, head: str, options: dict[str, str], body: str) -> str:
    """A MyST directive; its fence is longer than any fence inside it."""
    longest = max((len(fence) for fence in re.findall(r"^`{3,}", body, flags=re.M)), default=2)
    fence = "`" * (longest + 1)
    lines = [
        f"{fence}{{{kind}}} {head}",
        *(f":{name}: {json.dumps(value)}" for name, value in options.items()),
    ]
    return "\n".join([*lines, "", body, fence])


def function_reference(node: Function, source: str, targets: dict[str, str], in_class: bool = False) -> str:
    """The entry of a function, a method or a property."""
    decorators = {
        ast.unparse(decorator).partition("(")[0].rpartition(".")[2] for decorator in node.decorator_list
    }
    body = docstring_markdown(ast.get_docstring(node), targets)
    comments = parameter_comments(node, source)
    if comments:
        body += "\n\n" + "\n".join(f":param {name}: {text}" for name, text in comments.items())
    if in_class and decorators & {"property", "cached_property"}:
        return directive(
            "py:property", node.name, {"type": ast.unparse(node.returns)} if node.returns else {}, body
        )
    options = {"async": ""} if isinstance(node, ast.AsyncFunctionDef) else {}
    options |= {name: "" for name in ("classmethod", "staticmethod") if name in decorators}
    bound = in_class and "staticmethod" not in decorators
    return directive(
        "py:method" if in_class else "py:function", node.name + signature(node, bound), options, body
    )


def class_reference(node: ast.ClassDef, source: str, targets: dict[str, str]) -> str:
    """The entry of a class: its docstring, its documented fields, its public methods."""
    constructor = next(
        (item for item in node.body if isinstance(item, Function) and item.name == "__init__"), None
    )
    head = node.name + (signature(constructor, bound=True) if constructor else "")
    parts = [docstring_markdown(ast.get_docstring(node), targets)]
    bases = [f"`{base}`" for base in map(ast.unparse, node.bases) if base in targets]
    if bases:
        parts.append(link_names(f"Based on {', '.join(bases)}.", targets))
    following = [*node.body[1:], None]
    for item, after in zip(node.body, following, strict=True):
        if isinstance(item, ast.AnnAssign) and not ast.unparse(item.target).startswith("_"):
            parts.append(field_reference(item, after, targets))
    for item in public_definitions(node.body):
        if isinstance(item, Function) and ast.get_docstring(item):
            parts.append(function_reference(item, source, targets, in_class=True))
    return directive("py:class", head, {}, "\n\n".join(part for part in parts if part))


def field_reference(item: ast.AnnAssign, after: ast.stmt | None, targets: dict[str, str]) -> str:
    """The entry of a typed field; the string under it is its documentation."""
    # The side list of a page names classes and functions; their many fields would bury them.
    options = {"type": ast.unparse(item.annotation), "no-contents-entry": ""}
    if item.value:
        options["value"] = ast.unparse(item.value)
    is_documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    text = after.value.value if is_documented and isinstance(after.value.value, str) else ""
    return directive("py:attribute", ast.unparse(item.target), options, docstring_markdown(text, targets))


def cell_reference(source: str, targets: dict[str, str], seen: set[str]) -> str:
    """The entries of everything public that an exported cell defines; `seen` keeps names from coming twice."""
    entries = []
    for node in public_definitions(ast.parse(source).body):
        if node.name not in seen:
            seen.add(node.name)
            make = class_reference if isinstance(node, ast.ClassDef) else function_reference
            entries.append(make(node, source, targets))
    return "\n\n".join(entries)


def is_import_only(source: str) -> bool:
    """Whether a cell does nothing but import."""
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body)


def summaries(source: str) -> dict[str, str]:
    """Public name -> first line of its docstring."""
    nodes = public_definitions(ast.parse(source).body)
    return {node.name: (ast.get_docstring(node) or "").partition("\n")[0] for node in nodes}
