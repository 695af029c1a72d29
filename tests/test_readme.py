"""The README's promises that a test can hold; tests/test_docs.py holds those of all pages."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MOST_LINES = 130


def test_ci_runs_the_readmes_test_command():
    command = next(line for line in README.splitlines() if line.endswith("python -m pytest -q"))
    assert command in (ROOT / ".ci" / "run").read_text()


def test_the_start_page_has_the_readmes_commands_word_for_word():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    start = (ROOT / "docs" / "start.md").read_text().splitlines()
    assert len(commands) == 2
    assert [line for line in start if line.startswith("python3 -m venv")] == commands


def test_the_readme_is_short():
    assert len(README.splitlines()) <= MOST_LINES


def test_the_readme_leads_to_the_page_of_every_task():
    for page in (ROOT / "docs" / "tasks").glob("*.md"):
        if page.stem != "index":
            assert f"(docs/tasks/{page.name})" in README, page.name
