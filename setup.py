"""All metadata lives in pyproject.toml. Here is what it cannot say: recipes and texts go into the wheel."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("recipes", "examples/data")


class BuildWithRecipes(build_py):
    """Copies the folders of a clone into the package, where ``files.shipped`` looks for them first."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in SHIPPED:
                shutil.copytree(
                    folder, Path(self.build_lib, "elastic_megatron/shipped", folder), dirs_exist_ok=True
                )

    def get_source_files(self) -> list[str]:
        """A source distribution has them too, or no wheel could be built from it."""
        found = (path for folder in SHIPPED for path in Path(folder).rglob("*") if path.is_file())
        return [*super().get_source_files(), *map(str, found)]


setup(cmdclass={"build_py": BuildWithRecipes})
