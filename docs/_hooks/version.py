"""Says at the foot of every page which version it describes."""

import tomllib
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig, **_: Any) -> MkDocsConfig:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.copyright = (
        f"{project['name']} {project['version']}, licensed under {project['license']}"
    )
    return config
