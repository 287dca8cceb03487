"""The house keeps its shape: imports go down, names are words, and nothing grows without being seen."""

import ast
import functools
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "peftc"
SOURCE = PACKAGE / "docs" / "source"  # what writes the pages: it looks at every room and is none; no wheel holds it
FILES = sorted(file for file in PACKAGE.rglob("*.py") if SOURCE not in file.parents)
LAYERS = [  # top to bottom; no import climbs
    {"transformers", "lm_eval", "timm"},  # doors: what users import
    {"runtimes"},
    {"cli", "__main__"},
    {"steps"},
    {"pruning"},
    {"factors"},
    {"calibration", "training", "formats"},
    {"tasks"},
    {"data", "measure"},
    {"models"},
    {"methods"},
    {"nn"},
    {"plans", "pages"},
    {"project", "report"},
    {"store", "processes", "options"},
    {"errors", "progress", "version"},
]
BANNED_FILES = {"utils", "util", "common", "core", "base", "helpers", "misc"}
BANNED_STARTS = ("do_", "handle_", "process_")
THEIRS = {"process_weights_after_loading"}  # what another library calls by this name
MODULE_LINES, FUNCTION_LINES, MEDIAN_LINES = 400, 60, 12


def part(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def layer(name: str) -> int:
    found = [index for index, names in enumerate(LAYERS) if name in names]
    assert found, f"`peftc.{name}` has no layer: add it to LAYERS, as low as it can stand"
    return found[0]


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def own_imports(file: Path) -> Iterator[tuple[int, str]]:
    """Yield line and first part of every import of this package, wherever it stands."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom) and node.module == "peftc":
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peftc."):
            yield node.lineno, str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name.split(".")[1]) for a in node.names if a.name.startswith("peftc."))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_only_go_down(file: Path) -> None:
    if file == PACKAGE / "__init__.py":
        return  # the door: its names are found on first use
    up = [f"line {line}: peftc.{name}" for line, name in own_imports(file) if layer(name) < layer(part(file))]
    assert not up, f"`{file.relative_to(PACKAGE)}` imports from a layer above its own: {up}"


def functions(file: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef):
            yield node


def test_names_are_words() -> None:
    files = [str(file.relative_to(PACKAGE)) for file in FILES if file.stem.lstrip("_") in BANNED_FILES]
    bad = [
        f"{file.relative_to(PACKAGE)}:{function.lineno} {function.name}"
        for file in FILES
        for function in functions(file)
        if function.name.lstrip("_").startswith(BANNED_STARTS) or function.name.endswith("_impl")
        if function.name not in THEIRS
    ]
    assert not files + bad


def test_every_step_is_a_command_of_its_name() -> None:
    """`push` is what stands behind ``--push-to-hub``."""
    steps = {file.stem: file for file in (PACKAGE / "steps").glob("*.py") if file.stem not in ("__init__", "push")}
    commands = {function.name for file in (PACKAGE / "cli").glob("*.py") for function in functions(file)}
    assert steps.keys() <= commands
    assert [step for step, file in steps.items() if step not in {each.name for each in functions(file)}] == []


MODULES = {
    ".".join(("peftc", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in FILES
}


def module_imports(module: str) -> set[str]:
    """Return the modules of this package that one names, wherever and for whatever it does."""
    found = set()
    for node in ast.walk(tree(MODULES[module])):
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in MODULES else node.module for name in whole}
    return found & MODULES.keys() - {module}


def in_circles(names: dict[str, set[str]]) -> list[str]:
    """Return what names something that, in the end, names it again."""
    left = dict(names)
    while free := [name for name, there in left.items() if not there & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_neither_modules_nor_rooms_name_each_other_in_a_circle() -> None:
    """Imports for types alone count: they tie two files as firmly for who reads them."""
    modules = {module: module_imports(module) for module in MODULES}
    assert not in_circles(modules)
    rooms: dict[str, set[str]] = {}
    for module, names in modules.items():
        own = ".".join(module.split(".")[:2])
        rooms.setdefault(own, set()).update({".".join(name.split(".")[:2]) for name in names} - {own})
    assert not in_circles(rooms)


def test_nothing_is_handed_on_under_its_own_name() -> None:
    """A name has one home; `peftc` itself is the door."""
    handed = [
        f"{file.relative_to(PACKAGE)}:{node.lineno} {alias.name}"
        for file in FILES
        if file != PACKAGE / "__init__.py"
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    ]
    assert not handed


def test_the_formatter_writes_every_line() -> None:
    """So a length is what one sees; `ruff format --check` of `make lint` says the rest."""
    kept = [
        str(file.relative_to(PACKAGE)) for file in FILES if re.search(r"#\s*fmt:", file.read_text(encoding="utf-8"))
    ]
    assert not kept


def exported(file: Path) -> list[str]:
    """Return the names in `__all__`."""
    for node in tree(file).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def test_no_room_hands_out_what_is_another_ones() -> None:
    foreign = [
        f"{file.relative_to(PACKAGE)} {alias.name}, of {node.module}"
        for file in FILES
        if file != PACKAGE / "__init__.py"
        for node in ast.walk(tree(file))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peftc.")
        for alias in node.names
        if (alias.asname or alias.name) in exported(file) and str(node.module).split(".")[1] != part(file)
    ]
    assert not foreign


def only_hands_on(function: ast.FunctionDef) -> bool:
    """Whether the whole body gives the function's own arguments, and all of them, as they are to one call."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if len(body) != 1 or not isinstance(body[0], ast.Return | ast.Expr) or not isinstance(body[0].value, ast.Call):
        return False
    own = {each.arg for each in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)}
    given = [*body[0].value.args, *(each.value for each in body[0].value.keywords)]
    names = [each.id for each in given if isinstance(each, ast.Name)]
    return bool(own) and isinstance(body[0].value.func, ast.Name) and len(names) == len(given) and set(names) == own


