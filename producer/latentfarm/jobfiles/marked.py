"""YAML whose every value knows where it stands, and that is not larger than it looks."""

from __future__ import annotations

from typing import Any

import yaml
from latentfarm_shared.parameters import short

from latentfarm.jobfiles.located import InvalidRows, RowError, Where

MAX_NODES, MAX_DEPTH = 100_000, 24


class _BoundedLoader(yaml.SafeLoader):
    """Reads no more than so many values, nested no deeper than so far, before anything is made of them."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes, self._depth = 0, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Count a value and what it stands in."""
        self._nodes += 1
        self._depth += 1
        if self._nodes > MAX_NODES or self._depth > MAX_DEPTH:
            what = (
                f"holds more than {MAX_NODES} values"
                if self._nodes > MAX_NODES
                else f"is nested deeper than {MAX_DEPTH}"
            )
            raise yaml.MarkedYAMLError(problem=what, problem_mark=self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class MarkedDocument:
    """A YAML document as plain values, and where every one of them stands."""

    def __init__(self, text: str, file: str) -> None:
        self._marks: dict[tuple[Any, ...], Where] = {}
        self._left, self._file = MAX_NODES, file
        try:
            loader = _BoundedLoader(text)
            node = loader.get_single_node()
            self.value = self._build(node, (), loader) if node is not None else {}
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            raise InvalidRows((RowError(file, *where, "YAML", str(error.problem or error.context)),)) from error
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            reason = "is nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
            raise InvalidRows((RowError(file, 1, 1, "YAML", reason),)) from error

    def _build(self, node: yaml.Node, path: tuple[Any, ...], loader: yaml.SafeLoader) -> Any:
        where = node.start_mark.line + 1, node.start_mark.column + 1
        self._marks[path] = where
        self._left -= 1
        if self._left < 0 or len(path) > MAX_DEPTH:
            reason = f"holds more than {MAX_NODES} values" if self._left < 0 else f"is nested deeper than {MAX_DEPTH}"
            raise InvalidRows((RowError(self._file, *where, "YAML", reason),))
        if isinstance(node, yaml.MappingNode):
            found: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                key = loader.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
                if not isinstance(key, str | int | float) or key in found:
                    line, column = key_node.start_mark.line + 1, key_node.start_mark.column + 1
                    is_twice = key is not None and key in found
                    reason = f"{short(key)} stands twice" if is_twice else "a field's name should be a text"
                    raise InvalidRows((RowError(self._file, line, column, "YAML", reason),))
                found[key] = self._build(value_node, (*path, key), loader)
            return found
        if isinstance(node, yaml.SequenceNode):
            return [self._build(item, (*path, number), loader) for number, item in enumerate(node.value)]
        try:
            value = loader.construct_object(node)
        except (ValueError, OverflowError) as error:
            raise InvalidRows((RowError(self._file, *where, "YAML", f"cannot be read: {error}"),)) from error
        return value if isinstance(value, str | int | float | bool) or value is None else str(node.value)

    def at(self, *path: Any) -> Where:
        """Return where a value stands."""
        return self._marks.get(path, (1, 1))

    def near(self, name: str) -> Where:
        """Return where the field that an error names stands, or its section."""
        first, _, _ = name.partition(".")
        section = {"axes": "matrix", "zipped": "zip"}.get(first, first)
        for path in (("defaults", first), (section,), ("matrix",), ("defaults",)):
            if path in self._marks:
                return self._marks[path]
        return 1, 1
