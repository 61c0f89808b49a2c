"""For the site: links to files of the repository that are not on it become plain names."""

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^]]+)\]\(((?:\.\./)+[^)#]+)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs for each page."""
    here = Path(page.file.abs_src_path).parent
    root = Path(config.docs_dir)

    def plain(found: re.Match[str]) -> str:
        inside = (here / found[2]).resolve().is_relative_to(root)
        return found[0] if inside else f"`{found[1]}`"

    return LINK.sub(plain, markdown)