HANDS_ON = {"progress.py track": "what it calls is set by the program"}


def test_no_function_only_hands_its_arguments_on() -> None:
    """Of a method the signature is what there is to say: its settings are read from it."""
    found = [
        f"{file.relative_to(PACKAGE)} {function.name}"
        for file in FILES
        if file != PACKAGE / "__init__.py" and part(file) != "methods"
        for function in functions(file)
        if only_hands_on(function)
    ]
    assert found == list(HANDS_ON)


def body_lines(function: ast.FunctionDef) -> int:
    """Return the lines of a function without signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_modules_and_functions_stay_short() -> None:
    modules = {str(file.relative_to(PACKAGE)): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    lengths = {
        f"{file.relative_to(PACKAGE)}:{function.name}": body_lines(function)
        for file in FILES
        for function in functions(file)
    }
    print(
        f"{len(modules)} modules, {sum(modules.values())} lines, median function {statistics.median(lengths.values())}"
    )
    for name, lines in sorted({**modules, **lengths}.items(), key=lambda item: -item[1])[:12]:
        print(f"{lines:5d} {name}")
    assert not {name: lines for name, lines in modules.items() if lines > MODULE_LINES}
    assert not {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES}
    assert statistics.median(lengths.values()) <= MEDIAN_LINES


TESTS = sorted((PACKAGE.parent / "tests").rglob("*.py"))
PRIVATE = {  # what tests still look at inside, and why
    "closing._gaps": "which layers are neighbours is told apart in more cases than networks are at hand for",
    "closing._shapes": "as for `_gaps`, which reads them",
    "closing._site": "a report says where a map went, not by which factor it is scaled",
    "closing._tokens_that_count": "a mask that no report shows",
    "closing._fit": "on noise a whole run would be as quiet for other reasons",
    "evidence._flipping": "repeats that flip cannot be had on purpose",
    "step._is_measured": "a benchmark measures by itself",
    "work._by_member": "no other call corrects the biases of a stack with a mean that is known",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(file: Path) -> Iterator[str]:
    """Yield what a test imports, reads or patches of this package that is private there."""
    ours: set[str] = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peftc":
            yield from (f"{node.module}.{alias.name}" for alias in node.names if is_private(alias.name))
            ours |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            ours |= {alias.asname or "peftc" for alias in node.names if alias.name.split(".")[0] == "peftc"}
    made = {  # `work = Factoring(...)` is ours as well
        target.id
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and first_name(node.value) in ours
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and first_name(node) in ours | made:
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and first_name(node.func) in {"monkeypatch", "patch", "mocker"}:
            words = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            owner = node.args and first_name(node.args[0]) in ours | made
            yield from (word for word in words if (owner and is_private(word)) or re.match(r"peftc\..*\._[a-z]", word))


def first_name(node: ast.AST) -> str:
    """Return what an expression of names, attributes and calls begins with."""
    while not isinstance(node, ast.Name):
        inner = getattr(node, "value", None) or getattr(node, "func", None)
        if not isinstance(inner, ast.AST):
            return ""
        node = inner
    return node.id


def test_no_test_reaches_for_a_private_name() -> None:
    """Tests go through what is public, so that what is inside can be written anew."""
    found = {f"{file.name}: {name}" for file in TESTS for name in private_names(file)}
    assert not {each for each in found if each.split(": ")[1] not in PRIVATE}
    assert PRIVATE.keys() <= {each.split(": ")[1] for each in found}, "an exception that nothing needs"


def test_the_rule_on_private_names_sees_them(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(
        "from peftc.steps import demo\nfrom peftc.plans.plan import _shape, Plan\nimport peftc.report as told\n"
        "demo._write()\nmonkeypatch.setattr(demo, '_trained', 1)\nmonkeypatch.setattr('peftc.x._y', 1)\n"
        "plan = Plan()\nplan._inner\ntold._cell\nother._free\nmonkeypatch.setattr(other, '_free', 1)\n"
    )
    assert sorted(private_names(file)) == [
        "_trained",
        "demo._write",
        "peftc.plans.plan._shape",
        "peftc.x._y",
        "plan._inner",
        "told._cell",
    ]
