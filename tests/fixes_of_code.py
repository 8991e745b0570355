"""The fixes of all errors that the code can raise, read from its syntax trees, with a stand-in for each value."""

from __future__ import annotations

import ast
import itertools
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

COMMAND = "python step3_setup_configs.py --model 64ep"  # stands for the commands that the functions below return
VALUE = "\0"  # stands for a value until all of a text are numbered
#: Functions that return a command. Every other function is read.
COMMANDS = {"again", "install", "step_command", "rename_command", "in_own_venv", "interpreter"}
HANDED_ON = "failed[1]"  # the fix of another process, as is the attribute `fix` that of another error
ERROR = "LightningDiTError"

INTERPRETER = {"sys.executable", "shlex.quote(sys.executable)"}


class UnreadableError(ValueError):
    """An expression whose texts the tree does not show."""


@dataclass(frozen=True)
class Scope:
    """A function of a module, or the module outside of functions."""

    path: Path
    tree: ast.Module
    function: ast.FunctionDef | None = None


@dataclass(frozen=True)
class Expression:
    """An expression where it stands."""

    node: ast.expr
    scope: Scope


def stands_for(mark: str, text: str) -> str:
    """Return a text with `mark` for its values and commands, as in the catalogue."""
    return re.sub(rf"VALUE\d|{re.escape(COMMAND)}", mark, text)


