"""What MkDocs does besides mkdocs.yml: pages from outside docs/, links that hold in both places, formulas, one package
tree.

Formulas are written as GitHub reads them, ```math blocks and $`...`$ within a line, and become MathML, which browsers
draw without a script or a network.

The site mirrors the checkout with docs/ as its root: README.md is the home page, benchmarks/results, examples and the
rest keep their paths. So a page of docs/ links to `../examples/x.py` in the checkout and to `examples/x.py` here.
"""

import html
import re
import shutil
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CITATION.cff",
    "LICENSE",
    "benchmarks/results/*.md",
    "examples/*.py",
)
SOURCES = ROOT / "build" / "docs"  # `paths` of mkdocstrings in mkdocs.yml


def on_startup(**_: Any) -> None:
    """The two source folders side by side as they are imported: a static reader is blind to setuptools' mapping.

    At startup, as the reader forgets about folders that are not there when it is made.
    """
    shutil.rmtree(SOURCES, ignore_errors=True)
    for folder, package in (("optrelax", "optrelax"), ("layers", "optrelax/layers")):
        for path in (ROOT / folder).rglob("*.py"):
            target = SOURCES / package / path.relative_to(ROOT / folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            # "from optrelax import layers", for type checkers, would hide the folder from a static reader.
            text = re.sub(r"^    from optrelax import .*\n", "", path.read_text(), flags=re.MULTILINE)
            target.write_text(text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The README as home page, and what pages link to outside of docs/."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links of the checkout as links of the site."""
    if page.file.src_uri in ("index.md", "CONTRIBUTING.md"):
        markdown = markdown.replace("](docs/", "](")
    markdown = markdown.replace("](../README.md", "](index.md").replace("](../", "](")
    # A folder is no page: its first table stands for it.
    markdown = markdown.replace("](benchmarks/results)", "](benchmarks/results/lp_layers.md)")
    block = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return block.sub(lambda found: convert(found[1].strip(), display="block"), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas within a line, which Markdown has taken for code."""
    return re.sub(r"\$<code>([^<]+)</code>\$", lambda found: convert(html.unescape(found[1])), content)
