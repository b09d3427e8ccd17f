"""Hand the values of settings.ini (nbdev's file) to setuptools; all that is fixed is in pyproject.toml."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

setup(
    version=settings["version"],
    description=settings["description"],
    author=settings["author"],
    author_email=settings["author_email"],
    keywords=settings["keywords"].split(),
    url=settings["git_url"],
    packages=[settings["lib_path"]],
    package_data={settings["lib_path"]: ["weights/**/*", "results/**/*"]},
    install_requires=settings["requirements"].split(),
    extras_require={"dev": settings["dev_requirements"].split()},
    entry_points={"nbdev": ["diffcourse=diffcourse._modidx:d"], "console_scripts": settings["console_scripts"].split()},
)
