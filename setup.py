"""Packaging, read from settings.ini with the standard library alone."""

import configparser
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
parser.read(ROOT / "settings.ini", encoding="utf8")
settings = parser["DEFAULT"]


def requirement_list(key: str) -> list[str]:
    """One requirement a line, or several separated by spaces."""
    return [item for line in settings.get(key, "").splitlines() for item in line.split() if item]


# "test_requirements" becomes the extra "test", and so on.
extras = {
    match.group(1): requirement_list(key)
    for key in settings
    if (match := re.fullmatch(r"(\w+)_requirements", key))
}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="MIT",
    keywords=settings["keywords"].split(),
    packages=find_packages(include=["medai_nb", "medai_nb.*"]),
    # jobs/ is a link to nbs/jobs: the stage notebooks travel inside the wheel.
    package_data={"medai_nb": ["configs/*", "configs/*/*", "jobs/*.ipynb", "assets/*", "assets/*/*"]},
    include_package_data=True,
    python_requires=">=" + settings["min_python"],
    install_requires=requirement_list("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": requirement_list("console_scripts")},
    zip_safe=False,
)
