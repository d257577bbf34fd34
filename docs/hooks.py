"""Pages of the site that stand elsewhere in the repository: CONTRIBUTING.md, CHANGELOG.md and READMEs of experiments.

Pages of docs/ link to them as the repository does (`../experiments/faults/README.md`), so that the links work in both.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "experiments/*/README.md", "experiments/*/figures/*.png", "colabs/*.ipynb")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return markdown.replace("](../", "](") if Path(page.file.abs_src_path).parent == ROOT / "docs" else markdown
