"""What holds the project together: import directions, the README's commands, versions, and what no file may name."""

from __future__ import annotations

import ast
import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from pipeline.cli.evaluate import app as evaluate_app
from pipeline.cli.export import app as export_app
from pipeline.cli.train import app as train_app
from pipeline.cli.view import app as view_app
from pipeline.training.config import TrainConfig
from tests.imports import circles, import_graph
from tests.prose import Figures, document_prose, figures, listing, project_prose, python_prose
from tests.repository import REPOSITORY

# Packages of this project that each package may import; imports point one way.
OWN = {
    "wsi": {"wsi"},
    "models": {"models", "wsi"},  # of wsi only the base error, see below
    "pipeline": {"pipeline", "models", "wsi"},
    "flows": {"flows", "pipeline", "models", "wsi"},
}
TORCH = {"torch", "torchvision", "timm", "segmentation_models_pytorch", "pytorch_grad_cam"}
READERS = {"openslide", "tiffslide"}
ORCHESTRATION = {"dask", "distributed", "prefect", "prefect_dask"}
# Libraries that stay out of each package.
FOREIGN = {
    "wsi": TORCH | ORCHESTRATION,
    "models": READERS | ORCHESTRATION,
    "pipeline": {"prefect", "prefect_dask"},
    "flows": TORCH | READERS,
}


ROOMS = (
    "errors", "limits", "config", "files", "progress", "console", "results", "formats", "pages", "slide", "workers",
    "batch", "training", "web", "labeling", "viewing", "checks", "cli",
)  # fmt: skip
"""Files and folders of `pipeline/`, from the bottom up: each imports only from itself and from those before it."""


