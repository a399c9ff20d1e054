"""What the documents say is true: their Python runs, their links lead somewhere, their commands are CI's."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```", re.M | re.S)


def blocks(document: pathlib.Path, *languages: str):
    """(line number, text) of a document's fenced blocks in the given languages."""
    text = document.read_text()
    return [(text.count("\n", 0, m.start(2)), m[2]) for m in BLOCK.finditer(text) if m[1] in languages]


def each(documents):
    return pytest.mark.parametrize("document", documents, ids=lambda d: str(d.relative_to(ROOT)))


@each([d for d in DOCUMENTS if blocks(d, "python")])
def test_python_blocks_run(document):
    namespace = {"__name__": document.stem}
    for line, code in blocks(document, "python"):
        # The blank lines let a traceback name the document's own line.
        exec(compile("\n" * line + code, str(document), "exec"), namespace)


@each(DOCUMENTS)
def test_links_lead_somewhere(document):
    prose = BLOCK.sub("", document.read_text())
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("name", ["install", "example", "test"])
def test_ci_runs_the_commands_of_the_readme(name):
    command = re.search(rf"^readme_{name}='(.*)'$", (ROOT / ".ci/run").read_text(), re.M)[1]
    lines = {line.strip() for _, block in blocks(ROOT / "README.md", "sh", "bash") for line in block.splitlines()}
    assert command in lines, f".ci/run runs {command!r}, which README.md does not name"
