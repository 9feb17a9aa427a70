"""Conversations from Python source: the prompt is the head of a function or class, the response its docstring.

Fine-tuning data that every machine has, without a download. Only the first paragraph of a docstring is used: it
summarizes the object and fits a short window.
"""

import ast
import warnings
from collections.abc import Iterator

_Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def docstrings(source: str | bytes) -> Iterator[tuple[str, str]]:
    """(head, first paragraph of the docstring) of each documented function, method and class, in the order of the text.

    Heads are written as `ast.unparse` writes them, without decorators. Raises SyntaxError for text that is not Python.
    """
    with warnings.catch_warnings(action="ignore"):  # such as "\d" in a plain string
        tree = ast.parse(source)
    nodes = [node for node in ast.walk(tree) if isinstance(node, _Documented)]
    for node in sorted(nodes, key=lambda node: node.lineno):
        text = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
        if text:
            node.decorator_list, node.body = [], [ast.Pass()]
            yield ast.unparse(node).removesuffix("pass").rstrip(), text
