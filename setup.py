"""What pyproject.toml cannot say: files that lie elsewhere in a wheel than here.

`secateur.py` becomes the package `secateur`, since type checkers believe the types of packages alone (py.typed). The
demo's config goes into it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Also moves the module into its package. An editable installation leaves everything where it is."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        built = Path(self.build_lib)
        package = built / "secateur"
        package.mkdir(exist_ok=True)
        (built / "secateur.py").replace(package / "__init__.py")
        (package / "py.typed").touch()
        shutil.copyfile("configs/demo.yaml", package / "demo.yaml")


setup(cmdclass={"build_py": BuildPy})
