"""Which packages are installed; everything else about the project is said in pyproject.toml.

`recipes/` stands at the top of the checkout, where people look for it, and travels inside the
package as `medm/recipes`.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["medm", "medm.*"]), "medm.recipes"],
    package_dir={"medm.recipes": "recipes"},
)