class Code:
    """The syntax trees of some modules."""

    def __init__(self, paths: list[Path]) -> None:
        self.modules = [Scope(path, ast.parse(path.read_text(encoding="utf-8"))) for path in paths]
        self._open: set[ast.expr] = set()  # what is being read

    @cached_property
    def scopes(self) -> list[tuple[Scope, list[ast.AST]]]:
        """Every function and module with the nodes that belong to no function within it."""
        found = []
        for module in self.modules:
            functions = [node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef)]
            for function in (None, *functions):
                scope = Scope(module.path, module.tree, function)
                found.append((scope, list(_own_nodes(function or module.tree))))
        return found

    @cached_property
    def calls(self) -> dict[str, list[tuple[ast.Call, Scope]]]:
        """Every call by the name of its function; `super().__init__` by the name of the class around it."""
        found: dict[str, list[tuple[ast.Call, Scope]]] = {}
        for scope, nodes in self.scopes:
            for node in nodes:
                if isinstance(node, ast.Call):
                    name = _name(node.func)
                    if name == "__init__" and scope.function:
                        name = f"super of {_class_around(scope)}"
                    found.setdefault(name, []).append((node, scope))
        return found

    @cached_property
    def functions(self) -> dict[str, list[Scope]]:
        found: dict[str, list[Scope]] = {}
        for scope, _ in self.scopes:
            if scope.function:
                found.setdefault(scope.function.name, []).append(scope)
        return found

    @cached_property
    def makers(self) -> dict[str, int]:
        """The names of the calls that take a fix, with its position: classes, and `super of CLASS`."""
        found: dict[str, int] = {"fixed_by": 0, "_say_in_chinese": 0}
        classes = [node for module in self.modules for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
        found[ERROR] = 1
        while True:
            known = len(found)
            for node in classes:
                base = next((found[_name(base)] for base in node.bases if _name(base) in found), None)
                own = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
                names = [part.arg for part in own[0].args.args[1:]] if own else []
                if "fix" in names:
                    found[node.name] = names.index("fix")
                elif base is not None:
                    found[f"super of {node.name}" if own else node.name] = base
            if len(found) == known:
                return found

    def fixes(self) -> dict[str, str]:
        """Return each text of a fix, its values numbered, with the place of an error that has it.

        Raises:
            UnreadableError: names the place of a fix that cannot be read, or of an error without one.
        """
        found: dict[str, str] = {}
        for name, position in self.makers.items():
            for call, scope in self.calls.get(name, []):
                place = f"{scope.path.name}:{call.lineno}"
                try:
                    for text in sorted(self._argument(call, scope, position) - {""}):
                        numbers = itertools.count(1)
                        found.setdefault(re.sub(VALUE, lambda _, n=numbers: f"VALUE{next(n)}", text), place)
                except UnreadableError as error:
                    raise UnreadableError(f"{place}: {error}") from error
        return found

    def _argument(self, call: ast.Call, scope: Scope, position: int) -> set[str]:
        """Return the texts of the fix that a call is given."""
        starred = next((part for part in call.args if isinstance(part, ast.Starred)), None)
        if starred:
            rows = self._items(Expression(starred.value, scope))
            return set().union(*(self.texts(row[position]) for row in rows))
        given = [part.value for part in call.keywords if part.arg == "fix"] or call.args[position : position + 1]
        if given:
            return self.texts(Expression(given[0], scope))
        if _name(call.func) == ERROR:
            raise UnreadableError("the error has no fix")
        return set()

    def texts(self, expression: Expression) -> set[str]:
        """Return all texts that an expression can be; one that refers to itself adds none."""
        if expression.node in self._open:
            return set()
        self._open.add(expression.node)
        try:
            return self._texts(expression)
        finally:
            self._open.remove(expression.node)

    def _texts(self, expression: Expression) -> set[str]:
        node, scope = expression.node, expression.scope
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return {node.value}
        if isinstance(node, ast.JoinedStr):
            return self._joined([self._part(part, scope) for part in node.values])
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._joined([self.texts(Expression(side, scope)) for side in (node.left, node.right)])
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return {"", *self.texts(Expression(node.left, scope))}
        if isinstance(node, ast.IfExp):
            return self.texts(Expression(node.body, scope)) | self.texts(Expression(node.orelse, scope))
        if isinstance(node, ast.BoolOp):
            return set().union(*(self.texts(Expression(value, scope)) for value in node.values))
        if ast.unparse(node) == HANDED_ON or (isinstance(node, ast.Attribute) and node.attr == "fix"):
            return set()
        if ast.unparse(node) in INTERPRETER:
            return {"python"}
        if isinstance(node, ast.Call):
            return self._returned(node, scope)
        return set().union(*(self.texts(found) for found in self._meanings(expression)))

    def _part(self, part: ast.expr, scope: Scope) -> set[str]:
        """Return the texts of a part of a text; what cannot be read is a value."""
        node = part.value if isinstance(part, ast.FormattedValue) else part
        if isinstance(node, ast.Name) and node.id in _parameters(scope) and "fix" not in node.id:
            return {VALUE}
        try:
            return self.texts(Expression(node, scope)) or {VALUE}
        except UnreadableError:
            return {VALUE}

    def _joined(self, parts: list[set[str]]) -> set[str]:
        return {"".join(texts) for texts in itertools.product(*parts)}

    def _returned(self, call: ast.Call, scope: Scope) -> set[str]:
        """Return the texts that a call can return."""
        name, owner = _name(call.func), getattr(call.func, "value", None)
        if name in COMMANDS or (name == "join" and ast.unparse(owner) in ("shlex", "' && '")):
            return {COMMAND}
        if name == "get" and owner:
            defaults = [Expression(part, scope) for part in call.args[1:]]
            values = [row for rows in self._items(Expression(owner, scope)) for row in rows]
            return set().union(*(self.texts(value) for value in (*values, *defaults)))
        if name == "format" and owner:
            table = {part.arg: self._part(part.value, scope) for part in call.keywords if part.arg}
            for part in call.keywords:
                table |= {} if part.arg else self._entries(part.value, scope)
            return set().union(*(self._filled(text, table) for text in self.texts(Expression(owner, scope))))
        if isinstance(call.func, ast.Name) and scope.function and (local := self._assigned(name, scope)):
            return set().union(*(self._called(function) for function in local))
        if name not in self.functions:
            raise UnreadableError(
                f"{ast.unparse(call)} is unknown; add the function to COMMANDS if it returns a command"
            )
        return set().union(*(self.texts(found) for found in self._results(name)))

    def _called(self, function: Expression) -> set[str]:
        """Return the texts that a lambda returns, or a `partial` of a function."""
        node, scope = function.node, function.scope
        if isinstance(node, ast.Lambda):
            return self.texts(Expression(node.body, scope))
        if isinstance(node, ast.Call) and _name(node.func) == "partial":
            return self.texts(Expression(ast.Call(node.args[0], [], []), scope))
        raise UnreadableError(f"{ast.unparse(node)} is called")

    def _filled(self, text: str, table: dict[str, set[str]]) -> set[str]:
        """Return the texts of a template of `str.format`; a field that the table lacks is a value."""
        parts = []
        for literal, field, _, _ in string.Formatter().parse(text):
            parts += [{literal}, *([table.get(field, {VALUE})] if field else [])]
        return self._joined(parts)

    def _entries(self, table: ast.expr, scope: Scope) -> dict[str, set[str]]:
        """Return the texts of a local dictionary by key, those that are set later too."""
        found: dict[str, set[str]] = {}
        for node in _own_nodes(scope.function):
            if not isinstance(node, ast.Assign):
                continue
            target, value = node.targets[0], node.value
            if isinstance(target, ast.Subscript) and ast.unparse(target.value) == ast.unparse(table):
                pairs = [(target.slice, value)]
            elif isinstance(value, ast.Dict) and ast.unparse(target) == ast.unparse(table):
                pairs = [(key, part) for key, part in zip(value.keys, value.values, strict=True) if key]
            else:
                continue
            for key, part in pairs:
                found.setdefault(ast.literal_eval(key), set()).update(self._part(part, scope))
        return found

    def _results(self, name: str) -> Iterator[Expression]:
        """Yield what functions of this name return."""
        for scope in self.functions[name]:
            for node in _own_nodes(scope.function):
                if isinstance(node, ast.Return) and node.value:
                    yield Expression(node.value, scope)

    def _meanings(self, expression: Expression) -> list[Expression]:
        """Return the expressions that a name, an attribute or an item of a table stands for."""
        node, scope = expression.node, expression.scope
        found: list[Expression] = []
        if isinstance(node, ast.Subscript):
            place = node.slice.value if isinstance(node.slice, ast.Constant) else None
            for row in self._items(Expression(node.value, scope)):
                found += [row[place]] if isinstance(place, int) else row
        elif isinstance(node, ast.Name) and scope.function:
            given = self._given(node.id, scope) if node.id in _parameters(scope) else []
            found = given + self._assigned(node.id, scope)
        if not found and isinstance(node, ast.Name | ast.Attribute):
            found = self._constants(_name(node), scope)
        if not found:
            raise UnreadableError(f"{ast.unparse(node)} is no text that the code shows")
        return found

    def _given(self, parameter: str, scope: Scope) -> list[Expression]:
        """Return what a parameter is in all calls of its function, and its default."""
        function = scope.function
        named = [part.arg for part in (*function.args.posonlyargs, *function.args.args)]
        defaults = dict(zip(reversed(named), reversed(function.args.defaults), strict=False))
        defaults |= {
            part.arg: default
            for part, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
            if default
        }
        found = [Expression(defaults[parameter], scope)] if parameter in defaults else []
        position = named.index(parameter) - (named[0] in ("self", "cls")) if parameter in named else None
        name = _class_around(scope) if function.name == "__init__" else function.name
        for call, caller in self.calls.get(name, []):
            given = [part.value for part in call.keywords if part.arg == parameter]
            given += call.args[position : position + 1] if position is not None else []
            found += [Expression(part, caller) for part in given]
        return found

    def _assigned(self, name: str, scope: Scope) -> list[Expression]:
        """Return what a local name is assigned to, by `=` or by a loop."""
        found = []
        for node in _own_nodes(scope.function):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    found += self._unpacked(name, target, Expression(node.value, scope))
            elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value:
                found += self._unpacked(name, node.target, Expression(node.value, scope))
            elif isinstance(node, ast.AugAssign) and _binds(node.target, name):
                raise UnreadableError(f"{ast.unparse(node)} changes a fix; write it in one expression")
            elif isinstance(node, ast.For | ast.comprehension):
                for row in self._items(Expression(node.iter, scope)) if _binds(node.target, name) else ():
                    for item in row:
                        found += self._unpacked(name, node.target, item)
        return found

    def _unpacked(self, name: str, target: ast.expr, value: Expression) -> list[Expression]:
        """Return what `name` gets where `value` is assigned to `target`."""
        if isinstance(target, ast.Name):
            return [value] if target.id == name else []
        if not (isinstance(target, ast.Tuple) and _binds(target, name)):
            return []
        found = []
        for row in self._items(value):
            places = list(target.elts)
            for place, part in enumerate(places):
                if isinstance(part, ast.Starred):  # a list of the rest, which `_items` sees as one row
                    rest = ast.Tuple([item.node for item in row[place:]])
                    found += self._unpacked(name, part.value, Expression(rest, value.scope))
                else:
                    found += self._unpacked(name, part, row[place])
        return found

    def _constants(self, name: str, scope: Scope) -> list[Expression]:
        """Return a constant of the module, else those of this name in all modules: one of them is imported."""
        found = [
            Expression(node.value, module)
            for module in self.modules
            for node in module.tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name) and target.id == name
        ]
        own = [expression for expression in found if expression.scope.path == scope.path]
        return own or found

    def _items(self, expression: Expression) -> list[list[Expression]]:
        """Return the rows of items that a tuple, a list or a dictionary can be; of a dictionary its values."""
        node, scope = expression.node, expression.scope
        if isinstance(node, ast.Tuple | ast.List):
            return [[Expression(part, scope) for part in node.elts]]
        if isinstance(node, ast.Dict):
            values = []
            for key, value in zip(node.keys, node.values, strict=True):
                is_fromkeys = key is None and isinstance(value, ast.Call) and _name(value.func) == "fromkeys"
                values.append(Expression(value.args[1] if is_fromkeys else value, scope))
            return [values]
        if isinstance(node, ast.IfExp):
            return [row for part in (node.body, node.orelse) for row in self._items(Expression(part, scope))]
        if isinstance(node, ast.Call):
            name = _name(node.func)
            if name == "get":
                defaults = [row for part in node.args[1:] for row in self._items(Expression(part, scope))]
                tables = self._items(Expression(node.func.value, scope))
                return [row for table in tables for value in table for row in self._items(value)] + defaults
            if name in self.functions:
                return [row for result in self._results(name) for row in self._items(result)]
            raise UnreadableError(f"{ast.unparse(node)} is unknown")
        return [row for found in self._meanings(expression) for row in self._items(found)]


def _own_nodes(root: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below `root` outside of functions within it; lambdas count as its own."""
    for node in ast.iter_child_nodes(root):
        yield node
        if not isinstance(node, ast.FunctionDef):
            yield from _own_nodes(node)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def _parameters(scope: Scope) -> set[str]:
    if scope.function is None:
        return set()
    arguments = scope.function.args
    return {part.arg for part in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}


def _binds(target: ast.expr, name: str) -> bool:
    return any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(target))


def _class_around(scope: Scope) -> str:
    classes = [node for node in ast.walk(scope.tree) if isinstance(node, ast.ClassDef) and scope.function in node.body]
    return classes[0].name if classes else ""