def imported(path: Path) -> set[str]:
    """The top-level names that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names.add((node.module or "").partition(".")[0])
    return names


def test_tests_import_nothing_from_other_test_modules() -> None:
    wrong = [
        f"{path}: {module}"
        for path in (REPOSITORY / "tests").rglob("*.py")
        for module in re.findall(
            r"^\s*(?:from|import) (tests[\w.]*\.test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE
        )
    ]
    assert wrong == [], "move what several test modules use to a module of its own"


def test_the_path_of_the_repository_is_computed_in_one_module() -> None:
    own_path = re.compile(r"__file__\)[.\w()]*\.parent(?:s\b|\.parent\b)")
    found = {path.name for path in (REPOSITORY / "tests").rglob("*.py") if own_path.search(path.read_text("utf-8"))}
    assert found == {"repository.py"}


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [block.strip() for block in blocks]


def project_files() -> list[Path]:
    """Text files of the project, without what tools leave beside them."""
    roots = ("wsi", "models", "pipeline", "flows", "tests", "docs", "deploy", "bench", ".ci")
    files = [
        p for root in roots for p in (REPOSITORY / root).rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    files += [p for p in REPOSITORY.iterdir() if p.is_file() and p.name != ".git"]  # a file in a worktree
    ends = {"", ".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".csv", ".sh", ".groovy"}
    return [p for p in files if p.suffix in ends]


@pytest.mark.parametrize("package", list(OWN))
def test_imports_point_one_way(package: str) -> None:
    modules = sorted((REPOSITORY / package).rglob("*.py"))
    assert modules
    for module in modules:
        names = imported(module)
        assert names & set(OWN) <= OWN[package], f"{module} imports against the direction"
        assert not names & FOREIGN[package], f"{module} imports what {package} stays free of"


def test_imports_have_no_circle() -> None:
    assert circles(import_graph()) == []


def test_a_circle_under_type_checking_is_found(tmp_path: Path) -> None:
    (tmp_path / "wsi").mkdir()
    (tmp_path / "wsi" / "a.py").write_text("if TYPE_CHECKING:\n    from wsi.b import B\n")
    (tmp_path / "wsi" / "b.py").write_text("def f() -> None:\n    from wsi import a\n")
    assert circles(import_graph(tmp_path)) == [["wsi.a", "wsi.b", "wsi.a"], ["wsi.b", "wsi.a", "wsi.b"]]


def test_models_import_only_the_base_error_from_wsi() -> None:
    graph = import_graph()
    targets = {target for module in graph if module.startswith("models") for target in graph[module]}
    assert {target for target in targets if target.startswith("wsi")} == {"wsi.errors"}
    assert graph["wsi.errors"] == set()


def test_every_file_of_pipeline_lives_in_a_room() -> None:
    names = {
        path.stem
        for path in (REPOSITORY / "pipeline").iterdir()
        if path.name not in ("__init__.py", "__pycache__", "py.typed")
    }
    assert names <= set(ROOMS)
    loose = {path.stem for path in (REPOSITORY / "pipeline").glob("*.py")} - {"__init__"}
    assert loose <= {"errors", "limits", "config", "files", "progress", "console"}


def test_a_room_of_pipeline_imports_only_from_rooms_before_it() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in import_graph().items()
        for target in targets
        if module.startswith("pipeline.")
        and target.startswith("pipeline.")
        and ROOMS.index(target.split(".")[1]) > ROOMS.index(module.split(".")[1])
    ]
    assert wrong == []


def test_readme_has_two_commands_of_one_line_that_make_their_environment() -> None:
    commands = readme_commands()
    assert len(commands) == 2
    assert all("\n" not in command and command.startswith("python3 -m venv .venv && ") for command in commands)


def test_ci_runs_the_commands_of_the_readme_word_for_word() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    assert all(command in script for command in readme_commands())


@pytest.mark.parametrize("command", [view_app, export_app])
def test_viewing_docs_have_every_option_of_the_commands(command: typer.Typer) -> None:
    text = (REPOSITORY / "docs" / "viewing.md").read_text(encoding="utf-8")
    group = get_command(command)
    commands = list(getattr(group, "commands", {}).values()) or [group]
    offered = {name for one in commands for parameter in one.params for name in parameter.opts if name.startswith("--")}
    assert {name for name in offered - {"--help", "--version"} if not re.search(rf"{name}\b", text)} == set()


def documented_in_code(table_head: str) -> dict[str, str]:
    """First and second column of a table of docs/training.md: names in backticks, and what is said of the default."""
    text = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    table = text[text.index(f"| {table_head} |") :].partition("\n\n")[0]
    found: dict[str, str] = {}
    for line in table.splitlines()[2:]:
        names, default = (cell.strip() for cell in line.split("|")[1:3])
        listed = re.findall(r"`([^`]+)`", names)
        parts = default.split(", ") if len(listed) > 1 else [default]
        found |= dict(zip(listed, parts * (len(listed) // len(parts)), strict=True))
    return found


@pytest.mark.parametrize(("table", "command"), [("option", train_app), ("evaluation option", evaluate_app)])
def test_training_docs_have_every_option_of_both_commands(table: str, command: typer.Typer) -> None:
    parameters = get_command(command).params
    offered = {name for one in parameters for name in (one.opts if one.param_type_name == "option" else [one.name])}
    assert set(documented_in_code(table)) == offered - {"--help", "--version"}


def test_training_docs_have_every_setting_with_its_default() -> None:
    documented = documented_in_code("setting")
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    assert set(documented) == set(defaults)
    in_words = {"name", "encoder", "mpp", "classifier_mpp", "frozen"}
    for name, default in defaults.items():
        if name in in_words:
            continue
        said = documented[name].strip("`")
        expected = default if isinstance(default, str) else said
        assert said == expected
        if isinstance(default, bool):
            assert said == str(default).lower()
        elif isinstance(default, tuple):
            assert tuple(float(part) for part in said.split(", ")) == default
        elif not isinstance(default, str):
            assert float(said) == default


def test_changelog_begins_with_the_version_of_the_project() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    head = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert head is not None
    assert head[1] == version


def test_constraints_pin_every_dependency_exactly() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {normal(line.partition("==")[0]) for line in lines}
    asked = project["dependencies"] + project["optional-dependencies"]["test"]
    assert {normal(re.split(r"[\[<>=!~; ]", one)[0]) for one in asked} <= pinned


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_no_file_names_a_package_registry_or_a_path_of_the_machine_it_was_written_on() -> None:
    hosts = r"(?:pypi|pythonhosted|npmjs|deb\.debian)\.(?:org|com)"
    paths = r"(?<![\w.~$}/-])/(?:wo[r]k|roo[t]|opt/ven[v]|tm[p])/"
    for path in project_files():
        found = re.search(f"{hosts}|{paths}", path.read_text(encoding="utf-8"))
        assert found is None, f"{path}: {found}"


# Limits of old prose patterns. They may only fall: lower them when `python -m tests.prose` prints less.
MOST_WHERE_SHARE = 0.08
MOST_IS_NO = 30


@pytest.fixture(scope="module")
def prose() -> Figures:
    return figures(project_prose())


@pytest.mark.full
def test_where_does_not_replace_if_and_when_more_often_than_before(prose: Figures) -> None:
    assert prose.where_share <= MOST_WHERE_SHARE, listing(prose.where)


@pytest.mark.full
def test_is_no_does_not_replace_is_not_more_often_than_before(prose: Figures) -> None:
    assert len(prose.is_no) <= MOST_IS_NO, listing(prose.is_no)


def test_prose_is_comments_strings_test_names_and_documents_without_code() -> None:
    source = '''
def test_where_it_is() -> None:
    """Where is it?

    It is no longer there, if it was no slide.
    """
    where = f"{where if where else when}: where"  # when it is
'''
    found = figures(python_prose("a.py", source))
    assert [line.number for line in found.where] == [2, 3, 7]
    assert [line.number for line in found.is_no] == [5]
    assert found.conditions == 2
    document = "Where?\n\n    if code:\n```sh\nwhere x\n```\nThese are no commands.\n"
    found = figures(document_prose("a.md", document))
    assert [(line.number, line.text) for line in (*found.where, *found.is_no)] == [
        (1, "Where?"), (7, "These are no commands.")
    ]  # fmt: skip
    assert found.conditions == 0
